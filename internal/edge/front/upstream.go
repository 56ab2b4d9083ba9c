package front

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mysocketio/mysocket-injector/internal/edge/registry"
)

const (
	maxIdlePerTunnel = 64
	idleTimeout      = 30 * time.Second
	// maxReplays bounds how often a request that was sent, and got no answer, is sent again: a request that makes apps
	// fall over must not visit every replica.
	maxReplays = 2
)

// upstream speaks HTTP through one tunnel.
type upstream struct {
	// keep reuses channels, for requests that can be sent again should a reused one turn out to be dead. fresh opens a
	// channel for each request: for all others, so that the only failure before the first byte is the opening.
	keep  *http.Transport
	fresh *http.Transport
}

// upstreams has one upstream for each connected tunnel that has been used.
type upstreams struct {
	dispatcher *Dispatcher
	// preferred may return nil: then a visit's tunnel is chosen by load alone.
	preferred func(*visit) func(*registry.Tunnel) bool

	mu  sync.Mutex
	all map[*registry.Tunnel]*upstream
	// closing are the withdrawals that are closing idle channels.
	closing sync.WaitGroup
}

func newUpstreams(d *Dispatcher, preferred func(*visit) func(*registry.Tunnel) bool) *upstreams {
	return &upstreams{dispatcher: d, preferred: preferred, all: map[*registry.Tunnel]*upstream{}}
}

func (us *upstreams) get(t *registry.Tunnel) *upstream {
	us.mu.Lock()
	u := us.all[t]
	if u != nil {
		us.mu.Unlock()
		return u
	}
	u = &upstream{keep: us.transport(t, false), fresh: us.transport(t, true)}
	us.all[t] = u
	us.mu.Unlock()
	t.OnWithdraw(func() {
		us.mu.Lock()
		delete(us.all, t)
		us.mu.Unlock()
		// Closing writes to the tunnel, which must not hold up whoever withdraws it: the peer may be gone.
		us.closing.Add(1)
		go func() {
			defer us.closing.Done()
			u.keep.CloseIdleConnections()
		}()
	})
	return u
}

// close closes all idle channels.
func (us *upstreams) close() {
	us.mu.Lock()
	all := make([]*upstream, 0, len(us.all))
	for _, u := range us.all {
		all = append(all, u)
	}
	us.mu.Unlock()
	for _, u := range all {
		u.keep.CloseIdleConnections()
	}
	us.closing.Wait()
}

func (us *upstreams) transport(t *registry.Tunnel, fresh bool) *http.Transport {
	return &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var visitor netip.AddrPort
			if v := visitOf(ctx); v != nil {
				visitor = v.visitor
			}
			return us.dispatcher.open(ctx, t, visitor)
		},
		DisableKeepAlives:      fresh,
		DisableCompression:     true,
		MaxIdleConnsPerHost:    maxIdlePerTunnel,
		IdleConnTimeout:        idleTimeout,
		ExpectContinueTimeout:  time.Second,
		MaxResponseHeaderBytes: 1 << 20,
		// HTTP/2 is not spoken to apps: the channel carries plain HTTP/1.1.
		Protocols: http1Only(),
	}
}

func http1Only() *http.Protocols {
	var p http.Protocols
	p.SetHTTP1(true)
	return &p
}

// RoundTrip sends a request through a tunnel of the visit's socket, and through another when that one fails before
// anything is lost.
func (us *upstreams) RoundTrip(req *http.Request) (*http.Response, error) {
	v := visitOf(req.Context())
	if v == nil {
		return nil, errors.New("front: a request without a visit")
	}
	body := &guardedBody{}
	out := req
	if req.Body != nil && req.Body != http.NoBody {
		body.ReadCloser = req.Body
		out = req.Clone(req.Context())
		out.Body = body
	}
	replayable := body.ReadCloser == nil && safeMethod(req.Method)
	replays := 0
	var resp *http.Response
	t, release, err := us.dispatcher.doPreferring(req.Context(), v.socket.ID, us.preferred(v), func(t *registry.Tunnel) (bool, error) {
		v.attempts++
		u := us.get(t)
		transport := u.fresh
		if replayable {
			transport = u.keep
		}
		var err error
		resp, err = transport.RoundTrip(out) //nolint:bodyclose // ReverseProxy closes it
		if err == nil {
			v.upstream = u
			return false, nil
		}
		var opening *openError
		if errors.As(err, &opening) {
			return !body.touched.Load(), err
		}
		if !replayable || replays >= maxReplays {
			return false, err
		}
		replays++
		return true, err
	})
	if err != nil {
		return nil, err
	}
	v.tunnel, v.release = t, release
	return resp, nil
}

// safeMethod says whether a request with the method may be sent twice (RFC 9110, 9.2.1).
func safeMethod(method string) bool {
	switch method {
	case http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodTrace:
		return true
	}
	return false
}

// guardedBody is a request's body that survives attempts which did not read it: a transport closes the body even when
// it could not connect. The server closes the real one.
type guardedBody struct {
	io.ReadCloser
	touched atomic.Bool
}

func (b *guardedBody) Read(p []byte) (int, error) {
	b.touched.Store(true)
	return b.ReadCloser.Read(p)
}

func (b *guardedBody) Close() error { return nil }
