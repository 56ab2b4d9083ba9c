package edge_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mysocketio/mysocket-injector/internal/edge"
	"github.com/mysocketio/mysocket-injector/internal/edge/edgetest"
)

// accessLog keeps the lines of an access log.
type accessLog struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *accessLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *accessLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

func (l *accessLog) option(c *edge.Config) { c.AccessLog = slog.New(slog.NewJSONHandler(l, nil)) }

// line waits for the only line that has all the values, such as path=/x.
func (l *accessLog) line(t testing.TB, values ...string) map[string]any {
	t.Helper()
	var found map[string]any
	eventually(t, fmt.Sprint("a line of the log with ", values), func() bool {
		found = nil
		for text := range strings.Lines(l.String()) {
			var line map[string]any
			if err := json.Unmarshal([]byte(text), &line); err != nil {
				t.Fatal(err)
			}
			if !slices.ContainsFunc(values, func(v string) bool {
				key, want, _ := strings.Cut(v, "=")
				return fmt.Sprint(line[key]) != want
			}) {
				if found != nil {
					t.Fatalf("there are two lines with %s: %v and %v", values, found, line)
				}
				found = line
			}
		}
		return found != nil
	})
	return found
}

func TestRequestIDIsTheSameEverywhere(t *testing.T) {
	var log accessLog
	e := edgetest.Start(t, log.option)
	a := login(t, e)
	s := a.newSocket("http")
	a.connect(s, appAddress(newApp(t, "app")))
	visitor := e.VisitorClient(t)
	for _, c := range []struct {
		sent []string
		kept bool
	}{
		{nil, false},
		{[]string{"0f8fad5b-d9cb-469f-a165-70867728950e"}, true},
		{[]string{"Ab.c_d-1"}, true},
		{[]string{"short"}, false},
		{[]string{strings.Repeat("x", 65)}, false},
		{[]string{"with a space"}, false},
		{[]string{"quote\"quote"}, false},
		{[]string{"twice-sent-1", "twice-sent-2"}, false},
	} {
		req, err := http.NewRequestWithContext(t.Context(), "GET", "https://"+s.DNSName+"/echo", nil)
		if err != nil {
			t.Fatal(err)
		}
		if c.sent != nil {
			req.Header["X-Request-Id"] = c.sent
		}
		resp, err := visitor.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		var echo struct{ Header http.Header }
		err = json.NewDecoder(resp.Body).Decode(&echo)
		_ = resp.Body.Close()
		if err != nil {
			t.Fatal(err)
		}
		id := resp.Header.Get("X-Request-Id")
		if len(id) < 8 || c.kept != slices.Contains(c.sent, id) || !slices.Equal(echo.Header["X-Request-Id"], []string{id}) {
			t.Errorf("sent %q: the visitor got %q, the app %q", c.sent, id, echo.Header["X-Request-Id"])
		}
		log.line(t, "request="+id, "status=200")
	}
	resp, err := visitor.Get("https://no-such-name-0000." + e.Domain + "/lost")
	if err != nil {
		t.Fatal(err)
	}
	body, _ := io.ReadAll(resp.Body)
	_ = resp.Body.Close()
	id := resp.Header.Get("X-Request-Id")
	if line := log.line(t, "request="+id); line["status"] != 404.0 || line["path"] != "/lost" || !strings.Contains(string(body), id) {
		t.Errorf("the page says %s, the log %v", body, line)
	}
}

func TestPagesAreWhatTheVisitorAccepts(t *testing.T) {
	e := edgetest.Start(t)
	visitor := e.VisitorClient(t)
	for accept, want := range map[string]string{
		"": "text/plain; charset=utf-8", "*/*": "text/plain; charset=utf-8", "application/json": "text/plain; charset=utf-8",
		"text/html,application/xhtml+xml,*/*;q=0.8": "text/html; charset=utf-8",
	} {
		req, err := http.NewRequestWithContext(t.Context(), "GET", "http://no-such-name-0000."+e.Domain+"/<script>", nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Accept", accept)
		resp, err := visitor.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if got := resp.Header.Get("Content-Type"); got != want || resp.StatusCode != 404 || len(body) > 500 || strings.Contains(string(body), "script") {
			t.Errorf("%q: %d %s %s", accept, resp.StatusCode, got, body)
		}
	}
}

func TestAccessLog(t *testing.T) {
	var log accessLog
	e := edgetest.Start(t, log.option)
	a := login(t, e)
	s := a.newSocket("http")
	r := a.connect(s, appAddress(newApp(t, "app")))
	req, err := http.NewRequestWithContext(t.Context(), "POST", "http://"+s.DNSName+"/a%20b?secret=1", strings.NewReader("five!"))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("User-Agent", strings.Repeat("agent", 100))
	resp, err := e.VisitorClient(t).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	line := log.line(t, "path=/a b")
	for key, want := range map[string]any{
		"msg": "request", "socket": s.ID, "tunnel": r.tunnel.ID, "method": "POST", "host": s.DNSName, "status": 200.0, "bytes_in": 5.0,
		"bytes_out": 12.0, "visitor": "127.0.0.1", "protocol": "HTTP/1.1", "attempts": 1.0, "part": "web",
	} {
		if line[key] != want {
			t.Errorf("%s is %v, want %v", key, line[key], want)
		}
	}
	if first, all := line["first_byte_ms"].(float64), line["ms"].(float64); first > all {
		t.Errorf("the first byte took %v ms, all of it %v ms", first, all)
	}
	if len(line["agent"].(string)) > 203 {
		t.Errorf("the user agent has %d bytes", len(line["agent"].(string)))
	}
	if strings.Contains(log.String(), "secret") {
		t.Error("the query is in the log")
	}
	for _, series := range []string{`mysocket_edge_bytes_total{direction="in"}`, `mysocket_edge_bytes_total{direction="out"}`, "mysocket_edge_first_byte_seconds_count"} {
		if n := labelled(t, e, series); n == "0" {
			t.Errorf("%s is 0", series)
		}
	}

	tcp := a.newSocket("tcp")
	a.connect(tcp, appAddress(newApp(t, "app")))
	conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", tcp.Ports[0]))
	if err != nil {
		t.Fatal(err)
	}
	_, _ = io.WriteString(conn, "GET / HTTP/1.0\r\n\r\n")
	answer, _ := io.ReadAll(conn)
	_ = conn.Close()
	line = log.line(t, "msg=connection")
	if line["socket"] != tcp.ID || line["bytes_in"] != 18.0 || line["bytes_out"] != float64(len(answer)) || line["first_byte_ms"].(float64) > line["ms"].(float64) {
		t.Errorf("the connection's line is %v", line)
	}
}

// Neither the app nor the tunnel's client fills the log: with what it answers, or the reason for which it refuses.
func TestLogLinesAreBounded(t *testing.T) {
	var log accessLog
	e := edgetest.Start(t, log.option, func(c *edge.Config) { c.Log = slog.New(slog.NewJSONHandler(&log, nil)) })
	a := login(t, e)
	long := strings.Repeat("x", 100_000)
	app := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		_, _ = io.WriteString(conn, long+"\r\n\r\n")
		_ = conn.Close()
	}))
	t.Cleanup(app.Close)
	for path, refuse := range map[string]bool{"/nonsense": false, "/refused": true} {
		s := a.newSocket("http")
		r := a.connect(s, appAddress(app))
		r.reason = long
		r.refuse.Store(refuse)
		if status, _ := get(t, e.VisitorClient(t), "http://"+s.DNSName+path); status != 502 {
			t.Errorf("%s was answered %d", path, status)
		}
		log.line(t, "path="+path)
	}
	for line := range strings.Lines(log.String()) {
		if len(line) > 2000 {
			t.Errorf("a line has %d bytes: %.300s", len(line), line)
		}
	}
}

// Without an access log there is a line for what a visitor may ask about, and for nothing else.
func TestNoAccessLog(t *testing.T) {
	var log accessLog
	e := edgetest.Start(t, func(c *edge.Config) {
		c.Log = slog.New(slog.NewJSONHandler(&log, nil))
		c.Timings.Hold = time.Millisecond
	})
	a := login(t, e)
	s := a.newSocket("http")
	resp, err := e.VisitorClient(t).Get("http://" + s.DNSName + "/fails")
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	a.connect(s, appAddress(newApp(t, "app")))
	get(t, e.VisitorClient(t), "http://"+s.DNSName+"/works")
	if line := log.line(t, "path=/fails"); line["status"] != 502.0 || line["request"] != resp.Header.Get("X-Request-Id") {
		t.Errorf("the request that failed has the line %v", line)
	}
	if strings.Contains(log.String(), "/works") {
		t.Error("there is a line for a request that worked")
	}
}

// trailerApp is an app that answers with what it got as trailers, in trailers.
func trailerApp(t *testing.T) *httptest.Server {
	app := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Trailer", "X-Announced")
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		_, _ = w.Write(body)
		w.Header().Set("X-Announced", r.Trailer.Get("X-Sum"))
		w.Header().Set(http.TrailerPrefix+"X-Late", r.Trailer.Get("X-Real-Ip")+"nothing forged")
	}))
	t.Cleanup(app.Close)
	return app
}

func TestTrailersPassBothWays(t *testing.T) {
	e := edgetest.Start(t)
	a := login(t, e)
	s := a.newSocket("http")
	a.connect(s, appAddress(trailerApp(t)))
	visitor := e.VisitorClient(t)
	for _, c := range []struct {
		scheme string
		length int64
	}{{"http", -1}, {"https", -1}, {"https", 4}} {
		req, err := http.NewRequestWithContext(t.Context(), "PUT", c.scheme+"://"+s.DNSName+"/", io.MultiReader(strings.NewReader("body")))
		if err != nil {
			t.Fatal(err)
		}
		req.ContentLength = c.length
		req.Trailer = http.Header{"X-Sum": {"42"}, "X-Real-Ip": {"forged"}}
		resp, err := visitor.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if err != nil || string(body) != "body" || resp.Trailer.Get("X-Announced") != "42" || resp.Trailer.Get("X-Late") != "nothing forged" {
			t.Errorf("%+v: %q, trailers %v, %v", c, body, resp.Trailer, err)
		}
	}
}

// A tunnel that accepts and never answers costs its visitors a bounded time, and is ejected.
func TestAppThatNeverAnswers(t *testing.T) {
	var log accessLog
	e := edgetest.Start(t, log.option, func(c *edge.Config) { c.Web.Answer = 200 * time.Millisecond })
	a := login(t, e)
	s := a.newSocket("http")
	mute, err := net.Listen("tcp", "127.0.0.1:0") // the kernel accepts
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = mute.Close() }() // before the replica is closed, which waits for its app
	bad := a.connect(s, mute.Addr().String())
	visitor := e.VisitorClient(t)
	for i := range 3 {
		resp, err := visitor.Get(fmt.Sprint("http://", s.DNSName, "/", i))
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if resp.StatusCode != 504 || !strings.Contains(string(body), "in time") {
			t.Errorf("got %d %s", resp.StatusCode, body)
		}
		if line := log.line(t, fmt.Sprint("path=/", i)); line["attempts"] != 1.0 || line["status"] != 504.0 {
			t.Errorf("the log says %v", line)
		}
	}
	if !ejected(e, bad.tunnel.ID) {
		t.Error("the tunnel is not ejected after three requests without an answer")
	}
	a.connect(s, appAddress(newApp(t, "good")))
	eventually(t, "a request to be answered", func() bool { // the other one may be on probation
		status, _ := get(t, visitor, "http://"+s.DNSName+"/")
		return status == 200
	})
}
