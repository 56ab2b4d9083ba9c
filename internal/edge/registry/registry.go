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
}

// Registry holds the connected tunnels of all sockets. It is safe for concurrent use.
type Registry struct {
	now     func() time.Time
	penalty time.Duration

	mu    sync.Mutex
	pools map[string]*pool
}

// pool is what one socket has. It exists while the socket has tunnels or somebody waits for one.
type pool struct {
	tunnels []*Tunnel
	// picks counts choices, so that among equals the one chosen longest ago is next.
	picks   uint64
	waiters int
	// added is closed, and made anew, when a tunnel is added.
	added chan struct{}
}

// New makes an empty registry.
func New(cfg Config) *Registry {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Registry{now: cfg.Now, penalty: cfg.Penalty, pools: map[string]*pool{}}
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
	onWithdraw  []func()

	// opening counts channel opens that are on their way.
	opening sync.WaitGroup
}

// Add puts a tunnel into the rotation. If one with the same id is there, that one is taken out and returned: the newest
// login wins.
func (r *Registry) Add(info Info, open OpenFunc) (added, superseded *Tunnel) {
	t := &Tunnel{Info: info, registry: r, open: open}
	r.mu.Lock()
	p := r.pool(info.SocketID)
	for _, old := range p.tunnels {
		if old.TunnelID == info.TunnelID {
			superseded = old
		}
	}
	p.tunnels = append(p.tunnels, t)
	close(p.added)
	p.added = make(chan struct{})
	r.mu.Unlock()
	if superseded != nil {
		r.withdraw(superseded)
	}
	return t, superseded
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

// Open opens a channel to the origin. A failure counts against the tunnel, for a short time.
func (t *Tunnel) Open(ctx context.Context, visitor netip.AddrPort) (Conn, error) {
	t.registry.mu.Lock()
	if t.withdrawn {
		t.registry.mu.Unlock()
		return nil, ErrWithdrawn
	}
	t.opening.Add(1)
	t.registry.mu.Unlock()
	defer t.opening.Done()

	conn, err := t.open(ctx, visitor)
	t.registry.mu.Lock()
	defer t.registry.mu.Unlock()
	switch {
	case err == nil:
		t.penaltyEnd = time.Time{}
	case ctx.Err() == nil || errors.Is(ctx.Err(), context.DeadlineExceeded):
		// A visitor who went away says nothing about the tunnel.
		t.penaltyEnd = t.registry.now().Add(t.registry.penalty)
	}
	return conn, err
}

// Pick chooses the connected tunnel of a socket with the fewest outstanding requests, among equals the one chosen
// longest ago, leaving out those in tried. The caller must call release once, when the request or connection is over.
// It returns nil if there is none.
func (r *Registry) Pick(socketID string, tried map[*Tunnel]bool) (t *Tunnel, release func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	p := r.pools[socketID]
	if p == nil {
		return nil, nil
	}
	now := r.now()
	for _, c := range p.tunnels {
		if !c.withdrawn && !tried[c] && (t == nil || c.before(t, now)) {
			t = c
		}
	}
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

func (t *Tunnel) before(o *Tunnel, now time.Time) bool {
	if a, b := now.Before(t.penaltyEnd), now.Before(o.penaltyEnd); a != b {
		return b
	}
	if t.outstanding != o.outstanding {
		return t.outstanding < o.outstanding
	}
	return t.lastPick < o.lastPick
}

// WaitForNew waits until a tunnel of the socket is added, or there is one that is not in tried, or ctx ends. It says
// whether it is worth picking again.
func (r *Registry) WaitForNew(ctx context.Context, socketID string, tried map[*Tunnel]bool) bool {
	r.mu.Lock()
	p := r.pool(socketID)
	for _, t := range p.tunnels {
		if !tried[t] {
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
	// Outstanding are the requests and connections that it carries now, Total all that chose it.
	Outstanding int
	Total       uint64
}

// Snapshot returns the connected tunnels of all sockets, by socket id, oldest first.
func (r *Registry) Snapshot() map[string][]Status {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make(map[string][]Status, len(r.pools))
	for id, p := range r.pools {
		for _, t := range p.tunnels {
			out[id] = append(out[id], Status{Info: t.Info, Outstanding: t.outstanding, Total: t.total})
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
