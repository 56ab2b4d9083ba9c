package front

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/mysocketio/mysocket-injector/internal/edge/metrics"
	"github.com/mysocketio/mysocket-injector/internal/edge/registry"
	"github.com/mysocketio/mysocket-injector/internal/edge/store"
)

// originURL is the scheme and the host of requests to a socket's app. The tunnel is chosen by the round trip, so the host is
// never resolved; with HTTPS it is the name that the app is asked for (SNI), and connections are reused for that name only.
func originURL(socket store.Socket) (scheme, host string) {
	if socket.UpstreamType != store.UpstreamHTTPS {
		return "http", "origin"
	}
	return "https", hostName(cmp.Or(socket.UpstreamHTTPHostname, socket.DNSName))
}

// dialTLS opens a channel and agrees on TLS, and a protocol (ALPN), with the app behind it. The app's certificate is not verified: the tunnel's client
// has authenticated itself, all is encrypted on the way, and the app is beside that client. Its errors are openErrors: of the
// request nothing was sent.
func (us *upstreams) dialTLS(ctx context.Context, t *registry.Tunnel, address, protocol string) (net.Conn, error) {
	name, _, err := net.SplitHostPort(address)
	if err != nil {
		return nil, &openError{err}
	}
	channel, err := us.dispatcher.open(ctx, t, visitorIn(ctx))
	if err != nil {
		return nil, err
	}
	conn := tls.Client(&lateCloser{Conn: channel}, &tls.Config{
		ServerName: name, InsecureSkipVerify: true, NextProtos: []string{protocol}, MinVersion: tls.VersionTLS12, // #nosec G402 -- see above
	})
	ctx, cancel := context.WithTimeout(ctx, us.dispatcher.OpenTimeout)
	defer cancel()
	agreed := make(chan error, 1)
	// It ends with the channel, which has no deadlines: a client that does not answer to the end of one is found dead later.
	go func() { agreed <- conn.HandshakeContext(ctx) }()
	select {
	case err = <-agreed:
	case <-ctx.Done():
		err = ctx.Err()
	}
	if err == nil {
		return conn, nil
	}
	_ = channel.Close()
	if !errors.Is(ctx.Err(), context.Canceled) { // A visitor who went away says nothing about the app.
		us.dispatcher.Metrics.OpenFailed(metrics.TLS)
	}
	return nil, &openError{fmt.Errorf("TLS with the app: %w", err)}
}

// lateCloser gives a channel the one deadline that crypto/tls needs: it says goodbye before it closes, and the app may not be
// reading.
type lateCloser struct {
	registry.Conn

	mu    sync.Mutex
	timer *time.Timer
}

// SetWriteDeadline closes the channel at that time. One that has come already is for crypto/tls itself, which writes no more.
func (c *lateCloser) SetWriteDeadline(at time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.timer != nil {
		c.timer.Stop()
		c.timer = nil
	}
	if wait := time.Until(at); wait > 0 {
		c.timer = time.AfterFunc(wait, func() { _ = c.Conn.Close() })
	}
	return nil
}

// Close closes the channel.
func (c *lateCloser) Close() error {
	_ = c.SetWriteDeadline(time.Time{})
	return c.Conn.Close()
}
