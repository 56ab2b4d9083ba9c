package edge_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/mysocketio/mysocket-injector/internal/edge"
	"github.com/mysocketio/mysocket-injector/internal/edge/edgetest"
)

// newSumApp answers, once the visitor has ended, how many bytes it got.
func newSumApp(t testing.TB) string {
	t.Helper()
	return newTCPApp(t, func(conn net.Conn) {
		if n, err := io.Copy(io.Discard, conn); err == nil {
			_, _ = fmt.Fprintf(conn, "got %d bytes", n)
		}
	})
}

func publicAddress(s socket) string { return fmt.Sprintf("127.0.0.1:%d", s.Ports[0]) }

func TestTLSSocket(t *testing.T) {
	log := &lockedBuffer{}
	e := edgetest.Start(t, logTo(log))
	a := login(t, e)
	b := loginWithToken(t, e)
	var border0 socket
	b.must("POST", v1+"/socket", map[string]any{"name": "other", "socket_type": "tls"}, &border0)
	if border0.Type != "tls" || len(border0.Ports) != 1 {
		t.Errorf("the other dialect made %+v", border0)
	}
	s := a.newSocket("tls")
	if s.Type != "tls" || len(s.Ports) != 1 || s.Ports[0] < 20000 || s.Ports[0] > 29999 {
		t.Fatalf("made %+v", s)
	}
	r := a.connect(s, newSumApp(t))

	dial := func(name string, config *tls.Config) (*tls.Conn, error) {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		config.ServerName, config.RootCAs = name, e.CAPool()
		conn, err := (&tls.Dialer{Config: config}).DialContext(ctx, "tcp", publicAddress(s))
		if err != nil {
			return nil, err
		}
		_ = conn.SetDeadline(time.Now().Add(patience))
		return conn.(*tls.Conn), nil
	}
	for _, c := range []struct {
		what   string
		name   string
		config *tls.Config
	}{
		{"its name", s.DNSName, &tls.Config{}},
		{"in capitals", strings.ToUpper(s.DNSName), &tls.Config{}},
		{"TLS 1.2", s.DNSName, &tls.Config{MaxVersion: tls.VersionTLS12}},
		{"a protocol of the app's", s.DNSName, &tls.Config{NextProtos: []string{"imap"}}},
		// An IP address is not sent as SNI, nor is it in the certificate.
		{"no name", "127.0.0.1", &tls.Config{InsecureSkipVerify: true}}, // #nosec G402
	} {
		conn, err := dial(c.name, c.config)
		if err != nil {
			t.Errorf("%s: %v", c.what, err)
			continue
		}
		if _, err := conn.Write(make([]byte, 3<<20)); err != nil {
			t.Errorf("%s: %v", c.what, err)
		}
		_ = conn.CloseWrite()
		answer, err := io.ReadAll(conn)
		if err != nil || string(answer) != "got 3145728 bytes" {
			t.Errorf("%s: %q, %v", c.what, answer, err)
		}
		if err := conn.ConnectionState().PeerCertificates[0].VerifyHostname(s.DNSName); err != nil {
			t.Errorf("%s: %v", c.what, err)
		}
		_ = conn.Close()
	}
	r.mu.Lock()
	if r.lastOpen.OriginHost != "127.0.0.1" || r.lastOpen.OriginPort == 0 {
		t.Errorf("forwarded-tcpip said %+v", r.lastOpen)
	}
	r.mu.Unlock()

	opened := r.opened.Load()
	for _, name := range []string{border0.DNSName, e.Domain, "other.example"} {
		if _, err := dial(name, &tls.Config{}); err == nil || err.Error() != "remote error: tls: unrecognized name" {
			t.Errorf("%s: %v", name, err)
		}
	}
	eventually(t, "the log to say why", func() bool {
		return strings.Contains(log.String(), `the client asks for the name \"other.example\", not for the socket's`)
	})
	if _, err := dial(s.DNSName, &tls.Config{MaxVersion: tls.VersionTLS11, MinVersion: tls.VersionTLS10}); err == nil { // #nosec G402
		t.Error("TLS 1.1 was taken")
	}
	// Something else than TLS.
	conn, err := net.Dial("tcp", publicAddress(s))
	if err != nil {
		t.Fatal(err)
	}
	_ = conn.SetDeadline(time.Now().Add(patience))
	_, _ = io.WriteString(conn, "GET / HTTP/1.1\r\n\r\n")
	_, _ = io.Copy(io.Discard, conn)
	_ = conn.Close()
	if n := r.opened.Load(); n != opened {
		t.Errorf("%d refused connections reached the app", n-opened)
	}
	eventually(t, "the refused to be counted", func() bool { return metric(t, e, "mysocket_edge_tls_handshake_failures_total") == 5 })

	// A visitor who breaks off has not ended properly: the app must not take it for an end.
	secure, err := dial(s.DNSName, &tls.Config{})
	if err != nil {
		t.Fatal(err)
	}
	_, _ = secure.Write([]byte("half a mess"))
	eventually(t, "the connection at the app", func() bool { return r.opened.Load() == opened+1 })
	_ = secure.NetConn().Close()
	eventually(t, "the end of it", func() bool { return openOf(e, s) == 0 })

	a.must("DELETE", "/socket/"+s.ID, nil, nil)
	if conn, err := net.Dial("tcp", publicAddress(s)); err == nil {
		_ = conn.Close()
		t.Error("the port of a deleted socket still listens")
	}
}

// openOf counts the connections that a socket's tunnels carry.
func openOf(e *edgetest.Edge, s socket) int {
	n := 0
	for _, k := range e.Tunnels() {
		for _, tunnel := range k.Tunnels {
			if k.Socket == s.ID {
				n += tunnel.Open
			}
		}
	}
	return n
}

// A visitor who only connects must not be there for ever, nor hold the edge up when it stops.
func TestTLSSocketStopsWithVisitorsHalfway(t *testing.T) {
	e := edgetest.Start(t)
	a := login(t, e)
	s := a.newSocket("tls")
	a.connect(s, newSumApp(t))
	silent, err := net.Dial("tcp", publicAddress(s))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = silent.Close() }()
	talking, err := tls.Dial("tcp", publicAddress(s), &tls.Config{ServerName: s.DNSName, RootCAs: e.CAPool(), MinVersion: tls.VersionTLS12})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = talking.Close() }()
	_, _ = talking.Write([]byte("x"))
	eventually(t, "the connection to be carried", func() bool { return openOf(e, s) == 1 })
	start := time.Now()
	e.Stop()
	if took := time.Since(start); took > 8*time.Second {
		t.Errorf("stopping took %s", took)
	}
	// After a restart the port is the socket's again.
	e = edgetest.Start(t, edgetest.SameState(e))
	if _, _, err := shown(t, publicAddress(s), s.DNSName, e.CAPool()); err != nil {
		t.Errorf("after a restart: %v", err)
	}
}

// A visitor who connects and says nothing, or stops in the middle, is closed in time.
func TestTLSSocketsSilentVisitor(t *testing.T) {
	e := edgetest.Start(t, func(c *edge.Config) { c.Timings.VisitorHandshake = 300 * time.Millisecond })
	a := login(t, e)
	s := a.newSocket("tls")
	for _, says := range []string{"", "\x16\x03\x01\x02\x00\x01"} {
		conn, err := net.Dial("tcp", publicAddress(s))
		if err != nil {
			t.Fatal(err)
		}
		_ = conn.SetDeadline(time.Now().Add(patience))
		_, _ = io.WriteString(conn, says)
		_, err = io.Copy(io.Discard, conn)
		var timeout net.Error
		if errors.As(err, &timeout) && timeout.Timeout() {
			t.Errorf("after %q the connection stays open", says)
		}
		_ = conn.Close()
	}
}

// The welcome of a session says where the socket is.
func TestTLSSocketsURL(t *testing.T) {
	e := edgetest.Start(t)
	a := login(t, e)
	s := a.newSocket("tls")
	r := a.connect(s, newSumApp(t))
	session, err := r.client.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = session.Close() }()
	out, err := session.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := session.RequestPty("xterm", 40, 80, ssh.TerminalModes{}); err != nil {
		t.Fatal(err)
	}
	if err := session.Shell(); err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf("tls://%s:%d", s.DNSName, s.Ports[0])
	got := ""
	buf := make([]byte, 4096)
	for !strings.Contains(got, want) {
		n, err := out.Read(buf)
		if err != nil {
			t.Fatalf("the welcome is %q, want %s in it", got, want)
		}
		got += string(buf[:n])
	}
}
