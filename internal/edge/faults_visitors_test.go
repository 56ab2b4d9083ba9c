package edge_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mysocketio/mysocket-injector/internal/edge"
	"github.com/mysocketio/mysocket-injector/internal/edge/edgetest"
)

// short are time-outs that a test can wait for, and that others keep on a busy machine.
func short(c *edge.Config) {
	c.Web.Header, c.Web.Body, c.Web.Upgraded = time.Second, time.Second, 2*time.Second
}

// rawVisitor connects to the HTTP front and says something.
func rawVisitor(t *testing.T, e *edgetest.Edge, text string) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", e.HTTPAddress)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(patience))
	if _, err := io.WriteString(conn, text); err != nil {
		t.Fatal(err)
	}
	return conn
}

// drip sends a byte at each tick, for as long as the other side takes them.
func drip(conn net.Conn, stop <-chan struct{}) {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-stop:
			return
		case <-tick.C:
			if _, err := conn.Write([]byte("x")); err != nil {
				return
			}
		}
	}
}

// Slowloris: headers, or bodies, that come byte by byte. Others are served meanwhile.
func TestSlowVisitorsAreCutOff(t *testing.T) {
	var log accessLog
	e := edgetest.Start(t, short, log.option)
	a := login(t, e)
	s := a.newSocket("http")
	a.connect(s, appAddress(newApp(t, "app")))
	stop := make(chan struct{})
	var slow sync.WaitGroup
	defer slow.Wait()
	defer close(stop)
	var conns []net.Conn
	for range 50 {
		conn := rawVisitor(t, e, "GET / HTTP/1.1\r\nHost: "+s.DNSName+"\r\nX-Slow: ")
		slow.Go(func() { drip(conn, stop) })
		conns = append(conns, conn)
	}
	body := rawVisitor(t, e, "POST /slow HTTP/1.1\r\nHost: "+s.DNSName+"\r\nContent-Length: 100000\r\n\r\n")
	slow.Go(func() { drip(body, stop) })
	visitor := e.VisitorClient(t)
	for range 5 {
		if status, _ := get(t, visitor, "http://"+s.DNSName+"/"); status != 200 {
			t.Errorf("another visitor got %d", status)
		}
	}
	for _, conn := range conns {
		if answer, err := io.ReadAll(conn); errors.Is(err, os.ErrDeadlineExceeded) || strings.Contains(string(answer), "200 OK") {
			t.Fatalf("a slow header was answered with %q, %v", answer, err)
		}
	}
	resp, err := http.ReadResponse(bufio.NewReader(body), nil)
	if err != nil || resp.StatusCode != 408 {
		t.Fatalf("a slow body was answered with %v, %v", resp, err)
	}
	_ = resp.Body.Close()
	if line := log.line(t, "path=/slow"); line["status"] != 408.0 || line["err"] != "the visitor stopped sending the body of its request" {
		t.Errorf("the log says %v", line)
	}
	if n := labelled(t, e, `mysocket_edge_visitors_cut_total{reason="sending"}`); n != "1" {
		t.Errorf("%s visitors were cut off", n)
	}
	// The same over HTTP/2, of which other streams live on.
	pipe, writer := io.Pipe()
	defer func() { _ = writer.Close() }()
	req, err := http.NewRequestWithContext(t.Context(), "POST", "https://"+s.DNSName+"/slow2", pipe)
	if err != nil {
		t.Fatal(err)
	}
	resp, err = visitor.Do(req)
	if err != nil || resp.StatusCode != 408 || resp.ProtoMajor != 2 {
		t.Fatalf("a slow body over HTTP/2 was answered with %v, %v", resp, err)
	}
	_ = resp.Body.Close()
}

// Bodies that no app reads, since there is none or it answered before: the server reads what is left of them by itself.
func TestBodiesThatNobodyReadsEnd(t *testing.T) {
	e := edgetest.Start(t, short)
	a := login(t, e)
	s := a.newSocket("http")
	app := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_ = http.NewResponseController(w).EnableFullDuplex() // or the app's server waits for the body
		w.WriteHeader(http.StatusForbidden)
		_ = http.NewResponseController(w).Flush()
	}))
	t.Cleanup(app.Close)
	a.connect(s, appAddress(app))
	for name, request := range map[string]string{
		"404": "POST / HTTP/1.1\r\nHost: unknown.example\r\nContent-Length: 1000\r\n\r\nabc",
		"403": "POST / HTTP/1.1\r\nHost: " + s.DNSName + "\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
	} {
		answer, err := io.ReadAll(rawVisitor(t, e, request))
		if err != nil || !strings.HasPrefix(string(answer), "HTTP/1.1 "+name+" ") {
			t.Errorf("want %s and the end of the connection, got %q, %v", name, answer, err)
		}
	}
	// The answer itself waits behind the body, if that has a length.
	stuck := rawVisitor(t, e, "POST / HTTP/1.1\r\nHost: "+s.DNSName+"\r\nContent-Length: 1000\r\n\r\nabc")
	if _, err := io.ReadAll(stuck); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("the connection is still open")
	}
}

// Answers that don't pass through a handler's Write: those so short that the server sends them when the handler has returned, and
// informational ones.
func TestVisitorWhoTakesNoShortAnswersIsCutOff(t *testing.T) {
	e := edgetest.Start(t, short)
	a := login(t, e)
	s := a.newSocket("http")
	app := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Link", strings.Repeat("x", 60_000))
		for range 10 {
			w.WriteHeader(http.StatusEarlyHints)
		}
		w.Header().Del("Link")
		w.WriteHeader(http.StatusNoContent)
	}))
	t.Cleanup(app.Close)
	a.connect(s, appAddress(app))
	for _, host := range []string{"unknown.example", s.DNSName} {
		conn := rawVisitor(t, e, "")
		requests := []byte(strings.Repeat("GET / HTTP/1.1\r\nHost: "+host+"\r\n\r\n", 1000))
		var err error
		for err == nil {
			_ = conn.SetDeadline(time.Now().Add(patience)) // it is the last write that must not wait for ever
			_, err = conn.Write(requests)
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: the connection is still open", host)
		}
	}
	eventually(t, "the request to end", func() bool { return e.Tunnels()[0].Tunnels[0].Open == 0 })
}

// A body that takes longer than the time-out in all, but makes progress, is not cut off, nor is one that the app takes slowly.
func TestSteadyBodyIsNotCutOff(t *testing.T) {
	e := edgetest.Start(t, func(c *edge.Config) { c.Web.Body = 2 * time.Second })
	a := login(t, e)
	s := a.newSocket("http")
	app := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n, err := io.Copy(io.Discard, r.Body)
		_, _ = fmt.Fprint(w, n, err)
	}))
	t.Cleanup(app.Close)
	a.connect(s, appAddress(app))
	pipe, writer := io.Pipe()
	go func() {
		tick := time.NewTicker(50 * time.Millisecond)
		defer tick.Stop()
		for range 50 {
			<-tick.C
			_, _ = writer.Write(make([]byte, 2048))
		}
		_ = writer.Close()
	}()
	resp, err := e.VisitorClient(t).Post("http://"+s.DNSName+"/", "text/plain", pipe)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	if body, _ := io.ReadAll(resp.Body); string(body) != fmt.Sprint(50*2048, error(nil)) {
		t.Errorf("the app got %s", body)
	}
}

// endless is an app whose answer has no end.
func endless(t *testing.T) *httptest.Server {
	app := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		part := make([]byte, 64<<10)
		for {
			if _, err := w.Write(part); err != nil {
				return
			}
		}
	}))
	t.Cleanup(app.Close)
	return app
}

func TestVisitorWhoStopsReadingIsCutOff(t *testing.T) {
	var log accessLog
	e := edgetest.Start(t, short, log.option)
	a := login(t, e)
	s := a.newSocket("http")
	a.connect(s, appAddress(endless(t)))
	open := func() int { return e.Tunnels()[0].Tunnels[0].Open }

	rawVisitor(t, e, "GET /1 HTTP/1.1\r\nHost: "+s.DNSName+"\r\n\r\n")
	if line := log.line(t, "path=/1"); line["err"] != "the visitor stopped taking the answer" || line["status"] != 200.0 {
		t.Errorf("the log says %v", line)
	}
	eventually(t, "the request to end", func() bool { return open() == 0 })

	// HTTP/2: the stream's window is full, and the connection serves others.
	visitor := e.VisitorClient(t)
	resp, err := visitor.Get("https://" + s.DNSName + "/2")
	if err != nil || resp.ProtoMajor != 2 {
		t.Fatal(resp, err)
	}
	defer func() { _ = resp.Body.Close() }()
	if status, _ := get(t, visitor, "https://no-such-name-0000."+e.Domain+"/"); status != 404 {
		t.Errorf("got %d", status)
	}
	if line := log.line(t, "path=/2"); line["err"] != "the visitor stopped taking the answer" {
		t.Errorf("the log says %v", line)
	}
	eventually(t, "the request to end", func() bool { return open() == 0 })

	// HTTP/2 of which not even the frames are read.
	raw, err := net.Dial("tcp", e.HTTPSAddress)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = raw.Close() }()
	stuck := &stuckConn{Conn: raw, release: make(chan struct{})}
	defer close(stuck.release)
	protocols := new(http.Protocols)
	protocols.SetHTTP2(true)
	transport := &http.Transport{
		DialContext:     func(context.Context, string, string) (net.Conn, error) { return stuck, nil },
		TLSClientConfig: &tls.Config{RootCAs: e.CAPool(), MinVersion: tls.VersionTLS12},
		Protocols:       protocols, HTTP2: &http.HTTP2Config{MaxReceiveBufferPerConnection: 4<<20 - 1, MaxReceiveBufferPerStream: 4<<20 - 1},
	}
	defer transport.CloseIdleConnections()
	again, err := (&http.Client{Transport: transport}).Get("https://" + s.DNSName + "/3")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = again.Body.Close() }()
	stuck.stop.Store(true)
	go func() { _, _ = io.Copy(io.Discard, again.Body) }()
	log.line(t, "path=/3")
	eventually(t, "the request to end", func() bool { return open() == 0 })
}

// stuckConn stops reading when it is told to.
type stuckConn struct {
	net.Conn
	stop    atomic.Bool
	release chan struct{}
}

func (c *stuckConn) Read(p []byte) (int, error) {
	if c.stop.Load() {
		<-c.release
		return 0, net.ErrClosed
	}
	return c.Conn.Read(p)
}

// switchApp switches to a protocol of its own, in which it is told what to do by the first line.
func switchApp(t *testing.T) *httptest.Server {
	app := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		conn, buf, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer func() { _ = conn.Close() }()
		_, _ = buf.WriteString("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: test\r\n\r\n")
		_ = buf.Flush()
		for {
			line, err := buf.ReadString('\n')
			if err != nil {
				return
			}
			_, _ = buf.WriteString("got " + line)
			for line == "flood\n" && err == nil {
				_, err = buf.Write(make([]byte, 64<<10))
			}
			_ = buf.Flush()
		}
	}))
	t.Cleanup(app.Close)
	return app
}

func TestUpgradedConnectionThatIsIdleOrNotReadIsClosed(t *testing.T) {
	var log accessLog
	e := edgetest.Start(t, short, log.option)
	a := login(t, e)
	s := a.newSocket("http")
	a.connect(s, appAddress(switchApp(t)))
	for _, c := range []struct{ path, early, why, metric string }{
		{"/idle", "hello\n", "nothing passed through the upgraded connection for too long", "idle"},
		{"/flood", "flood\n", "the visitor stopped taking the answer", "taking"},
	} {
		// The first line comes right behind the request, before the switch.
		conn := rawVisitor(t, e, "GET "+c.path+" HTTP/1.1\r\nHost: "+s.DNSName+"\r\nConnection: Upgrade\r\nUpgrade: test\r\n\r\n"+c.early)
		reader := bufio.NewReader(conn)
		if resp, err := http.ReadResponse(reader, nil); err != nil || resp.StatusCode != 101 || resp.Header.Get("X-Request-Id") == "" {
			t.Fatalf("%s: got %v, %v", c.path, resp, err)
		}
		if line, err := reader.ReadString('\n'); err != nil || line != "got "+c.early {
			t.Fatalf("%s: got %q, %v", c.path, line, err)
		}
		line := log.line(t, "path="+c.path)
		if line["err"] != c.why || line["status"] != 101.0 || line["bytes_in"] != 6.0 || line["bytes_out"].(float64) < 10 {
			t.Errorf("the log says %v", line)
		}
		if n := labelled(t, e, `mysocket_edge_visitors_cut_total{reason="`+c.metric+`"}`); n != "1" {
			t.Errorf("%s visitors were cut off", n)
		}
	}
}

// An upgraded connection in use lives longer than the time-outs.
func TestUpgradedConnectionInUseIsNotClosed(t *testing.T) {
	e := edgetest.Start(t, func(c *edge.Config) { c.Web.Body, c.Web.Upgraded = 2*time.Second, 2*time.Second })
	a := login(t, e)
	s := a.newSocket("http")
	a.connect(s, appAddress(switchApp(t)))
	conn := rawVisitor(t, e, "GET / HTTP/1.1\r\nHost: "+s.DNSName+"\r\nConnection: Upgrade\r\nUpgrade: test\r\n\r\n")
	reader := bufio.NewReader(conn)
	if resp, err := http.ReadResponse(reader, nil); err != nil || resp.StatusCode != 101 {
		t.Fatalf("got %v, %v", resp, err)
	}
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for i := range 50 {
		<-tick.C
		_, _ = fmt.Fprintln(conn, i)
		if line, err := reader.ReadString('\n'); err != nil || line != fmt.Sprintf("got %d\n", i) {
			t.Fatalf("got %q, %v", line, err)
		}
	}
}

// wireApp keeps the bytes that reach it, and answers each connection once.
type wireApp struct {
	address string
	stop    func()
	mu      sync.Mutex
	got     []string
}

func newWireApp(t *testing.T) *wireApp {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	app := &wireApp{address: ln.Addr().String()}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer func() { _ = conn.Close() }()
				var raw strings.Builder
				req, err := http.ReadRequest(bufio.NewReader(io.TeeReader(conn, &raw)))
				if err == nil {
					if req.Header.Get("Expect") != "" {
						_, _ = io.WriteString(conn, "HTTP/1.1 100 Continue\r\n\r\n")
					}
					_, err = io.Copy(io.Discard, req.Body)
				}
				app.mu.Lock()
				app.got = append(app.got, raw.String())
				app.mu.Unlock()
				if err == nil {
					_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
				}
			})
		}
	})
	app.stop = func() {
		_ = ln.Close()
		wg.Wait()
	}
	t.Cleanup(app.stop)
	return app
}

// What could be read as other requests than the edge reads: it is refused, or reaches the app in one form that nobody can
// take for something else.
func TestSmuggledRequestsDoNotReachTheApp(t *testing.T) {
	e := edgetest.Start(t)
	a := login(t, e)
	s := a.newSocket("http")
	app := newWireApp(t)
	r := a.connect(s, app.address)
	const smuggled = "GET /smuggled HTTP/1.1\r\nHost: HOST\r\n\r\n"
	cases := []struct {
		name, request string
		status        string
		// app is what the app may get at most: "" nothing; else the end of what it gets.
		app string
	}{
		{"length and chunks", "POST / HTTP/1.1\r\nHost: HOST\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + smuggled, "200", "0\r\n\r\n"},
		// The app's 100 must not undo the end of the connection.
		{"length, chunks and an informational answer", "POST / HTTP/1.1\r\nHost: HOST\r\nExpect: 100-continue\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + smuggled, "200", "0\r\n\r\n"},
		{"two lengths", "POST / HTTP/1.1\r\nHost: HOST\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\nabcde", "400", ""},
		{"one length twice", "POST / HTTP/1.1\r\nHost: HOST\r\nContent-Length: 4\r\nContent-Length: 4\r\n\r\nabcd", "200", "Content-Length: 4"},
		{"lengths in a list", "POST / HTTP/1.1\r\nHost: HOST\r\nContent-Length: 4, 4\r\n\r\nabcd", "400", ""},
		{"length with a sign", "POST / HTTP/1.1\r\nHost: HOST\r\nContent-Length: +4\r\n\r\nabcd", "400", ""},
		{"negative length", "POST / HTTP/1.1\r\nHost: HOST\r\nContent-Length: -1\r\n\r\nabcd", "400", ""},
		{"length in hex", "POST / HTTP/1.1\r\nHost: HOST\r\nContent-Length: 0x4\r\n\r\nabcd", "400", ""},
		{"chunks twice", "POST / HTTP/1.1\r\nHost: HOST\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n", "501", ""},
		{"other coding", "POST / HTTP/1.1\r\nHost: HOST\r\nTransfer-Encoding: xchunked\r\nContent-Length: 4\r\n\r\nabcd", "501", ""},
		{"coding list", "POST / HTTP/1.1\r\nHost: HOST\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", "501", ""},
		{"tab before coding", "POST / HTTP/1.1\r\nHost: HOST\r\nTransfer-Encoding:\x0bchunked\r\nContent-Length: 4\r\n\r\nabcd", "400", ""},
		{"space before colon", "POST / HTTP/1.1\r\nHost: HOST\r\nTransfer-Encoding : chunked\r\nContent-Length: 4\r\n\r\nabcd", "400", ""},
		{"space in a name", "GET / HTTP/1.1\r\nHost: HOST\r\nX Y: z\r\n\r\n", "400", ""},
		{"obs-fold in a length", "POST / HTTP/1.1\r\nHost: HOST\r\nContent-Length:\r\n 4\r\n\r\nabcd", "200", "Content-Length: 4"},
		{"obs-fold first", "GET / HTTP/1.1\r\n X: y\r\nHost: HOST\r\n\r\n", "400", ""},
		{"NUL in a value", "GET / HTTP/1.1\r\nHost: HOST\r\nX: a\x00b\r\n\r\n", "400", ""},
		{"CR in a value", "GET / HTTP/1.1\r\nHost: HOST\r\nX: a\rContent-Length: 5\r\n\r\n", "400", ""},
		{"bad chunk size", "POST / HTTP/1.1\r\nHost: HOST\r\nTransfer-Encoding: chunked\r\n\r\n0x1\r\na\r\n0\r\n\r\n", "400", ""},
		{"chunk longer than said", "POST / HTTP/1.1\r\nHost: HOST\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nabc\r\n0\r\n\r\n", "400", ""},
		{"huge chunk size", "POST / HTTP/1.1\r\nHost: HOST\r\nTransfer-Encoding: chunked\r\n\r\n10000000000000001\r\na\r\n0\r\n\r\n", "400", ""},
		{"chunk extension", "POST / HTTP/1.1\r\nHost: HOST\r\nTransfer-Encoding: chunked\r\n\r\n1;x=\"y\"\r\na\r\n0\r\n\r\n", "200", "1\r\na\r\n0\r\n\r\n"},
		{"bare LF in a chunk extension", "POST / HTTP/1.1\r\nHost: HOST\r\nTransfer-Encoding: chunked\r\n\r\n1;x\na\r\n0\r\n\r\n", "400", ""},
		{"endless chunk extensions", "POST / HTTP/1.1\r\nHost: HOST\r\nTransfer-Encoding: chunked\r\n\r\n" + strings.Repeat("1;"+strings.Repeat("x", 1000)+"\r\na\r\n", 100) + "0\r\n\r\n", "400", ""},
		{"GET with a body", "GET / HTTP/1.1\r\nHost: HOST\r\nContent-Length: 4\r\n\r\nabcd", "200", "Content-Length: 4"},
		{"chunks in HTTP/1.0", "POST / HTTP/1.0\r\nHost: HOST\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n", "200", "Content-Length: 3"},
		{"length hidden by Connection", "POST / HTTP/1.1\r\nHost: HOST\r\nContent-Length: 4\r\nConnection: content-length\r\n\r\nabcd", "200", "Content-Length: 4"},
		{"host hidden by Connection", "GET / HTTP/1.1\r\nHost: HOST\r\nConnection: host, x-forwarded-for, x-real-ip\r\n\r\n", "200", "X-Real-Ip: 127.0.0.1"},
		{"absolute target", "GET http://other.example/ HTTP/1.1\r\nHost: HOST\r\n\r\n", "404", ""},
		{"two versions", "GET / HTTP/1.1 HTTP/1.1\r\nHost: HOST\r\n\r\n", "400", ""},
		{"LF only", "GET / HTTP/1.1\nHost: HOST\nX: y\n\n", "200", "X: y\r\n"},
		{"trailer with a length", "POST / HTTP/1.1\r\nHost: HOST\r\nTransfer-Encoding: chunked\r\nTrailer: Content-Length\r\n\r\n0\r\nContent-Length: 5\r\n\r\n", "400", ""},
	}
	for i, c := range cases {
		request := strings.Replace(strings.ReplaceAll(c.request, "HOST", s.DNSName), "/ HTTP", fmt.Sprintf("/case-%d. HTTP", i), 1)
		conn := rawVisitor(t, e, request)
		reader := bufio.NewReader(conn)
		resp, err := http.ReadResponse(reader, nil)
		for err == nil && resp.StatusCode == http.StatusContinue {
			resp, err = http.ReadResponse(reader, nil)
		}
		if err != nil {
			t.Errorf("%s: no answer: %v", c.name, err)
			continue
		}
		_, _ = io.Copy(io.Discard, resp.Body)
		_ = resp.Body.Close()
		if strings.Contains(c.request, "smuggled") {
			// The edge ends the connection, rather than read on.
			rest, err := io.ReadAll(reader)
			if errors.Is(err, os.ErrDeadlineExceeded) || len(rest) > 0 {
				t.Errorf("%s: then came %q, %v", c.name, rest, err)
			}
		}
		_ = conn.Close()
		if !strings.HasPrefix(resp.Status, c.status) {
			t.Errorf("%s: answered %s, want %s", c.name, resp.Status, c.status)
		}
	}
	r.close() // All that reaches the app has reached it then, and is over.
	app.stop()
	for _, raw := range app.got {
		if strings.Contains(raw, "smuggled") {
			t.Errorf("the app got a smuggled request: %q", raw)
		}
	}
	for i, c := range cases {
		for _, raw := range app.got {
			if !strings.Contains(raw, fmt.Sprintf("/case-%d.", i)) {
				continue
			}
			head, body, _ := strings.Cut(raw, "\r\n\r\n")
			switch lower := strings.ToLower(head); {
			case strings.Count(lower, "content-length:")+strings.Count(lower, "transfer-encoding:") > 1:
				t.Errorf("%s: the app got more than one length: %q", c.name, raw)
			case c.app != "" && !strings.Contains(raw, c.app):
				t.Errorf("%s: the app got %q, without %q", c.name, raw, c.app)
			case c.app == "" && strings.HasSuffix(body, "0\r\n\r\n"):
				t.Errorf("%s: the app got the whole request: %q", c.name, raw)
			case strings.Contains(strings.ReplaceAll(head, "\r\n", ""), "\n"), strings.Contains(strings.ReplaceAll(head, "\r\n", ""), "\r"):
				t.Errorf("%s: the app got a bare CR or LF: %q", c.name, raw)
			}
		}
	}
}

func TestTooLargeHeaders(t *testing.T) {
	e := edgetest.Start(t, func(c *edge.Config) { c.Timings.Hold = 10 * time.Millisecond })
	a := login(t, e)
	s := a.newSocket("http")
	app := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("X", strings.Repeat("x", 2<<20))
	}))
	t.Cleanup(app.Close)
	a.connect(s, appAddress(app))
	visitor := e.VisitorClient(t)
	for _, scheme := range []string{"http", "https"} {
		if status, _ := get(t, visitor, scheme+"://"+s.DNSName+"/"); status != 502 {
			t.Errorf("%s: an answer with a header of 2 MiB became %d", scheme, status)
		}
	}
	req, err := http.NewRequestWithContext(t.Context(), "GET", "https://"+s.DNSName+"/", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X", strings.Repeat("x", 200<<10))
	resp, err := visitor.Do(req)
	if err == nil {
		_ = resp.Body.Close()
	}
	if err == nil && resp.StatusCode != 431 {
		t.Errorf("a header of 200 KiB over HTTP/2 was answered with %d", resp.StatusCode)
	}
}

// Bodies are streamed: their size does not matter for the memory.
func TestLargeBodiesAreStreamed(t *testing.T) {
	const size = 16 << 20
	e := edgetest.Start(t)
	a := login(t, e)
	s := a.newSocket("http")
	app := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == "PUT" {
			n, _ := io.Copy(io.Discard, r.Body)
			_, _ = fmt.Fprint(w, n)
			return
		}
		_, _ = io.CopyN(w, zeros{}, size)
	}))
	t.Cleanup(app.Close)
	a.connect(s, appAddress(app))
	runtime.GC()
	var before, now runtime.MemStats
	runtime.ReadMemStats(&before)
	most := uint64(0)
	seen := func() {
		runtime.GC() // what is garbage does not count
		runtime.ReadMemStats(&now)
		most = max(most, now.HeapAlloc-min(now.HeapAlloc, before.HeapAlloc))
	}
	for _, scheme := range []string{"http", "https"} {
		visitor := e.VisitorClient(t)
		resp, err := visitor.Get(scheme + "://" + s.DNSName + "/")
		if err != nil {
			t.Fatal(err)
		}
		got := int64(0)
		for err == nil {
			var n int64
			n, err = io.CopyN(io.Discard, resp.Body, 8<<20)
			got += n
			seen()
		}
		_ = resp.Body.Close()
		if got != size {
			t.Errorf("%s: %d bytes came down, %v", scheme, got, err)
		}
		req, err := http.NewRequestWithContext(t.Context(), "PUT", scheme+"://"+s.DNSName+"/", io.LimitReader(zeros{}, size))
		if err != nil {
			t.Fatal(err)
		}
		resp, err = visitor.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if string(body) != fmt.Sprint(size) {
			t.Errorf("%s: %s bytes went up", scheme, body)
		}
		seen()
	}
	t.Logf("the heap grew by %d MiB", most>>20)
	if most > size*3/4 {
		t.Errorf("the heap grew by %d MiB for bodies of %d MiB", most>>20, size>>20)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}
