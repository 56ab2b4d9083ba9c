// Package sshd is the SSH server that tunnels log in to. It authenticates them, turns their tcpip-forward requests into
// connected tunnels of the registry, and opens channels to them. It must not know what visitors speak.
package sshd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/mysocketio/mysocket-injector/internal/edge/addr"
	"github.com/mysocketio/mysocket-injector/internal/edge/feed"
	"github.com/mysocketio/mysocket-injector/internal/edge/metrics"
	"github.com/mysocketio/mysocket-injector/internal/edge/pki"
	"github.com/mysocketio/mysocket-injector/internal/edge/registry"
	"github.com/mysocketio/mysocket-injector/internal/edge/store"
	"github.com/mysocketio/mysocket-injector/internal/sshguard"
)

// userTimeout is how long the kernel waits for a peer to acknowledge what was sent. Keepalives see to it that something was.
const userTimeout = 10 * time.Second

// Shutdown spreads the ends of connections over spreadEach for each of them, and over maxSpread at most: clients of old come back a
// fixed second later, and would do it all at once.
const (
	spreadEach = 2 * time.Millisecond
	maxSpread  = time.Second
)

// Config are the parts a Server is made of. All are required unless said otherwise.
type Config struct {
	Store    *store.Store
	Keys     *pki.Keys
	Registry *registry.Registry
	Feed     *feed.Hub
	Metrics  *metrics.Metrics
	Log      *slog.Logger
	// Version is part of the banner.
	Version string
	// URL returns a socket's public address, for the welcome text.
	URL func(store.Socket) string
	// HandshakeTimeout is how long a client may take to log in.
	HandshakeTimeout time.Duration
	// LoginPause is how long the reading of a login pauses between its parts; sshguard.Pause if zero.
	LoginPause time.Duration
	// A client is pinged every KeepaliveInterval, and dead after KeepaliveMisses intervals in which nothing came from it.
	KeepaliveInterval time.Duration
	KeepaliveMisses   int
	// ProbeTimeout is how long a client may take to answer a data-path probe. One is sent every KeepaliveInterval.
	ProbeTimeout time.Duration
	// SettleTimeout bounds how long the answer to a cancel-tcpip-forward waits for channel opens that are under way.
	SettleTimeout time.Duration
	// ComeBack is when clients are to come back after Shutdown; zero says nothing of it.
	ComeBack time.Duration
}

// Server is one SSH server. Make it with New.
type Server struct {
	cfg       Config
	log       *slog.Logger
	strangers *strangerLog

	mu          sync.Mutex
	closed      bool
	handshakes  map[net.Conn]struct{}
	perAddress  map[netip.Addr]int // of those that have not logged in
	connections map[*connection]struct{}
	fromAddress map[netip.Addr]int // of those that have
	accounts    accounts
	serving     map[*registry.Tunnel]*connection
	wg          sync.WaitGroup
}

// New makes a server that does not listen yet.
func New(cfg Config) *Server {
	return &Server{
		cfg: cfg, log: cfg.Log, strangers: newStrangerLog(cfg.Log),
		handshakes: map[net.Conn]struct{}{}, perAddress: map[netip.Addr]int{},
		connections: map[*connection]struct{}{}, fromAddress: map[netip.Addr]int{}, accounts: accounts{},
		serving: map[*registry.Tunnel]*connection{},
	}
}

// sshConfig is the library's configuration for one connection, whose key exchanges are counted.
func (s *Server) sshConfig(f *flood) *ssh.ServerConfig {
	cfg := &ssh.ServerConfig{
		PublicKeyCallback: s.authenticate,
		ServerVersion:     "SSH-2.0-mysocket-edge_" + bannerVersion(s.cfg.Version),
		MaxAuthTries:      maxAuthTries,
	}
	cfg.AddHostKey(countedKey{s.cfg.Keys.HostKey, f})
	return cfg
}

// countedKey is the host key, which signs each key exchange.
type countedKey struct {
	ssh.Signer
	flood *flood
}

var errTooManyKeys = errors.New("too many key exchanges")

func (k countedKey) Sign(rand io.Reader, data []byte) (*ssh.Signature, error) {
	if !k.flood.add(floodKeys, time.Now()) {
		return nil, errTooManyKeys
	}
	return k.Signer.Sign(rand, data)
}

// bannerVersion keeps only what RFC 4253 allows in a software version.
func bannerVersion(v string) string {
	out := []byte{}
	for i := 0; i < len(v) && len(out) < 32; i++ {
		if c := v[i]; c > ' ' && c < 0x7f && c != '-' {
			out = append(out, c)
		} else {
			out = append(out, '_')
		}
	}
	return string(out)
}

// Serve accepts connections until the listener is closed.
func (s *Server) Serve(ln net.Listener) error {
	var delay time.Duration
	for {
		conn, err := ln.Accept()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return nil
			}
			// Out of file descriptors, most likely: wait for some to come back rather than stop serving.
			delay = min(max(2*delay, 5*time.Millisecond), time.Second)
			s.log.Warn("accept failed on the SSH listener", "err", err, "retry_in", delay)
			time.Sleep(delay)
			continue
		}
		delay = 0
		if !s.admit(conn) {
			_ = conn.Close()
			continue
		}
		go s.handle(conn)
	}
}

// admit counts a new connection among those that have not logged in, if there is room.
func (s *Server) admit(conn net.Conn) bool {
	host := addr.Host(addr.Of(conn.RemoteAddr()).Addr())
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	reason := ""
	switch {
	case s.perAddress[host] >= maxUnauthenticatedPerAddress, s.fromAddress[host] >= maxConnectionsPerAddress:
		reason = metrics.SSHAddress
	case crowded(len(s.handshakes)):
		reason = metrics.SSHCrowd
	}
	if reason != "" {
		s.cfg.Metrics.SSHRefused(reason)
		s.strangers.line(slog.LevelWarn, "SSH connection refused: there are too many", "remote", conn.RemoteAddr().String(), "of", reason,
			"not_logged_in", len(s.handshakes))
		return false
	}
	s.handshakes[conn] = struct{}{}
	s.perAddress[host]++
	s.wg.Add(1)
	return true
}

func (s *Server) endHandshake(conn net.Conn) {
	host := addr.Host(addr.Of(conn.RemoteAddr()).Addr())
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.handshakes, conn)
	if s.perAddress[host]--; s.perAddress[host] <= 0 {
		delete(s.perAddress, host)
	}
}

func (s *Server) handle(conn net.Conn) {
	defer s.wg.Done()
	defer func() { _ = conn.Close() }()
	if err := tuneTCP(conn); err != nil {
		s.log.Debug("TCP options could not be set", "remote", conn.RemoteAddr().String(), "err", err)
	}
	c, chans, reqs, err := s.handshake(conn)
	if err != nil {
		s.strangers.line(slog.LevelInfo, "SSH login failed", "remote", conn.RemoteAddr().String(), "err", bounded(err.Error()))
		return
	}
	c.serve(chans, reqs)
}

// bounded keeps a client from filling the log with what it sent.
func bounded(text string) string {
	if len(text) > 300 {
		text = strings.ToValidUTF8(text[:300], "") + "..."
	}
	return text
}

// handshake logs a client in and makes it known, so that from then on a deletion closes it.
func (s *Server) handshake(conn net.Conn) (*connection, <-chan ssh.NewChannel, <-chan *ssh.Request, error) {
	defer s.endHandshake(conn)
	// The server's own clock may be pinned in tests; deadlines are the kernel's business.
	if err := conn.SetDeadline(time.Now().Add(s.cfg.HandshakeTimeout)); err != nil {
		return nil, nil, nil, err
	}
	guarded := sshguard.New(conn, s.cfg.LoginPause)
	f := &flood{}
	sshConn, chans, reqs, err := ssh.NewServerConn(guarded, s.sshConfig(f))
	if err != nil {
		s.cfg.Metrics.SSHRefused(metrics.SSHLogin)
		return nil, nil, nil, err
	}
	guarded.LoginOver()
	c, err := s.enter(guarded, sshConn, f)
	if err != nil {
		// Whatever it sent is taken, or the library waits for somebody who does.
		_ = conn.Close()
		go func() {
			for nc := range chans {
				_ = nc.Reject(ssh.ConnectionFailed, "closing")
			}
		}()
		ssh.DiscardRequests(reqs)
		sshguard.Drain(sshConn)
		return nil, nil, nil, err
	}
	return c, chans, reqs, nil
}

// enter makes a login known.
func (s *Server) enter(conn *sshguard.Conn, sshConn *ssh.ServerConn, f *flood) (*connection, error) {
	if err := conn.SetDeadline(time.Time{}); err != nil {
		return nil, err
	}
	l, ok := sshConn.Permissions.ExtraData[loginKey{}].(*login)
	if !ok {
		return nil, errors.New("login without an account")
	}
	c := newConnection(s, conn, sshConn, l, f)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, errors.New("the server is stopping")
	}
	acc, err := s.accounts.enter(l.user.ID)
	if err != nil {
		s.cfg.Metrics.SSHRefused(metrics.SSHAccount)
		return nil, err
	}
	c.account = acc
	s.connections[c] = struct{}{}
	s.fromAddress[addressOf(c)]++
	return c, nil
}

func (s *Server) forget(c *connection) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.connections, c)
	s.accounts.leave(c.login.user.ID)
	host := addressOf(c)
	if s.fromAddress[host]--; s.fromAddress[host] <= 0 {
		delete(s.fromAddress, host)
	}
}

func (s *Server) all() []*connection {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]*connection, 0, len(s.connections))
	for c := range s.connections {
		all = append(all, c)
	}
	return all // Whoever goes on does so without mu: a connection's lock comes before the server's.
}

// Gone are the ids of what was deleted.
type Gone struct{ Users, Sockets, Tunnels map[string]bool }

// Close closes the live connections of what was deleted. When it returns their tunnels are out of the rotation; it waits for no
// client.
func (s *Server) Close(gone Gone) {
	for _, c := range s.all() {
		if reason := c.lost(gone); reason != "" {
			if farewell := c.leave(reason); farewell != nil && !s.later(c, farewell) {
				farewell()
			}
		}
	}
}

// later does the rest of closing a connection, unless that has ended by itself.
func (s *Server) later(c *connection, farewell func()) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, there := s.connections[c]; !there {
		return false
	}
	s.wg.Add(1) // There is one for the connection still.
	go func() {
		defer s.wg.Done()
		farewell()
	}()
	return true
}

// Shutdown tells clients to reconnect, and when, by closing their sessions, and then closes their connections, each at a time by chance. It
// waits until ctx ends for everything to be over. The listeners are the caller's to close, before.
func (s *Server) Shutdown(ctx context.Context) error {
	s.mu.Lock()
	s.closed = true
	for conn := range s.handshakes {
		_ = conn.Close()
	}
	s.mu.Unlock()
	all := s.all()
	spread := min(time.Duration(len(all))*spreadEach, maxSpread)
	var closing sync.WaitGroup
	for _, c := range all {
		closing.Go(func() {
			wait := time.NewTimer(time.Duration(rand.Int64N(int64(spread)))) // #nosec G404 -- no secret
			defer wait.Stop()
			select {
			case <-wait.C:
			case <-c.done: // it left by itself
			case <-ctx.Done():
			}
			c.close(stopping)
		})
	}
	done := make(chan struct{})
	go func() {
		closing.Wait()
		s.wg.Wait()
		close(done)
	}()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("SSH connections did not end: %w", ctx.Err())
	}
}
