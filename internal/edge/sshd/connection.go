package sshd

import (
	"log/slog"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/mysocketio/mysocket-injector/internal/edge/metrics"
	"github.com/mysocketio/mysocket-injector/internal/edge/registry"
	"github.com/mysocketio/mysocket-injector/internal/sshguard"
)

const (
	keepaliveRequest = "keepalive@openssh.com"
	farewellTimeout  = time.Second

	// stopping is the reason for closing a connection whose client is welcome again.
	stopping = "the edge is stopping"
	flooding = "the client floods the connection with messages of no use"
)

// connection is one client that has logged in.
type connection struct {
	server *Server
	raw    *sshguard.Conn
	ssh    *ssh.ServerConn
	login  *login
	flood  *flood
	log    *slog.Logger
	// account is what the connections of the account have together.
	account *account
	since   time.Time
	done    chan struct{}
	// forwarding is closed with the first forward.
	forwarding chan struct{}

	mu       sync.Mutex
	closed   bool
	reason   string
	name     string // what the client calls itself
	forwards []*forward
	sessions map[*session]struct{}
	wg       sync.WaitGroup
}

func newConnection(s *Server, raw *sshguard.Conn, conn *ssh.ServerConn, l *login, f *flood) *connection {
	log := s.log.With("remote", conn.RemoteAddr().String(), "user", conn.User())
	return &connection{
		server: s, raw: raw, ssh: conn, login: l, flood: f, log: log, since: time.Now(),
		done: make(chan struct{}), forwarding: make(chan struct{}), sessions: map[*session]struct{}{},
	}
}

// serve runs the connection until it ends, and returns when nothing of it is left.
func (c *connection) serve(chans <-chan ssh.NewChannel, reqs <-chan *ssh.Request) {
	c.log.Info("tunnel client logged in", "client", string(c.ssh.ClientVersion()), "socket", c.login.socketID, "tunnel", c.login.tunnelID)
	// Between authentication and now what it logged in for may have been deleted; whatever is deleted from here on
	// finds this connection and closes it.
	if err := c.server.stillThere(c.login); err != nil {
		c.close("what it serves was deleted")
	}
	c.wg.Add(3)
	go func() {
		defer c.wg.Done()
		c.handleChannels(chans)
	}()
	go func() {
		defer c.wg.Done()
		c.keepalive()
	}()
	go func() {
		defer c.wg.Done()
		c.probe()
	}()
	for req := range reqs {
		c.handleRequest(req)
	}
	// The transport is gone: out of the rotation first, everything else after.
	if c.flood.isOver() {
		c.close(flooding) // with key exchanges
	}
	c.close("the client disconnected")
	close(c.done)
	sshguard.Drain(c.ssh)
	c.wg.Wait()
	c.server.forget(c)
	c.mu.Lock()
	reason := c.reason
	c.mu.Unlock()
	if reason == flooding {
		c.server.cfg.Metrics.SSHRefused(metrics.SSHFlood)
	}
	c.log.Info("tunnel client disconnected", "reason", reason, "after", time.Since(c.since).Round(time.Millisecond))
}

// close takes the connection's tunnels out of the rotation, then ends it. Only the first reason is kept.
func (c *connection) close(reason string) {
	if farewell := c.leave(reason); farewell != nil {
		farewell()
	}
}

// leave takes the connection's tunnels out of the rotation. What it returns, if anything, ends the connection, and may wait for the client
// for a moment.
func (c *connection) leave(reason string) (farewell func()) {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return nil
	}
	c.closed, c.reason = true, reason
	sessions := make([]*session, 0, len(c.sessions))
	for s := range c.sessions {
		sessions = append(sessions, s)
	}
	c.mu.Unlock()
	for _, f := range c.takeForwards() {
		c.withdraw(f)
	}
	return func() {
		// The farewell must not wait for a peer that does not read.
		_ = c.raw.SetWriteDeadline(time.Now().Add(farewellTimeout))
		for _, s := range sessions {
			if reason == stopping && c.server.cfg.ComeBack > 0 {
				s.comeBack(c.server.cfg.ComeBack)
			}
			s.close()
		}
		_ = c.ssh.Close()
	}
}

// takeForwards takes all forwards from the connection; the caller withdraws them.
func (c *connection) takeForwards() []*forward {
	c.mu.Lock()
	defer c.mu.Unlock()
	forwards := c.forwards
	c.forwards = nil
	return forwards
}

// lost says why the connection must end when something was deleted: it logged in for it, or forwards it now. It is empty if it need not.
func (c *connection) lost(gone Gone) string {
	switch {
	case gone.Users[c.login.user.ID]:
		return "its account was deleted"
	case gone.Sockets[c.login.socketID]:
		return "its socket was deleted"
	case gone.Tunnels[c.login.tunnelID]:
		return "its tunnel was deleted"
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, f := range c.forwards {
		if gone.Sockets[f.socketID] || gone.Tunnels[f.tunnelID] {
			return "what it forwards was deleted"
		}
	}
	return ""
}

// useless counts a message, and ends the connection when there have been too many. It says whether it is to be answered.
func (c *connection) useless() bool {
	if c.flood.add(1, time.Now()) {
		return true
	}
	c.close(flooding)
	return false
}

func (c *connection) handleRequest(req *ssh.Request) {
	if !c.useless() {
		return
	}
	switch req.Type {
	case "tcpip-forward":
		c.handleForward(req)
	case "cancel-tcpip-forward":
		c.handleCancel(req)
	case keepaliveRequest:
		c.reply(req, true, nil)
	default:
		c.reply(req, false, nil)
	}
}

func (c *connection) reply(req *ssh.Request, ok bool, payload []byte) {
	if !req.WantReply {
		return
	}
	if err := req.Reply(ok, payload); err != nil {
		c.log.Debug("reply could not be sent", "request", req.Type, "err", err)
	}
}

// keepalive pings the client and closes the connection when nothing has come from it for too long. A refusal is an answer: some
// clients do not know the request. So is anything else that comes: the answer waits behind what the client sends, which on a slow line takes long.
func (c *connection) keepalive() {
	ticker := time.NewTicker(c.server.cfg.KeepaliveInterval)
	defer ticker.Stop()
	answered := make(chan error, 1)
	pending, misses := false, 0
	var received int64
	for {
		select {
		case <-c.done:
			return
		case err := <-answered:
			pending, misses = false, 0
			if err != nil {
				return // The transport is gone, and serve knows.
			}
		case <-ticker.C:
			if !pending {
				pending, received = true, c.raw.Received()
				c.wg.Add(1)
				go func() {
					defer c.wg.Done()
					_, _, err := c.ssh.SendRequest(keepaliveRequest, true, nil)
					answered <- err
				}()
				continue
			}
			if now := c.raw.Received(); now != received {
				received, misses = now, 0
				continue
			}
			if misses++; misses >= c.server.cfg.KeepaliveMisses {
				c.close("the client does not answer")
				return
			}
		}
	}
}

// superseded closes the connection that held a tunnel which a newer login has taken over.
func (s *Server) superseded(t *registry.Tunnel) {
	s.mu.Lock()
	c := s.serving[t]
	delete(s.serving, t)
	s.mu.Unlock()
	if c != nil {
		c.close("a newer login serves its tunnel")
	}
}
