package front

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/mysocketio/mysocket-injector/internal/edge/api"
	"github.com/mysocketio/mysocket-injector/internal/edge/feed"
	"github.com/mysocketio/mysocket-injector/internal/edge/metrics"
	"github.com/mysocketio/mysocket-injector/internal/edge/registry"
	"github.com/mysocketio/mysocket-injector/internal/edge/store"
)

// statusClientGone is logged when the visitor went away before the answer, as nginx does.
const statusClientGone = 499

// WebConfig are the parts a Web front is made of.
type WebConfig struct {
	Store      *store.Store
	Dispatcher *Dispatcher
	Metrics    *metrics.Metrics
	Feed       *feed.Hub
	Log        *slog.Logger
	// RedirectPort returns the port of the HTTPS front, to which plain HTTP is redirected; nil if it is not.
	RedirectPort func() int
	// StickyKey is the secret that sticky cookies are made with.
	StickyKey []byte
}

// Web is the handler of the HTTP and HTTPS fronts. Make it with NewWeb.
type Web struct {
	cfg       WebConfig
	upstreams *upstreams
	proxy     *httputil.ReverseProxy
}

// NewWeb makes the handler.
func NewWeb(cfg WebConfig) *Web {
	w := &Web{cfg: cfg}
	w.upstreams = newUpstreams(cfg.Dispatcher, w.preferred)
	w.proxy = &httputil.ReverseProxy{
		Rewrite:        rewrite,
		ModifyResponse: w.modify,
		Transport:      w.upstreams,
		// Of an answer whose length is known; others are flushed with each write. At once would be a write for the header and one
		// for the body of each small answer.
		FlushInterval: time.Millisecond,
		BufferPool:    &bufferPool{},
		ErrorHandler:  w.proxyFailed,
		ErrorLog:      slog.NewLogLogger(cfg.Log.Handler(), slog.LevelDebug),
	}
	return w
}

// Close closes idle channels. Requests that are being answered go on.
func (w *Web) Close() { w.upstreams.close() }

// visit is one request of a visitor.
type visit struct {
	id      string
	socket  store.Socket
	visitor netip.AddrPort
	// secure says that the visitor came over HTTPS; cookie is what it sent as the edge's own.
	secure bool
	cookie string
	// Filled in by the round trip.
	attempts int
	tunnel   *registry.Tunnel
	upstream *upstream
	release  func()
	err      error
}

type visitKey struct{}

func visitOf(ctx context.Context) *visit {
	v, _ := ctx.Value(visitKey{}).(*visit)
	return v
}

// ServeHTTP answers one public request.
func (w *Web) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	start := time.Now()
	w.cfg.Metrics.RequestStarted()
	rec := &recorder{ResponseWriter: rw}
	v := &visit{id: newRequestID(), visitor: visitorOf(r), secure: r.TLS != nil}
	defer w.finish(v, rec, r, start)

	if r.Method == http.MethodConnect {
		w.page(rec, r, v, http.StatusMethodNotAllowed, "This is no forward proxy.")
		return
	}
	socket, err := w.cfg.Store.SocketByDNSName(hostName(r.Host))
	if err != nil || !socket.Type.Web() {
		w.page(rec, r, v, http.StatusNotFound, "There is no socket with this name.")
		return
	}
	v.socket = socket
	if w.toHTTPS(rec, r, v) { // before anybody is asked for a password
		return
	}
	if !authorized(r, socket.Protection) {
		rec.Header().Set("WWW-Authenticate", `Basic realm="protected socket", charset="UTF-8"`)
		w.page(rec, r, v, http.StatusUnauthorized, "This socket is protected. Give its user name and password.")
		return
	}
	w.proxy.ServeHTTP(rec, r.WithContext(context.WithValue(r.Context(), visitKey{}, v)))
}

// finish runs when the answer is over, however it ended.
func (w *Web) finish(v *visit, rec *recorder, r *http.Request, start time.Time) {
	tunnel := ""
	if v.release != nil {
		v.release()
		tunnel = v.tunnel.TunnelID
		if v.tunnel.Withdrawn() {
			// The channel of this request became idle after the tunnel's idle channels were closed.
			v.upstream.keep.CloseIdleConnections()
		}
	}
	took := time.Since(start)
	status := rec.code()
	if v.err != nil && r.Context().Err() != nil {
		status = statusClientGone
	}
	w.cfg.Metrics.RequestDone(status, took.Seconds())
	args := []any{"request", v.id, "host", truncate(r.Host), "method", truncate(r.Method), "path", truncate(r.URL.Path),
		"socket", v.socket.ID, "tunnel", tunnel, "visitor", v.visitor.Addr().String(), "status", status, "bytes", rec.bytes,
		"ms", took.Milliseconds(), "attempts", v.attempts}
	if v.err != nil {
		args = append(args, "err", v.err)
	}
	w.cfg.Log.Info("request", args...)
	if v.socket.ID != "" {
		w.cfg.Feed.Publish(v.socket.ID, func() string {
			// A terminal shows this: nothing of the visitor's may reach it unquoted.
			return fmt.Sprintf("%s  %-15s %s %s -> %d, %d ms", start.Format(time.TimeOnly), v.visitor.Addr(),
				asciiOnly(r.Method), asciiOnly(r.URL.RequestURI()), status, took.Milliseconds())
		})
	}
}

func (w *Web) proxyFailed(rw http.ResponseWriter, r *http.Request, err error) {
	v := visitOf(r.Context())
	v.err = err
	if r.Context().Err() != nil {
		return
	}
	rw.Header().Set("Retry-After", "1")
	text := "The app behind this socket did not answer."
	if errors.Is(err, errNoTunnel) {
		text = "No tunnel of this socket is connected."
	}
	w.page(rw, r, v, http.StatusBadGateway, text)
}

// page writes a small page of the edge's own.
func (w *Web) page(rw http.ResponseWriter, r *http.Request, v *visit, status int, text string) {
	title := strconv.Itoa(status) + " " + http.StatusText(status)
	h := rw.Header()
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("X-Request-Id", v.id)
	body := fmt.Sprintf("%s\n%s\nRequest %s\n", title, text, v.id)
	h.Set("Content-Type", "text/plain; charset=utf-8")
	if strings.Contains(r.Header.Get("Accept"), "text/html") {
		h.Set("Content-Type", "text/html; charset=utf-8")
		body = fmt.Sprintf("<!doctype html>\n<title>%[1]s</title>\n<h1>%[1]s</h1>\n<p>%[2]s</p>\n<p><small>Request %[3]s</small></p>\n", title, text, v.id)
	}
	rw.WriteHeader(status)
	_, _ = rw.Write([]byte(body))
}

// ownedHeaders say who the visitor is, so they are the edge's to set; what a visitor sends under these names is dropped.
var ownedHeaders = []string{
	"Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Forwarded-Port", "X-Forwarded-Server",
	"X-Forwarded-Ssl", "X-Forwarded-Scheme", "X-Real-Ip", "X-Client-Ip", "True-Client-Ip", "X-Auth-Name", "X-Auth-Email",
}

// dropForged removes what only the edge may say, and the upgrade to HTTP/2: over it a visitor could send requests
// that do not pass here.
func dropForged(h http.Header) {
	for _, name := range ownedHeaders {
		h.Del(name)
	}
	for name := range h {
		// Many frameworks see no difference between X_Real_Ip and X-Real-Ip.
		if strings.Contains(name, "_") && slices.Contains(ownedHeaders, http.CanonicalHeaderKey(strings.ReplaceAll(name, "_", "-"))) {
			delete(h, name)
		}
	}
	if strings.EqualFold(strings.TrimSpace(h.Get("Upgrade")), "h2c") {
		h.Del("Upgrade")
		h.Del("Connection")
	}
	h.Del("Http2-Settings")
}

func rewrite(pr *httputil.ProxyRequest) {
	v := visitOf(pr.In.Context())
	out := pr.Out
	// The tunnel is chosen by the round trip; the name here is never resolved.
	out.URL.Scheme, out.URL.Host = "http", "origin"
	out.URL.RawQuery = pr.In.URL.RawQuery
	out.Host = pr.In.Host
	if v.socket.UpstreamHTTPHostname != "" {
		out.Host = v.socket.UpstreamHTTPHostname
	}
	dropForged(out.Header)
	v.cookie = takeStickyCookie(out.Header)
	proto := "http"
	if pr.In.TLS != nil {
		proto = "https"
	}
	ip := v.visitor.Addr().String()
	out.Header.Set("X-Forwarded-For", ip)
	out.Header.Set("X-Forwarded-Proto", proto)
	out.Header.Set("X-Forwarded-Host", pr.In.Host)
	out.Header.Set("X-Real-Ip", ip)
	if out.Header.Get("X-Request-Id") == "" {
		out.Header.Set("X-Request-Id", v.id)
	}
	if v.socket.Protection != nil {
		out.Header.Del("Authorization") // The edge's password is not the app's business.
	}
}

// modify is done to an app's answer before it goes to the visitor.
func (w *Web) modify(resp *http.Response) error {
	if err := checkSwitch(resp); err != nil {
		return err
	}
	w.stick(visitOf(resp.Request.Context()), resp.Header)
	return nil
}

// checkSwitch refuses an answer that switches to something else than what was asked for, such as "websocket" where the
// visitor's header says "foo, websocket". ReverseProxy refuses it too, but leaves the channel open, and the app's connection
// with it, for as long as the tunnel lives; what is refused here it closes.
func checkSwitch(resp *http.Response) error {
	if resp.StatusCode != http.StatusSwitchingProtocols {
		return nil
	}
	asked, got := resp.Request.Header.Get("Upgrade"), resp.Header.Get("Upgrade")
	if asked == "" || !strings.EqualFold(asked, got) {
		return fmt.Errorf("the app switched to protocol %q when %q was requested", truncate(got), truncate(asked))
	}
	return nil
}

// authorized checks the visitor's name and password, in a time that does not depend on them.
func authorized(r *http.Request, p *store.Protection) bool {
	if p == nil {
		return true
	}
	username, password, ok := r.BasicAuth()
	// Both are hashed first, so that neither their lengths nor their content changes how long comparing takes.
	user := subtle.ConstantTimeCompare(api.HashProtection(p.Salt, username), api.HashProtection(p.Salt, p.Username))
	pass := subtle.ConstantTimeCompare(api.HashProtection(p.Salt, password), p.Hash)
	return ok && user&pass == 1
}

// hostName is the name in a Host header: lower case, without port and trailing dot.
func hostName(host string) string {
	if i := strings.LastIndexByte(host, ':'); i >= 0 && !strings.HasSuffix(host, "]") {
		host = host[:i]
	}
	return strings.ToLower(strings.TrimSuffix(host, "."))
}

func visitorOf(r *http.Request) netip.AddrPort {
	ap, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(ap.Addr().Unmap().WithZone(""), ap.Port())
}

func newRequestID() string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // Never fails, as its documentation says.
	return hex.EncodeToString(b[:])
}

const maxLogged = 200

func truncate(s string) string {
	if len(s) > maxLogged {
		return strings.ToValidUTF8(s[:maxLogged], "") + "..."
	}
	return s
}

func asciiOnly(s string) string {
	q := strconv.QuoteToASCII(truncate(s))
	return q[1 : len(q)-1]
}

// recorder remembers the status and size of an answer.
type recorder struct {
	http.ResponseWriter
	status int
	bytes  int64
}

// Unwrap lets http.ResponseController flush and hijack.
func (r *recorder) Unwrap() http.ResponseWriter { return r.ResponseWriter }

// WriteHeader notes the final status, and an upgrade, but not other informational ones.
func (r *recorder) WriteHeader(code int) {
	if r.status == 0 && (code >= 200 || code == http.StatusSwitchingProtocols) {
		r.status = code
	}
	r.ResponseWriter.WriteHeader(code)
}

func (r *recorder) Write(p []byte) (int, error) {
	if r.status == 0 {
		r.status = http.StatusOK
	}
	n, err := r.ResponseWriter.Write(p)
	r.bytes += int64(n)
	return n, err
}

func (r *recorder) code() int {
	if r.status == 0 {
		return http.StatusOK
	}
	return r.status
}

// bufferPool lends copy buffers.
type bufferPool struct{ pool sync.Pool }

const bufferSize = 32 << 10

// Get returns a buffer.
func (p *bufferPool) Get() []byte {
	if b, ok := p.pool.Get().(*[]byte); ok {
		return *b
	}
	return make([]byte, bufferSize)
}

// Put takes a buffer back.
func (p *bufferPool) Put(b []byte) { p.pool.Put(&b) }
