package sshd

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"golang.org/x/crypto/ssh"

	"github.com/mysocketio/mysocket-injector/internal/edge/registry"
)

// forward is one accepted tcpip-forward: a connected tunnel.
type forward struct {
	conn *connection
	// host is exactly what the client asked for: clients match channels by it.
	host     string
	port     uint32
	socketID string
	tunnelID string
	tunnel   *registry.Tunnel
	channels atomic.Int64
}

// forwardRequest is the payload of tcpip-forward and cancel-tcpip-forward (RFC 4254, 7.1).
type forwardRequest struct {
	Host string
	Port uint32
}

// forwardedChannel is the payload of a forwarded-tcpip channel (RFC 4254, 7.2).
type forwardedChannel struct {
	Host       string
	Port       uint32
	OriginHost string
	OriginPort uint32
}

var allowedHosts = []string{"localhost", "127.0.0.1", "", "0.0.0.0"}

func parseForwardRequest(payload []byte) (forwardRequest, error) {
	var r forwardRequest
	if err := ssh.Unmarshal(payload, &r); err != nil {
		return r, errors.New("the request cannot be read")
	}
	if !slices.Contains(allowedHosts, r.Host) {
		return r, fmt.Errorf("bind host %.64q is not localhost", r.Host)
	}
	if r.Port > 65535 {
		return r, fmt.Errorf("port %d is not a port", r.Port)
	}
	return r, nil
}

func (c *connection) handleForward(req *ssh.Request) {
	f, zero, err := c.newForward(req.Payload)
	if err != nil {
		c.log.Info("forward refused", "err", err)
		c.reply(req, false, nil)
		return
	}
	var payload []byte
	if zero {
		payload = ssh.Marshal(struct{ Port uint32 }{f.port})
	}
	// The reply goes first: a client that does not yet know that its forward stands refuses channels for it.
	c.reply(req, true, payload)
	c.enter(f)
}

// newForward checks a request and says which tunnel it is for. zero means that the client left the choice of
// the port to us.
func (c *connection) newForward(payload []byte) (f *forward, zero bool, err error) {
	r, err := parseForwardRequest(payload)
	if err != nil {
		return nil, false, err
	}
	f = &forward{conn: c, host: r.Host, port: r.Port}
	if err := c.chooseTunnel(f); err != nil {
		return nil, false, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.forwards) >= maxForwards {
		return nil, false, fmt.Errorf("a connection may have %d forwards", maxForwards)
	}
	for _, other := range c.forwards {
		if other.tunnelID == f.tunnelID {
			return nil, false, errors.New("this connection forwards the tunnel already")
		}
	}
	if !take(&c.account.forwards, maxForwardsPerAccount) {
		return nil, false, fmt.Errorf("an account may have %d forwards", maxForwardsPerAccount)
	}
	if f.port == 0 {
		f.port = c.freePort()
	}
	return f, r.Port == 0, nil
}

// chooseTunnel fills in the tunnel that a forward is for, and its port unless any will do.
func (c *connection) chooseTunnel(f *forward) error {
	st := c.server.cfg.Store
	switch {
	case c.login.tunnelID != "":
		t, err := st.Tunnel(c.login.tunnelID)
		if err != nil {
			return err
		}
		if f.port != 0 && int(f.port) != t.LocalPort {
			return fmt.Errorf("port %d is not the tunnel's local port %d, nor 0", f.port, t.LocalPort)
		}
		f.socketID, f.tunnelID, f.port = t.SocketID, t.ID, uint32(t.LocalPort) // #nosec G115 -- a port
	case f.port != 0:
		t, err := st.TunnelByLocalPort(c.login.user.ID, int(f.port))
		if err != nil || c.login.socketID != "" && t.SocketID != c.login.socketID {
			return fmt.Errorf("port %d is not the local port of a tunnel that this login may serve", f.port)
		}
		f.socketID, f.tunnelID = t.SocketID, t.ID
	case c.login.socketID != "":
		// A login for the socket as a whole: each is a tunnel of its own, for as long as it lasts.
		if _, err := st.Socket(c.login.socketID); err != nil {
			return err
		}
		f.socketID, f.tunnelID = c.login.socketID, uuid.NewString()
	default:
		return errors.New("port 0 needs a certificate, since the account's key does not say which socket is meant")
	}
	return nil
}

// freePort makes up a port that the connection does not use yet. Nothing listens on it: it only names the forward. The
// caller holds mu.
func (c *connection) freePort() uint32 {
	for {
		port := uint32(10000 + rand.IntN(50000)) // #nosec G404 G115 -- a name, no secret
		if !slices.ContainsFunc(c.forwards, func(f *forward) bool { return f.port == port }) {
			return port
		}
	}
}

// enter puts a forward into the rotation, unless the connection has ended meanwhile.
func (c *connection) enter(f *forward) {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		c.account.forwards.Add(-1)
		return
	}
	c.server.mu.Lock()
	t, old := c.server.cfg.Registry.Add(registry.Info{
		SocketID: f.socketID, TunnelID: f.tunnelID, RemoteAddr: c.ssh.RemoteAddr().String(), Since: time.Now(),
	}, f.open)
	f.tunnel = t
	t.SetName(c.name)
	c.server.serving[t] = c
	c.server.mu.Unlock()
	c.forwards = append(c.forwards, f)
	select {
	case <-c.forwarding:
	default:
		close(c.forwarding)
	}
	c.mu.Unlock()
	c.log.Info("tunnel connected", "socket", f.socketID, "tunnel", f.tunnelID, "bind", net.JoinHostPort(f.host, fmt.Sprint(f.port)))
	if old != nil {
		c.server.superseded(old)
	}
}

func (c *connection) withdraw(f *forward) {
	c.account.forwards.Add(-1)
	f.tunnel.Withdraw()
	c.server.mu.Lock()
	delete(c.server.serving, f.tunnel)
	c.server.mu.Unlock()
	c.log.Info("tunnel left the rotation", "socket", f.socketID, "tunnel", f.tunnelID)
}

// handleCancel takes a tunnel out of the rotation and answers only then, so that a client which has the answer knows that
// no new channel will come. This is how a replica drains.
func (c *connection) handleCancel(req *ssh.Request) {
	r, err := parseForwardRequest(req.Payload)
	if err != nil {
		c.log.Info("cancel of a forward refused", "err", err)
		c.reply(req, false, nil)
		return
	}
	c.mu.Lock()
	i := slices.IndexFunc(c.forwards, func(f *forward) bool { return f.host == r.Host && f.port == r.Port })
	if i < 0 && r.Port == 0 && len(c.forwards) == 1 && c.forwards[0].host == r.Host {
		i = 0
	}
	if i < 0 {
		c.mu.Unlock()
		c.reply(req, false, nil)
		return
	}
	f := c.forwards[i]
	c.forwards = slices.Delete(c.forwards, i, i+1)
	c.mu.Unlock()
	c.withdraw(f)
	if !f.tunnel.Settle(c.server.cfg.SettleTimeout) {
		c.log.Warn("channels are still being opened through a tunnel that was cancelled", "tunnel", f.tunnelID)
	}
	c.reply(req, true, nil)
}

// These mean that a tunnel, or all tunnels of an account, have as many channels as they may have.
var (
	errSaturated        = fmt.Errorf("%w: the tunnel has %d channels open", registry.ErrFull, maxChannels)
	errAccountSaturated = fmt.Errorf("%w: the tunnels of the account have %d channels open", registry.ErrFull, maxChannelsPerAccount)
)

// takeChannel counts a channel. It counts until the client has closed it, too, lest one that never does hold any number.
func (f *forward) takeChannel() error {
	if !take(&f.channels, maxChannels) {
		return errSaturated
	}
	if !take(&f.conn.account.channels, maxChannelsPerAccount) {
		f.channels.Add(-1)
		return errAccountSaturated
	}
	return nil
}

func (f *forward) giveChannel() {
	f.channels.Add(-1)
	f.conn.account.channels.Add(-1)
}

// open asks the client for a channel to the origin. It is the registry's OpenFunc.
func (f *forward) open(ctx context.Context, visitor netip.AddrPort) (registry.Conn, error) {
	if err := f.takeChannel(); err != nil {
		return nil, err
	}
	type result struct {
		ch   ssh.Channel
		reqs <-chan *ssh.Request
		err  error
	}
	payload := ssh.Marshal(forwardedChannel{
		Host: f.host, Port: f.port, OriginHost: visitor.Addr().String(), OriginPort: uint32(visitor.Port()),
	})
	opened := make(chan result, 1)
	go func() {
		ch, reqs, err := f.conn.ssh.OpenChannel("forwarded-tcpip", payload)
		if refused, ok := errors.AsType[*ssh.OpenChannelError](err); ok {
			refused.Message = bounded(refused.Message)
			if refused.Reason == ssh.ResourceShortage { // So say sidecars that have as many visitors as they take.
				err = fmt.Errorf("%w: %w", registry.ErrFull, err)
			}
		}
		opened <- result{ch, reqs, err}
	}()
	wrap := func(r result) *channelConn {
		c := &channelConn{Channel: r.ch, forward: f, visitor: visitor, done: make(chan struct{})}
		go func() {
			ssh.DiscardRequests(r.reqs)
			f.giveChannel()
			close(c.done)
		}()
		return c
	}
	select {
	case r := <-opened:
		if r.err != nil {
			f.giveChannel()
			return nil, r.err
		}
		return wrap(r), nil
	case <-ctx.Done():
		// The channel still counts until the client has answered or the connection ends, and is closed if it opens.
		go func() {
			r := <-opened
			if r.err != nil {
				f.giveChannel()
				return
			}
			_ = wrap(r).Close()
		}()
		return nil, fmt.Errorf("the client did not answer to opening a channel: %w", ctx.Err())
	}
}

// channelConn is a channel as a connection.
type channelConn struct {
	ssh.Channel
	forward *forward
	visitor netip.AddrPort
	done    chan struct{}
}

// Done is closed when the channel has ended.
func (c *channelConn) Done() <-chan struct{} { return c.done }

// LocalAddr is the visitor's address, which this end of the channel speaks for.
func (c *channelConn) LocalAddr() net.Addr { return net.TCPAddrFromAddrPort(c.visitor) }

// RemoteAddr is the address of the tunnel client.
func (c *channelConn) RemoteAddr() net.Addr { return c.forward.conn.ssh.RemoteAddr() }

// SetDeadline is not supported by SSH channels.
func (c *channelConn) SetDeadline(time.Time) error { return errNoDeadline }

// SetReadDeadline is not supported by SSH channels.
func (c *channelConn) SetReadDeadline(time.Time) error { return errNoDeadline }

// SetWriteDeadline is not supported by SSH channels.
func (c *channelConn) SetWriteDeadline(time.Time) error { return errNoDeadline }

var errNoDeadline = errors.New("SSH channels have no deadlines")
