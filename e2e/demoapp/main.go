// Command demoapp is the application of the demo and of the end-to-end tests: a small HTTP
// server whose answers show which replica gave them and what reached it.
//
//	/            Server: HOSTNAME
//	/healthz     ok
//	/slow?ms=N   answers as / does, after N milliseconds
//	/stream?n=N&ms=M  N lines, one every M milliseconds, each sent at once
//	/echo        what was asked (method, headers, body ...), as JSON
//	/stop?ms=N   takes no new connections for N milliseconds
//	/unready?ms=N  /healthz answers 503 for N milliseconds, and all else as before
//	/ws?ms=N     a WebSocket with one line, as of /stream, every N milliseconds, closed (1001) when the app is told to end
//
// With --proxy-addr it also serves TCP there: it reads a header of the PROXY protocol, tells what it says, and then echoes.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	// shutdownLimit is how long open requests may take after SIGTERM.
	shutdownLimit = 20 * time.Second
	maxEcho       = 1 << 20
	maxWait       = 10 * time.Minute
	maxLines      = 100_000
)

func main() {
	addr := flag.String("addr", ":8000", "address to listen on")
	proxyAddr := flag.String("proxy-addr", "", "address to serve TCP on whose connections begin with a header of the PROXY protocol")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	err := run(ctx, *addr, *proxyAddr)
	stop()
	if err != nil {
		slog.Error("serve", "err", err)
		os.Exit(1)
	}
}

// run serves HTTP, and TCP where it is asked for, until ctx ends.
func run(ctx context.Context, addr, proxyAddr string) error {
	if proxyAddr == "" {
		return serve(ctx, addr)
	}
	l, err := net.Listen("tcp", proxyAddr)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() {
		defer cancel() // neither goes on without the other
		ended <- serveProxied(ctx, l)
	}()
	err = serve(ctx, addr)
	cancel()
	return errors.Join(err, <-ended)
}

// serve answers until ctx ends, then finishes the requests that are open.
func serve(ctx context.Context, addr string) error {
	hostname, err := os.Hostname()
	if err != nil {
		return err
	}
	stop := make(chan time.Duration, 1)
	sockets := &webSockets{ending: ctx}
	srv := &http.Server{Handler: handler(hostname, stop, sockets), ReadHeaderTimeout: 10 * time.Second}
	for ctx.Err() == nil {
		pause, err := listen(ctx, srv, addr, stop)
		if err != nil {
			return err
		}
		if pause > 0 {
			slog.Info("told to stop: taking no new connections", "for", pause)
			wait(ctx, pause)
		}
	}
	slog.Info("told to end: finishing open requests", "limit", shutdownLimit)
	limit, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownLimit)
	defer cancel()
	if err := srv.Shutdown(limit); err != nil {
		return fmt.Errorf("open requests did not finish: %w", errors.Join(err, srv.Close()))
	}
	sockets.open.Wait() // the server does not know of them any more; each ends within closeLimit
	slog.Info("ended")
	return nil
}

// listen serves on addr until it is told to stop, and returns for how long, or until ctx ends. What is connected stays.
func listen(ctx context.Context, srv *http.Server, addr string, stop <-chan time.Duration) (time.Duration, error) {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return 0, err
	}
	slog.Info("listening", "addr", l.Addr().String())
	ended := make(chan error, 1)
	go func() { ended <- srv.Serve(l) }()
	select {
	case err := <-ended:
		return 0, err
	case pause := <-stop:
		err := l.Close()
		<-ended
		return pause, err
	case <-ctx.Done():
		return 0, nil // shutting down closes l
	}
}

func handler(hostname string, stop chan<- time.Duration, sockets *webSockets) http.Handler {
	mux := http.NewServeMux()
	hello := func(w http.ResponseWriter) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		_, _ = fmt.Fprintf(w, "Server: %s\n", hostname)
	}
	mux.HandleFunc("/{$}", func(w http.ResponseWriter, _ *http.Request) { hello(w) })
	var unreadyUntil atomic.Int64 // Unix time in nanoseconds
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) {
		if time.Now().UnixNano() < unreadyUntil.Load() {
			http.Error(w, "told to be unready", http.StatusServiceUnavailable)
			return
		}
		_, _ = io.WriteString(w, "ok\n")
	})
	mux.HandleFunc("/unready", func(w http.ResponseWriter, r *http.Request) {
		ms, err := number(r, "ms", 1000, int(maxWait.Milliseconds()))
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		unreadyUntil.Store(time.Now().Add(milliseconds(ms)).UnixNano())
		hello(w)
	})
	mux.HandleFunc("/slow", func(w http.ResponseWriter, r *http.Request) {
		ms, err := number(r, "ms", 1000, int(maxWait.Milliseconds()))
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		if wait(r.Context(), milliseconds(ms)) {
			hello(w)
		}
	})
	mux.HandleFunc("/stream", func(w http.ResponseWriter, r *http.Request) {
		n, err := number(r, "n", 10, maxLines)
		ms, err2 := number(r, "ms", 100, int(maxWait.Milliseconds()))
		if err := errors.Join(err, err2); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		out := http.NewResponseController(w)
		for i := range n {
			if i > 0 && !wait(r.Context(), milliseconds(ms)) {
				return
			}
			if _, err := fmt.Fprintf(w, "%d %s\n", i, hostname); err != nil || out.Flush() != nil {
				return
			}
		}
	})
	mux.HandleFunc("/ws", func(w http.ResponseWriter, r *http.Request) {
		ms, err := number(r, "ms", 100, int(maxWait.Milliseconds()))
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		sockets.serve(w, r, hostname, milliseconds(max(ms, 1)))
	})
	mux.HandleFunc("/echo", func(w http.ResponseWriter, r *http.Request) { echo(w, r, hostname) })
	mux.HandleFunc("/stop", func(w http.ResponseWriter, r *http.Request) {
		ms, err := number(r, "ms", 1000, int(maxWait.Milliseconds()))
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		select {
		case stop <- milliseconds(ms):
			hello(w)
		default:
			http.Error(w, "told to stop already", http.StatusConflict)
		}
	})
	return mux
}

// echoed is the answer of /echo.
type echoed struct {
	Server     string      `json:"server"`
	Method     string      `json:"method"`
	URL        string      `json:"url"`
	Proto      string      `json:"proto"`
	Host       string      `json:"host"`
	RemoteAddr string      `json:"remoteAddr"`
	Headers    http.Header `json:"headers"`
	Body       string      `json:"body"`
}

func echo(w http.ResponseWriter, r *http.Request, hostname string) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxEcho))
	if err != nil {
		http.Error(w, fmt.Sprintf("body: %v (at most %d bytes are echoed)", err, maxEcho), http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(echoed{
		Server: hostname, Method: r.Method, URL: r.URL.String(), Proto: r.Proto, Host: r.Host,
		RemoteAddr: r.RemoteAddr, Headers: r.Header, Body: string(body),
	})
}

// number reads a query parameter that is a whole number from 0 to most.
func number(r *http.Request, name string, def, most int) (int, error) {
	s := r.URL.Query().Get(name)
	if s == "" {
		return def, nil
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 0 || n > most {
		return 0, fmt.Errorf("%s=%q: want a whole number from 0 to %d", name, s, most)
	}
	return n, nil
}

func milliseconds(n int) time.Duration { return time.Duration(n) * time.Millisecond }

// wait waits and says whether ctx is still there.
func wait(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
