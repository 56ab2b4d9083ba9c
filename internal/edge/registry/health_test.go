package registry

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// channel is what an open of a test returns.
type channel struct {
	net.Conn
	closed *atomic.Int64
}

func (c channel) CloseWrite() error     { return nil }
func (c channel) Done() <-chan struct{} { return nil }
func (c channel) Close() error          { c.closed.Add(1); return nil }

// origin opens channels, or not.
type origin struct {
	down   atomic.Bool
	hangs  atomic.Bool
	mu     sync.Mutex
	asked  []time.Time
	closed atomic.Int64
}

func (o *origin) open(ctx context.Context, _ netip.AddrPort) (Conn, error) {
	o.mu.Lock()
	o.asked = append(o.asked, time.Now())
	o.mu.Unlock()
	switch {
	case o.hangs.Load():
		<-ctx.Done()
		return nil, ctx.Err()
	case o.down.Load():
		return nil, errOpen
	}
	return channel{closed: &o.closed}, nil
}

func (o *origin) count() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return len(o.asked)
}

// events notes what a registry tells.
type events struct {
	mu    sync.Mutex
	lines []string
}

func (e *events) add(line string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.lines = append(e.lines, line)
}

func (e *events) String() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return strings.Join(e.lines, ", ")
}

func (e *events) config() Config {
	return Config{
		Penalty:  time.Millisecond,
		Ejected:  func(t *Tunnel, _ error) { e.add("ejected " + t.TunnelID) },
		Probed:   func(t *Tunnel, err error) { e.add(fmt.Sprintf("probed %s %t", t.TunnelID, err == nil)) },
		Returned: func(t *Tunnel) { e.add("returned " + t.TunnelID) },
	}
}

func ask(t *Tunnel) error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	_, err := t.Open(ctx, netip.AddrPort{})
	return err
}

// picks says whom n requests one after the other would go to.
func picks(r *Registry, n int) string {
	var got []string
	for range n {
		t, release := r.Pick("s", nil)
		if t == nil {
			return "none"
		}
		got = append(got, t.TunnelID)
		release()
	}
	slices.Sort(got)
	return strings.Join(slices.Compact(got), " ")
}

func TestTunnelThatDoesNotOpenIsEjectedAndProbedBackIn(t *testing.T) {
	for _, c := range []struct {
		name string
		fail func(*origin) *atomic.Bool
	}{
		{"refuses", func(o *origin) *atomic.Bool { return &o.down }},
		{"hangs", func(o *origin) *atomic.Bool { return &o.hangs }},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var seen events
				r := New(seen.config())
				defer r.Close()
				var bad, good origin
				broken := c.fail(&bad)
				a, _ := r.Add(Info{SocketID: "s", TunnelID: "bad"}, bad.open)
				r.Add(Info{SocketID: "s", TunnelID: "good"}, good.open)
				broken.Store(true)
				for i := range maxFailures {
					if r.Snapshot()["s"][0].Ejected {
						t.Fatalf("ejected after %d failures", i)
					}
					_ = ask(a)
				}
				time.Sleep(2 * time.Millisecond) // the penalty is over
				if got := picks(r, 10); got != "good" || !r.Snapshot()["s"][0].Ejected {
					t.Errorf("requests go to %s", got)
				}
				began, before := time.Now(), bad.count()
				for bad.count() < before+7 {
					time.Sleep(time.Second)
				}
				// Seven probes: after 1, 2, 4, 8, 16, 30, 30 seconds and up to a quarter more, each hanging for 5 seconds at most.
				if took := time.Since(began); took < 91*time.Second || took > 160*time.Second {
					t.Errorf("seven probes took %s", took)
				}
				if bad.closed.Load() != 0 {
					t.Error("a probe opened a channel")
				}
				broken.Store(false)
				time.Sleep(lastProbe*5/4 + 6*time.Second)
				if got := picks(r, 10); got != "bad good" {
					t.Errorf("after its recovery requests go to %s", got)
				}
				if bad.closed.Load() != 1 {
					t.Errorf("%d channels of probes were closed, want 1", bad.closed.Load())
				}
				if s := seen.String(); !strings.HasPrefix(s, "ejected bad, probed bad false") || !strings.HasSuffix(s, "probed bad true, returned bad") {
					t.Error(s)
				}
			})
		})
	}
}

// Visitors can fill a tunnel: it is passed over, but not ejected.
func TestAFullTunnelIsNotEjected(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var seen events
		r := New(seen.config())
		defer r.Close()
		var full atomic.Bool
		var o origin
		a, _ := r.Add(Info{SocketID: "s", TunnelID: "a"}, func(ctx context.Context, visitor netip.AddrPort) (Conn, error) {
			if full.Load() {
				return nil, fmt.Errorf("open: %w", ErrFull)
			}
			return o.open(ctx, visitor)
		})
		r.Add(Info{SocketID: "s", TunnelID: "b"}, o.open)
		full.Store(true)
		for range 2 * maxFailures {
			if err := ask(a); err == nil {
				t.Fatal("a full tunnel opened a channel")
			}
		}
		if got := picks(r, 10); got != "b" {
			t.Errorf("right after that requests go to %s", got)
		}
		full.Store(false)
		time.Sleep(2 * time.Millisecond) // the penalty is over
		if got := picks(r, 10); got != "a b" || seen.String() != "" {
			t.Errorf("then requests go to %s; %s", got, &seen)
		}
		// Whatever else fails counts as before.
		o.down.Store(true)
		for range maxFailures {
			_ = ask(a)
		}
		if got := seen.String(); got != "ejected a" {
			t.Errorf("the registry told: %q", got)
		}
	})
}

func TestTheOnlyTunnelIsUsedThoughItFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var seen events
		r := New(seen.config())
		defer r.Close()
		var a, b origin
		first, _ := r.Add(Info{SocketID: "s", TunnelID: "a"}, a.open)
		second, _ := r.Add(Info{SocketID: "s", TunnelID: "b"}, b.open)
		a.down.Store(true)
		b.down.Store(true)
		waited := make(chan bool)
		go func() { waited <- r.WaitForNew(t.Context(), "s", map[*Tunnel]bool{second: true}) }()
		if !<-waited {
			t.Error("no tunnel to wait for")
		}
		for range maxFailures {
			_ = ask(first)
		}
		if got := picks(r, 4); got != "b" {
			t.Errorf("requests go to %s", got)
		}
		// A request that has tried the other one waits, and is told when there is nothing better left.
		go func() { waited <- r.WaitForNew(t.Context(), "s", map[*Tunnel]bool{second: true}) }()
		synctest.Wait()
		for range maxFailures {
			_ = ask(second)
		}
		if !<-waited {
			t.Error("the wait was in vain")
		}
		time.Sleep(2 * time.Millisecond) // the penalties are over
		if got := picks(r, 4); got != "a b" {
			t.Errorf("with all ejected requests go to %s", got)
		}
		// A visitor who gets through is as good as a probe.
		a.down.Store(false)
		if err := ask(first); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if got := picks(r, 4); got != "a" {
			t.Errorf("requests go to %s", got)
		}
		if s := seen.String(); s != "ejected a, ejected b, returned a" {
			t.Error(s)
		}
	})
}

func TestTunnelWhoseRequestsAreNotAnsweredIsEjected(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var seen events
		r := New(seen.config())
		defer r.Close()
		var mute, fine origin
		a, _ := r.Add(Info{SocketID: "s", TunnelID: "mute"}, mute.open)
		r.Add(Info{SocketID: "s", TunnelID: "fine"}, fine.open)
		a.Answered(false)
		a.Answered(false)
		a.Answered(true)
		a.Answered(false)
		a.Answered(false)
		_ = ask(a) // Its channels open: that is no answer.
		if s := seen.String(); s != "" {
			t.Error(s)
		}
		a.Answered(false)
		if got := picks(r, 4); got != "fine" {
			t.Errorf("requests go to %s", got)
		}
		time.Sleep(2 * time.Second)
		if got := picks(r, 4); got != "fine mute" {
			t.Errorf("requests go to %s", got)
		}
		a.Answered(false) // one is enough now
		time.Sleep(1900 * time.Millisecond)
		if got := picks(r, 4); got != "fine" {
			t.Errorf("the second ejection is no longer than the first: requests go to %s", got)
		}
		time.Sleep(2 * time.Second)
		a.Answered(true)
		_ = ask(a)
		if s := seen.String(); s != "ejected mute, probed mute true, returned mute, ejected mute, probed mute true, returned mute" {
			t.Error(s)
		}
	})
}

func TestProbesEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var seen events
		r := New(seen.config())
		var o origin
		o.hangs.Store(true)
		for _, id := range []string{"a", "b"} {
			tun, _ := r.Add(Info{SocketID: "s", TunnelID: id}, o.open)
			tun.Stuck()
			tun.Stuck()
		}
		time.Sleep(1500 * time.Millisecond) // The first probes hang.
		r.mu.Lock()
		a := r.pools["s"].tunnels[0]
		r.mu.Unlock()
		a.Withdraw()
		r.Close()
		a.Stuck()
		if s := seen.String(); s != "ejected a, ejected b" {
			t.Error(s)
		}
		// synctest fails the test if a goroutine is left.
	})
}

func TestSlowStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := New(Config{SlowStart: 10 * time.Second})
		defer r.Close()
		old := add(r, "old", opens)
		time.Sleep(10 * time.Second)
		held := map[*Tunnel]int{}
		take := func(n int) {
			for range n {
				tun, _ := r.Pick("s", nil)
				held[tun]++
			}
		}
		take(8)
		fresh := add(r, "fresh", opens)
		take(3)
		if held[fresh] != 1 || held[old] != 10 {
			t.Errorf("at the start the new tunnel has %d of 11", held[fresh])
		}
		time.Sleep(5 * time.Second)
		take(7)
		if held[fresh] != 6 || held[old] != 12 {
			t.Errorf("at half of the slow start the new tunnel has %d of 18", held[fresh])
		}
		time.Sleep(5 * time.Second)
		take(6)
		if held[fresh] != 12 || held[old] != 12 {
			t.Errorf("after the slow start the new tunnel has %d of 24", held[fresh])
		}
	})
}

// One request after the other leaves nothing outstanding, so that new and old get the same.
func TestSlowStartLeavesIdleTunnelsEqual(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := New(Config{SlowStart: 5 * time.Second})
		defer r.Close()
		counts := map[string]int{}
		for i := range 3 {
			add(r, fmt.Sprint(i), opens)
			time.Sleep(time.Second)
		}
		for range 60 {
			tun, release := r.Pick("s", nil)
			counts[tun.TunnelID]++
			release()
		}
		for i := range 3 {
			if counts[fmt.Sprint(i)] != 20 {
				t.Errorf("the requests went %v", counts)
			}
		}
	})
}

func TestPickThat(t *testing.T) {
	r := New(Config{Penalty: time.Minute})
	defer r.Close()
	var o origin
	a, _ := r.Add(Info{SocketID: "s", TunnelID: "a"}, o.open)
	add(r, "b", opens)
	isA := func(t *Tunnel) bool { return t.TunnelID == "a" }
	for range 3 {
		tun, _ := r.PickThat("s", nil, isA) // busier each time
		if tun != a {
			t.Fatal("the wanted tunnel was not chosen")
		}
	}
	if tun, _ := r.PickThat("s", map[*Tunnel]bool{a: true}, isA); tun != nil {
		t.Error("a tried tunnel was chosen")
	}
	if tun, _ := r.PickThat("other", nil, isA); tun != nil {
		t.Error("another socket's tunnel was chosen")
	}
	o.down.Store(true)
	_ = ask(a)
	if tun, _ := r.PickThat("s", nil, isA); tun != nil {
		t.Error("a failing tunnel was chosen")
	}
	o.down.Store(false)
	_ = ask(a)
	a.Stuck()
	if tun, _ := r.PickThat("s", nil, isA); tun != nil {
		t.Error("an ejected tunnel was chosen")
	}
}
