package front

import (
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/pires/go-proxyproto"

	"github.com/mysocketio/mysocket-injector/internal/edge/metrics"
)

// ProxyHeaders takes the visitor's address from a header of the PROXY protocol, version 1 or 2, that trusted proxies put in
// front of what their visitors send.
type ProxyHeaders struct {
	Trusted Trusted
	// Timeout is how long a proxy may take to send its header.
	Timeout time.Duration
	Log     *slog.Logger
	Metrics *metrics.Metrics
}

// Listen returns a listener whose connections have the visitor's address. Those of trusted proxies must begin with a header,
// as the protocol wants it: a visitor could write one himself where it is optional. Those of others are what they are.
func (h *ProxyHeaders) Listen(ln net.Listener) net.Listener { return &proxyListener{ln, h} }

type proxyListener struct {
	net.Listener
	headers *ProxyHeaders
}

// Accept does not wait for a header: who asks for the visitor's address first does, in its own time.
func (l *proxyListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	peer, ok := conn.RemoteAddr().(*net.TCPAddr)
	if !ok || !l.headers.Trusted.Has(peer.AddrPort().Addr()) {
		return conn, nil
	}
	return &proxiedConn{headers: l.headers, raw: conn, Conn: proxyproto.NewConn(conn,
		proxyproto.WithPolicy(proxyproto.REQUIRE), proxyproto.SetReadHeaderTimeout(l.headers.Timeout), proxyproto.ValidateHeader(checkHeader))}, nil
}

// checkHeader refuses headers that name no visitor as the edge needs him: an address and a port. Those of a proxy's own
// checks name nobody, and are good.
func checkHeader(h *proxyproto.Header) error {
	if h.Command.IsLocal() || h.TransportProtocol.IsUnspec() {
		return nil
	}
	if source, ok := h.SourceAddr.(*net.TCPAddr); !ok || source.Port == 0 || len(source.IP) == 0 {
		return fmt.Errorf("the header of the PROXY protocol names %v, which is no address and port of a TCP visitor", h.SourceAddr)
	}
	return nil
}

// proxiedConn is a connection from a trusted proxy.
type proxiedConn struct {
	*proxyproto.Conn
	headers *ProxyHeaders
	raw     net.Conn
	checked sync.Once
	err     error
}

// check reads the header, once, and says what is wrong with it.
func (c *proxiedConn) check() error {
	c.checked.Do(func() {
		if c.ProxyHeader() != nil {
			return
		}
		if _, c.err = c.Read(nil); c.err == nil {
			c.err = proxyproto.ErrNoProxyProtocol
		}
		c.headers.Metrics.ProxyHeaderRefused()
		c.headers.Log.Info("connection refused", "proxy", c.raw.RemoteAddr().String(), "err", c.err)
	})
	return c.err
}

// RemoteAddr is the visitor's address, or the proxy's when the header names nobody. The HTTP server asks for it before
// anything else.
func (c *proxiedConn) RemoteAddr() net.Addr {
	_ = c.check() // Reading fails then.
	return c.Conn.RemoteAddr()
}

// CloseWrite ends what goes to the visitor.
func (c *proxiedConn) CloseWrite() error {
	if half, ok := c.raw.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return nil
}
