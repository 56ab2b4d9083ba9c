// Package clocktest is a clock that stands still until a test moves it.
package clocktest

import (
	"sync"
	"testing"
	"time"

	"github.com/mysocketio/mysocket-injector/internal/sidecar/retry"
)

// Clock is a [retry.Clock] that a test moves by hand.
type Clock struct {
	mu     sync.Mutex
	now    time.Time
	timers map[*timer]struct{}
	set    chan struct{} // closed and replaced whenever a timer is set
}

// New returns a clock that shows the given time.
func New(now time.Time) *Clock {
	return &Clock{now: now, timers: make(map[*timer]struct{}), set: make(chan struct{})}
}

// Now returns what the clock shows.
func (c *Clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

// NewTimer returns a timer that fires when the clock has been moved by d.
func (c *Clock) NewTimer(d time.Duration) retry.Timer {
	t := &timer{clock: c, fired: make(chan time.Time, 1)}
	t.Reset(d)
	return t
}

// Advance moves the clock and fires the timers that are due.
func (c *Clock) Advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
	for t := range c.timers {
		if !t.due.After(c.now) {
			delete(c.timers, t)
			t.fired <- c.now
		}
	}
}

// AwaitTimer waits until a timer is pending that will fire d from now.
func (c *Clock) AwaitTimer(t testing.TB, d time.Duration) {
	t.Helper()
	deadline := time.After(10 * time.Second)
	for {
		c.mu.Lock()
		found, set := false, c.set
		for pending := range c.timers {
			found = found || pending.due.Equal(c.now.Add(d))
		}
		c.mu.Unlock()
		if found {
			return
		}
		select {
		case <-set:
		case <-deadline:
			t.Fatalf("no timer of %s was set within 10 s", d)
		}
	}
}

type timer struct {
	clock *Clock
	due   time.Time
	fired chan time.Time
}

func (t *timer) C() <-chan time.Time { return t.fired }

func (t *timer) Reset(d time.Duration) {
	t.clock.mu.Lock()
	defer t.clock.mu.Unlock()
	select {
	case <-t.fired:
	default:
	}
	t.due = t.clock.now.Add(d)
	if d <= 0 {
		delete(t.clock.timers, t)
		t.fired <- t.clock.now
		return
	}
	t.clock.timers[t] = struct{}{}
	close(t.clock.set)
	t.clock.set = make(chan struct{})
}

func (t *timer) Stop() {
	t.clock.mu.Lock()
	defer t.clock.mu.Unlock()
	delete(t.clock.timers, t)
}
