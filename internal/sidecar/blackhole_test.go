package sidecar

import (
	"context"
	"log/slog"
	"net/url"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mysocketio/mysocket-injector/internal/gatewayapi"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/gatewaytest"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/retry"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/retry/clocktest"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/tunnel"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/tunnel/sshtest"
)

// sidecarOf is a supervisor with a real tunnel to an edge, and an app that is always well.
type sidecarOf struct {
	sup       *supervisor
	metrics   *metrics
	attempted atomic.Pointer[time.Time] // when the newest attempt began to connect
	connected chan time.Time
	stop      func()
}

// startSidecar runs a supervisor until the test ends. Its app is dialled at a port of loopback.
func startSidecar(t testing.TB, gateway gateway, clock retry.Clock, random func() float64, socketID string, port int32) *sidecarOf {
	t.Helper()
	app := podApp{"127.0.0.1"}
	s := &sidecarOf{metrics: newMetrics("test"), connected: make(chan time.Time, 16)}
	s.sup = newSupervisor(&surroundings{
		gateway: gateway,
		connect: func(ctx context.Context, cfg tunnel.Config) (edgeTunnel, error) {
			now := time.Now()
			s.attempted.Store(&now)
			tun, err := tunnel.Connect(ctx, cfg)
			if err != nil {
				return nil, err
			}
			return tun, nil
		},
		dialApp:  app.dial,
		checkApp: func(context.Context, int32, string) error { return nil },
		probeApp: func(context.Context, *gatewayapi.Probe) error { return nil },
		proxy:    func(string) (*url.URL, error) { return nil, nil }, //nolint:nilnil // no proxy
		key:      newKey(t), version: "test", clock: clock, random: random, metrics: s.metrics, logger: slog.New(slog.DiscardHandler),
		connected: func() { s.connected <- time.Now() },
	}, gatewayapi.Assignment{SocketID: socketID, SocketName: "k8s shop.web", Service: "web", Port: port}, 0)
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { s.sup.run(ctx) })
	s.stop = func() { cancel(); running.Wait() }
	t.Cleanup(s.stop)
	return s
}

func (s *sidecarOf) awaitConnected(t testing.TB, within time.Duration) time.Time {
	t.Helper()
	select {
	case at := <-s.connected:
		return at
	case <-time.After(within):
		t.Fatalf("not connected within %s", within)
		return time.Time{}
	}
}

// A path that swallows all packets, and closes nothing, is noticed by the keepalive and left: the longest time is that between two
// keepalives, and the wait for the answer to the next.
func TestATCPBlackHoleIsLeft(t *testing.T) {
	const bound = 45 * time.Second
	edge := sshtest.Start(t)
	way := newGate(t, edge.Address)
	gateway := newFakeGateway(t)
	gateway.address, gateway.hostKey = way.address, edge.HostKey
	gateway.lifetime = time.Hour
	clock := clocktest.New(time.Now())
	apps, _ := (&world{t: t}).listen("app")
	s := startSidecar(t, gateway, clock, func() float64 { return 0 }, "s1", apps)
	s.awaitConnected(t, sshtest.Patience)
	old := edge.Await(t)
	channel := visit(t, old, old.AwaitForward(t), "app")
	clock.AwaitTimer(t, 10*time.Second) // the keepalive's

	// The worst moment: right after an answered keepalive.
	if n := way.swallow(); n != 1 {
		t.Fatalf("%d connections went through the gate, want 1", n)
	}
	began := clock.Now()
	clock.Advance(10 * time.Second)
	clock.AwaitTimer(t, 20*time.Second) // the wait for the answer
	if n := s.metrics.value(t, "reconnects_total", tunnel.LostKeepalive); n != 0 {
		t.Errorf("the connection was given up before an answer was late")
	}
	clock.Advance(20 * time.Second)
	gatewaytest.Eventually(t, "the black hole is noticed", func() bool { return s.metrics.value(t, "reconnects_total", tunnel.LostKeepalive) == 1 })
	if noticed := clock.Now().Sub(began); noticed > bound {
		t.Errorf("noticed after %s, want at most %s", noticed, bound)
	}
	// The back-off, and what else waits.
	gatewaytest.Eventually(t, "it is connected again", func() bool {
		clock.Advance(100 * time.Millisecond)
		return len(s.connected) > 0
	})
	again := edge.Await(t)
	_ = visit(t, again, again.AwaitForward(t), "app").Close()
	_ = channel.Close()
}
