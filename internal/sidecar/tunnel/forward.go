package tunnel

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"
)

const (
	forwardTimeout = 15 * time.Second
	// forwardGrace is how much longer the answer is awaited when nobody wants the tunnel any more: an edge that was asked
	// may have sent visitors already, and they are not to be cut off.
	forwardGrace = 500 * time.Millisecond
	// settle is how long after the edge's acknowledgement of a withdrawal visitors are still taken: those whose
	// opening was on its way, or in our own queue, when the acknowledgement came.
	settle = 500 * time.Millisecond

	maxHostBytes = 255
)

// forward is what was asked of the edge with tcpip-forward.
type forward struct {
	mu          sync.Mutex
	state       forwardState
	port        uint32 // what the edge listens on
	withdrawnAt time.Time
}

type forwardState int

const (
	forwardNone forwardState = iota
	forwardAsked
	forwardActive
)

// forwardRequest is the payload of tcpip-forward and cancel-tcpip-forward, RFC 4254 section 7.1.
type forwardRequest struct {
	Host string
	Port uint32
}

// Forward puts the tunnel into the edge's rotation. Connect has done so already; it is for the time after Withdraw.
func (t *Tunnel) Forward(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, forwardTimeout, fmt.Errorf("the edge did not answer tcpip-forward within %s", forwardTimeout))
	defer cancel()
	t.forward.set(forwardAsked, t.cfg.ForwardPort)
	ok, reply, err := t.request(ctx, "tcpip-forward", ssh.Marshal(forwardRequest{t.cfg.ForwardHost, t.cfg.ForwardPort}))
	port := t.cfg.ForwardPort
	switch {
	case err != nil:
	case !ok:
		err = fmt.Errorf("the edge refused to forward %s:%d: is the tunnel still known to it?", t.cfg.ForwardHost, t.cfg.ForwardPort)
	case port == 0:
		port, err = boundPort(reply)
	}
	if err != nil {
		if ok || ctx.Err() == nil {
			t.forward.set(forwardNone, 0)
		} // else the edge may forward all the same, and Withdraw has something to take back
		return &StepError{StepForward, err}
	}
	t.forward.set(forwardActive, port)
	return nil
}

// boundPort reads the reply to a tcpip-forward with port 0.
func boundPort(reply []byte) (uint32, error) {
	var bound struct{ Port uint32 }
	if err := ssh.Unmarshal(reply, &bound); err != nil {
		return 0, fmt.Errorf("the edge chose a port but did not say which: %w", err)
	}
	if bound.Port == 0 || bound.Port > 65535 {
		return 0, fmt.Errorf("the edge chose port %d; a port is 1 to 65535", bound.Port)
	}
	return bound.Port, nil
}

// Withdraw takes the tunnel out of the edge's rotation and returns when the edge has acknowledged that, so that no new
// visitor comes. Those that are open stay. Withdrawing what is not forwarded does nothing; a withdrawal that failed may be
// tried again.
func (t *Tunnel) Withdraw(ctx context.Context) error {
	state, port := t.forward.current()
	if state == forwardNone {
		return nil
	}
	ok, _, err := t.request(ctx, "cancel-tcpip-forward", ssh.Marshal(forwardRequest{t.cfg.ForwardHost, port}))
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return errors.New("the edge did not acknowledge the withdrawal in time")
	case err != nil:
		return fmt.Errorf("the withdrawal could not be sent: %w", err)
	case !ok:
		return errors.New("the edge refused the withdrawal")
	}
	t.forward.withdraw(t.cfg.Clock.Now())
	return nil
}

func (f *forward) set(state forwardState, port uint32) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.state, f.port = state, port
}

func (f *forward) withdraw(now time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.state, f.withdrawnAt = forwardNone, now
}

func (f *forward) current() (forwardState, uint32) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.state, f.port
}

// visitor is the payload of a forwarded-tcpip channel, RFC 4254 section 7.2.
type visitor struct {
	Host       string
	Port       uint32
	OriginHost string
	OriginPort uint32
}

// parseVisitor reads the payload of a forwarded-tcpip channel.
func parseVisitor(payload []byte) (visitor, error) {
	var v visitor
	if err := ssh.Unmarshal(payload, &v); err != nil {
		return visitor{}, fmt.Errorf("the payload of forwarded-tcpip can't be read: %w", err)
	}
	if len(v.Host) > maxHostBytes || len(v.OriginHost) > maxHostBytes {
		return visitor{}, fmt.Errorf("the hosts of forwarded-tcpip have %d and %d bytes; allowed are %d", len(v.Host), len(v.OriginHost), maxHostBytes)
	}
	if v.Port == 0 || v.Port > 65535 || v.OriginPort > 65535 {
		return visitor{}, fmt.Errorf("the ports of forwarded-tcpip are %d and %d; allowed are 1 to 65535", v.Port, v.OriginPort)
	}
	return v, nil
}

// origin returns the visitor's address; an invalid one when the edge did not name an IP address.
func (v visitor) origin() netip.AddrPort {
	ip, err := netip.ParseAddr(v.OriginHost)
	if err != nil {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(ip.Unmap().WithZone(""), uint16(v.OriginPort)) //nolint:gosec // parseVisitor checked the range
}

// matches tells whether a visitor belongs to the forward. While the answer to port 0 is on its way any port may be the
// right one, and for a moment after a withdrawal there are visitors who came before it.
func (f *forward) matches(host string, v visitor, now time.Time) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if v.Host != host {
		return false
	}
	switch f.state {
	case forwardAsked:
		return f.port == 0 || v.Port == f.port
	case forwardActive:
		return v.Port == f.port
	}
	return v.Port == f.port && !f.withdrawnAt.IsZero() && now.Sub(f.withdrawnAt) < settle
}
