package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
)

// What a visitor sends first tells the backend what to do with the connection.
const (
	wantDownload = 'D' // send for as long as the visitor reads
	wantUpload   = 'U' // read until the end
	wantEcho     = 'E' // send back what comes
	wantHTTP     = 'G' // the first letter of GET
	wantHTTPPost = 'P' // of POST
)

const bulkChunk = 256 << 10

// serveBackend is the app behind all tunnels. It prints its address and serves until ctx ends.
func serveBackend(ctx context.Context) error {
	l, err := listen()
	if err != nil {
		return err
	}
	web := newQueue(l.Addr())
	server := &http.Server{Handler: http.HandlerFunc(answer)} //nolint:gosec // no stranger reaches it
	go func() { _ = server.Serve(web) }()
	return acceptAll(ctx, l, func(conn *net.TCPConn) {
		first := make([]byte, 1)
		if _, err := io.ReadFull(conn, first); err != nil {
			_ = conn.Close()
			return
		}
		switch first[0] {
		case wantDownload:
			chunk := make([]byte, bulkChunk)
			for {
				if _, err := conn.Write(chunk); err != nil {
					break
				}
			}
		case wantUpload:
			_, _ = io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{conn}, make([]byte, bulkChunk))
		case wantEcho:
			_, _ = io.Copy(struct{ io.Writer }{conn}, struct{ io.Reader }{conn})
		case wantHTTP, wantHTTPPost:
			web.put(&begun{conn, first})
			return
		}
		_ = conn.Close()
	})
}

var smallBody = strings.Repeat("x", 1024)

// answer is the app as HTTP has it: 1 KiB, or bulk in either direction until the visitor goes away.
func answer(w http.ResponseWriter, r *http.Request) {
	switch r.URL.Path {
	case downloadPath:
		chunk := make([]byte, bulkChunk)
		for {
			if _, err := w.Write(chunk); err != nil {
				return
			}
		}
	case uploadPath:
		_, _ = io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{r.Body}, make([]byte, bulkChunk))
	default:
		_, _ = io.WriteString(w, smallBody)
	}
}

const (
	downloadPath = "/download"
	uploadPath   = "/upload"
)

// begun is a connection of which the first byte has been read.
type begun struct {
	net.Conn
	first []byte
}

func (b *begun) Read(p []byte) (int, error) {
	if len(b.first) > 0 && len(p) > 0 {
		n := copy(p, b.first)
		b.first = b.first[n:]
		return n, nil
	}
	return b.Conn.Read(p)
}

// queue is a net.Listener of connections that somebody else has accepted.
type queue struct {
	addr  net.Addr
	conns chan net.Conn
}

func newQueue(addr net.Addr) *queue { return &queue{addr: addr, conns: make(chan net.Conn)} }

func (q *queue) put(conn net.Conn)         { q.conns <- conn }
func (q *queue) Accept() (net.Conn, error) { return <-q.conns, nil }
func (q *queue) Close() error              { return nil }
func (q *queue) Addr() net.Addr            { return q.addr }

// serveRelay passes connections on to an address, in both directions and nothing else.
func serveRelay(ctx context.Context, args []string) error {
	if len(args) != 1 {
		return errors.New("relay: give the address to pass on to")
	}
	l, err := listen()
	if err != nil {
		return err
	}
	return acceptAll(ctx, l, func(visitor *net.TCPConn) {
		defer func() { _ = visitor.Close() }()
		to, err := net.Dial("tcp", args[0]) //nolint:noctx,gosec // the address is ours, and it ends with the process
		if err != nil {
			return
		}
		app, ok := to.(*net.TCPConn)
		if !ok {
			return
		}
		defer func() { _ = app.Close() }()
		var both sync.WaitGroup
		pass := func(to, from *net.TCPConn) {
			// Through memory, as every tunnel must: io.Copy alone would have the kernel do it.
			_, _ = io.CopyBuffer(struct{ io.Writer }{to}, struct{ io.Reader }{from}, make([]byte, 32<<10))
			_ = to.CloseWrite()
		}
		both.Go(func() { pass(app, visitor) })
		both.Go(func() { pass(visitor, app) })
		both.Wait()
	})
}

// listen listens on a free port of loopback and prints the address, for the parent process.
func listen() (net.Listener, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	_, err = fmt.Println(l.Addr())
	return l, err
}

func acceptAll(ctx context.Context, l net.Listener, serve func(*net.TCPConn)) error {
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	defer context.AfterFunc(ctx, func() { _ = l.Close() })()
	for {
		conn, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		if tcp, ok := conn.(*net.TCPConn); ok {
			go serve(tcp)
		}
	}
}
