// Package api is the edge's REST API, in both Mysocket dialects: in the classic one accounts log in for a token, and with
// it make sockets, tunnels and tunnel certificates; in the border0 one, below /api/v1, they have an access token, and each
// login with a socket's certificate is a tunnel. Both work on the same sockets. It must not know how tunnels connect or what visitors do.
package api

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"sort"
	"strings"
	"time"

	"golang.org/x/crypto/bcrypt"

	"github.com/mysocketio/mysocket-injector/internal/edge/pki"
	"github.com/mysocketio/mysocket-injector/internal/edge/store"
)

const maxBody = 1 << 20

// Hooks are what the rest of the edge does for the API. What must happen when objects come and go is not among them: who must act
// then follows the store.
type Hooks interface {
	// ReservePort finds a free public port for a tcp or tls socket and listens on it. It returns ErrNoPort if there is none.
	ReservePort() (int, error)
	// PortReleased gives back a reserved port whose socket could not be stored.
	PortReleased(port int)
}

// ErrNoPort means that all public ports for tcp and tls sockets are taken.
var ErrNoPort = errors.New("no public port is free for the socket")

// Config are the parts an API is made of. All are required unless said otherwise.
type Config struct {
	Store *store.Store
	Keys  *pki.Keys
	Hooks Hooks
	Log   *slog.Logger
	// Domain is the parent of all public names.
	Domain string
	// WebPorts are the public ports of web sockets.
	WebPorts []int
	// AllowRegistration lets strangers make accounts.
	AllowRegistration bool
	// PasswordCost is that of bcrypt; its default if 0.
	PasswordCost int
	// Now may be nil.
	Now func() time.Time
}

// API answers the REST requests. Make it with New.
type API struct {
	cfg    Config
	logins *logins
	// rates bounds the requests of each account.
	rates *throttle
	// hashing bounds the password checks that run at once: each takes a core for tens of milliseconds.
	hashing chan struct{}
	// noSuchUser is a hash for logins to accounts that are not there: they must take as long as one with a wrong password.
	noSuchUser []byte
	handler    http.Handler
}

// New makes the API.
func New(cfg Config) *API {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	a := &API{cfg: cfg, logins: newLogins(cfg.Now), rates: newRates(cfg.Now), hashing: make(chan struct{}, 2)}
	a.noSuchUser = noSuchUserHash
	if hash, err := bcrypt.GenerateFromPassword([]byte("no such user"), cfg.PasswordCost); err == nil && cfg.PasswordCost != 0 {
		a.noSuchUser = hash
	}
	a.handler = a.routes()
	return a
}

// ServeHTTP answers one request.
func (a *API) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	start := time.Now()
	r.Body = http.MaxBytesReader(w, r.Body, maxBody)
	rec := &statusRecorder{ResponseWriter: w, status: http.StatusOK, body: r.Body}
	rec.Header().Set("Cache-Control", "no-store")
	if strings.HasPrefix(r.URL.Path, "/") {
		a.handler.ServeHTTP(rec, r)
	} else { // a CONNECT, for which a ServeMux has an answer of its own that is no JSON
		a.fail(rec, r, refuse(http.StatusNotFound, "there is nothing at %q", truncate(r.URL.Path, 100)))
	}
	a.cfg.Log.Info("api request", "method", truncate(r.Method, 20), "path", truncate(r.URL.Path, 200), "status", rec.status,
		"remote", r.RemoteAddr, "ms", time.Since(start).Milliseconds())
}

type statusRecorder struct {
	http.ResponseWriter
	status int
	body   io.Reader
}

// WriteHeader reads what nobody wanted of the request's body before the answer begins: an HTTP/2 server that answers first resets the
// stream, and curl takes that for an error although it has the answer.
func (s *statusRecorder) WriteHeader(code int) {
	_, _ = io.Copy(io.Discard, s.body) // bounded, in bytes and in time
	s.status = code
	s.ResponseWriter.WriteHeader(code)
}

// handlerFunc handles one request of a known user; user is zero on routes that need no token.
type handlerFunc func(r *http.Request, user store.User) (any, error)

// methods are the handlers of one path.
type methods map[string]handlerFunc

func (a *API) routes() http.Handler {
	mux := http.NewServeMux()
	route := func(pattern string, open bool, m methods) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) { a.dispatch(w, r, open, m) })
	}
	a.border0Routes(route)
	route("/user", true, methods{"POST": a.register})
	route("/login", true, methods{"POST": a.login})
	route("/login/refresh", false, methods{"POST": a.refresh})
	route("/user/{id}", false, methods{"GET": a.getUser})
	route("/organization", false, methods{"GET": a.getOrganization})
	route("/connect", false, methods{"GET": a.listSockets, "POST": a.connect})
	route("/socket", false, methods{"GET": a.listSockets, "POST": a.createSocket})
	route("/socket/{id}", false, methods{"GET": a.getSocket, "PUT": a.updateSocket, "DELETE": a.deleteSocket})
	route("/socket/{id}/signkey", false, methods{"POST": a.signSocketKey})
	route("/socket/{id}/tunnel", false, methods{"GET": a.listTunnels, "POST": a.createTunnel})
	route("/socket/{id}/tunnel/{tunnel}", false, methods{"GET": a.getTunnel, "DELETE": a.deleteTunnel})
	route("/socket/{id}/tunnel/{tunnel}/signkey", false, methods{"POST": a.signTunnelKey})
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		a.fail(w, r, refuse(http.StatusNotFound, "there is nothing at %s", truncate(r.URL.Path, 100)))
	})
	return mux
}

func (a *API) dispatch(w http.ResponseWriter, r *http.Request, open bool, m methods) {
	h, ok := m[r.Method]
	if !ok {
		allowed := make([]string, 0, len(m))
		for method := range m {
			allowed = append(allowed, method)
		}
		sort.Strings(allowed)
		w.Header().Set("Allow", strings.Join(allowed, ", "))
		a.fail(w, r, refuse(http.StatusMethodNotAllowed, "%s is not possible here; use %s", truncate(r.Method, 20), strings.Join(allowed, " or ")))
		return
	}
	var user store.User
	if !open {
		var err error
		authenticate := a.authenticate
		if inBorder0(r) {
			authenticate = a.authenticateAccess
		}
		if user, err = authenticate(r); err != nil {
			a.fail(w, r, err)
			return
		}
		if _, err := a.rates.begin(user.ID); err != nil {
			a.fail(w, r, err)
			return
		}
	}
	answer, err := h(r, user)
	if err != nil {
		a.fail(w, r, err)
		return
	}
	if answer == nil {
		w.WriteHeader(http.StatusNoContent)
		return
	}
	a.write(w, http.StatusOK, answer)
}

// refusal is an error with the status and the sentence that the client gets.
type refusal struct {
	status     int
	message    string
	retryAfter time.Duration
}

func (r *refusal) Error() string { return r.message }

func refuse(status int, format string, args ...any) *refusal {
	return &refusal{status: status, message: fmt.Sprintf(format, args...)}
}

func badRequest(format string, args ...any) *refusal {
	return refuse(http.StatusBadRequest, format, args...)
}

func (a *API) fail(w http.ResponseWriter, r *http.Request, err error) {
	var ref *refusal
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &ref):
	case errors.As(err, &tooLarge):
		ref = refuse(http.StatusRequestEntityTooLarge, "the body is larger than %d bytes", maxBody)
	case errors.Is(err, store.ErrNotFound):
		ref = refuse(http.StatusNotFound, "not found")
	case errors.Is(err, store.ErrExists):
		ref = refuse(http.StatusConflict, "%s", err)
	case errors.Is(err, store.ErrLimit):
		ref = badRequest("%s", err)
	case errors.Is(err, store.ErrUnavailable):
		a.cfg.Log.Error("api request failed", "method", r.Method, "path", truncate(r.URL.Path, 200), "err", err)
		ref = refuse(http.StatusServiceUnavailable, "%s; try again", store.ErrUnavailable)
		ref.retryAfter = time.Second
	case errors.Is(err, ErrNoPort):
		ref = refuse(http.StatusServiceUnavailable, "%s", err)
	case errors.Is(err, context.Canceled):
		ref = refuse(http.StatusServiceUnavailable, "the request was given up")
	case notKept(err) != nil:
		a.cfg.Log.Error("api request failed", "method", r.Method, "path", r.URL.Path, "err", err)
		ref = notKept(err)
	default:
		a.cfg.Log.Error("api request failed", "method", r.Method, "path", r.URL.Path, "err", err)
		ref = refuse(http.StatusInternalServerError, "the edge could not do this; its log says why")
	}
	if ref.retryAfter > 0 {
		w.Header().Set("Retry-After", fmt.Sprint(max(1, int(ref.retryAfter.Round(time.Second).Seconds()))))
	}
	if inBorder0(r) {
		a.write(w, ref.status, border0Error{ref.status, ref.message, http.StatusText(ref.status)})
		return
	}
	a.write(w, ref.status, map[string]string{"error_message": ref.message})
}

func (a *API) write(w http.ResponseWriter, status int, answer any) {
	body, err := json.Marshal(answer)
	if err != nil {
		a.cfg.Log.Error("api answer could not be written as JSON", "err", err)
		w.WriteHeader(http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(append(body, '\n'))
}

// decode reads a JSON body. An absent body and null are an empty object; fields that we do not know are left alone, since
// the clients of several years send several.
func decode(r *http.Request, into any) error {
	data, err := io.ReadAll(r.Body)
	if err != nil {
		return err
	}
	if len(strings.TrimSpace(string(data))) == 0 {
		return nil
	}
	if err := json.Unmarshal(data, into); err != nil {
		var wrong *json.UnmarshalTypeError
		if errors.As(err, &wrong) {
			return badRequest("%s must not be a JSON %s", fieldName(wrong), wrong.Value)
		}
		return badRequest("the body is not JSON: %s", truncate(err.Error(), 100))
	}
	return nil
}

func fieldName(err *json.UnmarshalTypeError) string {
	if err.Field == "" {
		return "the body"
	}
	return truncate(err.Field, 100)
}

func truncate(s string, n int) string {
	if len(s) <= n {
		return s
	}
	return strings.ToValidUTF8(s[:n], "") + "..."
}

func newSalt() ([]byte, error) {
	salt := make([]byte, 16)
	_, err := rand.Read(salt)
	return salt, err
}

// sshUser is the SSH user name of an account: its id without dashes.
func sshUser(userID string) string { return strings.ReplaceAll(userID, "-", "") }

// validID keeps wild ids away from the store and the log.
func validID(id string) bool {
	if len(id) != 36 {
		return false
	}
	_, err := hex.DecodeString(strings.ReplaceAll(id, "-", ""))
	return err == nil
}
