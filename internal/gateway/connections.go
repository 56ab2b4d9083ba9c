package gateway

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"syscall"
	"time"
)

// source is the address that a connection comes from. Inside a cluster it is a pod's, unless the network hides it
// behind its node's.
type source = netip.Addr

func sourceOf(address string) source {
	a, err := netip.ParseAddrPort(address)
	if err != nil {
		return source{}
	}
	return a.Addr().Unmap()
}

// door is a listener that counts. Those who have not shown a valid token yet, the strangers, get few connections and
// little time, so that they can't use up what the pods need.
type door struct {
	net.Listener
	limits  limits
	failing *buckets[source]
	metrics *metrics

	// slots holds one value for each stranger. When there are as many as there may be, nobody is let in until one has
	// gone or shown a token: when every sidecar comes back at once they wait in the kernel's queue.
	slots  chan struct{}
	closed chan struct{}
	once   sync.Once

	mu        sync.Mutex
	open      int
	strangers map[source]int
	pods      map[string]int // by UID
}

func newDoor(l net.Listener, limits limits, failing *buckets[source], m *metrics) *door {
	return &door{
		Listener: l, limits: limits, failing: failing, metrics: m,
		slots:     make(chan struct{}, limits.strangers),
		closed:    make(chan struct{}),
		strangers: map[source]int{},
		pods:      map[string]int{},
	}
}

// Accept returns the next connection that may come in.
func (d *door) Accept() (net.Conn, error) {
	for {
		select {
		case d.slots <- struct{}{}:
		case <-d.closed:
			return nil, net.ErrClosed
		}
		accepted, err := d.Listener.Accept()
		if err != nil {
			<-d.slots
			return nil, err
		}
		c := &conn{Conn: accepted, door: d, source: sourceOf(accepted.RemoteAddr().String())}
		why := d.enter(c)
		if why == "" {
			return c, nil
		}
		<-d.slots
		d.metrics.connectionsRefused.WithLabelValues(why).Inc()
		_ = accepted.Close()
	}
}

// Close stops to listen.
func (d *door) Close() error {
	d.once.Do(func() { close(d.closed) })
	return d.Listener.Close()
}

// enter counts a connection, or says what it is too many of.
func (d *door) enter(c *conn) string {
	if d.failing.wait(c.source) > 0 {
		return "source_failed"
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case d.open >= d.limits.connections:
		return "open"
	case d.strangers[c.source] >= d.limits.strangersOfSource:
		return "source_unauthenticated"
	}
	noteDeadPeers(c.Conn)
	d.open++
	d.strangers[c.source]++
	d.metrics.connections.Inc()
	c.stranger = true
	c.patience = time.AfterFunc(d.limits.greeting, func() { _ = c.Close() })
	return ""
}

// conn is a connection that came through a door. Its state is guarded by the door's lock.
type conn struct {
	net.Conn
	door     *door
	source   source
	patience *time.Timer

	stranger, gone bool
	pod            string // UID, once known
}

// isKnown notes that the connection has shown the valid token of a pod. It tells whether the pod has too many
// connections for this one to stay open for another request.
func (c *conn) isKnown(pod string) (tooMany bool) {
	d := c.door
	d.mu.Lock()
	defer d.mu.Unlock()
	if c.gone {
		return true
	}
	c.noStranger()
	if c.pod != pod {
		c.noPod()
		c.pod = pod
		d.pods[pod]++
	}
	return d.pods[pod] > d.limits.connectionsOfPod
}

// isStranger tells whether the connection has not shown a valid token yet.
func (c *conn) isStranger() bool {
	c.door.mu.Lock()
	defer c.door.mu.Unlock()
	return c.stranger
}

// Close closes the connection. A stranger that never showed a valid token is counted as one that failed to.
func (c *conn) Close() error {
	d := c.door
	d.mu.Lock()
	failed := c.stranger && !c.gone
	if !c.gone {
		c.gone = true
		c.noStranger()
		c.noPod()
		d.open--
		d.metrics.connections.Dec()
	}
	d.mu.Unlock()
	if failed {
		d.failing.take(c.source)
	}
	return c.Conn.Close()
}

func (c *conn) noStranger() {
	if !c.stranger {
		return
	}
	c.stranger = false
	c.patience.Stop()
	less(c.door.strangers, c.source)
	<-c.door.slots
}

func (c *conn) noPod() {
	if c.pod != "" {
		less(c.door.pods, c.pod)
		c.pod = ""
	}
}

func less[K comparable](counts map[K]int, key K) {
	if counts[key]--; counts[key] <= 0 {
		delete(counts, key)
	}
}

// SyscallConn gives access to the socket below.
func (c *conn) SyscallConn() (syscall.RawConn, error) { return socketOf(c.Conn) }

// socketOf returns the socket below a connection.
func socketOf(c net.Conn) (syscall.RawConn, error) {
	if t, ok := c.(*tls.Conn); ok {
		c = t.NetConn()
	}
	s, ok := c.(syscall.Conn)
	if !ok {
		return nil, errors.New("the connection has no socket")
	}
	return s.SyscallConn()
}

type connKey struct{}

// withConn makes a request's connection known to connOf.
func withConn(ctx context.Context, c net.Conn) context.Context {
	if t, ok := c.(*tls.Conn); ok {
		c = t.NetConn()
	}
	return context.WithValue(ctx, connKey{}, c)
}

// connOf returns a request's connection; nil when it came through no door.
func connOf(r *http.Request) *conn {
	c, _ := r.Context().Value(connKey{}).(*conn)
	return c
}
