package front

import (
	"net/netip"
	"sync"

	"github.com/mysocketio/mysocket-injector/internal/edge/addr"
	"github.com/mysocketio/mysocket-injector/internal/edge/metrics"
)

const (
	// maxTCPConnections bounds the public connections of all tcp and tls sockets together.
	maxTCPConnections = 20_000
	// maxTCPConnectionsOfAHost keeps a quarter of them the most that one host can take from the others.
	maxTCPConnectionsOfAHost = maxTCPConnections / 4
)

// crowd counts connections, in all and by host.
type crowd struct {
	most, mostOfAHost int

	mu     sync.Mutex
	all    int
	byHost map[netip.Addr]int
}

func newCrowd(most, mostOfAHost int) *crowd {
	return &crowd{most: most, mostOfAHost: mostOfAHost, byHost: map[netip.Addr]int{}}
}

// arrive counts one more connection, before it is known whose, and says whether there is room for it.
func (c *crowd) arrive() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.all >= c.most {
		return false
	}
	c.all++
	return true
}

// leave takes back what arrive counted.
func (c *crowd) leave() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.all--
}

// enter counts a connection that arrived with those of its host, if there is room for it. The caller calls leave when it is over.
func (c *crowd) enter(visitor netip.Addr) (leave func(), ok bool) {
	host := addr.Host(visitor)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.byHost[host] >= c.mostOfAHost {
		return nil, false
	}
	c.byHost[host]++
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.byHost[host]--; c.byHost[host] == 0 {
			delete(c.byHost, host)
		}
	}, true
}

// admit is enter, which it counts when it fails.
func (f *TCP) admit(visitor netip.Addr) (leave func(), ok bool) {
	if leave, ok = f.crowd.enter(visitor); !ok {
		f.cfg.Metrics.ConnectionRefused(metrics.OneHost)
	}
	return leave, ok
}
