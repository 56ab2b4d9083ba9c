// Package registry knows which tunnels are connected at this moment, and chooses one for each request or connection.
// It must not know how a tunnel was logged in, nor what is sent through it.
package registry

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"sort"
	"sync"
	"time"
)

// ErrWithdrawn is returned by Open when the tunnel left the rotation. Nothing was sent to it.
var ErrWithdrawn = errors.New("the tunnel has left the rotation")

// ErrFull is what an OpenFunc returns, wrapped, when the tunnel has as many channels as it may have.
var ErrFull = errors.New("full")

// Conn is a channel to an origin. Deadlines are not supported.
type Conn interface {
	net.Conn
	// CloseWrite tells the origin that no more is coming; reading goes on.
	CloseWrite() error
	// Done is closed when the channel is closed in both directions, by whichever side or cause.
	Done() <-chan struct{}
}

// OpenFunc opens one channel to the origin behind a tunnel, for a visitor at the given address.
type OpenFunc func(ctx context.Context, visitor netip.AddrPort) (Conn, error)

// Info describes a connected tunnel. It does not change.
type Info struct {
	SocketID string
	// TunnelID is unique among the connected tunnels: the id of a tunnel object, or that of a single login where
	// the account has no tunnel objects.
	TunnelID   string
	RemoteAddr string
	Since      time.Time
}

// Config are the parts a Registry is made of.
type Config struct {
	// Now may be nil.
	Now func() time.Time
	// Penalty is for how long a tunnel that refused a channel is only chosen when there is no other. Without it a dead
	// app, which never has anything outstanding, would be everybody's first choice.
	Penalty time.Duration
	// SlowStart is for how long a tunnel that has just connected, or come back, gets less than its share. 0 is not at all.
	SlowStart time.Duration
	// OpenTimeout is how long a tunnel client may take to open the channel that probes an ejected tunnel. 5 s if 0.
	OpenTimeout time.Duration
	// Ejected, Probed and Returned are told of each ejection, of each probe of an ejected tunnel, and of each return to the
	// rotation. They must not call the registry. Each may be nil.
	Ejected  func(t *Tunnel, cause error)
	Probed   func(t *Tunnel, err error)
	Returned func(t *Tunnel)
}

// Registry holds the connected tunnels of all sockets. It is safe for concurrent use.
type Registry struct {
	cfg Config
	now func() time.Time
	// ctx ends the probes, and probing waits for them.
	ctx     context.Context
	stop    context.CancelFunc
	probing sync.WaitGroup

	mu    sync.Mutex
	pools map[string]*pool
}

// pool is what one socket has. It exists while the socket has tunnels or somebody waits for one.
type pool struct {
	tunnels []*Tunnel
	// picks counts choices, so that among equals the one chosen longest ago is next.
	picks   uint64
	waiters int
	// added is closed, and made anew, when a tunnel is added or returns.
	added chan struct{}
}

// New makes an empty registry.
func New(cfg Config) *Registry {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.OpenTimeout == 0 {
		cfg.OpenTimeout = 5 * time.Second
	}
	ctx, stop := context.WithCancel(context.Background())
	return &Registry{cfg: cfg, now: cfg.Now, ctx: ctx, stop: stop, pools: map[string]*pool{}}
}

// Close ends all probes and waits for them. No tunnel that is ejected returns after it.
func (r *Registry) Close() {
	r.mu.Lock()
	r.stop() // under mu, so that no probe begins after the wait did
	r.mu.Unlock()
	r.probing.Wait()
}

// Tunnel is one connected tunnel.
type Tunnel struct {
	Info
	registry *Registry
	open     OpenFunc

	// Guarded by registry.mu.
	outstanding int
	total       uint64
	lastPick    uint64
	penaltyEnd  time.Time
	withdrawn   bool
	name        string
	onWithdraw  []func()
	// started is when it entered the rotation last: its slow start is counted from then.
	started time.Time
	health  health

	// opening counts channel opens that are on their way.
	opening sync.WaitGroup
}

// Add puts a tunnel into the rotation. If one with the same id is there, that one is taken out and returned: the newest
// login wins.
func (r *Registry) Add(info Info, open OpenFunc) (added, superseded *Tunnel) {
	t := &Tunnel{Info: info, registry: r, open: open, started: r.now()}
	t.health.ctx, t.health.cancel = context.WithCancel(r.ctx)
	r.mu.Lock()
	p := r.pool(info.SocketID)
	for _, old := range p.tunnels {
		if old.TunnelID == info.TunnelID {
			superseded = old
		}
	}
	p.tunnels = append(p.tunnels, t)
	p.wake()
	r.mu.Unlock()
	if superseded != nil {
		r.withdraw(superseded)
	}
	return t, superseded
}

// wake ends the waits of all who wait for a tunnel. The caller holds mu.
func (p *pool) wake() {
	close(p.added)
	p.added = make(chan struct{})
}

// pool returns the pool of a socket. The caller holds mu.
func (r *Registry) pool(socketID string) *pool {
	p := r.pools[socketID]
	if p == nil {
		p = &pool{added: make(chan struct{})}
		r.pools[socketID] = p
	}
	return p
}

func (r *Registry) tidy(socketID string) {
	if p := r.pools[socketID]; p != nil && len(p.tunnels) == 0 && p.waiters == 0 {
		delete(r.pools, socketID)
	}
}

// Withdraw takes the tunnel out of the rotation. When it returns no new request can choose the tunnel and no
// channel can be opened through it, except those whose opening was under way; Settle waits for them. Channels that are
// open go on.
func (t *Tunnel) Withdraw() { t.registry.withdraw(t) }

func (r *Registry) withdraw(t *Tunnel) {
	r.mu.Lock()
	if t.withdrawn {
		r.mu.Unlock()
		return
	}
	t.withdrawn = true
	t.health.cancel()
	hooks := t.onWithdraw
	t.onWithdraw = nil
	if p := r.pools[t.SocketID]; p != nil {
		p.tunnels = slices.DeleteFunc(p.tunnels, func(o *Tunnel) bool { return o == t })
		r.tidy(t.SocketID)
	}
	r.mu.Unlock()
	for _, hook := range hooks {
		hook()
	}
}

// Settle waits until the channel opens that were under way when the tunnel was withdrawn have ended, or for the limit.
// It says whether they have.
func (t *Tunnel) Settle(limit time.Duration) bool {
	done := make(chan struct{})
	go func() {
		t.opening.Wait()
		close(done)
	}()
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-done:
		return true
	case <-timer.C:
		return false
	}
}

// OnWithdraw has hook called once, when the tunnel leaves the rotation; at once if it has already.
func (t *Tunnel) OnWithdraw(hook func()) {
	t.registry.mu.Lock()
	if !t.withdrawn {
		t.onWithdraw = append(t.onWithdraw, hook)
		t.registry.mu.Unlock()
		return
	}
	t.registry.mu.Unlock()
	hook()
}

// Withdrawn says whether the tunnel has left the rotation.
func (t *Tunnel) Withdrawn() bool {
	t.registry.mu.Lock()
	defer t.registry.mu.Unlock()
	return t.withdrawn
}

// Open opens a channel to the origin. A failure counts against the tunnel, for a short time; several in a row eject it, unless it is
// full: that is the doing of its visitors, and it may have room again at any moment, before a probe would find out.
func (t *Tunnel) Open(ctx context.Context, visitor netip.AddrPort) (Conn, error) {
	r := t.registry
	r.mu.Lock()
	if t.withdrawn {
		r.mu.Unlock()
		return nil, ErrWithdrawn
	}
	t.opening.Add(1)
	r.mu.Unlock()
	defer t.opening.Done()

	conn, err := t.open(ctx, visitor)
	var ejected bool
	r.mu.Lock()
	switch {
	case err == nil:
		t.penaltyEnd = time.Time{}
		t.health.opened()
	case ctx.Err() == nil || errors.Is(ctx.Err(), context.DeadlineExceeded):
		// A visitor who went away says nothing about the tunnel.
		t.penaltyEnd = r.now().Add(r.cfg.Penalty)
		if !errors.Is(err, ErrFull) {
			t.health.unopened++
			ejected = t.health.unopened >= maxFailures && r.eject(t)
		}
	}
	r.mu.Unlock()
	if ejected {
		r.tell(t, err)
	}
	return conn, err
}

// Pick chooses the connected tunnel of a socket that is least busy, among equals the one chosen longest ago, leaving out
// those in tried, and those that are ejected unless all of the socket's are. The caller must call release once, when the
// request or connection is over. It returns nil if there is none.
func (r *Registry) Pick(socketID string, tried map[*Tunnel]bool) (t *Tunnel, release func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	p := r.pools[socketID]
	if p == nil {
		return nil, nil
	}
	now, all := r.now(), p.allEjected()
	for _, c := range p.tunnels {
		if c.eligible(tried, all) && (t == nil || c.before(t, now)) {
			t = c
		}
	}
	return r.take(p, t)
}

// PickThat chooses the tunnel of the socket that that says yes to. It returns nil if there is none, or it is not one to be
// preferred at this moment: in tried, ejected, or failing.
func (r *Registry) PickThat(socketID string, tried map[*Tunnel]bool, that func(*Tunnel) bool) (t *Tunnel, release func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	p := r.pools[socketID]
	if p == nil {
		return nil, nil
	}
	for _, c := range p.tunnels {
		if c.eligible(tried, false) && that(c) && !r.now().Before(c.penaltyEnd) {
			return r.take(p, c)
		}
	}
	return nil, nil
}

// take counts a choice. The caller holds mu.
func (r *Registry) take(p *pool, t *Tunnel) (_ *Tunnel, release func()) {
	if t == nil {
		return nil, nil
	}
	p.picks++
	t.lastPick = p.picks
	t.outstanding++
	t.total++
	var once sync.Once
	return t, func() {
		once.Do(func() {
			r.mu.Lock()
			t.outstanding--
			r.mu.Unlock()
		})
	}
}

func (p *pool) allEjected() bool {
	return !slices.ContainsFunc(p.tunnels, func(t *Tunnel) bool { return !t.health.ejected })
}

// eligible says whether the tunnel may be chosen. allEjected is whether all tunnels of its socket are ejected: then it is
// better to try one than to give up.
func (t *Tunnel) eligible(tried map[*Tunnel]bool, allEjected bool) bool {
	return !t.withdrawn && !tried[t] && (allEjected || !t.health.ejected)
}

func (t *Tunnel) before(o *Tunnel, now time.Time) bool {
	if a, b := now.Before(t.penaltyEnd), now.Before(o.penaltyEnd); a != b {
		return b
	}
	if a, b := t.load(now), o.load(now); a != b {
		return a < b
	}
	return t.lastPick < o.lastPick
}

// slowestStart is the share that a tunnel gets at the very beginning of its slow start.
const slowestStart = 0.1

// load is how busy the tunnel is: its outstanding requests, each of which counts as several while it starts slowly. With
// nothing outstanding it is idle, however new it is.
func (t *Tunnel) load(now time.Time) float64 {
	age := now.Sub(t.started)
	if age >= t.registry.cfg.SlowStart {
		return float64(t.outstanding)
	}
	share := max(slowestStart, float64(age)/float64(t.registry.cfg.SlowStart))
	return float64(t.outstanding) / share
}

// WaitForNew waits until a tunnel of the socket is added or returns, or there is one that may be chosen and is not in tried,
// or ctx ends. It says whether it is worth picking again.
func (r *Registry) WaitForNew(ctx context.Context, socketID string, tried map[*Tunnel]bool) bool {
	r.mu.Lock()
	p := r.pool(socketID)
	all := p.allEjected()
	for _, t := range p.tunnels {
		if t.eligible(tried, all) {
			r.mu.Unlock()
			return true
		}
	}
	p.waiters++
	added := p.added
	r.mu.Unlock()
	defer func() {
		r.mu.Lock()
		p.waiters--
		r.tidy(socketID)
		r.mu.Unlock()
	}()
	select {
	case <-added:
		return true
	case <-ctx.Done():
		return false
	}
}

// Status is a tunnel at one moment.
type Status struct {
	Info
	// Name is what the tunnel's client calls itself; empty when it has not said.
	Name string
	// Outstanding are the requests and connections that it carries now, Total all that chose it.
	Outstanding int
	Total       uint64
	// Ejected says that it is out of the rotation until a probe succeeds.
	Ejected bool
}

// Snapshot returns the connected tunnels of all sockets, by socket id, oldest first.
func (r *Registry) Snapshot() map[string][]Status {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make(map[string][]Status, len(r.pools))
	for id, p := range r.pools {
		for _, t := range p.tunnels {
			out[id] = append(out[id], Status{Info: t.Info, Name: t.name, Outstanding: t.outstanding, Total: t.total, Ejected: t.health.ejected})
		}
		sort.SliceStable(out[id], func(i, j int) bool { return out[id][i].Since.Before(out[id][j].Since) })
	}
	return out
}

// Count is the number of connected tunnels.
func (r *Registry) Count() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := 0
	for _, p := range r.pools {
		n += len(p.tunnels)
	}
	return n
}
