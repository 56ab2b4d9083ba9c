package main

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

func TestHandler(t *testing.T) {
	for _, tc := range []struct {
		path string
		code int
		body string
	}{
		{"/", 200, "Server: pod-1\n"},
		{"/healthz", 200, "ok\n"},
		{"/slow?ms=1", 200, "Server: pod-1\n"},
		{"/slow?ms=-1", 400, "ms=\"-1\": want a whole number from 0 to 600000\n"},
		{"/stream?n=2&ms=0", 200, "0 pod-1\n1 pod-1\n"},
		{"/stream?n=x", 400, "n=\"x\": want a whole number from 0 to 100000\n"},
		{"/stop?ms=1", 200, "Server: pod-1\n"},
		{"/nothing", 404, "404 page not found\n"},
	} {
		t.Run(tc.path, func(t *testing.T) {
			w := httptest.NewRecorder()
			handler("pod-1", make(chan time.Duration, 1), &webSockets{ending: t.Context()}).ServeHTTP(w, httptest.NewRequest(http.MethodGet, tc.path, nil))
			if w.Code != tc.code || w.Body.String() != tc.body {
				t.Errorf("got %d %q, want %d %q", w.Code, w.Body, tc.code, tc.body)
			}
		})
	}
}

func TestUnready(t *testing.T) {
	h := handler("pod-1", make(chan time.Duration, 1), &webSockets{ending: t.Context()})
	ask := func(path string) int {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
		return w.Code
	}
	for _, step := range []struct {
		path string
		code int
	}{
		{"/healthz", 200}, {"/unready?ms=600000", 200}, {"/healthz", 503}, {"/", 200}, {"/unready?ms=0", 200}, {"/healthz", 200}, {"/unready?ms=x", 400},
	} {
		if got := ask(step.path); got != step.code {
			t.Errorf("%s: got %d, want %d", step.path, got, step.code)
		}
	}
}

func TestEcho(t *testing.T) {
	req := httptest.NewRequest(http.MethodPut, "/echo?a=b", strings.NewReader("hello"))
	req.Header.Set("X-Forwarded-For", "192.0.2.7")
	w := httptest.NewRecorder()
	handler("pod-1", make(chan time.Duration, 1), &webSockets{ending: t.Context()}).ServeHTTP(w, req)
	var got echoed
	if err := json.Unmarshal(w.Body.Bytes(), &got); err != nil {
		t.Fatal(err)
	}
	if got.Method != "PUT" || got.Body != "hello" || got.URL != "/echo?a=b" || got.Headers.Get("X-Forwarded-For") != "192.0.2.7" || got.Server != "pod-1" {
		t.Errorf("got %+v", got)
	}
	big := httptest.NewRecorder()
	handler("pod-1", make(chan time.Duration, 1), &webSockets{ending: t.Context()}).ServeHTTP(big, httptest.NewRequest(http.MethodPost, "/echo", strings.NewReader(strings.Repeat("x", maxEcho+1))))
	if big.Code != http.StatusBadRequest {
		t.Errorf("a body over the limit: got %d", big.Code)
	}
}

// TestStreamFlushes reads the first line while the second is not due yet.
func TestStreamFlushes(t *testing.T) {
	srv := httptest.NewServer(handler("pod-1", make(chan time.Duration, 1), &webSockets{ending: t.Context()}))
	defer srv.Close()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, srv.URL+"/stream?n=2&ms=600000", nil)
	if err != nil {
		t.Fatal(err)
	}
	res, err := srv.Client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = res.Body.Close() }()
	line, err := bufio.NewReader(res.Body).ReadString('\n')
	if err != nil || line != "0 pod-1\n" {
		t.Errorf("first line: %q, %v", line, err)
	}
}

// TestServeFinishesOpenRequests ends the server while a request is open: it gets its answer.
func TestServeFinishesOpenRequests(t *testing.T) {
	addr := freeAddress(t)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- serve(ctx, addr) }()
	conn := dial(t, addr)
	defer func() { _ = conn.Close() }()
	if _, err := io.WriteString(conn, "GET /stream?n=2&ms=300 HTTP/1.1\r\nHost: demo\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	cancel() // the headers are here, the second line is not
	body, err := io.ReadAll(res.Body)
	_ = res.Body.Close()
	if err != nil || strings.Count(string(body), "\n") != 2 {
		t.Errorf("the open request got %q, %v", body, err)
	}
	if err := <-ended; err != nil {
		t.Errorf("serve: %v", err)
	}
}

// TestStop has the app stop for a while: new connections are refused, then taken again.
func TestStop(t *testing.T) {
	addr := freeAddress(t)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- serve(ctx, addr) }()
	first := dial(t, addr)
	defer func() { _ = first.Close() }()
	if _, err := io.WriteString(first, "GET /stop?ms=200 HTTP/1.1\r\nHost: demo\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	if res, err := http.ReadResponse(bufio.NewReader(first), nil); err != nil || res.StatusCode != http.StatusOK {
		t.Fatalf("got %v, %v", res, err)
	}
	refused := false
	for deadline := time.Now().Add(10 * time.Second); !refused && time.Now().Before(deadline); {
		conn, err := net.Dial("tcp", addr)
		if err == nil {
			_ = conn.Close()
		}
		refused = err != nil
	}
	if !refused {
		t.Error("new connections are still taken")
	}
	_ = dial(t, addr).Close() // it listens again
	cancel()
	if err := <-ended; err != nil {
		t.Errorf("serve: %v", err)
	}
}

func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	return l.Addr().String()
}

// dial connects as soon as somebody listens.
func dial(t *testing.T, addr string) net.Conn {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for {
		conn, err := net.Dial("tcp", addr)
		if err == nil {
			return conn
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}
