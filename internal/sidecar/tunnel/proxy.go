package tunnel

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"golang.org/x/net/proxy"

	"github.com/mysocketio/mysocket-injector/internal/edgeproxy"
)

// maxProxyAnswer bounds what a proxy may say to CONNECT.
const maxProxyAnswer = 16 << 10

// dialProxy connects to the edge through a proxy.
func dialProxy(ctx context.Context, dialer *net.Dialer, via *url.URL, address string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	conn, err := dialVia(ctx, dialer, via, address)
	if err != nil {
		return nil, &StepError{StepProxy, fmt.Errorf("the edge can't be reached through the proxy %s: %w", via.Redacted(), err)}
	}
	return conn, nil
}

func dialVia(ctx context.Context, dialer *net.Dialer, via *url.URL, address string) (net.Conn, error) {
	if err := edgeproxy.Check(via); err != nil {
		return nil, err
	}
	port := via.Port()
	if port == "" {
		port = map[string]string{edgeproxy.HTTP: "80", edgeproxy.HTTPS: "443"}[via.Scheme]
		if port == "" {
			port = "1080"
		}
	}
	at := net.JoinHostPort(via.Hostname(), port)
	if via.Scheme == edgeproxy.SOCKS5 || via.Scheme == edgeproxy.SOCKS5H {
		socks, err := proxy.SOCKS5("tcp", at, nil, dialer)
		if err != nil {
			return nil, err
		}
		with, ok := socks.(proxy.ContextDialer)
		if !ok {
			return nil, errors.New("the SOCKS library knows no contexts")
		}
		return with.DialContext(ctx, "tcp", address)
	}
	conn, err := dialer.DialContext(ctx, "tcp", at)
	if err != nil {
		return nil, err
	}
	if via.Scheme == edgeproxy.HTTPS {
		secure := tls.Client(conn, &tls.Config{ServerName: via.Hostname(), MinVersion: tls.VersionTLS12})
		if err := secure.HandshakeContext(ctx); err != nil {
			return nil, errors.Join(err, conn.Close())
		}
		conn = secure
	}
	through, err := connectVia(ctx, conn, address)
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return through, nil
}

// connectVia asks a proxy to connect to an address.
func connectVia(ctx context.Context, conn net.Conn, address string) (net.Conn, error) {
	if deadline, ok := ctx.Deadline(); ok {
		if err := conn.SetDeadline(deadline); err != nil {
			return nil, err
		}
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	req := &http.Request{Method: http.MethodConnect, URL: &url.URL{Opaque: address}, Host: address, Header: http.Header{"User-Agent": {"mysocket-sidecar"}}}
	if err := req.Write(conn); err != nil {
		return nil, err
	}
	limited := &limitedReader{conn, maxProxyAnswer}
	in := bufio.NewReader(limited)
	res, err := http.ReadResponse(in, req) //nolint:bodyclose // what follows the answer to CONNECT is the tunnel
	if err != nil {
		return nil, fmt.Errorf("its answer to CONNECT can't be read: %w", err)
	}
	if res.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("it answers CONNECT with %.100q", strings.TrimSpace(res.Status))
	}
	if !stop() {
		return nil, ctx.Err()
	}
	limited.left = -1
	return &proxied{conn, in}, conn.SetDeadline(time.Time{})
}

// limitedReader reads no more than left bytes; a negative number lets all through.
type limitedReader struct {
	net.Conn
	left int
}

func (l *limitedReader) Read(p []byte) (int, error) {
	if l.left == 0 {
		return 0, fmt.Errorf("it is longer than %d bytes", maxProxyAnswer)
	}
	if l.left > 0 {
		p = p[:min(len(p), l.left)]
	}
	n, err := l.Conn.Read(p)
	if l.left > 0 {
		l.left -= n
	}
	return n, err
}

// proxied is a connection whose first bytes may have come with the proxy's answer: an SSH server speaks first.
type proxied struct {
	net.Conn
	in *bufio.Reader
}

func (c *proxied) Read(p []byte) (int, error) {
	if c.in != nil && c.in.Buffered() > 0 {
		return c.in.Read(p)
	}
	c.in = nil
	return c.Conn.Read(p)
}
