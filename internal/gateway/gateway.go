// Package gateway is the HTTPS API that sidecars call: what do I serve, register me, renew my certificate, withdraw me.
// It runs on every replica of the control plane. It decides who may do what; the account's credentials stay behind it.
// It must not change Services or pods, and it knows nothing of SSH beyond the form of a public key.
package gateway

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/mysocketio/mysocket-injector/internal/annotations"
	"github.com/mysocketio/mysocket-injector/internal/gatewayapi"
	"github.com/mysocketio/mysocket-injector/internal/mysocket"
)

// MysocketAPI is what the gateway needs of the Mysocket API; *mysocket.Client has it.
type MysocketAPI interface {
	Login(ctx context.Context) (user string, err error)
	Sockets(ctx context.Context, maxAge time.Duration) ([]mysocket.Socket, error)
	CreateTunnel(ctx context.Context, socketID string) (mysocket.Tunnel, error)
	DeleteTunnel(ctx context.Context, socketID, tunnelID string) error
	SignKey(ctx context.Context, socketID, tunnelID, publicKey string) (mysocket.SignedKey, error)
}

// Config is what a Server needs.
type Config struct {
	// Cache reads Services and pods from the informers. Live reads and writes the API server directly.
	Cache client.Reader
	Live  client.Client
	// Reviews makes the token reviews; Live does when it is nil. With a rate limit of its own, strangers can't use up that
	// of Live.
	Reviews client.Writer
	API     MysocketAPI
	// Changes tells which namespaces' assignments may have changed. It must watch the informers behind Cache.
	Changes *Changes
	// Names is what the sockets of Services are called.
	Names annotations.Names
	// LeftOver, if set, is told when there may be a tunnel at Mysocket that no Tunnel object names.
	LeftOver func()
	// EdgeAddress is the edge's SSH server, host:port.
	EdgeAddress string
	// EdgeHostKeys are the edge's pinned host keys in authorized_keys form. When there are none, the host key of the
	// signing answer is used, which came over the API's TLS.
	EdgeHostKeys []string
	Log          *slog.Logger
	// Registerer gets the metrics; there are none when it is nil.
	Registerer prometheus.Registerer
}

// Server answers sidecars. It is an http.Handler; Serve runs it with the time limits it needs.
type Server struct {
	Config
	limits     limits
	now        func() time.Time
	handler    http.Handler
	metrics    *metrics
	reviews    *reviews
	allowances map[kind]*buckets[string] // by a pod's UID
	failing    *buckets[source]
	streams    *streams
}

// New returns a server, or an error when a metric can't be registered.
func New(cfg Config) (*Server, error) { return newServer(cfg, defaultLimits(), time.Now) }

func newServer(cfg Config, l limits, now func() time.Time) (*Server, error) {
	m, err := newMetrics(cfg.Registerer)
	if err != nil {
		return nil, err
	}
	s := &Server{
		Config: cfg, limits: l, now: now, metrics: m,
		allowances: allowances(now), failing: strangerAllowance(now),
		streams: newStreams(m),
	}
	s.reviews = newReviews(s.review, now, l.review, func(result string) { m.reviews.WithLabelValues(result).Inc() })
	mux := http.NewServeMux()
	names := map[string]string{}
	for _, e := range []struct {
		name, pattern string
		as            kind
		h             func(http.ResponseWriter, *http.Request, identity)
	}{
		{"assignments", "GET " + gatewayapi.AssignmentsPath, kindStream, s.assignments},
		{"register", "POST " + gatewayapi.SocketsPath + "{socket}/tunnels", kindRegister, s.limited(s.register)},
		{"renew", "POST " + gatewayapi.SocketsPath + "{socket}/tunnels/{tunnel}/certificate", kindRegister, s.limited(s.renew)},
		{"report", "PUT " + gatewayapi.SocketsPath + "{socket}/status", kindReport, s.limited(s.report)},
		{"withdraw", "DELETE " + gatewayapi.SocketsPath + "{socket}/tunnels/{tunnel}", kindReport, s.limited(s.withdraw)},
	} {
		mux.Handle(e.pattern, s.authenticated(e.as, e.h))
		names[e.pattern] = e.name
	}
	s.handler = m.observed(mux, names, now)
	return s, nil
}

// ServeHTTP implements http.Handler.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) { s.handler.ServeHTTP(w, r) }

// Serve answers on l until ctx ends, then closes every stream and waits up to five seconds for the other requests.
func (s *Server) Serve(ctx context.Context, l net.Listener, tlsConfig *tls.Config) error {
	// A stream takes its connection over, so there is one request at a time on it. Sidecars don't ask for HTTP/2, with
	// which an open stream would take nearly three times the memory (BenchmarkStreams).
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	srv := &http.Server{
		Handler:           s,
		TLSConfig:         tlsConfig,
		Protocols:         &protocols,
		ReadHeaderTimeout: s.limits.header,
		WriteTimeout:      s.limits.answer(),
		IdleTimeout:       s.limits.idle,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(s.Log.Handler(), slog.LevelDebug),
		// Not ctx: a registration that is under way when we are told to stop would be cut off between the tunnel that is
		// made at Mysocket and the object that knows of it.
		BaseContext: func(net.Listener) context.Context { return context.WithoutCancel(ctx) },
		ConnContext: withConn,
	}
	defer s.streams.end()
	done := make(chan error, 1)
	go func() { done <- srv.ServeTLS(newDoor(l, s.limits, s.failing, s.metrics), "", "") }()
	select {
	case err := <-done:
		return fmt.Errorf("gateway: %w", err)
	case <-ctx.Done():
	}
	s.streams.tell()
	shutdown, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	if srv.Shutdown(shutdown) != nil {
		_ = srv.Close()
	}
	<-done
	return nil
}

// handler answers a request of a known pod: with a value (200), nil (204) or an error. A *refusal says its own status.
type handler func(r *http.Request, caller identity) (any, error)

// refusal is an error that the sidecar is told.
type refusal struct {
	status     int
	reason     gatewayapi.Reason
	message    string
	retryAfter time.Duration
}

func (e *refusal) Error() string { return e.message }

func refuse(status int, reason gatewayapi.Reason, format string, args ...any) error {
	return &refusal{status: status, reason: reason, message: fmt.Sprintf(format, args...)}
}

func forbidden(format string, args ...any) error {
	return refuse(http.StatusForbidden, gatewayapi.ReasonForbidden, format, args...)
}

func unavailable(format string, args ...any) error {
	return &refusal{http.StatusServiceUnavailable, gatewayapi.ReasonUnavailable, fmt.Sprintf(format, args...), 2 * time.Second}
}

// limited wraps a handler with time and size limits and writes its answer.
func (s *Server) limited(h handler) func(http.ResponseWriter, *http.Request, identity) {
	return func(w http.ResponseWriter, r *http.Request, caller identity) {
		ctx, cancel := context.WithTimeout(r.Context(), s.limits.request)
		defer cancel()
		r.Body = http.MaxBytesReader(w, r.Body, gatewayapi.MaxBodyBytes)
		for _, id := range []string{"socket", "tunnel"} {
			if v := r.PathValue(id); v != "" && !validID(v) {
				s.fail(w, r, caller, refuse(http.StatusBadRequest, gatewayapi.ReasonInvalid, "the %s id in the path is not a UUID", id))
				return
			}
		}
		if _, err := connection(r); err != nil {
			s.fail(w, r, caller, err)
			return
		}
		answer, err := h(r.WithContext(ctx), caller)
		switch {
		case err != nil:
			s.fail(w, r, caller, err)
		case answer == nil:
			w.WriteHeader(http.StatusNoContent)
		default:
			w.Header().Set("Content-Type", "application/json")
			_ = json.NewEncoder(w).Encode(answer)
		}
	}
}

// connection returns the number of the connection that a request is about.
func connection(r *http.Request) (int, error) {
	values := r.URL.Query()[gatewayapi.ConnectionParameter]
	if len(values) == 0 {
		return 0, nil
	}
	n, err := strconv.Atoi(values[0])
	if err != nil || len(values) > 1 || n < 0 || n >= gatewayapi.MaxConnections || values[0] != strconv.Itoa(n) {
		return 0, refuse(http.StatusBadRequest, gatewayapi.ReasonInvalid, "the query parameter %s is not one number from 0 to %d", gatewayapi.ConnectionParameter, gatewayapi.MaxConnections-1)
	}
	return n, nil
}

// fail writes an error answer. What is not a refusal is our own trouble: logged whole, told in general.
func (s *Server) fail(w http.ResponseWriter, r *http.Request, caller identity, err error) {
	var e *refusal
	known := errors.As(err, &e)
	switch {
	case known:
		s.Log.Debug("gateway request refused", "pod", caller.String(), "method", r.Method, "reason", e.reason, "err", e.message)
	case r.Context().Err() != nil: // a sidecar that ends hangs up
		s.Log.Debug("gateway request given up by its caller", "pod", caller.String(), "method", r.Method, "err", err)
	default:
		s.Log.Error("gateway request failed", "pod", caller.String(), "method", r.Method, "err", err)
	}
	if !known {
		e = &refusal{http.StatusServiceUnavailable, gatewayapi.ReasonUnavailable, "the gateway could not read or write the cluster's state; see its log", 2 * time.Second}
	}
	if e.retryAfter > 0 {
		w.Header().Set("Retry-After", strconv.Itoa(int((e.retryAfter+time.Second-1)/time.Second)))
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(e.status)
	_ = json.NewEncoder(w).Encode(gatewayapi.Error{Reason: e.reason, Message: e.message})
}

// upstream turns an error of the Mysocket client into a refusal that the sidecar can act on and log.
func upstream(err error) error {
	e := &refusal{status: http.StatusBadGateway, reason: gatewayapi.ReasonUpstream, message: err.Error(), retryAfter: mysocket.RetryAfter(err)}
	var api *mysocket.APIError
	if errors.As(err, &api) && api.Status == http.StatusTooManyRequests {
		e.status, e.reason = http.StatusTooManyRequests, gatewayapi.ReasonTooMany
	}
	return e
}

func decode(r *http.Request, into any) error {
	body, err := io.ReadAll(r.Body)
	var tooLarge *http.MaxBytesError
	if errors.As(err, &tooLarge) {
		return refuse(http.StatusRequestEntityTooLarge, gatewayapi.ReasonInvalid, "the request body is larger than %d bytes", tooLarge.Limit)
	}
	if err == nil {
		err = json.Unmarshal(body, into)
	}
	if err != nil {
		return refuse(http.StatusBadRequest, gatewayapi.ReasonInvalid, "the request body is not the expected JSON")
	}
	return nil
}
