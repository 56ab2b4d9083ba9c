package front

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"strconv"
	"sync"
	"time"

	"github.com/mysocketio/mysocket-injector/internal/edge/addr"
	"github.com/mysocketio/mysocket-injector/internal/edge/api"
	"github.com/mysocketio/mysocket-injector/internal/edge/feed"
	"github.com/mysocketio/mysocket-injector/internal/edge/metrics"
	"github.com/mysocketio/mysocket-injector/internal/edge/registry"
	"github.com/mysocketio/mysocket-injector/internal/edge/stats"
	"github.com/mysocketio/mysocket-injector/internal/edge/store"
)

const (
	relistenInterval = 5 * time.Second
)

// TCPConfig are the parts a TCP front is made of.
type TCPConfig struct {
	Dispatcher *Dispatcher
	Metrics    *metrics.Metrics
	Feed       *feed.Hub
	Log        *slog.Logger
	// Stats may be nil.
	Stats *stats.Stats
	// Access gets a line for each connection; nil for none.
	Access *slog.Logger
	// Host is the address to listen on, empty for all; MinPort and MaxPort the public ports to give away.
	Host             string
	MinPort, MaxPort int
	// Certificate finds those of tls sockets, HandshakeTimeout is how long their visitors may take to agree on TLS.
	Certificate      Certificate
	HandshakeTimeout time.Duration
	// ProxyHeaders are taken if not nil.
	ProxyHeaders *ProxyHeaders
}

// TCP listens on the public ports of tcp and tls sockets. Make it with NewTCP.
type TCP struct {
	cfg  TCPConfig
	ctx  context.Context
	stop context.CancelFunc
	wg   sync.WaitGroup

	mu    sync.Mutex
	ports map[int]*port
	crowd *crowd

	buffers bufferPool
}

// port is one public port that is taken.
type port struct {
	// socket is the id of the socket that has it, empty while it is only reserved.
	socket string
	ln     net.Listener
	ctx    context.Context
	cancel context.CancelFunc
}

// NewTCP makes a front that listens on nothing yet.
func NewTCP(cfg TCPConfig) *TCP {
	ctx, stop := context.WithCancel(context.Background())
	return &TCP{cfg: cfg, ctx: ctx, stop: stop, ports: map[int]*port{}, crowd: newCrowd(maxTCPConnections, maxTCPConnectionsOfAHost)}
}

// Reserve takes a free port of the range and listens on it.
func (f *TCP) Reserve() (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	size := f.cfg.MaxPort - f.cfg.MinPort + 1
	start := rand.IntN(size) // #nosec G404 -- a public port is no secret
	for i := range size {
		n := f.cfg.MinPort + (start+i)%size
		if f.ports[n] != nil || f.ctx.Err() != nil {
			continue
		}
		ln, err := f.listen(n)
		if err != nil {
			continue // Some other program has it.
		}
		f.ports[n] = f.newPort(ln)
		return n, nil
	}
	return 0, fmt.Errorf("%w: all of %d-%d are taken", api.ErrNoPort, f.cfg.MinPort, f.cfg.MaxPort)
}

func (f *TCP) listen(n int) (net.Listener, error) {
	ln, err := net.Listen("tcp", net.JoinHostPort(f.cfg.Host, strconv.Itoa(n)))
	if err != nil || f.cfg.ProxyHeaders == nil {
		return ln, err
	}
	return f.cfg.ProxyHeaders.Listen(ln), nil
}

func (f *TCP) newPort(ln net.Listener) *port {
	ctx, cancel := context.WithCancel(f.ctx)
	return &port{ln: ln, ctx: ctx, cancel: cancel}
}

// Unreserve gives a port back that Reserve took, unless a socket has got it meanwhile.
func (f *TCP) Unreserve(n int) { f.release(n, "") }

// Release stops listening on the port of a socket and closes the connections that came in on it.
func (f *TCP) Release(socket store.Socket) { f.release(socket.TCPPort, socket.ID) }

func (f *TCP) release(n int, socket string) {
	f.mu.Lock()
	defer f.mu.Unlock() // relisten sets p.ln under it
	p := f.ports[n]
	if p == nil || p.socket != socket {
		return
	}
	delete(f.ports, n)
	p.cancel()
	if p.ln != nil {
		_ = p.ln.Close()
	}
}

// Serve sends what arrives on a socket's port to the socket's tunnels. It listens on the port unless Reserve does that already. Should
// another program have it, it goes on trying.
func (f *TCP) Serve(socket store.Socket) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ctx.Err() != nil {
		return
	}
	p := f.ports[socket.TCPPort]
	if p == nil {
		p = f.newPort(nil)
		f.ports[socket.TCPPort] = p
	}
	if p.socket == socket.ID {
		return
	}
	p.socket = socket.ID
	f.wg.Add(1)
	if p.ln != nil {
		go f.accept(p, socket)
		return
	}
	ln, err := f.listen(socket.TCPPort)
	if err == nil {
		p.ln = ln
		go f.accept(p, socket)
		return
	}
	f.cfg.Log.Error("the port of a socket is taken by another program; trying again until it is free",
		"socket", socket.ID, "port", socket.TCPPort, "err", err)
	go f.relisten(p, socket)
}

func (f *TCP) relisten(p *port, socket store.Socket) {
	defer f.wg.Done()
	ticker := time.NewTicker(relistenInterval)
	defer ticker.Stop()
	for {
		select {
		case <-p.ctx.Done():
			return
		case <-ticker.C:
		}
		f.mu.Lock()
		if p.ctx.Err() != nil {
			f.mu.Unlock()
			return
		}
		ln, err := f.listen(socket.TCPPort)
		if err == nil {
			p.ln = ln
			f.wg.Add(1)
			go f.accept(p, socket)
			f.mu.Unlock()
			f.cfg.Log.Info("socket listens again", "socket", socket.ID, "port", socket.TCPPort)
			return
		}
		f.mu.Unlock()
	}
}

func (f *TCP) accept(p *port, socket store.Socket) {
	defer f.wg.Done()
	config := f.tlsOf(socket)
	for {
		conn, err := p.ln.Accept()
		if err != nil {
			if errors.Is(err, net.ErrClosed) || p.ctx.Err() != nil {
				return
			}
			select {
			case <-p.ctx.Done():
				return
			case <-time.After(100 * time.Millisecond):
			}
			continue
		}
		if !f.crowd.arrive() {
			f.cfg.Metrics.ConnectionRefused(metrics.Crowd)
			_ = conn.Close()
			continue
		}
		f.wg.Add(1)
		go func() {
			defer f.wg.Done()
			defer f.crowd.leave()
			f.serve(p.ctx, conn, config, socket)
		}()
	}
}

func (f *TCP) serve(ctx context.Context, conn net.Conn, config *tls.Config, socket store.Socket) {
	defer func() { _ = conn.Close() }()
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	start := time.Now()
	f.cfg.Metrics.Connection()
	if proxied, ok := conn.(*proxiedConn); ok && proxied.check() != nil {
		return
	}
	visitor := addr.Of(conn.RemoteAddr())
	leave, ok := f.admit(visitor.Addr())
	if !ok {
		return
	}
	defer leave()
	plain := conn
	if config != nil {
		var err error
		if plain, err = endTLS(ctx, conn, config, socket.DNSName, f.cfg.HandshakeTimeout); err != nil {
			f.cfg.Metrics.HandshakeFailed()
			f.cfg.Log.Info("connection refused", "socket", socket.ID, "visitor", visitor.Addr().String(), "err", err)
			return
		}
	}
	var origin registry.Conn
	t, release, err := f.cfg.Dispatcher.do(ctx, socket.ID, func(t *registry.Tunnel) (bool, error) {
		var err error
		origin, err = f.cfg.Dispatcher.open(ctx, t, visitor)
		return true, err
	})
	f.cfg.Stats.Record(socket.ID, err != nil, -1)
	if err != nil {
		f.cfg.Log.Info("connection refused", "socket", socket.ID, "visitor", visitor.Addr().String(), "err", err)
		return
	}
	defer release()
	timed := &timedConn{Conn: origin, start: start}
	in, out := splice(&f.buffers, plain, timed)
	took := time.Since(start)
	f.cfg.Metrics.Moved(in, out)
	if f.cfg.Access != nil {
		f.cfg.Access.Info("connection", "part", "tcp", "socket", socket.ID, "tunnel", t.TunnelID, "name", t.Name(), "visitor", visitor.Addr().String(),
			"bytes_in", in, "bytes_out", out, "first_byte_ms", timed.first.Milliseconds(), "ms", took.Milliseconds())
	}
	f.cfg.Feed.Publish(socket.ID, func() string {
		return fmt.Sprintf("%s  %-15s connection, %d bytes in, %d bytes out, %d ms", start.Format(time.TimeOnly),
			visitor.Addr(), in, out, took.Milliseconds())
	})
}

// timedConn notes when the first byte of the origin came, for the access log.
type timedConn struct {
	registry.Conn
	start time.Time
	first time.Duration
}

// Read reads what the origin sends. One goroutine calls it, and that one has ended before first is read.
func (c *timedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if n > 0 && c.first == 0 {
		c.first = time.Since(c.start)
	}
	return n, err
}

// Close stops listening, closes all connections and waits for them.
func (f *TCP) Close() {
	f.stop()
	f.mu.Lock()
	for _, p := range f.ports {
		if p.ln != nil {
			_ = p.ln.Close()
		}
	}
	f.ports = map[int]*port{}
	f.mu.Unlock()
	f.wg.Wait()
}

// splice copies both ways between a visitor and the origin, and carries the end of either direction to the other side. It
// returns when both have ended, or the channel is gone.
func splice(buffers *bufferPool, visitor net.Conn, origin registry.Conn) (in, out int64) {
	inDone := make(chan struct{})
	go func() {
		defer close(inDone)
		var err error
		in, err = copyPooled(buffers, origin, visitor)
		if err != nil {
			_ = origin.Close() // The visitor broke off: the origin must not take it for a proper end.
			return
		}
		_ = origin.CloseWrite()
	}()
	var err error
	out, err = copyPooled(buffers, visitor, origin)
	if err != nil {
		_ = origin.Close()
		_ = visitor.Close()
	} else if half, ok := visitor.(interface{ CloseWrite() error }); ok {
		_ = half.CloseWrite()
	}
	select {
	case <-inDone:
	case <-origin.Done():
		// Nothing can be sent to the origin any more; do not wait for a visitor who has nothing to say.
		_ = visitor.SetReadDeadline(time.Now())
		<-inDone
	}
	_ = origin.Close()
	return in, out
}

func copyPooled(buffers *bufferPool, dst io.Writer, src io.Reader) (int64, error) {
	buf := buffers.Get()
	defer buffers.Put(buf)
	// Hide ReadFrom and WriteTo, which would make a buffer of their own.
	return io.CopyBuffer(struct{ io.Writer }{dst}, struct{ io.Reader }{src}, buf)
}
