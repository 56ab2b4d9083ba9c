package api

import (
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"
)

const (
	// An address may fail maxFailures times in a row, and once more each failureRefill after that.
	maxFailures   = 10
	failureRefill = 6 * time.Second
	maxAddresses  = 10_000
)

// throttle bounds how often an address may present a wrong password. Right ones cost nothing, so that a control plane
// behind the same address as a guesser only suffers while guessing goes on.
type throttle struct {
	now func() time.Time

	mu      sync.Mutex
	buckets map[netip.Addr]*bucket
}

type bucket struct {
	// tokens are the failures that are left at time at.
	tokens float64
	at     time.Time
}

func newThrottle(now func() time.Time) *throttle {
	return &throttle{now: now, buckets: map[netip.Addr]*bucket{}}
}

// attempt is one try that is under way. It holds a token, so that many tries at once are not a way around the bound.
type attempt struct {
	throttle *throttle
	addr     netip.Addr
	done     bool
}

func (t *throttle) begin(remote string) (*attempt, error) {
	addr := throttleKey(remote)
	t.mu.Lock()
	defer t.mu.Unlock()
	now := t.now()
	b := t.buckets[addr]
	if b == nil {
		t.makeRoom(now)
		b = &bucket{tokens: maxFailures, at: now}
		t.buckets[addr] = b
	}
	b.refill(now)
	if b.tokens < 1 {
		wait := time.Duration((1 - b.tokens) * float64(failureRefill))
		return nil, &refusal{status: http.StatusTooManyRequests, message: "too many failed logins from this address; try again later", retryAfter: wait + time.Second}
	}
	b.tokens--
	return &attempt{throttle: t, addr: addr}, nil
}

func (b *bucket) refill(now time.Time) {
	if elapsed := now.Sub(b.at); elapsed > 0 {
		b.tokens = min(maxFailures, b.tokens+float64(elapsed)/float64(failureRefill))
		b.at = now
	}
}

// makeRoom forgets addresses that have all their tries again, and if that is not enough, any: the map must not grow
// without end. The caller holds mu.
func (t *throttle) makeRoom(now time.Time) {
	if len(t.buckets) < maxAddresses {
		return
	}
	for addr, b := range t.buckets {
		if b.refill(now); b.tokens >= maxFailures {
			delete(t.buckets, addr)
		}
	}
	for addr := range t.buckets {
		if len(t.buckets) < maxAddresses {
			return
		}
		delete(t.buckets, addr)
	}
}

func (a *attempt) succeeded() {
	if a.done {
		return
	}
	a.done = true
	a.throttle.mu.Lock()
	defer a.throttle.mu.Unlock()
	if b := a.throttle.buckets[a.addr]; b != nil {
		b.tokens = min(maxFailures, b.tokens+1)
	}
}

func (a *attempt) failed() { a.done = true }

// throttleKey is the address, or for IPv6 its /64, which one host has to itself.
func throttleKey(remote string) netip.Addr {
	host, _, err := net.SplitHostPort(remote)
	if err != nil {
		return netip.Addr{}
	}
	addr, err := netip.ParseAddr(host)
	if err != nil {
		return netip.Addr{}
	}
	addr = addr.Unmap().WithZone("")
	if addr.Is6() {
		if p, err := addr.Prefix(64); err == nil {
			return p.Addr()
		}
	}
	return addr
}
