// Package gatewaytest is a gateway for tests of the sidecar: it speaks the contract over TLS, and whoever tests decides
// what it knows.
package gatewaytest

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mysocketio/mysocket-injector/internal/gatewayapi"
)

// Token is what the gateway takes for a pod's token.
const Token = "a-token-that-must-not-be-logged"

// Backend is what is behind the gateway.
type Backend interface {
	// Register makes or finds the tunnel of a socket and signs the key for it; tunnelID is empty but for a renewal.
	Register(ctx context.Context, socketID, tunnelID, publicKey string) (gatewayapi.Registration, error)
	Delete(ctx context.Context, socketID, tunnelID string) error
}

// Gateway is a running gateway.
type Gateway struct {
	URL   string
	CAPEM []byte
	// Down makes the gateway answer everything with 503.
	Down atomic.Bool

	backend Backend
	server  *httptest.Server

	mu          sync.Mutex
	assignments []gatewayapi.Assignment
	changed     chan struct{}
	calls       []string
	reports     []gatewayapi.StatusReport
}

// Start runs a gateway until the test ends. It assigns nothing yet.
func Start(t testing.TB, backend Backend) *Gateway {
	t.Helper()
	g := &Gateway{backend: backend, changed: make(chan struct{})}
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+gatewayapi.AssignmentsPath, g.stream)
	mux.HandleFunc("POST /v1/sockets/{socket}/tunnels", g.register)
	mux.HandleFunc("POST /v1/sockets/{socket}/tunnels/{tunnel}/certificate", g.register)
	mux.HandleFunc("PUT /v1/sockets/{socket}/status", g.report)
	mux.HandleFunc("DELETE /v1/sockets/{socket}/tunnels/{tunnel}", g.remove)
	g.server = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.Header.Get("Authorization") != "Bearer "+Token:
			refuse(w, http.StatusUnauthorized, gatewayapi.ReasonUnauthenticated, "the token is wrong")
		case g.Down.Load():
			refuse(w, http.StatusServiceUnavailable, gatewayapi.ReasonUnavailable, "down for the test")
		default:
			mux.ServeHTTP(w, r)
		}
	}))
	t.Cleanup(func() {
		g.server.CloseClientConnections()
		g.server.Close()
	})
	g.URL = g.server.URL
	g.CAPEM = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: g.server.Certificate().Raw})
	return g
}

// Files writes the token and the CA bundle as the kubelet does, and returns their names.
func (g *Gateway) Files(t testing.TB) (token, ca string) {
	t.Helper()
	dir := t.TempDir()
	token, ca = filepath.Join(dir, "token"), filepath.Join(dir, "ca.crt")
	for name, content := range map[string][]byte{token: []byte(Token), ca: g.CAPEM} {
		if err := os.WriteFile(name, content, 0o644); err != nil { //nolint:gosec // as in a pod: whoever runs the sidecar reads it
			t.Fatal(err)
		}
	}
	if err := os.Chmod(dir, 0o755); err != nil { //nolint:gosec // likewise
		t.Fatal(err)
	}
	return token, ca
}

// Assign replaces what the pod is assigned.
func (g *Gateway) Assign(assignments ...gatewayapi.Assignment) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.assignments = assignments
	close(g.changed)
	g.changed = make(chan struct{})
}

// Disconnect breaks all connections with the gateway.
func (g *Gateway) Disconnect() { g.server.CloseClientConnections() }

// Calls returns the calls so far, without the stream and the reports: "register", "renew", "delete", or "register/1" of a
// further connection.
func (g *Gateway) Calls() []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Clone(g.calls)
}

// Reports returns the status reports so far.
func (g *Gateway) Reports() []gatewayapi.StatusReport {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Clone(g.reports)
}

func (g *Gateway) note(call string, r *http.Request) {
	if n := r.URL.Query().Get(gatewayapi.ConnectionParameter); n != "" {
		call += "/" + n
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.calls = append(g.calls, call)
}

func (g *Gateway) stream(w http.ResponseWriter, r *http.Request) {
	for {
		g.mu.Lock()
		snapshot, changed := gatewayapi.Snapshot{Assignments: g.assignments}, g.changed
		g.mu.Unlock()
		if err := json.NewEncoder(w).Encode(snapshot); err != nil {
			return
		}
		if http.NewResponseController(w).Flush() != nil {
			return
		}
		for waiting := true; waiting; {
			select {
			case <-changed:
				waiting = false
			case <-time.After(gatewayapi.Heartbeat):
				_, _ = io.WriteString(w, "\n")
				_ = http.NewResponseController(w).Flush()
			case <-r.Context().Done():
				return
			}
		}
	}
}

func (g *Gateway) register(w http.ResponseWriter, r *http.Request) {
	call := "register"
	if r.PathValue("tunnel") != "" {
		call = "renew"
	}
	g.note(call, r)
	var request gatewayapi.RegisterRequest
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, gatewayapi.MaxBodyBytes)).Decode(&request); err != nil {
		refuse(w, http.StatusBadRequest, gatewayapi.ReasonInvalid, err.Error())
		return
	}
	registration, err := g.backend.Register(r.Context(), r.PathValue("socket"), r.PathValue("tunnel"), request.PublicKey)
	if err != nil {
		refuse(w, http.StatusBadGateway, gatewayapi.ReasonUpstream, err.Error())
		return
	}
	_ = json.NewEncoder(w).Encode(registration)
}

func (g *Gateway) report(w http.ResponseWriter, r *http.Request) {
	var report gatewayapi.StatusReport
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, gatewayapi.MaxBodyBytes)).Decode(&report); err != nil || !report.State.Valid() || len(report.Message) > gatewayapi.MaxMessageBytes {
		refuse(w, http.StatusBadRequest, gatewayapi.ReasonInvalid, "not a report")
		return
	}
	g.mu.Lock()
	g.reports = append(g.reports, report)
	g.mu.Unlock()
	w.WriteHeader(http.StatusNoContent)
}

func (g *Gateway) remove(w http.ResponseWriter, r *http.Request) {
	g.note("delete", r)
	if err := g.backend.Delete(r.Context(), r.PathValue("socket"), r.PathValue("tunnel")); err != nil {
		refuse(w, http.StatusBadGateway, gatewayapi.ReasonUpstream, err.Error())
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

func refuse(w http.ResponseWriter, status int, reason gatewayapi.Reason, message string) {
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(gatewayapi.Error{Reason: reason, Message: strings.ToValidUTF8(message, "?")})
}

// Eventually waits until condition holds, and fails the test when it doesn't within 20 s.
func Eventually(t testing.TB, what string, condition func() bool) {
	t.Helper()
	deadline := time.After(20 * time.Second)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !condition() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("not within 20 s: %s", what)
		}
	}
}
