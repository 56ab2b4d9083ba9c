package edge_test

import (
	"bufio"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/pires/go-proxyproto"

	"github.com/mysocketio/mysocket-injector/internal/edge"
	"github.com/mysocketio/mysocket-injector/internal/edge/edgetest"
)

// behindProxy starts an edge that takes PROXY headers from 127.0.0.2 on all its fronts.
func behindProxy(t *testing.T, options ...edgetest.Option) *edgetest.Edge {
	t.Helper()
	return edgetest.Start(t, append([]edgetest.Option{func(c *edge.Config) {
		c.Visitors.TrustedProxies = []netip.Prefix{netip.MustParsePrefix("127.0.0.2/32")}
		c.Visitors.ProxyProtocol = []string{"http", "https", "tcp"}
	}}, options...)...)
}

// dialFrom connects from an address of this machine.
func dialFrom(t *testing.T, from, to string) net.Conn {
	t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}, Timeout: patience}
	conn, err := d.DialContext(t.Context(), "tcp", to)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(patience))
	return conn
}

func header(t *testing.T, version byte) string {
	t.Helper()
	h := proxyproto.HeaderProxyFromAddrs(version, &net.TCPAddr{IP: net.ParseIP("192.0.2.7"), Port: 4711}, &net.TCPAddr{IP: net.ParseIP("192.0.2.1"), Port: 443})
	data, err := h.Format()
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// local is the header of a proxy's own check.
const local = "\r\n\r\n\x00\r\nQUIT\n\x20\x00\x00\x00"

func TestProxyProtocolHTTP(t *testing.T) {
	e := behindProxy(t)
	a := login(t, e)
	s := a.newSocket("http")
	r := a.connect(s, appAddress(newApp(t, "app")))
	for _, c := range []struct {
		what, from, header, visitor, forwarded string
	}{
		{"version 1", "127.0.0.2", header(t, 1), "192.0.2.7", "192.0.2.7"},
		{"version 2", "127.0.0.2", header(t, 2), "192.0.2.7", "192.0.2.7"},
		// The proxy speaks for itself; and then, being trusted, its X-Forwarded-For counts.
		{"unknown", "127.0.0.2", "PROXY UNKNOWN\r\n", "1.1.1.1", "1.1.1.1, 127.0.0.2"},
		{"local", "127.0.0.2", local, "1.1.1.1", "1.1.1.1, 127.0.0.2"},
		{"somebody else", "127.0.0.1", "", "127.0.0.1", "127.0.0.1"},
	} {
		for _, front := range []string{"http", "https"} {
			address := e.HTTPAddress
			if front == "https" {
				address = e.HTTPSAddress
			}
			conn := dialFrom(t, c.from, address)
			_, _ = io.WriteString(conn, c.header)
			if front == "https" {
				secure := tls.Client(conn, &tls.Config{ServerName: s.DNSName, RootCAs: e.CAPool(), MinVersion: tls.VersionTLS12})
				if err := secure.HandshakeContext(t.Context()); err != nil {
					t.Errorf("%s, %s: %v", c.what, front, err)
					continue
				}
				conn = secure
			}
			_, _ = fmt.Fprintf(conn, "GET /echo HTTP/1.1\r\nHost: %s\r\nX-Forwarded-For: 1.1.1.1\r\nConnection: close\r\n\r\n", s.DNSName)
			resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil {
				t.Errorf("%s, %s: %v", c.what, front, err)
				continue
			}
			var echo struct{ Header http.Header }
			err = json.NewDecoder(resp.Body).Decode(&echo)
			_ = resp.Body.Close()
			if got := echo.Header.Get("X-Real-Ip"); err != nil || got != c.visitor {
				t.Errorf("%s, %s: X-Real-Ip is %q, want %q, %v", c.what, front, got, c.visitor, err)
			}
			if got := echo.Header.Get("X-Forwarded-For"); got != c.forwarded {
				t.Errorf("%s, %s: X-Forwarded-For is %q, want %q", c.what, front, got, c.forwarded)
			}
		}
	}
	// On a new channel the client is told of the visitor with his port.
	conn := dialFrom(t, "127.0.0.2", e.HTTPAddress)
	_, _ = fmt.Fprintf(conn, "%sPOST /echo HTTP/1.1\r\nHost: %s\r\nContent-Length: 0\r\n\r\n", header(t, 2), s.DNSName)
	if resp, err := http.ReadResponse(bufio.NewReader(conn), nil); err != nil || resp.StatusCode != 200 {
		t.Fatalf("POST: %v, %v", resp, err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.lastOpen.OriginHost != "192.0.2.7" || r.lastOpen.OriginPort != 4711 {
		t.Errorf("forwarded-tcpip said %+v", r.lastOpen)
	}
}

func TestProxyProtocolTCP(t *testing.T) {
	e := behindProxy(t)
	a := login(t, e)
	for _, kind := range []string{"tcp", "tls"} {
		s := a.newSocket(kind)
		r := a.connect(s, newSumApp(t))
		for _, c := range []struct{ from, header, origin string }{
			{"127.0.0.2", header(t, 1), "192.0.2.7"}, {"127.0.0.2", header(t, 2), "192.0.2.7"},
			{"127.0.0.2", local, "127.0.0.2"}, {"127.0.0.1", "", "127.0.0.1"},
		} {
			conn := dialFrom(t, c.from, publicAddress(s))
			_, _ = io.WriteString(conn, c.header)
			if kind == "tls" {
				conn = tls.Client(conn, &tls.Config{ServerName: s.DNSName, RootCAs: e.CAPool(), MinVersion: tls.VersionTLS12})
			}
			if _, err := io.WriteString(conn, "hello"); err != nil {
				t.Errorf("%s, %+v: %v", kind, c, err)
			}
			// The end of each direction passes on its own.
			_ = conn.(interface{ CloseWrite() error }).CloseWrite()
			if answer, err := io.ReadAll(conn); err != nil || string(answer) != "got 5 bytes" {
				t.Errorf("%s, %+v: %q, %v", kind, c, answer, err)
			}
			r.mu.Lock()
			if r.lastOpen.OriginHost != c.origin || r.lastOpen.OriginPort == 0 {
				t.Errorf("%s, %+v: forwarded-tcpip said %+v", kind, c, r.lastOpen)
			}
			r.mu.Unlock()
		}
	}
}

// A trusted proxy that sends no header, or none that is good, is refused before anything reaches an app, and in time.
func TestProxyProtocolRefused(t *testing.T) {
	log := &lockedBuffer{}
	e := behindProxy(t, func(c *edge.Config) { c.Timings.VisitorHandshake = 300 * time.Millisecond }, logTo(log))
	a := login(t, e)
	web, port := a.newSocket("http"), a.newSocket("tcp")
	apps := []*replica{a.connect(web, appAddress(newApp(t, "app"))), a.connect(port, newSumApp(t))}
	before := apps[0].opened.Load() + apps[1].opened.Load()
	request := fmt.Sprintf("GET / HTTP/1.1\r\nHost: %s\r\n\r\n", web.DNSName)
	refused := 0
	for _, says := range []string{
		"", "PROXY TCP4 ", request, "PROXY TCP4 192.0.2.7 192.0.2.1 0 443\r\n" + request, "PROXY TCP4 nobody 192.0.2.1 1 443\r\n" + request,
		"PROXY TCP4 " + strings.Repeat("1", 200) + "\r\n" + request,
		"\r\n\r\n\x00\r\nQUIT\n\x21\x11\xff\xff" + strings.Repeat("x", 5000),                               // too long
		"\r\n\r\n\x00\r\nQUIT\n\x21\x12\x00\x0c\xc0\x00\x02\x07\xc0\x00\x02\x01\x12\x67\x01\xbb" + request, // UDP
		"\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c\xc0\x00\x02\x07\xc0\x00\x02\x01\x00\x00\x01\xbb" + request, // port 0
	} {
		for _, to := range []string{e.HTTPAddress, publicAddress(port)} {
			conn := dialFrom(t, "127.0.0.2", to)
			_, _ = io.WriteString(conn, says)
			answer, err := io.ReadAll(conn)
			var timeout net.Error
			if errors.As(err, &timeout) && timeout.Timeout() {
				t.Errorf("%.40q: still open", says)
			}
			if strings.Contains(string(answer), "200 OK") {
				t.Errorf("%.40q: answered with %q", says, answer)
			}
			refused++
		}
	}
	if n := apps[0].opened.Load() + apps[1].opened.Load() - before; n != 0 {
		t.Errorf("%d connections reached an app", n)
	}
	if n := metric(t, e, "mysocket_edge_proxy_headers_refused_total"); n != float64(refused) {
		t.Errorf("%g refusals are counted, want %d", n, refused)
	}
	if !strings.Contains(log.String(), `msg="connection refused"`) || !strings.Contains(log.String(), "PROXY") && !strings.Contains(log.String(), "proxy protocol") {
		t.Errorf("the log does not say why: %s", log)
	}
}
