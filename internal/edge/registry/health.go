package registry

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"time"
)

const (
	// maxFailures is how many failures in a row eject a tunnel.
	maxFailures = 3
	// An ejected tunnel is probed after firstProbe, and after twice the time again each time that fails, up to lastProbe.
	firstProbe = time.Second
	lastProbe  = 30 * time.Second
)

var (
	errUnanswered = fmt.Errorf("%d requests in a row got no answer in time", maxFailures)
	errStuck      = errors.New("the client answers no opening of a channel, though its connection is alive")
)

// probeVisitor is whom probes are for. Clients expect an IP address; nobody has this one.
var probeVisitor = netip.AddrPortFrom(netip.IPv4Unspecified(), 0)

// health is what is known of whether a tunnel works. It is guarded by registry.mu, but for ctx, which ends with the tunnel.
type health struct {
	ctx    context.Context
	cancel context.CancelFunc

	// works is told when a visitor's channel opens though the tunnel is ejected, which happens when all of a socket's are.
	works chan struct{}

	// unopened and unanswered are the failures in a row: channels that did not open, requests that got no answer.
	unopened, unanswered int
	ejected              bool
	// delay is the time to the next probe. It is kept when a probe succeeds, until a visitor's request does: what only
	// probes get through stays out for longer each time.
	delay time.Duration
}

// opened notes that a channel for a visitor was opened. It says nothing of whether requests are answered.
func (h *health) opened() {
	h.unopened = 0
	switch {
	case h.unanswered >= maxFailures:
	case h.ejected:
		select {
		case h.works <- struct{}{}:
		default:
		}
	case h.unanswered == 0:
		h.delay = 0
	}
}

// Answered notes whether a request that was sent through the tunnel got an answer in time. Some in a row that did not eject
// the tunnel.
func (t *Tunnel) Answered(answered bool) {
	r := t.registry
	r.mu.Lock()
	if answered {
		t.health.unanswered = 0
		r.mu.Unlock()
		return
	}
	t.health.unanswered++
	ejected := t.health.unanswered >= maxFailures && r.eject(t)
	r.mu.Unlock()
	if ejected {
		r.tell(t, errUnanswered)
	}
}

// Stuck takes the tunnel out of the rotation until a channel can be opened: its client is known to answer no opening.
func (t *Tunnel) Stuck() {
	t.registry.mu.Lock()
	ejected := t.registry.eject(t)
	t.registry.mu.Unlock()
	if ejected {
		t.registry.tell(t, errStuck)
	}
}

// eject takes a tunnel out of the rotation and starts to probe it. It says whether the tunnel was in the rotation. The caller
// holds mu.
func (r *Registry) eject(t *Tunnel) bool {
	if t.withdrawn || t.health.ejected || r.ctx.Err() != nil {
		return false
	}
	t.health.ejected = true
	t.health.works = make(chan struct{}, 1)
	works := t.health.works
	r.probing.Add(1)
	go func() {
		defer r.probing.Done()
		t.probe(works)
	}()
	if p := r.pools[t.SocketID]; p != nil && p.allEjected() {
		p.wake() // Whoever waits may now choose one of these.
	}
	return true
}

func (r *Registry) tell(t *Tunnel, cause error) {
	if r.cfg.Ejected != nil {
		r.cfg.Ejected(t, cause)
	}
}

// probe tries to open a channel now and then, and puts the tunnel back into the rotation when one opens.
func (t *Tunnel) probe(works <-chan struct{}) {
	if !t.probeUntilGood(works) {
		return
	}
	r := t.registry
	r.mu.Lock()
	if t.health.ctx.Err() != nil { // It has ended meanwhile.
		r.mu.Unlock()
		return
	}
	t.health.ejected = false
	t.health.unopened = 0
	// A probe sees that channels open, not that requests are answered: one more that is not ejects again.
	t.health.unanswered = min(t.health.unanswered, maxFailures-1)
	t.penaltyEnd = time.Time{}
	t.started = r.now()
	if p := r.pools[t.SocketID]; p != nil {
		p.wake()
	}
	r.mu.Unlock()
	if r.cfg.Returned != nil {
		r.cfg.Returned(t)
	}
}

// probeUntilGood returns true when a channel opened, and false when the tunnel is over.
func (t *Tunnel) probeUntilGood(works <-chan struct{}) bool {
	r := t.registry
	for {
		r.mu.Lock()
		t.health.delay = min(max(2*t.health.delay, firstProbe), lastProbe)
		delay := t.health.delay
		r.mu.Unlock()
		// Up to a quarter more, so that what was ejected at once is not probed at once.
		timer := time.NewTimer(delay + rand.N(delay/4)) // #nosec G404 -- no secret
		select {
		case <-timer.C:
		case <-works:
			timer.Stop()
			return true
		case <-t.health.ctx.Done():
			timer.Stop()
			return false
		}
		err := t.probeOnce()
		if t.health.ctx.Err() != nil {
			return false
		}
		if r.cfg.Probed != nil {
			r.cfg.Probed(t, err)
		}
		if err == nil {
			return true
		}
	}
}

// probeOnce opens a channel and closes it. The app sees a connection without a byte.
func (t *Tunnel) probeOnce() error {
	ctx, cancel := context.WithTimeout(t.health.ctx, t.registry.cfg.OpenTimeout)
	defer cancel()
	conn, err := t.open(ctx, probeVisitor)
	if err != nil {
		return err
	}
	return conn.Close()
}
