package sshd

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"github.com/mysocketio/mysocket-injector/internal/edge/addr"
)

// Bounds on what strangers and accounts can make the server hold. Many replicas behind one address reconnect at once after an
// edge restart, so the bounds for one address and one account are not small.
const (
	// Of strangersFree connections that have not logged in, none is refused; from there on by chance, with a probability
	// that grows from strangersDrop percent to all at maxUnauthenticated. So when strangers fill it up, some of those who can log in still get through,
	// which with a hard bound alone none would. OpenSSH's server calls this MaxStartups.
	strangersFree                = 512
	strangersDrop                = 30
	maxUnauthenticated           = 1024
	maxUnauthenticatedPerAddress = 256

	// The live connections of one account, and of one address (for IPv6: one /64).
	maxConnectionsPerAccount = 20_000
	maxConnectionsPerAddress = 20_000
	// An account may log in loginBurst times at once, and loginRate times a second after that: two clients that take a tunnel
	// from each other would else keep the edge busy.
	loginBurst = 5_000
	loginRate  = 100
	// maxAuthTries are keys that may be refused before the connection is closed. The library allows that many questions about keys besides.
	maxAuthTries = 6

	// maxForwards and maxSessions bound one connection; a sidecar uses one of each. maxForwardsPerAccount is that of tunnels.
	maxForwards           = 64
	maxForwardsPerAccount = 20_000
	maxSessions           = 8
	// maxChannels bounds the channels to one tunnel that are open, being opened, or not closed yet by the client. Each may hold a window of 2 MiB.
	maxChannels = 4096
	// maxChannelsPerAccount bounds them over all tunnels of an account.
	maxChannelsPerAccount = 32_768

	// A connection whose client sends more than maxFlood messages of no use within floodWindow is closed. An honest client sends a keepalive every
	// few seconds, and a new key exchange after each GiB or so, which counts floodKeys for what it costs.
	maxFlood    = 1000
	floodWindow = 10 * time.Second
	floodKeys   = 20
)

// dropChance is the chance in percent that a connection is refused when n have not logged in.
func dropChance(n int) int {
	switch {
	case n < strangersFree:
		return 0
	case n >= maxUnauthenticated:
		return 100
	}
	return strangersDrop + (100-strangersDrop)*(n-strangersFree)/(maxUnauthenticated-strangersFree)
}

// crowded says by chance whether a connection is refused when n have not logged in.
func crowded(n int) bool {
	return rand.IntN(100) < dropChance(n) // #nosec G404 -- no secret
}

// account is what all connections of one account have together.
type account struct {
	connections int // guarded by the server's mu
	logins      *rate.Limiter
	forwards    atomic.Int64
	channels    atomic.Int64
}

// accounts are those with a connection, and those that logged in lately. The caller of its methods holds the server's mu.
type accounts map[string]*account

// enter counts a connection of the account, or says why there can be none. It counts by a clock that never jumps.
func (a accounts) enter(userID string) (*account, error) {
	acc := a[userID]
	if acc == nil {
		acc = &account{logins: rate.NewLimiter(loginRate, loginBurst)}
		a[userID] = acc
	}
	if acc.connections >= maxConnectionsPerAccount {
		return nil, fmt.Errorf("the account has %d connections, which is the most", acc.connections)
	}
	if !acc.logins.Allow() {
		return nil, fmt.Errorf("the account logs in too often: %d times at once and %d times a second are allowed", loginBurst, loginRate)
	}
	acc.connections++
	return acc, nil
}

func (a accounts) leave(userID string) {
	acc := a[userID]
	if acc == nil {
		return
	}
	// One that has all its logins again is the same as a new one.
	if acc.connections--; acc.connections == 0 && acc.logins.Tokens() >= loginBurst {
		delete(a, userID)
	}
}

// take counts one more, if there may be.
func take(n *atomic.Int64, most int64) bool {
	if n.Add(1) > most {
		n.Add(-1)
		return false
	}
	return true
}

// flood counts what a client sends that is of no use.
type flood struct {
	mu     sync.Mutex
	began  time.Time
	points int
	over   bool // for good
}

// add says whether it is still bearable.
func (f *flood) add(points int, now time.Time) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if now.Sub(f.began) >= floodWindow {
		f.began, f.points = now, 0
	}
	f.points += points
	f.over = f.over || f.points > maxFlood
	return !f.over
}

func (f *flood) isOver() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.over
}

// strangerLog is the log of what strangers do. It writes no more than a few lines a second, and says how many it left out: they could
// else fill the disk.
type strangerLog struct {
	log     *slog.Logger
	limiter *rate.Limiter
	left    atomic.Int64
}

func newStrangerLog(log *slog.Logger) *strangerLog {
	return &strangerLog{log: log, limiter: rate.NewLimiter(5, 50)}
}

func (l *strangerLog) line(level slog.Level, text string, args ...any) {
	if !l.limiter.Allow() {
		l.left.Add(1)
		return
	}
	if left := l.left.Swap(0); left > 0 {
		args = append(args, "left_out_before", left)
	}
	l.log.Log(context.Background(), level, text, args...)
}

// addressOf is what the connections of one host have in common.
func addressOf(c *connection) netip.Addr { return addr.Host(addr.Of(c.raw.RemoteAddr()).Addr()) }
