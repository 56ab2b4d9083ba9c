package sidecar

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/mysocketio/mysocket-injector/internal/gatewayapi"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/gatewayclient"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/retry"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/tunnel"
)

func newKey(t testing.TB) ssh.Signer {
	t.Helper()
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := ssh.NewSignerFromKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return signer
}

// certify signs a public key as the edge's CA does.
func certify(t testing.TB, ca ssh.Signer, publicKey string, now time.Time, lifetime time.Duration) string {
	t.Helper()
	key, _, _, _, err := ssh.ParseAuthorizedKey([]byte(publicKey))
	if err != nil {
		t.Fatal(err)
	}
	certificate := &ssh.Certificate{
		Key: key, CertType: ssh.UserCert, KeyId: "test", ValidPrincipals: []string{"user"},
		ValidAfter: uint64(now.Add(-time.Minute).Unix()), ValidBefore: uint64(now.Add(lifetime).Unix()),
	}
	if err := certificate.SignCert(rand.Reader, ca); err != nil {
		t.Fatal(err)
	}
	return authorizedKey(certificate)
}

// fakeGateway answers as a gateway and remembers what it was asked. Hooks may be nil.
type fakeGateway struct {
	t        testing.TB
	ca       ssh.Signer
	hostKey  ssh.PublicKey
	address  string
	lifetime time.Duration

	mu      sync.Mutex
	calls   []string
	reports []gatewayapi.StatusReport
	fail    func(call string, n int) error // n counts the calls of this kind from 1
	counts  map[string]int
	tunnels int
	hang    bool // deletes hang
	deaf    int  // reports fail while there are fewer tunnels
}

func newFakeGateway(t testing.TB) *fakeGateway {
	return &fakeGateway{t: t, ca: newKey(t), hostKey: newKey(t).PublicKey(), address: "edge.test:22", lifetime: 5 * time.Minute, counts: map[string]int{}}
}

func (g *fakeGateway) note(call string) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.calls = append(g.calls, call)
	g.counts[call]++
	if g.fail != nil {
		return g.fail(call, g.counts[call])
	}
	return nil
}

func (g *fakeGateway) seen() []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Clone(g.calls)
}

// reported returns the reported states, without those that last for no time at all in the bubble: whether the reporter
// sees them is chance.
func (g *fakeGateway) reported() []gatewayapi.State {
	g.mu.Lock()
	defer g.mu.Unlock()
	var states []gatewayapi.State
	for _, report := range g.reports {
		if report.State != gatewayapi.StateConnecting || report.Message != "" {
			states = append(states, report.State)
		}
	}
	return states
}

func (g *fakeGateway) lastReport() gatewayapi.StatusReport {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.reports[len(g.reports)-1]
}

func (g *fakeGateway) allReports() []gatewayapi.StatusReport {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Clone(g.reports)
}

// loseReportsUntilTunnel makes reports fail until that many tunnels were registered.
func (g *fakeGateway) loseReportsUntilTunnel(n int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.deaf = n
}

// moveTo gives the edge another address.
func (g *fakeGateway) moveTo(address string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.address = address
}

func (g *fakeGateway) registration(tunnelID, publicKey string) gatewayapi.Registration {
	g.mu.Lock()
	defer g.mu.Unlock()
	return gatewayapi.Registration{
		TunnelID: tunnelID, Certificate: certify(g.t, g.ca, publicKey, time.Now(), g.lifetime), User: "user",
		EdgeAddress: g.address, HostKeys: []string{authorizedKey(g.hostKey)}, ForwardHost: "localhost", ForwardPort: 4711,
	}
}

func (g *fakeGateway) Register(_ context.Context, _ gatewayclient.Connection, publicKey string) (gatewayapi.Registration, error) {
	if err := g.note("register"); err != nil {
		return gatewayapi.Registration{}, err
	}
	g.mu.Lock()
	g.tunnels++
	id := fmt.Sprintf("tunnel-%d", g.tunnels)
	g.mu.Unlock()
	return g.registration(id, publicKey), nil
}

func (g *fakeGateway) Renew(_ context.Context, _ gatewayclient.Connection, tunnelID, publicKey string) (gatewayapi.Registration, error) {
	if err := g.note("renew"); err != nil {
		return gatewayapi.Registration{}, err
	}
	return g.registration(tunnelID, publicKey), nil
}

func (g *fakeGateway) Report(_ context.Context, _ gatewayclient.Connection, report gatewayapi.StatusReport) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.tunnels < g.deaf {
		return errors.New("the gateway can't be reached")
	}
	g.reports = append(g.reports, report)
	return nil
}

func (g *fakeGateway) Delete(ctx context.Context, _ gatewayclient.Connection, _ string) error {
	err := g.note("delete")
	g.mu.Lock()
	hang := g.hang
	g.mu.Unlock()
	if hang {
		<-ctx.Done()
		return ctx.Err()
	}
	return err
}

// fakeTunnel is a tunnel whose connection a test ends by hand.
type fakeTunnel struct {
	mu                          sync.Mutex
	counts                      tunnelCounts
	conns                       int
	closed                      bool
	withdrawError, forwardError error
	hangWithdraw, away          bool
	err                         error
	comeBack                    time.Duration
	done, leave, idle           chan struct{}
}

func newFakeTunnel() *fakeTunnel {
	f := &fakeTunnel{done: make(chan struct{}), leave: make(chan struct{}), idle: make(chan struct{})}
	close(f.idle)
	return f
}

func (f *fakeTunnel) with(do func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	do()
}

func (f *fakeTunnel) lose(err error) {
	f.with(func() { f.err = err })
	close(f.done)
}

type tunnelCounts struct{ forwards, withdrawals int }

func (f *fakeTunnel) count() tunnelCounts {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.counts
}

// visit makes n connections open, or none.
func (f *fakeTunnel) visit(n int) {
	f.with(func() {
		if f.conns == 0 && n > 0 {
			f.idle = make(chan struct{})
		}
		if f.conns > 0 && n == 0 {
			close(f.idle)
		}
		f.conns = n
	})
}

func (f *fakeTunnel) Forward(context.Context) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.counts.forwards++
	return f.forwardError
}

func (f *fakeTunnel) Withdraw(ctx context.Context) error {
	f.mu.Lock()
	f.counts.withdrawals++
	hang, err := f.hangWithdraw, f.withdrawError
	f.mu.Unlock()
	if hang {
		<-ctx.Done()
		return ctx.Err()
	}
	return err
}

func (f *fakeTunnel) WaitIdle(ctx context.Context) error {
	f.mu.Lock()
	idle := f.idle
	f.mu.Unlock()
	select {
	case <-idle:
		return nil
	case <-f.done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (f *fakeTunnel) Done() <-chan struct{}           { return f.done }
func (f *fakeTunnel) ReconnectAsked() <-chan struct{} { return f.leave }
func (f *fakeTunnel) Home() bool                      { return !f.away }
func (f *fakeTunnel) Address() netip.Addr             { return fakeAddress }
func (f *fakeTunnel) LastDial() time.Time             { return time.Time{} }
func (f *fakeTunnel) ComeBack() time.Duration {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.comeBack
}

func (f *fakeTunnel) Err() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.err
}

func (f *fakeTunnel) Open() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.conns
}

func (f *fakeTunnel) Close() { f.with(func() { f.closed = true }) }

func (f *fakeTunnel) isClosed() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.closed
}

var fakeAddress = netip.MustParseAddr("192.0.2.7")

var errNoApp = errors.New("connection refused")

// bench is a supervisor between fakes, inside a synctest bubble.
type bench struct {
	t       *testing.T
	gateway *fakeGateway
	sup     *supervisor
	metrics *metrics
	random  func() float64

	mu      sync.Mutex
	appDown bool
	// unready makes the readiness probe fail, which takes this long.
	unready    bool
	probeTakes time.Duration
	probes     []time.Duration // since the start
	checks     []time.Duration // since the start
	attempts   []time.Duration
	configs    []tunnel.Config
	tunnels    []*fakeTunnel
	connect    func(n int) error // n counts from 1
	// addresses are how many the edge's name has, and unreachable why the connection's own can't be reached.
	addresses   int
	unreachable error
	reaches     []time.Duration // since the start
	began       time.Time
	running     sync.WaitGroup
	cancel      context.CancelFunc
}

func newBench(t *testing.T) *bench {
	b := &bench{t: t, gateway: newFakeGateway(t), metrics: newMetrics("test"), began: time.Now(), random: func() float64 { return 0.5 }}
	around := &surroundings{
		gateway: b.gateway,
		connect: func(_ context.Context, cfg tunnel.Config) (edgeTunnel, error) {
			b.mu.Lock()
			defer b.mu.Unlock()
			b.attempts = append(b.attempts, time.Since(b.began))
			b.configs = append(b.configs, cfg)
			if b.connect != nil {
				if err := b.connect(len(b.attempts)); err != nil {
					return nil, err
				}
			}
			f := newFakeTunnel()
			f.away = b.addresses > 1 && !cfg.Spread.Home && cfg.Spread.Detour%b.addresses != 0
			b.tunnels = append(b.tunnels, f)
			return f, nil
		},
		reach: func(_ context.Context, cfg tunnel.Config) error {
			b.mu.Lock()
			defer b.mu.Unlock()
			b.reaches = append(b.reaches, time.Since(b.began))
			return b.unreachable
		},
		dialApp: func(_ context.Context, port int32) (*net.TCPConn, error) {
			return nil, fmt.Errorf("dialled port %d", port)
		},
		checkApp: func(context.Context, int32, string) error {
			b.mu.Lock()
			defer b.mu.Unlock()
			b.checks = append(b.checks, time.Since(b.began))
			if b.appDown {
				return errNoApp
			}
			return nil
		},
		probeApp: func(ctx context.Context, of *gatewayapi.Probe) error {
			b.mu.Lock()
			b.probes = append(b.probes, time.Since(b.began))
			down, takes := b.unready, b.probeTakes
			b.mu.Unlock()
			timer := time.NewTimer(takes)
			defer timer.Stop()
			select {
			case <-timer.C:
			case <-ctx.Done():
				return ctx.Err()
			}
			if down {
				return errors.New("status 503")
			}
			return nil
		},
		proxy: func(string) (*url.URL, error) { return nil, nil }, //nolint:nilnil // no proxy
		key:   newKey(t), version: "test", clock: retry.System(), random: func() float64 { return b.random() },
		metrics: b.metrics, logger: slog.New(slog.DiscardHandler), connected: func() {},
	}
	b.sup = newSupervisor(around, gatewayapi.Assignment{SocketID: "s1", SocketName: "k8s shop.web", Service: "web", Port: 8000}, 0)
	return b
}

// start runs the supervisor until the test ends or stop is called.
func (b *bench) start() {
	ctx, cancel := context.WithCancel(b.t.Context())
	b.cancel = cancel
	b.running.Go(func() { b.sup.run(ctx) })
	b.t.Cleanup(b.stop)
}

func (b *bench) stop() {
	b.cancel()
	b.running.Wait()
}

func (b *bench) setApp(down bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.appDown = down
}

func (b *bench) setUnready(unready bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.unready = unready
}

func (b *bench) probed() []time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.probes)
}

// last returns the newest tunnel; nil when there is none.
func (b *bench) last() *fakeTunnel {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.tunnels) == 0 {
		return nil
	}
	return b.tunnels[len(b.tunnels)-1]
}

func (b *bench) connections() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.tunnels)
}

func (b *bench) checked() []time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.checks)
}

func (b *bench) attempted() []time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.attempts)
}

// value reads a metric, of a histogram how much it has observed: the one whose only label has the given value, or, with none given, the only one.
func (m *metrics) value(t testing.TB, name string, label ...string) float64 {
	t.Helper()
	families, err := m.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, family := range families {
		if family.GetName() != "mysocket_sidecar_"+name {
			continue
		}
		for _, metric := range family.GetMetric() {
			if len(label) == 1 && metric.GetLabel()[0].GetValue() != label[0] {
				continue
			}
			return metric.GetGauge().GetValue() + metric.GetCounter().GetValue() + float64(metric.GetHistogram().GetSampleCount())
		}
	}
	t.Fatalf("there is no metric %s%v", name, label)
	return 0
}
