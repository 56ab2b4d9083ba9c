// Package front takes visitors in: HTTP and HTTPS by host name, TCP by port. It chooses a connected tunnel for each
// request or connection and tries another when one fails before anything is lost. It must not know how tunnels log in.
package front

import (
	"context"
	"errors"
	"net/netip"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/mysocketio/mysocket-injector/internal/edge/metrics"
	"github.com/mysocketio/mysocket-injector/internal/edge/registry"
)

const (
	// maxAttempts bounds how many tunnels are tried for one request or connection.
	maxAttempts = 20
	// After all connected tunnels have refused, they are tried again while the hold time lasts, since a tunnel that has
	// just connected may not be ready and a refusing app may be starting.
	firstBackoff = 50 * time.Millisecond
)

// errNoTunnel means that no tunnel connected while the request was held.
var errNoTunnel = errors.New("no tunnel of the socket is connected")

// openError is a channel that could not be opened: nothing of the request has been sent.
type openError struct{ err error }

func (e *openError) Error() string { return "open channel: " + e.err.Error() }
func (e *openError) Unwrap() error { return e.err }

// Dispatcher finds tunnels for requests and connections.
type Dispatcher struct {
	Registry *registry.Registry
	Metrics  *metrics.Metrics
	// Hold is how long to wait for a tunnel when none is usable; OpenTimeout how long for a channel to be opened.
	Hold        time.Duration
	OpenTimeout time.Duration
}

// open opens a channel through a tunnel for a visitor. Its errors are openErrors.
func (d *Dispatcher) open(ctx context.Context, t *registry.Tunnel, visitor netip.AddrPort) (registry.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, d.OpenTimeout)
	defer cancel()
	conn, err := t.Open(ctx, visitor)
	if err == nil {
		return conn, nil
	}
	var refused *ssh.OpenChannelError
	switch {
	case errors.Is(err, registry.ErrWithdrawn):
		d.Metrics.OpenFailed(metrics.Withdrawn)
	case errors.As(err, &refused):
		d.Metrics.OpenFailed(metrics.Refused)
	case errors.Is(err, context.DeadlineExceeded):
		d.Metrics.OpenFailed(metrics.Timeout)
	case !errors.Is(err, context.Canceled):
		d.Metrics.OpenFailed(metrics.Broken)
	}
	return nil, &openError{err}
}

// try is one attempt with one tunnel. On an error it says whether another tunnel may be tried.
type try func(t *registry.Tunnel) (again bool, err error)

// do tries the tunnels of a socket, best first, until one attempt succeeds. The caller must call release when what the
// attempt started is over.
func (d *Dispatcher) do(ctx context.Context, socketID string, attempt try) (t *registry.Tunnel, release func(), err error) {
	return d.doPreferring(ctx, socketID, nil, attempt)
}

// doPreferring is do, but the first tunnel is the one that preferred says yes to, if it is in order. preferred may be nil.
func (d *Dispatcher) doPreferring(ctx context.Context, socketID string, preferred func(*registry.Tunnel) bool, attempt try) (t *registry.Tunnel, release func(), err error) {
	hold, cancel := context.WithTimeout(ctx, d.Hold)
	defer cancel()
	tried := map[*registry.Tunnel]bool{}
	backoff := firstBackoff
	held := false
	last := errNoTunnel
	for attempts := 0; ; {
		var t *registry.Tunnel
		var release func()
		if preferred != nil {
			t, release = d.Registry.PickThat(socketID, tried, preferred)
		}
		if t == nil {
			t, release = d.Registry.Pick(socketID, tried)
		}
		if t == nil {
			if !held {
				held = true
				d.Metrics.Held()
			}
			if !d.wait(hold, socketID, tried, &backoff) {
				if ctx.Err() != nil {
					return nil, nil, ctx.Err()
				}
				return nil, nil, last
			}
			continue
		}
		attempts++
		again, err := attempt(t)
		if err == nil {
			return t, release, nil
		}
		release()
		if ctx.Err() != nil {
			return nil, nil, ctx.Err()
		}
		if !again || attempts >= maxAttempts {
			return nil, nil, err
		}
		last = err
		tried[t] = true
		d.Metrics.Retried()
	}
}

// wait waits for a tunnel that was not tried. When some were tried it forgets after a while that they were. It returns
// false when the hold time is over.
func (d *Dispatcher) wait(hold context.Context, socketID string, tried map[*registry.Tunnel]bool, backoff *time.Duration) bool {
	if len(tried) == 0 {
		return d.Registry.WaitForNew(hold, socketID, tried)
	}
	ctx, cancel := context.WithTimeout(hold, *backoff)
	defer cancel()
	if !d.Registry.WaitForNew(ctx, socketID, tried) {
		if hold.Err() != nil {
			return false
		}
		clear(tried)
		*backoff *= 2
	}
	return true
}
