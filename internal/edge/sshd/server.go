// Package sshd is the SSH server that tunnels log in to. It authenticates them, turns their tcpip-forward requests into
// connected tunnels of the registry, and opens channels to them. It must not know what visitors speak.
package sshd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/mysocketio/mysocket-injector/internal/edge/feed"
	"github.com/mysocketio/mysocket-injector/internal/edge/pki"
	"github.com/mysocketio/mysocket-injector/internal/edge/registry"
	"github.com/mysocketio/mysocket-injector/internal/edge/store"
	"github.com/mysocketio/mysocket-injector/internal/sshguard"
)

const (
	// Bounds on what a stranger can make the server hold. Many replicas behind one address reconnect at once after
	// an edge restart, so the bound for one address is not small.
	maxUnauthenticated           = 1024
	maxUnauthenticatedPerAddress = 256
	// maxForwards and maxSessions bound one connection; a sidecar uses one of each.
	maxForwards = 64
	maxSessions = 8
	// maxChannels bounds the channels to one tunnel that are open or being opened. Each may hold a window of 2 MiB.
	maxChannels = 4096

	userTimeout = 20 * time.Second
)

// Config are the parts a Server is made of. All are required unless said otherwise.
type Config struct {
	Store    *store.Store
	Keys     *pki.Keys
	Registry *registry.Registry
	Feed     *feed.Hub
	Log      *slog.Logger
	// Version is part of the banner.
	Version string
	// URL returns a socket's public address, for the welcome text.
	URL func(store.Socket) string
	// HandshakeTimeout is how long a client may take to log in.
	HandshakeTimeout time.Duration
	// LoginPause is how long the reading of a login pauses between its parts; sshguard.Pause if zero.
	LoginPause time.Duration
	// A client is pinged every KeepaliveInterval, and dead after KeepaliveMisses intervals without an answer.
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
	cfg    Config
	sshCfg *ssh.ServerConfig
	log    *slog.Logger

	mu          sync.Mutex
	closed      bool
	handshakes  map[net.Conn]struct{}
	perAddress  map[netip.Addr]int
	connections map[*connection]struct{}
	serving     map[*registry.Tunnel]*connection
	wg          sync.WaitGroup
}

// New makes a server that does not listen yet.
func New(cfg Config) *Server {
	s := &Server{
		cfg: cfg, log: cfg.Log,
		handshakes: map[net.Conn]struct{}{}, perAddress: map[netip.Addr]int{},
		connections: map[*connection]struct{}{}, serving: map[*registry.Tunnel]*connection{},
	}
	s.sshCfg = &ssh.ServerConfig{
		PublicKeyCallback: s.authenticate,
		ServerVersion:     "SSH-2.0-mysocket-edge_" + bannerVersion(cfg.Version),
		MaxAuthTries:      6,
	}
	s.sshCfg.AddHostKey(cfg.Keys.HostKey)
	return s
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
	addr := sharedBy(addrOf(conn.RemoteAddr()).Addr())
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	if len(s.handshakes) >= maxUnauthenticated || s.perAddress[addr] >= maxUnauthenticatedPerAddress {
		s.log.Warn("SSH connection refused: too many that have not logged in", "remote", conn.RemoteAddr().String())
		return false
	}
	s.handshakes[conn] = struct{}{}
	s.perAddress[addr]++
	s.wg.Add(1)
	return true
}

func (s *Server) endHandshake(conn net.Conn) {
	addr := sharedBy(addrOf(conn.RemoteAddr()).Addr())
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.handshakes, conn)
	if s.perAddress[addr]--; s.perAddress[addr] <= 0 {
		delete(s.perAddress, addr)
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
		s.log.Info("SSH login failed", "remote", conn.RemoteAddr().String(), "err", bounded(err))
		return
	}
	c.serve(chans, reqs)
}

// bounded keeps a client from filling the log with what it sent.
func bounded(err error) string {
	text := err.Error()
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
	sshConn, chans, reqs, err := ssh.NewServerConn(guarded, s.sshCfg)
	if err != nil {
		return nil, nil, nil, err
	}
	guarded.LoginOver()
	c, err := s.enter(conn, sshConn)
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
func (s *Server) enter(conn net.Conn, sshConn *ssh.ServerConn) (*connection, error) {
	if err := conn.SetDeadline(time.Time{}); err != nil {
		return nil, err
	}
	l, ok := sshConn.Permissions.ExtraData[loginKey{}].(*login)
	if !ok {
		return nil, errors.New("login without an account")
	}
	c := newConnection(s, conn, sshConn, l)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, errors.New("the server is stopping")
	}
	s.connections[c] = struct{}{}
	return c, nil
}

func (s *Server) forget(c *connection) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.connections, c)
}

// closeWhere closes the connections that match, each with its tunnels taken out of the rotation first.
func (s *Server) closeWhere(reason string, match func(*connection) bool) {
	for _, c := range s.all() {
		if match(c) {
			c.close(reason)
		}
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

// Shutdown tells clients to reconnect, and when, by closing their sessions, then closes all connections and waits until ctx ends for
// everything to be over. The listeners are the caller's to close, before.
func (s *Server) Shutdown(ctx context.Context) error {
	s.mu.Lock()
	s.closed = true
	for conn := range s.handshakes {
		_ = conn.Close()
	}
	s.mu.Unlock()
	s.closeWhere(stopping, func(*connection) bool { return true })
	done := make(chan struct{})
	go func() {
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

// sharedBy is what connections of one host have in common: its address, or for IPv6 the /64 that a host has to itself, since
// with an address for every connection it would have no bound of its own, and could shut everybody else out.
func sharedBy(addr netip.Addr) netip.Addr {
	if addr.Is6() {
		if p, err := addr.Prefix(64); err == nil {
			return p.Addr()
		}
	}
	return addr
}

func addrOf(addr net.Addr) netip.AddrPort {
	if tcp, ok := addr.(*net.TCPAddr); ok {
		ap := tcp.AddrPort()
		return netip.AddrPortFrom(ap.Addr().Unmap().WithZone(""), ap.Port())
	}
	return netip.AddrPort{}
}
