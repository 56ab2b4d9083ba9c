package registry

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type clock struct{ t time.Time }

func (c *clock) now() time.Time { return c.t }

var errOpen = errors.New("refused")

func fails(context.Context, netip.AddrPort) (Conn, error) { return nil, errOpen }
func opens(context.Context, netip.AddrPort) (Conn, error) { return nil, nil }

func add(r *Registry, id string, open OpenFunc) *Tunnel {
	t, _ := r.Add(Info{SocketID: "s", TunnelID: id}, open)
	return t
}

func TestPickOrder(t *testing.T) {
	r := New(Config{})
	for i := range 3 {
		add(r, fmt.Sprint(i), opens)
	}
	order := ""
	for range 6 {
		tun, release := r.Pick("s", nil)
		order += tun.TunnelID
		release()
	}
	if order != "012012" {
		t.Errorf("idle tunnels are chosen in the order %s", order)
	}
	// Two held, so the third gets all until it has as many.
	a, _ := r.Pick("s", nil)
	b, releaseB := r.Pick("s", nil)
	c, releaseC := r.Pick("s", nil)
	if a == b || b == c || a == c {
		t.Error("three outstanding requests do not go to three tunnels")
	}
	releaseC()
	releaseC() // A second call changes nothing.
	if next, _ := r.Pick("s", nil); next != c {
		t.Error("the idle one was not chosen")
	}
	releaseB()
	if next, _ := r.Pick("s", nil); next != b {
		t.Error("the idle one was not chosen")
	}
	if tun, _ := r.Pick("s", map[*Tunnel]bool{a: true, b: true, c: true}); tun != nil {
		t.Error("a tried tunnel was chosen")
	}
	if tun, _ := r.Pick("other", nil); tun != nil {
		t.Error("another socket's tunnel was chosen")
	}
}

func TestFailingTunnelIsTheLastChoiceForAWhile(t *testing.T) {
	c := &clock{time.Unix(1000, 0)}
	r := New(Config{Now: c.now, Penalty: time.Second})
	bad, good := add(r, "bad", fails), add(r, "good", opens)
	if _, err := bad.Open(t.Context(), netip.AddrPort{}); !errors.Is(err, errOpen) {
		t.Fatal(err)
	}
	for range 5 {
		if tun, _ := r.Pick("s", nil); tun != good {
			t.Error("the failing tunnel was chosen")
		}
	}
	if tun, release := r.Pick("s", map[*Tunnel]bool{good: true}); tun != bad {
		t.Error("the failing tunnel is not even the last choice")
	} else {
		release()
	}
	c.t = c.t.Add(time.Second)
	if tun, _ := r.Pick("s", nil); tun != bad {
		t.Error("the penalty does not end")
	}
	// A visitor who leaves is not held against the tunnel.
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	fresh := add(r, "fresh", fails)
	_, _ = fresh.Open(gone, netip.AddrPort{})
	if tun, _ := r.Pick("s", nil); tun != fresh {
		t.Error("a visitor who left cost the tunnel its turn")
	}
}

func TestWithdrawAndSupersede(t *testing.T) {
	r := New(Config{})
	old := add(r, "t", opens)
	hooks := 0
	old.OnWithdraw(func() { hooks++ })
	newer, superseded := r.Add(Info{SocketID: "s", TunnelID: "t"}, opens)
	if superseded != old || !old.Withdrawn() || newer.Withdrawn() || hooks != 1 {
		t.Errorf("superseded %v, %d hooks", superseded == old, hooks)
	}
	old.Withdraw()
	old.OnWithdraw(func() { hooks++ })
	if hooks != 2 {
		t.Errorf("%d hooks ran", hooks)
	}
	if _, err := old.Open(t.Context(), netip.AddrPort{}); !errors.Is(err, ErrWithdrawn) {
		t.Errorf("open through a withdrawn tunnel: %v", err)
	}
	if n := r.Count(); n != 1 {
		t.Errorf("%d tunnels", n)
	}
	newer.Withdraw()
	if n := len(r.pools); n != 0 {
		t.Errorf("%d pools are left over", n)
	}
}

func TestSettleWaitsForOpens(t *testing.T) {
	r := New(Config{})
	entered, finish := make(chan struct{}), make(chan struct{})
	tun := add(r, "t", func(context.Context, netip.AddrPort) (Conn, error) {
		close(entered)
		<-finish
		return nil, nil
	})
	var wg sync.WaitGroup
	wg.Go(func() { _, _ = tun.Open(context.Background(), netip.AddrPort{}) })
	<-entered
	tun.Withdraw()
	if tun.Settle(time.Millisecond) {
		t.Error("settled while a channel is being opened")
	}
	close(finish)
	if !tun.Settle(time.Minute) {
		t.Error("not settled after it was opened")
	}
	wg.Wait()
}

func TestWaitForNew(t *testing.T) {
	r := New(Config{})
	got := make(chan bool)
	go func() { got <- r.WaitForNew(context.Background(), "s", nil) }()
	add(r, "t", opens) // Before or after the wait begins: both must end it.
	if !<-got {
		t.Error("the wait was in vain")
	}
	tun, _ := r.Pick("s", nil)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if r.WaitForNew(ctx, "s", map[*Tunnel]bool{tun: true}) {
		t.Error("a tunnel that was tried counts as new")
	}
	if r.WaitForNew(ctx, "other", nil) || len(r.pools) != 1 {
		t.Error("a wait for nothing left a pool")
	}
}
