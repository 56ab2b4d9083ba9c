package edge_test

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/mysocketio/mysocket-injector/internal/edge"
	"github.com/mysocketio/mysocket-injector/internal/edge/edgetest"
)

// newTLSApp is an app that speaks HTTPS only, with a certificate that nobody knows, and says what it was asked for.
func newTLSApp(t testing.TB) string {
	t.Helper()
	app := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") == "echo" {
			conn, buf, err := http.NewResponseController(w).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			defer func() { _ = conn.Close() }()
			_, _ = buf.WriteString("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
			_ = buf.Flush()
			line, _ := buf.ReadString('\n')
			_, _ = buf.WriteString("echo " + line)
			_ = buf.Flush()
			return
		}
		body, _ := io.ReadAll(r.Body)
		_, _ = fmt.Fprintf(w, "%s sni=%s host=%s body=%s", r.Proto, r.TLS.ServerName, r.Host, body)
	}))
	app.StartTLS()
	t.Cleanup(app.Close)
	return app.Listener.Addr().String()
}

func TestUpstreamHTTPS(t *testing.T) {
	e := edgetest.Start(t, func(c *edge.Config) { c.Timings.Hold = 50 * time.Millisecond })
	a := login(t, e)
	var s socket
	var answer map[string]any
	a.must("POST", "/socket", map[string]any{"name": "s", "upstream_type": "https"}, &s)
	a.must("GET", "/socket/"+s.ID, nil, &answer)
	if answer["upstream_type"] != "https" {
		t.Errorf("the upstream type came back as %v", answer["upstream_type"])
	}
	a.connect(s, newTLSApp(t))
	visitor := e.VisitorClient(t)
	ask := func(scheme, want string) {
		t.Helper()
		if status, body := get(t, visitor, scheme+"://"+s.DNSName+"/"); status != 200 || body != want {
			t.Errorf("GET over %s: %d %q, want %q", scheme, status, body, want)
		}
	}
	want := fmt.Sprintf("HTTP/1.1 sni=%[1]s host=%[1]s body=", s.DNSName)
	ask("http", want)
	ask("https", want)
	resp, err := visitor.Post("https://"+s.DNSName+"/", "text/plain", strings.NewReader("hello"))
	if err != nil {
		t.Fatal(err)
	}
	body, _ := io.ReadAll(resp.Body)
	_ = resp.Body.Close()
	if string(body) != want+"hello" {
		t.Errorf("POST: %q", body)
	}

	// An upgraded connection, in which both sides have the last word.
	conn, err := net.Dial("tcp", e.HTTPAddress)
	if err != nil {
		t.Fatal(err)
	}
	_ = conn.SetDeadline(time.Now().Add(patience))
	_, _ = fmt.Fprintf(conn, "GET /ws HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n", s.DNSName)
	reader := bufio.NewReader(conn)
	if resp, err := http.ReadResponse(reader, nil); err != nil || resp.StatusCode != 101 {
		t.Fatalf("upgrade: %v, %v", resp, err)
	}
	_, _ = io.WriteString(conn, "hello\n")
	if line, err := reader.ReadString('\n'); err != nil || line != "echo hello\n" {
		t.Errorf("upgraded: %q, %v", line, err)
	}
	_ = conn.Close()
	eventually(t, "the upgraded connection to end", func() bool { return openOf(e, s) == 0 })

	// Another name is another TLS connection, though one for the old name is idle.
	a.must("PUT", "/socket/"+s.ID, map[string]any{"upstream_http_hostname": "shop.example.com:8443"}, nil)
	ask("https", "HTTP/1.1 sni=shop.example.com host=shop.example.com:8443 body=")
	// And plain HTTP to an app that wants TLS is the app's own complaint.
	a.must("PUT", "/socket/"+s.ID, map[string]any{"upstream_type": "http"}, nil)
	if status, body := get(t, visitor, "https://"+s.DNSName+"/"); status != 400 || !strings.Contains(body, "HTTP request to an HTTPS server") {
		t.Errorf("plain HTTP: %d %q", status, body)
	}
}

func TestUpstreamIsNotHTTPS(t *testing.T) {
	e := edgetest.Start(t, func(c *edge.Config) {
		c.Timings.Hold = 50 * time.Millisecond
		c.Timings.OpenTimeout = 200 * time.Millisecond
	})
	a := login(t, e)
	visitor := e.VisitorClient(t)
	silent := newTCPApp(t, func(conn net.Conn) { _, _ = io.Copy(io.Discard, conn) }) // It reads, and says nothing.
	for what, c := range map[string]struct {
		app    string
		status int
	}{"plain HTTP": {appAddress(newApp(t, "plain")), 502}, "silence": {silent, 504}} {
		var s socket
		a.must("POST", "/socket", map[string]any{"name": what, "upstream_type": "https"}, &s)
		a.connect(s, c.app)
		failed := metric(t, e, `mysocket_edge_channel_open_failures_total{reason="tls"}`)
		for _, method := range []string{"GET", "POST"} {
			req, err := http.NewRequestWithContext(t.Context(), method, "https://"+s.DNSName+"/", nil)
			if err != nil {
				t.Fatal(err)
			}
			resp, err := visitor.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			_ = resp.Body.Close()
			if resp.StatusCode != c.status || resp.Header.Get("Retry-After") == "" {
				t.Errorf("%s, %s: %d %v, want %d", what, method, resp.StatusCode, resp.Header, c.status)
			}
		}
		if now := metric(t, e, `mysocket_edge_channel_open_failures_total{reason="tls"}`); now < failed+2 {
			t.Errorf("%s: %g failures are counted, want 2 or more", what, now-failed)
		}
	}
}

// A dead way is not the end while there is another: nothing of the request was sent.
func TestUpstreamHTTPSIsTriedElsewhere(t *testing.T) {
	e := edgetest.Start(t)
	a := login(t, e)
	var s socket
	a.must("POST", "/socket", map[string]any{"name": "s", "upstream_type": "https"}, &s)
	a.connect(s, appAddress(newApp(t, "plain")))
	a.connect(s, newTLSApp(t))
	client := &http.Client{Timeout: patience, Transport: &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: e.CAPool(), MinVersion: tls.VersionTLS12}, DisableKeepAlives: true,
		DialContext: e.VisitorClient(t).Transport.(*http.Transport).DialContext,
	}}
	for i := range 6 {
		resp, err := client.Post("http://"+s.DNSName+"/", "text/plain", strings.NewReader(fmt.Sprint("body ", i)))
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if resp.StatusCode != 200 || !strings.HasSuffix(string(body), fmt.Sprint("body=body ", i)) {
			t.Errorf("got %d %q", resp.StatusCode, body)
		}
	}
}
