// Package sidecar is the agent beside an app: it takes from the gateway which sockets the pod serves, and keeps one
// tunnel to the edge for each, or as many as it is told. It waits for the app, registers, connects, watches, drains, and tells how it is doing.
//
// It must not know Kubernetes or the Mysocket API: the gateway does. What an SSH connection is, it leaves to package tunnel.
package sidecar

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"net"
	"net/netip"
	"net/url"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/mysocketio/mysocket-injector/internal/gatewayapi"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/drain"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/gatewayclient"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/probe"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/retry"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/tunnel"
)

const (
	beatEvery = 5 * time.Second
	// beatLate is when the main loop counts as stuck.
	beatLate = 30 * time.Second

	// spreadTurns is a number with many divisors: drawn from as many turns, each of an edge's addresses gets about the same
	// number of pods, however many there are.
	spreadTurns = 27720
)

// Config is what a sidecar has to be told; the rest comes from the gateway.
type Config struct {
	GatewayURL string
	TokenFile  string
	CAFile     string
	// PodName is the pod's namespace and name, which the edge shows to its operator; it may be left out.
	PodName string
	// PodIP is where the app is dialled.
	PodIP string
	// AdminAddress is where metrics and health are served.
	AdminAddress string
	// DrainSocket is the name of the socket that the drain command asks on.
	DrainSocket string
	// DrainTimeout bounds how long the drain command waits for open connections.
	DrainTimeout time.Duration
	// ReadyGrace is when the pod becomes ready though its tunnels are not connected.
	ReadyGrace time.Duration
	// EdgeProxy returns the proxy through which to reach the edge at an address; a nil URL for none. It may be left out.
	EdgeProxy func(address string) (*url.URL, error)
	// EdgeResolver finds the addresses of the edge's name; the machine's own when nil.
	EdgeResolver tunnel.Resolver
	// Tunnels is told how many tunnels the agent is to hold, at first and when that changes. It may be left out.
	Tunnels func(n int)
	Version string
	Logger  *slog.Logger
	// Clock and Random, which draws from [0, 1), may be left out.
	Clock  retry.Clock
	Random func() float64
}

// Agent runs the supervisors of a pod.
type Agent struct {
	cfg     Config
	logger  *slog.Logger
	gateway *gatewayclient.Client
	around  *surroundings
	metrics *metrics

	snapshots chan gatewayapi.Snapshot
	ended     chan gatewayclient.Connection // whose supervisor has ended
	drains    chan chan<- []*supervisor
	connected chan struct{}
	finished  chan struct{} // closed when the main loop has ended

	lastBeat atomic.Int64 // unix nanoseconds
	ready    atomic.Bool
	readyWhy atomic.Pointer[string] // why it is so
}

// New checks the configuration and prepares an agent.
func New(cfg Config) (*Agent, error) {
	if cfg.Clock == nil {
		cfg.Clock = retry.System()
	}
	if cfg.EdgeProxy == nil {
		cfg.EdgeProxy = func(string) (*url.URL, error) { return nil, nil } //nolint:nilnil // no proxy, as net/http has it
	}
	if cfg.Random == nil {
		cfg.Random = mathrand.Float64
	}
	podIP, err := netip.ParseAddr(cfg.PodIP)
	if err != nil {
		return nil, fmt.Errorf("the pod's IP is %q; it must be an IP address", cfg.PodIP)
	}
	if cfg.DrainTimeout <= 0 || cfg.ReadyGrace < 0 {
		return nil, fmt.Errorf("the drain timeout is %s and the ready grace %s; they must not be negative, nor the first zero", cfg.DrainTimeout, cfg.ReadyGrace)
	}
	metrics := newMetrics(cfg.Version)
	gateway, err := gatewayclient.New(gatewayclient.Config{
		URL:       cfg.GatewayURL,
		TokenFile: cfg.TokenFile,
		CAFile:    cfg.CAFile,
		UserAgent: "mysocket-sidecar/" + cfg.Version,
		Clock:     cfg.Clock,
		Observe:   metrics.observeGateway,
	})
	if err != nil {
		return nil, err
	}
	// P-256, as the classic clients use: every edge takes it. The key lives as long as the process and is written nowhere.
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make an SSH key: %w", err)
	}
	key, err := ssh.NewSignerFromKey(private)
	if err != nil {
		return nil, fmt.Errorf("make an SSH key: %w", err)
	}
	a := &Agent{
		cfg:       cfg,
		logger:    cfg.Logger,
		gateway:   gateway,
		metrics:   metrics,
		snapshots: make(chan gatewayapi.Snapshot),
		ended:     make(chan gatewayclient.Connection),
		drains:    make(chan chan<- []*supervisor),
		connected: make(chan struct{}, 1),
		finished:  make(chan struct{}),
	}
	a.around = &surroundings{
		gateway: gateway,
		connect: func(ctx context.Context, cfg tunnel.Config) (edgeTunnel, error) {
			t, err := tunnel.Connect(ctx, cfg)
			if err != nil {
				return nil, err // not a nil *Tunnel in a non-nil interface
			}
			return t, nil
		},
		reach:    tunnel.Reach,
		dialApp:  podApp{cfg.PodIP}.dial,
		checkApp: podApp{cfg.PodIP}.check,
		probeApp: probe.New(cfg.PodIP, cfg.Version).Run,
		proxy:    cfg.EdgeProxy,
		resolver: cfg.EdgeResolver,
		// Pods begin anywhere, so that an edge's addresses get their share of those with one connection, too.
		spread:  tunnel.Spread{Turn: int(cfg.Random() * spreadTurns), IPv6: podIP.Unmap().Is6()},
		key:     key,
		version: cfg.Version,
		name:    cfg.PodName,
		clock:   cfg.Clock,
		random:  cfg.Random,
		metrics: metrics,
		logger:  cfg.Logger,
		connected: func() {
			select {
			case a.connected <- struct{}{}:
			default:
			}
		},
	}
	a.setReady(false, "no assignments have come from the gateway yet")
	return a, nil
}

// Run serves until ctx ends, and then leaves the edge's rotation, closes and deletes the tunnels within a few seconds.
// It returns an error only when it can't start.
func (a *Agent) Run(ctx context.Context) error {
	admin, err := net.Listen("tcp", a.cfg.AdminAddress)
	if err != nil {
		return fmt.Errorf("the admin address can't be listened on: %w", err)
	}
	drains, err := drain.Listen(a.cfg.DrainSocket)
	if err != nil {
		return errors.Join(err, admin.Close())
	}
	a.logger.Info("sidecar started", "version", a.cfg.Version, "gateway", a.cfg.GatewayURL, "admin", admin.Addr().String())

	// What serves ends only after the main loop: health and drain are answered while tunnels are being closed.
	serving, stopServing := context.WithCancel(context.WithoutCancel(ctx))
	var servers, streams sync.WaitGroup
	servers.Go(func() { a.serveAdmin(serving, admin) })
	servers.Go(func() { drain.Serve(serving, drains, a.logger, a.drain) })
	streams.Go(func() { a.followAssignments(ctx) })
	a.loop(ctx)
	streams.Wait()
	stopServing()
	servers.Wait()
	a.gateway.Close()
	a.logger.Info("sidecar ended")
	return nil
}

// fleet is the state of the main loop, which alone touches it.
type fleet struct {
	supervisors  map[gatewayclient.Connection]*supervisor
	wanted       []gatewayapi.Assignment
	haveSnapshot bool
	draining     bool
	graceOver    bool
	told         int // what Config.Tunnels was told last
	running      sync.WaitGroup
}

// loop owns the supervisors: it starts and ends them as the snapshots say.
func (a *Agent) loop(ctx context.Context) {
	defer close(a.finished)
	f := &fleet{supervisors: make(map[gatewayclient.Connection]*supervisor)}
	grace := a.cfg.Clock.NewTimer(a.cfg.ReadyGrace)
	defer grace.Stop()
	beat := a.cfg.Clock.NewTimer(beatEvery)
	defer beat.Stop()
	for {
		a.lastBeat.Store(a.cfg.Clock.Now().UnixNano())
		a.judgeReadiness(f)
		select {
		case <-ctx.Done():
			f.running.Wait()
			return
		case snapshot := <-a.snapshots:
			if f.draining {
				// A pod that ends may be assigned nothing any more. What is draining is not to be cut short by that.
				break
			}
			if !f.haveSnapshot && len(snapshot.Assignments) == 0 {
				a.logger.Info("no socket is assigned to this pod at the moment")
			}
			f.wanted, f.haveSnapshot = snapshot.Assignments, true
			a.metrics.assignments.Set(float64(len(f.wanted)))
			a.reconcile(ctx, f)
		case connection := <-a.ended:
			delete(f.supervisors, connection)
			if !f.draining {
				a.reconcile(ctx, f)
			}
		case <-a.connected:
		case <-grace.C():
			f.graceOver = true
		case <-beat.C():
			beat.Reset(beatEvery)
		case answer := <-a.drains:
			if !f.draining {
				f.draining = true
				a.metrics.drainingNow.Set(1)
				a.logger.Info("draining", "tunnels", len(f.supervisors))
			}
			list := make([]*supervisor, 0, len(f.supervisors))
			for _, s := range f.supervisors {
				s.drain()
				list = append(list, s)
			}
			answer <- list
		}
	}
}

// reconcile makes the supervisors what is wanted: one for each connection of each socket. A connection that is wanted again
// while its old supervisor is still ending is started when that is done: both use the same tunnel, and the old one deletes it.
func (a *Agent) reconcile(ctx context.Context, f *fleet) {
	wanted := make(map[gatewayclient.Connection]bool, len(f.wanted))
	for _, assignment := range f.wanted {
		for n := range max(1, assignment.Connections) {
			connection := gatewayclient.Connection{SocketID: assignment.SocketID, Number: n}
			wanted[connection] = true
			if s, ok := f.supervisors[connection]; ok {
				s.update(assignment)
				continue
			}
			s := newSupervisor(a.around, assignment, n)
			f.supervisors[connection] = s
			s.logger.Info("socket assigned", "url", assignment.URL, "port", assignment.Port)
			f.running.Go(func() {
				s.run(ctx)
				select {
				case a.ended <- connection:
				case <-ctx.Done():
				}
			})
		}
	}
	if a.cfg.Tunnels != nil && len(wanted) != f.told {
		f.told = len(wanted)
		a.cfg.Tunnels(f.told)
	}
	for connection, s := range f.supervisors {
		if !wanted[connection] && !s.retiring() {
			s.logger.Info("connection no longer assigned; closing its tunnel")
			s.retire()
		}
	}
}

// judgeReadiness makes the pod ready when it is time. It never takes that back: an edge that is down must not take the
// pod out of the cluster's own Services.
func (a *Agent) judgeReadiness(f *fleet) {
	if a.ready.Load() {
		return
	}
	connected := 0
	for _, assignment := range f.wanted {
		// One connection makes the socket reachable; the others add to it.
		for n := range max(1, assignment.Connections) {
			if s, ok := f.supervisors[gatewayclient.Connection{SocketID: assignment.SocketID, Number: n}]; ok && s.everWorked.Load() {
				connected++
				break
			}
		}
	}
	ready, why := readiness(f.haveSnapshot, f.graceOver, connected, len(f.wanted))
	a.setReady(ready, why)
	if ready {
		a.logger.Info("ready", "because", why)
	}
}

// readiness decides whether a pod that was never ready is so now, and says why.
func readiness(haveSnapshot, graceOver bool, connected, assigned int) (bool, string) {
	switch {
	case haveSnapshot && assigned == 0:
		return true, "no socket is assigned"
	case haveSnapshot && connected == assigned:
		return true, "every assigned socket has been connected"
	case graceOver:
		return true, "the grace period is over"
	case !haveSnapshot:
		return false, "no assignments have come from the gateway yet"
	}
	return false, fmt.Sprintf("%d of %d assigned sockets have been connected", connected, assigned)
}

func (a *Agent) setReady(ready bool, why string) {
	a.readyWhy.Store(&why)
	a.ready.Store(ready)
	if ready {
		a.metrics.ready.Set(1)
	}
}
