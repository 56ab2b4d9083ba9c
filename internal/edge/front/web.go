package front

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"encoding/hex"
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

	"golang.org/x/net/http/httpguts"

	"github.com/mysocketio/mysocket-injector/internal/edge/api"
	"github.com/mysocketio/mysocket-injector/internal/edge/feed"
	"github.com/mysocketio/mysocket-injector/internal/edge/metrics"
	"github.com/mysocketio/mysocket-injector/internal/edge/registry"
	"github.com/mysocketio/mysocket-injector/internal/edge/stats"
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
	// Stats may be nil.
	Stats *stats.Stats
	// Trusted are the proxies in front that say who the visitor is.
	Trusted Trusted
	// Access gets a line for each request; nil for none.
	Access *slog.Logger
	// Patience is how long visitors and apps are waited for.
	Patience Patience
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
	w.upstreams = newUpstreams(cfg.Dispatcher, w.preferred, cfg.Patience.Answer)
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
	from   provenance
	rec    *recorder
	in     *http.Request
	grpc   bool
	// Filled in by the round trip.
	attempts int
	tunnel   *registry.Tunnel
	upstream *upstream
	release  func()
	err      error
	// failed says that it got a page of the edge's own because no app answered.
	failed bool
	// broken says that the answer was begun and not finished.
	broken bool
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
	rec := newRecorder(rw, w.cfg.Patience, start)
	v := &visit{id: requestID(r.Header), from: w.cfg.Trusted.provenanceOf(r), rec: rec, in: r, grpc: isGRPC(r)}
	v.visitor, v.secure = v.from.visitor, v.from.secure(r)
	if v.grpc {
		rec.watch.stream()
	}
	defer w.finish(v, rec, r, start)

	if fault := malformed(r); fault != "" {
		w.page(rec, r, v, http.StatusBadRequest, fault)
		return
	}
	if len(r.TransferEncoding) > 0 {
		// It may have had a length too, which net/http passes over and a proxy in front may not have: what follows on the
		// connection could be what that proxy takes for the body (RFC 9112, 6.1).
		rec.last = true
	}
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
	v.broken = true // ReverseProxy panics when an answer can't be finished.
	w.proxy.ServeHTTP(rec, rec.watchBody(r).WithContext(context.WithValue(r.Context(), visitKey{}, v)))
	v.broken = false
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
	out.URL.Scheme, out.URL.Host = originURL(v.socket)
	out.URL.RawQuery = pr.In.URL.RawQuery
	out.Host = pr.In.Host
	if v.socket.UpstreamHTTPHostname != "" {
		out.Host = v.socket.UpstreamHTTPHostname
	}
	dropForged(out.Header)
	v.cookie = takeStickyCookie(out.Header)
	v.from.tell(out, pr.In)
	out.Header.Set("X-Request-Id", v.id)
	dropForged(out.Trailer)
	if v.socket.Protection != nil {
		out.Header.Del("Authorization") // The edge's password is not the app's business.
	}
}

// modify is done to an app's answer before it goes to the visitor.
func (w *Web) modify(resp *http.Response) error {
	if err := checkSwitch(resp); err != nil {
		return err
	}
	v := visitOf(resp.Request.Context())
	w.stick(v, resp.Header)
	resp.Header.Set("X-Request-Id", v.id)
	v.rec.whole = v.grpc && resp.ContentLength == 0 && resp.Header.Get("Grpc-Status") != ""
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

// malformed says what is wrong with a request that net/http lets through: over HTTP/2, the method may be anything, and so
// may a second length be. It returns "" if nothing is.
func malformed(r *http.Request) string {
	if !httpguts.ValidHeaderFieldName(r.Method) { // A method is a token, as the name of a header field is.
		return "The method of the request is not one."
	}
	for _, length := range r.Header["Content-Length"] {
		if length != r.Header["Content-Length"][0] {
			return "The request has two different lengths."
		}
	}
	return ""
}

// hostName is the name in a Host header: lower case, without port and trailing dot.
func hostName(host string) string {
	if i := strings.LastIndexByte(host, ':'); i >= 0 && !strings.HasSuffix(host, "]") {
		host = host[:i]
	}
	return strings.ToLower(strings.TrimSuffix(host, "."))
}

// requestID is the id of a request in the log, for the app and for the visitor: what the visitor or a proxy in front sent, if
// it is 8 to 64 letters, digits, dashes, dots and underscores; else the edge makes one.
func requestID(h http.Header) string {
	if ids := h["X-Request-Id"]; len(ids) == 1 && len(ids[0]) >= 8 && len(ids[0]) <= 64 && !strings.ContainsFunc(ids[0], notInID) {
		return ids[0]
	}
	return newRequestID()
}

func notInID(c rune) bool {
	switch {
	case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '-', c == '.', c == '_':
		return false
	}
	return true
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
