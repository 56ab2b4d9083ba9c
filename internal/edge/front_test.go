package edge_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/mysocketio/mysocket-injector/internal/edge"
	"github.com/mysocketio/mysocket-injector/internal/edge/edgetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestSequentialRequestsAreSpreadEvenly(t *testing.T) {
	e := edgetest.Start(t)
	a := login(t, e)
	s := a.newSocket("http")
	for i := range 3 {
		a.connect(s, appAddress(newApp(t, fmt.Sprint("pod-", i))))
	}
	visitor := e.VisitorClient(t)
	for _, scheme := range []string{"http", "https"} {
		counts := map[string]int{}
		for range 60 {
			status, body := get(t, visitor, scheme+"://"+s.DNSName+"/")
			if status != 200 {
				t.Fatalf("status %d: %s", status, body)
			}
			counts[strings.TrimSpace(body)]++
		}
		for i := range 3 {
			if n := counts[fmt.Sprint("Server: pod-", i)]; n != 20 {
				t.Errorf("%s: the requests went %v, want 20 each", scheme, counts)
			}
		}
	}
}

func TestLeastOutstanding(t *testing.T) {
	e := edgetest.Start(t)
	a := login(t, e)
	s := a.newSocket("http")
	release := make(chan struct{})
	var busy atomic.Int64
	slow := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/wait" {
			busy.Add(1)
			<-release
		}
		_, _ = io.WriteString(w, "slow")
	}))
	t.Cleanup(slow.Close)
	a.connect(s, appAddress(slow))
	visitor := e.VisitorClient(t)
	var waiting sync.WaitGroup
	for range 5 {
		waiting.Go(func() { _, _, _ = tryGet(t.Context(), visitor, "http://"+s.DNSName+"/wait") })
	}
	eventually(t, "five requests at the slow app", func() bool { return busy.Load() == 5 })
	a.connect(s, appAddress(newApp(t, "fast")))
	for range 5 {
		if _, body := get(t, visitor, "http://"+s.DNSName+"/"); body != "Server: fast\n" {
			t.Errorf("a request went to %q while that one had five outstanding", body)
		}
	}
	close(release)
	waiting.Wait()
}

func TestRefusedChannelIsTriedElsewhere(t *testing.T) {
	e := edgetest.Start(t)
	a := login(t, e)
	s := a.newSocket("http")
	bad := a.connect(s, appAddress(newApp(t, "bad")))
	bad.refuse.Store(true)
	a.connect(s, appAddress(newApp(t, "good")))
	visitor := e.VisitorClient(t)
	for i := range 20 {
		resp, err := visitor.Post("http://"+s.DNSName+"/echo", "text/plain", strings.NewReader(fmt.Sprint("body ", i)))
		if err != nil {
			t.Fatal(err)
		}
		var echo struct{ Body string }
		err = json.NewDecoder(resp.Body).Decode(&echo)
		_ = resp.Body.Close()
		if resp.StatusCode != 200 || err != nil || echo.Body != fmt.Sprint("body ", i) {
			t.Fatalf("status %d, body %q, err %v", resp.StatusCode, echo.Body, err)
		}
	}
	if n := bad.opened.Load(); n == 0 || n > 10 {
		t.Errorf("the refusing tunnel was tried %d times of 20; it should be tried, and then be the last choice for a while", n)
	}
}

func TestAllTunnelsRefuse(t *testing.T) {
	e := edgetest.Start(t, func(c *edge.Config) { c.Timings.Hold = 200 * time.Millisecond })
	a := login(t, e)
	s := a.newSocket("http")
	a.connect(s, appAddress(newApp(t, "bad"))).refuse.Store(true)
	resp, err := e.VisitorClient(t).Get("http://" + s.DNSName + "/")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	body, _ := io.ReadAll(resp.Body)
	if resp.StatusCode != 502 || resp.Header.Get("Retry-After") != "1" || resp.Header.Get("X-Request-Id") == "" ||
		!strings.Contains(string(body), resp.Header.Get("X-Request-Id")) {
		t.Errorf("got %d %v %s", resp.StatusCode, resp.Header, body)
	}
}

func TestUnansweredChannelIsTriedElsewhere(t *testing.T) {
	e := edgetest.Start(t, func(c *edge.Config) { c.Timings.OpenTimeout = 200 * time.Millisecond })
	a := login(t, e)
	s := a.newSocket("http")
	hung := a.connect(s, appAddress(newApp(t, "hung")))
	hung.silent.Store(true)
	a.connect(s, appAddress(newApp(t, "good")))
	visitor := e.VisitorClient(t)
	for range 6 {
		if status, body := get(t, visitor, "http://"+s.DNSName+"/"); status != 200 || body != "Server: good\n" {
			t.Fatalf("got %d %s", status, body)
		}
	}
	if hung.opened.Load() == 0 {
		t.Error("the hung tunnel was never tried")
	}
}

func TestRequestIsHeldForATunnel(t *testing.T) {
	e := edgetest.Start(t, func(c *edge.Config) { c.Timings.Hold = patience })
	a := login(t, e)
	s := a.newSocket("http")
	got := make(chan string, 1)
	visitor := e.VisitorClient(t)
	go func() {
		status, body, err := tryGet(context.Background(), visitor, "http://"+s.DNSName+"/")
		got <- fmt.Sprint(status, " ", body, err)
	}()
	eventually(t, "the request to be held", func() bool { return metric(t, e, "mysocket_edge_held_total") == 1 })
	a.connect(s, appAddress(newApp(t, "late")))
	if answer := <-got; answer != "200 Server: late\n<nil>" {
		t.Error(answer)
	}
}

func TestNoTunnelAndNoSocket(t *testing.T) {
	e := edgetest.Start(t, func(c *edge.Config) { c.Timings.Hold = 50 * time.Millisecond })
	a := login(t, e)
	s := a.newSocket("http")
	visitor := e.VisitorClient(t)
	for _, c := range []struct {
		host   string
		status int
	}{
		{s.DNSName, 502},
		{strings.ToUpper(s.DNSName), 502},
		{s.DNSName + ".", 502},
		{s.DNSName + ":8080", 502},
		{"no-such-name-0000." + e.Domain, 404},
		{e.Domain, 404},
	} {
		req, err := http.NewRequestWithContext(t.Context(), "GET", "http://x/", nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Host = c.host
		resp, err := visitor.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		if resp.StatusCode != c.status {
			t.Errorf("%s: %d, want %d", c.host, resp.StatusCode, c.status)
		}
	}
}

// metric reads one number without labels from /metrics.
func metric(t testing.TB, e *edgetest.Edge, name string) float64 {
	t.Helper()
	client := e.VisitorClient(t)
	client = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: client.Timeout}
	_, body := get(t, client, e.AdminURL+"/metrics")
	for line := range strings.Lines(body) {
		var v float64
		if n, _ := fmt.Sscanf(line, name+" %g", &v); n == 1 {
			return v
		}
	}
	t.Fatalf("there is no metric %s", name)
	return 0
}

func TestForwardedHeadersAreTheEdges(t *testing.T) {
	e := edgetest.Start(t)
	a := login(t, e)
	s := a.newSocket("http")
	r := a.connect(s, appAddress(newApp(t, "app")))
	visitor := e.VisitorClient(t)
	for _, scheme := range []string{"http", "https"} {
		req, err := http.NewRequestWithContext(t.Context(), "PUT", scheme+"://"+s.DNSName+"/echo?a=1;b=%zz&c", strings.NewReader("hello"))
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Real-Ip", "Forwarded", "X-Auth-Email", "X-Forwarded-Port",
			"X_forwarded_for", "x_real_ip", "Http2-Settings"} {
			req.Header[name] = []string{"forged"}
		}
		resp, err := visitor.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		var echo struct {
			Method, URI, Host, Body string
			Header                  http.Header
		}
		err = json.NewDecoder(resp.Body).Decode(&echo)
		_ = resp.Body.Close()
		if err != nil {
			t.Fatal(err)
		}
		if echo.Method != "PUT" || echo.URI != "/echo?a=1;b=%zz&c" || echo.Host != s.DNSName || echo.Body != "hello" {
			t.Errorf("%s: the app got %+v", scheme, echo)
		}
		want := map[string]string{
			"X-Forwarded-For": "127.0.0.1", "X-Real-Ip": "127.0.0.1", "X-Forwarded-Proto": scheme, "X-Forwarded-Host": s.DNSName,
			"Forwarded": "", "X-Auth-Email": "", "X-Forwarded-Port": "",
		}
		for name, value := range want {
			if got := echo.Header.Get(name); got != value {
				t.Errorf("%s: %s is %q, want %q", scheme, name, got, value)
			}
		}
		for name, values := range echo.Header {
			if slices.Contains(values, "forged") {
				t.Errorf("%s: the app got the visitor's %s", scheme, name)
			}
		}
		if echo.Header.Get("X-Request-Id") == "" {
			t.Error("no request id reached the app")
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.lastOpen.OriginHost != "127.0.0.1" || r.lastOpen.OriginPort == 0 || r.lastOpen.Host != "localhost" || r.lastOpen.Port != r.port {
		t.Errorf("forwarded-tcpip said %+v", r.lastOpen)
	}
}

func TestProtectedSocket(t *testing.T) {
	e := edgetest.Start(t)
	a := login(t, e)
	var s socket
	a.must("POST", "/socket", map[string]any{"name": "p", "protected_socket": true, "protected_username": "me", "protected_password": "s3cret"}, &s)
	a.connect(s, appAddress(newApp(t, "app")))
	visitor := e.VisitorClient(t)
	for _, c := range []struct {
		user, password string
		status         int
	}{{"me", "s3cret", 200}, {"me", "wrong", 401}, {"you", "s3cret", 401}, {"", "", 401}} {
		req, err := http.NewRequestWithContext(t.Context(), "GET", "http://"+s.DNSName+"/echo", nil)
		if err != nil {
			t.Fatal(err)
		}
		if c.user != "" {
			req.SetBasicAuth(c.user, c.password)
		}
		resp, err := visitor.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if resp.StatusCode != c.status || (c.status == 401) != (resp.Header.Get("WWW-Authenticate") != "") {
			t.Errorf("%+v: %d %v", c, resp.StatusCode, resp.Header)
		}
		if strings.Contains(string(body), "Authorization") {
			t.Error("the edge's password reached the app")
		}
	}
}

func TestWebSocketUpgrade(t *testing.T) {
	e := edgetest.Start(t)
	a := login(t, e)
	s := a.newSocket("http")
	app := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") != "echo" {
			http.Error(w, "no upgrade", http.StatusBadRequest)
			return
		}
		conn, buf, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer func() { _ = conn.Close() }()
		_, _ = buf.WriteString("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
		_ = buf.Flush()
		for {
			line, err := buf.ReadString('\n')
			if err != nil {
				return
			}
			_, _ = buf.WriteString("echo " + line)
			_ = buf.Flush()
		}
	}))
	t.Cleanup(app.Close)
	a.connect(s, appAddress(app))
	conn, err := net.Dial("tcp", e.HTTPAddress)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	_ = conn.SetDeadline(time.Now().Add(patience))
	_, _ = fmt.Fprintf(conn, "GET /ws HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n", s.DNSName)
	reader := bufio.NewReader(conn)
	resp, err := http.ReadResponse(reader, nil)
	if err != nil || resp.StatusCode != 101 {
		t.Fatalf("got %v, %v", resp, err)
	}
	for i := range 3 {
		_, _ = fmt.Fprintf(conn, "message %d\n", i)
		if line, err := reader.ReadString('\n'); err != nil || line != fmt.Sprintf("echo message %d\n", i) {
			t.Fatalf("got %q, %v", line, err)
		}
	}
	if open := e.Tunnels()[0].Tunnels[0].Open; open != 1 {
		t.Errorf("%d requests are outstanding while the upgraded connection lives, want 1", open)
	}
	_ = conn.Close()
	eventually(t, "the upgraded connection to end", func() bool { return e.Tunnels()[0].Tunnels[0].Open == 0 })
}

// An app that looks for "websocket" anywhere in the list, as many do, switches though the visitor asked for something else.
func TestSwitchToAnotherProtocolLeavesNothingOpen(t *testing.T) {
	e := edgetest.Start(t)
	a := login(t, e)
	s := a.newSocket("http")
	ended := make(chan struct{}, 1)
	app := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		conn, buf, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer func() { _ = conn.Close(); ended <- struct{}{} }()
		_, _ = buf.WriteString("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
		_ = buf.Flush()
		_, _ = io.Copy(io.Discard, buf)
	}))
	t.Cleanup(app.Close)
	r := a.connect(s, appAddress(app))
	for i, headers := range []string{"Connection: Upgrade\r\nUpgrade: foo, websocket\r\n", ""} {
		conn, err := net.Dial("tcp", e.HTTPAddress)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = conn.Close() }()
		_ = conn.SetDeadline(time.Now().Add(patience))
		_, _ = fmt.Fprintf(conn, "GET /ws HTTP/1.1\r\nHost: %s\r\n%s\r\n", s.DNSName, headers)
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil || resp.StatusCode != 502 {
			t.Fatalf("%q: got %v, %v", headers, resp, err)
		}
		_ = resp.Body.Close()
		select {
		case <-ended:
		case <-time.After(patience):
			t.Fatalf("%q: the app's connection stays open", headers)
		}
		if n := r.opened.Load(); n != int64(i+1) {
			t.Errorf("%q: %d channels were opened, want %d", headers, n, i+1)
		}
	}
}

func TestWhatIsNotProxied(t *testing.T) {
	e := edgetest.Start(t)
	a := login(t, e)
	s := a.newSocket("http")
	a.connect(s, appAddress(newApp(t, "app")))
	for _, c := range []struct{ request, answer, hasNot string }{
		{"GET /echo HTTP/1.1\r\nHost: HOST\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n", "200 OK", "h2c"},
		{"CONNECT example.com:443 HTTP/1.1\r\nHost: HOST\r\n\r\n", "405 ", "Server:"},
		{"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", "400 ", "Server:"},
		{"GET / HTTP/1.1\r\nHost: HOST\r\nX: " + strings.Repeat("x", 300<<10) + "\r\n\r\n", "431 ", "Server:"},
	} {
		conn, err := net.Dial("tcp", e.HTTPAddress)
		if err != nil {
			t.Fatal(err)
		}
		_ = conn.SetDeadline(time.Now().Add(patience))
		_, _ = io.WriteString(conn, strings.ReplaceAll(c.request, "HOST", s.DNSName))
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Errorf("%.40q: %v", c.request, err)
			_ = conn.Close()
			continue
		}
		body := make([]byte, 4096)
		n, _ := resp.Body.Read(body)
		if !strings.HasPrefix(resp.Status, c.answer) || strings.Contains(string(body[:n]), c.hasNot) {
			t.Errorf("%.40q: %s %s", c.request, resp.Status, body[:n])
		}
		_ = conn.Close()
	}
}

func TestStreamIsFlushedAtOnce(t *testing.T) {
	e := edgetest.Start(t)
	a := login(t, e)
	s := a.newSocket("http")
	next := make(chan struct{})
	a.connect(s, appAddress(newEventsApp(t, next)))
	for _, scheme := range []string{"http", "https"} {
		resp, err := e.VisitorClient(t).Get(scheme + "://" + s.DNSName + "/")
		if err != nil {
			t.Fatal(err)
		}
		if scheme == "https" && resp.ProtoMajor != 2 {
			t.Errorf("the HTTPS front spoke %s, want HTTP/2", resp.Proto)
		}
		reader := bufio.NewReader(resp.Body)
		for i := range 3 {
			// Each event must be here before the app may send the next.
			line, err := reader.ReadString('\n')
			if err != nil || line != fmt.Sprintf("data: %d\n", i) {
				t.Fatalf("got %q, %v", line, err)
			}
			_, _ = reader.ReadString('\n')
			next <- struct{}{}
		}
		_ = resp.Body.Close()
	}
}

func TestTCPSocketHalfClose(t *testing.T) {
	e := edgetest.Start(t)
	a := login(t, e)
	s := a.newSocket("tcp")
	if len(s.Ports) != 1 || s.Ports[0] < 20000 || s.Ports[0] > 29999 {
		t.Fatalf("ports %v", s.Ports)
	}
	app := newSumApp(t) // Only the visitor's half-close makes it answer.
	a.connect(s, app)
	bad := a.connect(s, app)
	bad.refuse.Store(true)
	for range 4 {
		conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", s.Ports[0]))
		if err != nil {
			t.Fatal(err)
		}
		_ = conn.SetDeadline(time.Now().Add(patience))
		if _, err := conn.Write(make([]byte, 3<<20)); err != nil {
			t.Fatal(err)
		}
		_ = conn.(*net.TCPConn).CloseWrite()
		answer, err := io.ReadAll(conn)
		_ = conn.Close()
		if err != nil || string(answer) != "got 3145728 bytes" {
			t.Fatalf("got %q, %v", answer, err)
		}
	}
	a.must("DELETE", "/socket/"+s.ID, nil, nil)
	if conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", s.Ports[0])); err == nil {
		_ = conn.Close()
		t.Error("the port of a deleted socket still listens")
	}
}
