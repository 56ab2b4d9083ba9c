package gateway

import (
	"net/http"
	"sync"
	"testing"
	"time"

	"golang.org/x/time/rate"

	"github.com/mysocketio/mysocket-injector/internal/gatewayapi"
)

// clock is a time that stands still until it is moved.
type clock struct {
	mu sync.Mutex
	at time.Time
}

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.at
}

func (c *clock) advance(by time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.at = c.at.Add(by)
}

func TestBuckets(t *testing.T) {
	c := &clock{at: time.Unix(1000, 0)}
	b := newBuckets[string](2, 4, 3, c.now)
	for n := range 4 {
		if wait := b.wait("a"); wait != 0 {
			t.Errorf("%d: %s before the burst is over", n, wait)
		}
		if wait := b.take("a"); wait != 0 {
			t.Errorf("%d: %s within the burst", n, wait)
		}
	}
	if take, wait := b.take("a"), b.wait("a"); take != time.Second/2 || wait != take {
		t.Errorf("take says %s, wait %s", take, wait)
	}
	if wait := b.take("b"); wait != 0 {
		t.Errorf("b pays for a: %s", wait)
	}
	c.advance(time.Second / 2)
	if wait := b.take("a"); wait != 0 {
		t.Errorf("not filled: %s", wait)
	}
	// Full ones are forgotten, and there are never more than there may be.
	c.advance(3 * time.Second)
	b.take("c")
	if len(b.by) != 1 || b.by["c"] == nil {
		t.Errorf("kept %v", b.by)
	}
	for _, key := range []string{"d", "e", "f", "g"} {
		b.take(key)
		if len(b.by) > 3 || b.by[key] == nil {
			t.Errorf("kept %v", b.by)
		}
	}
}

func FuzzBuckets(f *testing.F) {
	f.Add(uint8(2), uint8(3), []byte{0, 1, 2, 200, 1, 1, 1})
	f.Fuzz(func(t *testing.T, perSecond, burst uint8, steps []byte) {
		if perSecond == 0 || burst == 0 {
			return
		}
		c := &clock{at: time.Unix(1000, 0)}
		b := newBuckets[byte](rate.Limit(perSecond), int(burst), 4, c.now)
		taken := map[byte]int{}
		for _, step := range steps {
			if step >= 128 {
				c.advance(time.Duration(step-127) * 10 * time.Millisecond)
				continue
			}
			key := step % 4
			if wait := b.take(key); wait == 0 {
				taken[key]++
			} else if wait < 0 || wait > time.Second/time.Duration(perSecond)+time.Millisecond {
				t.Fatalf("wait %s at %d a second", wait, perSecond)
			}
			most := float64(burst) + c.now().Sub(time.Unix(1000, 0)).Seconds()*float64(perSecond)
			if len(b.by) > 4 || float64(taken[key]) > most+0.001 {
				t.Fatalf("%d buckets, %d taken of %f", len(b.by), taken[key], most)
			}
		}
	})
}

// TestAPodMayNotAskTooOften: every kind of request has its own allowance, and every pod.
func TestAPodMayNotAskTooOften(t *testing.T) {
	c := newMemoryCluster()
	mad, calm := c.pod("mad"), c.pod("calm")
	at := &clock{at: time.Now()}
	c.now = at.now
	s := c.serve(t, nil)
	for name, tc := range map[string]struct {
		method, path string
		burst        int
		retryAfter   string
	}{
		"register": {"POST", memorySocket + "/tunnels", 128, "1"},
		"report":   {"PUT", memorySocket + "/status", 512, "1"},
	} {
		p := s.dial(t)
		for n := range tc.burst {
			p.request(tc.method, tc.path, mad, "{}")
			if r := p.answer(); r.StatusCode != http.StatusBadRequest {
				t.Fatalf("%s %d: %s", name, n, r.Status)
			}
		}
		p.request(tc.method, tc.path, mad, "{}")
		r := p.answer()
		if r.StatusCode != http.StatusTooManyRequests || r.Header.Get("Retry-After") != tc.retryAfter {
			t.Errorf("%s: %s, Retry-After %q", name, r.Status, r.Header.Get("Retry-After"))
		}
		p.request(tc.method, tc.path, calm, "{}")
		if r := p.answer(); r.StatusCode != http.StatusBadRequest {
			t.Errorf("%s: another pod gets %s", name, r.Status)
		}
	}
	for range 16 {
		p := s.dial(t)
		p.stream(mad)
		_ = p.Close()
		waitFor(t, "the stream's end to be noticed", func() bool { return value(t, s.metrics.streams) == 0 })
	}
	p := s.dial(t)
	p.request("GET", gatewayapi.AssignmentsPath, mad, "")
	if r := p.answer(); r.StatusCode != http.StatusTooManyRequests || r.Header.Get("Retry-After") != "2" {
		t.Errorf("stream: %s, Retry-After %q", r.Status, r.Header.Get("Retry-After"))
	}
	for _, limit := range []kind{kindStream, kindRegister, kindReport} {
		if n := value(t, s.metrics.limited.WithLabelValues(string(limit))); n != 1 {
			t.Errorf("%s was met %v times", limit, n)
		}
	}
	at.advance(2 * time.Second)
	s.dial(t).stream(mad)
}
