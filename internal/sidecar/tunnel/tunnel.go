// Package tunnel is one SSH connection to an edge and what travels through it: the forward that puts the connection
// into the edge's rotation, the visitors' channels, and the keepalive that notices a dead peer.
//
// It must not know the gateway, Kubernetes, or when to try again: it connects once, and says how that ended.
package tunnel

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/mysocketio/mysocket-injector/internal/sidecar/retry"
	"github.com/mysocketio/mysocket-injector/internal/sshguard"
)

// The bounds of one connection.
const (
	// MaxChannels bounds the channels of one connection, those that wait for the app included. An idle one costs about
	// 21 KiB. One whose app does not read what a visitor sends costs up to 2.6 MiB: x/crypto/ssh gives each channel a
	// window of 2 MiB, which can't be set. The container's memory limit has to allow for as many of those as are expected.
	MaxChannels = 10_000
	// maxDials bounds how many channels dial the app at once: more than its listen backlog holds is of no use.
	maxDials = 256

	// GCPercent is the garbage collector's setting (GOGC) that suits a process of tunnels. x/crypto/ssh allocates each packet
	// that it receives; in a heap of a few MiB the default would collect after every 130 of them. An idle tunnel allocates
	// nothing, so it costs memory only under load, and GOMEMLIMIT bounds that.
	GCPercent = 400

	defaultHandshakeTimeout = 15 * time.Second
	defaultDialTimeout      = 3 * time.Second
)

// Config says where to connect, as whom, and where the visitors go.
type Config struct {
	// Address is the edge's SSH server, host:port.
	Address string
	// Proxy is the proxy to connect through; nil for none. Package edgeproxy says which are allowed.
	Proxy *url.URL
	// Resolver finds the addresses of the edge's name; the machine's own when nil. Spread says which of them to go to. With a
	// proxy neither is used: it resolves the name.
	Resolver Resolver
	Spread   Spread
	// User and Signer log in; the signer normally holds a certificate.
	User   string
	Signer ssh.Signer
	// HostKeys are the only keys that the edge may have.
	HostKeys []ssh.PublicKey
	// ForwardHost and ForwardPort are what tcpip-forward asks for. With port 0 the edge chooses.
	ForwardHost string
	ForwardPort uint32
	// Name is who serves, as the edge's operator is to see it; nothing is said when it is empty.
	Name string
	// ClientVersion is the SSH version string, beginning with "SSH-2.0-".
	ClientVersion string

	// DialApp opens a connection to the app for one visitor. Its context ends after DialTimeout.
	DialApp func(context.Context) (*net.TCPConn, error)
	// Preface, when set, returns what the app is sent before a visitor's own bytes; nil for nothing. It must be small
	// enough to fit into a new connection's buffer. visitor is invalid when the edge named no IP address.
	Preface func(visitor netip.AddrPort, app *net.TCPConn) []byte

	Clock    retry.Clock
	Logger   *slog.Logger
	Observer Observer

	// HandshakeTimeout bounds the SSH handshake and login; 15 s when zero.
	HandshakeTimeout time.Duration
	// LoginPause is how long the reading of a login pauses between its parts; sshguard.Pause when zero.
	LoginPause time.Duration
	// DialTimeout bounds one dial of the app; 3 s when zero.
	DialTimeout time.Duration
}

// Observer counts what happens in a tunnel. Its methods are called from many goroutines and must not block.
type Observer interface {
	ConnectionOpened()
	ConnectionClosed()
	BytesToApp(n int)
	BytesToEdge(n int)
	// DialFailed counts a visitor that the app did not take; reason is one of the Dial constants.
	DialFailed(reason string)
	// Rejected counts a visitor that was turned away before the app was asked; reason is one of the Reject constants.
	Rejected(reason string)
	// HandshakeTook is told how long a successful SSH handshake took, login included.
	HandshakeTook(d time.Duration)
	// RoundTrip is told how long the edge took to answer a keepalive. It comes behind what is under way, as a visitor's bytes do.
	RoundTrip(d time.Duration)
}

// Tunnel is a live connection to an edge. Close must be called, also after it ended by itself.
type Tunnel struct {
	cfg     Config
	home    bool
	conn    ssh.Conn
	logger  *slog.Logger
	buffers bufferPool
	forward forward
	flood   *flood
	open    counter
	dials   chan struct{}

	lastDial atomic.Int64 // unix nanoseconds of the newest successful dial of the app

	ctx    context.Context // ends with the connection
	cancel context.CancelFunc
	done   chan struct{}
	leave  chan struct{} // closed when the edge asks to reconnect

	session  chan struct{} // closed when the session has ended, or there is none
	comeBack atomic.Int64  // nanoseconds after which the edge wants to see us again

	mu      sync.Mutex
	err     error
	closed  bool
	running sync.WaitGroup
}

// Connect dials the edge, logs in and asks for the forward. Its errors are of type [*StepError]. The context bounds
// only the connecting; the tunnel lives until Close or until the connection is lost. Connect may succeed although its
// context has ended, when that happened while the edge was about to forward.
func Connect(ctx context.Context, cfg Config) (*Tunnel, error) {
	if cfg.HandshakeTimeout == 0 {
		cfg.HandshakeTimeout = defaultHandshakeTimeout
	}
	if cfg.DialTimeout == 0 {
		cfg.DialTimeout = defaultDialTimeout
	}
	if cfg.Resolver == nil {
		cfg.Resolver = net.DefaultResolver
	}
	conn, home, err := dialEdge(ctx, cfg)
	if err != nil {
		return nil, err
	}
	flood := &flood{clock: cfg.Clock}
	began := cfg.Clock.Now()
	sshConn, channels, requests, err := handshake(ctx, conn, cfg, flood)
	if err != nil {
		return nil, err
	}
	cfg.Observer.HandshakeTook(cfg.Clock.Now().Sub(began))
	t := &Tunnel{
		cfg:    cfg,
		home:   home,
		conn:   sshConn,
		logger: cfg.Logger,
		flood:  flood,
		dials:  make(chan struct{}, maxDials),
		done:   make(chan struct{}),
		leave:  make(chan struct{}),

		session: make(chan struct{}),
	}
	t.ctx, t.cancel = context.WithCancel(context.WithoutCancel(ctx))
	t.spawn(t.watch)
	t.spawn(func() { t.answerRequests(requests) })
	t.spawn(func() { t.acceptChannels(channels) })
	t.spawn(t.keepAlive)
	asking, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	stop := context.AfterFunc(ctx, func() { time.AfterFunc(forwardGrace, cancel) })
	defer stop()
	if err := t.Forward(asking); err != nil {
		t.Close()
		return nil, err
	}
	t.spawn(t.holdSession)
	return t, nil
}

// Home tells whether the connection is at its own address of the edge, of several. It isn't after a detour.
func (t *Tunnel) Home() bool { return t.home }

// Address is that of the edge, or of the proxy in between.
func (t *Tunnel) Address() netip.Addr {
	if tcp, ok := t.conn.RemoteAddr().(*net.TCPAddr); ok {
		return tcp.AddrPort().Addr().Unmap()
	}
	return netip.Addr{}
}

// Done is closed when the connection is lost or closed.
func (t *Tunnel) Done() <-chan struct{} { return t.done }

// Err says why the connection ended; nil while it lives and after Close.
func (t *Tunnel) Err() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.err
}

// ReconnectAsked is closed when the edge asks, by closing the session, that the tunnel be opened anew elsewhere.
func (t *Tunnel) ReconnectAsked() <-chan struct{} { return t.leave }

// ComeBack returns after what time the edge wants to see us again; zero when it said nothing of that. It may be asked once
// the tunnel has ended, or the edge has asked to reconnect.
func (t *Tunnel) ComeBack() time.Duration {
	<-t.session // what the edge said there may still be on its way to us
	return time.Duration(t.comeBack.Load())
}

// Open returns how many visitors' connections are open, those that wait for the app included.
func (t *Tunnel) Open() int { return t.open.value() }

// WaitIdle waits until no visitor's connection is open. It returns nil then, and also when the tunnel has ended.
func (t *Tunnel) WaitIdle(ctx context.Context) error {
	select {
	case <-t.open.idle():
		return nil
	case <-t.done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// LastDial returns when the app last took a visitor's connection; the zero time when it never did.
func (t *Tunnel) LastDial() time.Time {
	if at := t.lastDial.Load(); at != 0 {
		return time.Unix(0, at)
	}
	return time.Time{}
}

// Close ends the connection with everything in it, and returns when all its goroutines have.
func (t *Tunnel) Close() {
	t.mu.Lock()
	t.closed = true
	t.mu.Unlock()
	t.fail(nil)
	t.running.Wait()
}

// watch waits for the end of the connection.
func (t *Tunnel) watch() {
	err := t.conn.Wait()
	lost, ok := errors.AsType[*LostError](err) // our own refusal of a key exchange
	if !ok {
		lost = &LostError{Reason: LostClosed, Err: err}
	}
	t.fail(lost)
	close(t.done)
}

// fail records why the connection ends, unless that is known, and ends it.
func (t *Tunnel) fail(err error) {
	t.mu.Lock()
	if t.err == nil && !t.closed {
		t.err = err
	}
	t.mu.Unlock()
	t.cancel()
	// The error of closing what may be broken says nothing.
	_ = t.conn.Close()
}

// spawn runs f on a goroutine that Close waits for. It returns false, and runs nothing, after Close.
func (t *Tunnel) spawn(f func()) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return false
	}
	t.running.Go(f)
	return true
}

var errClosed = errors.New("the tunnel is closed")

// request sends a global request and waits for its answer, at most until ctx ends. SSH answers requests in order, so
// one that is not answered holds up those behind it; that is why the context bounds only the waiting.
func (t *Tunnel) request(ctx context.Context, name string, payload []byte) (bool, []byte, error) {
	type answer struct {
		ok   bool
		data []byte
		err  error
	}
	answers := make(chan answer, 1)
	if !t.spawn(func() {
		ok, data, err := t.conn.SendRequest(name, true, payload)
		answers <- answer{ok, data, err}
	}) {
		return false, nil, errClosed
	}
	select {
	case a := <-answers:
		return a.ok, a.data, a.err
	case <-ctx.Done():
		return false, nil, context.Cause(ctx)
	}
}

// answerRequests answers the edge's global requests. A failure is the right answer to a keepalive, and to all that we
// don't know.
func (t *Tunnel) answerRequests(requests <-chan *ssh.Request) {
	for request := range requests {
		t.useless()
		_ = request.Reply(false, nil)
	}
	sshguard.Drain(t.conn)
}

// counter counts what is open and tells when nothing is.
type counter struct {
	mu    sync.Mutex
	n     int
	empty chan struct{} // nil unless somebody waits
}

// add adds one, unless that would be more than limit.
func (c *counter) add(limit int) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.n >= limit {
		return false
	}
	c.n++
	return true
}

func (c *counter) remove() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.n--
	if c.n == 0 && c.empty != nil {
		close(c.empty)
		c.empty = nil
	}
}

func (c *counter) value() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.n
}

// idle returns a channel that is closed as soon as nothing is open.
func (c *counter) idle() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.n == 0 {
		closed := make(chan struct{})
		close(closed)
		return closed
	}
	if c.empty == nil {
		c.empty = make(chan struct{})
	}
	return c.empty
}
