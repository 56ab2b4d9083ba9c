// Package edgetest runs a real edge inside a test, on loopback, for tests of whatever speaks to an edge.
package edgetest

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/crypto/bcrypt"

	"github.com/mysocketio/mysocket-injector/internal/edge"
	"github.com/mysocketio/mysocket-injector/internal/edge/etcdtest"
	"github.com/mysocketio/mysocket-injector/internal/edge/store"
)

// Edge is a running edge with one account.
type Edge struct {
	*edge.Edge

	// Domain is the parent of public names.
	Domain string
	// APIURL is the base of the REST API, without a trailing slash; CAPEM the authority of its certificate.
	APIURL string
	CAPEM  []byte
	// SSHAddress is the SSH server, host:port; HostKey its public key in authorized_keys form.
	SSHAddress string
	HostKey    string
	// HTTPAddress and HTTPSAddress are the public fronts, host:port; AdminURL is the base of the admin address.
	HTTPAddress  string
	HTTPSAddress string
	AdminURL     string
	// The account.
	UserID   string
	Email    string
	Password string
	// Token is an access token of it.
	Token string

	state string
	stop  func()
}

// Option changes the configuration before the edge starts.
type Option func(*edge.Config)

// Start runs an edge until the test ends.
func Start(t testing.TB, options ...Option) *Edge {
	t.Helper()
	cfg := edge.Config{
		Domain:       "edge.mysocket.test",
		StatePath:    filepath.Join(t.TempDir(), "edge.db"),
		APIAddress:   "127.0.0.1:0",
		SSHAddress:   "127.0.0.1:0",
		HTTPAddress:  "127.0.0.1:0",
		HTTPSAddress: "127.0.0.1:0",
		AdminAddress: "127.0.0.1:0",
		TCPPorts:     edge.PortRange{Min: 20000, Max: 29999},
		Version:      "test",
		Log:          slog.New(slog.DiscardHandler),
		PasswordCost: bcrypt.MinCost, // Tests under the race detector would wait seconds for a proper one.
		Timings:      edge.Timings{Drain: time.Second},
	}
	for _, option := range options {
		option(&cfg)
	}
	core, err := edge.New(cfg)
	if err != nil {
		t.Fatalf("start edge: %v", err)
	}
	e := &Edge{Edge: core, Domain: cfg.Domain, Email: "owner@example.com", Password: "correct horse battery", state: cfg.StatePath}
	addrs := core.Addresses()
	e.APIURL = "https://" + addrs.API.String()
	e.CAPEM, e.HostKey = core.CACertificate(), core.SSHHostKey()
	e.SSHAddress, e.HTTPAddress, e.HTTPSAddress = addrs.SSH.String(), addrs.HTTP.String(), addrs.HTTPS.String()
	e.AdminURL = "http://" + addrs.Admin.String()

	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- core.Run(ctx) }()
	stopped := false
	e.stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			t.Errorf("edge: %v", err)
		}
	}
	t.Cleanup(e.stop)
	user, err := core.AddUser(edge.NewUser{Name: "Owner", Email: e.Email, Password: e.Password})
	if err == nil {
		e.UserID = user.ID
		if e.Token, err = core.AddToken(edge.NewToken{Email: e.Email, Name: "of the test"}); err != nil {
			t.Fatalf("make access token: %v", err)
		}
		return e
	}
	// A second start on one state file has the account already.
	for _, u := range core.Users() {
		if u.Email == e.Email {
			e.UserID = u.ID
		}
	}
	if e.UserID == "" {
		t.Fatalf("make account: %v", err)
	}
	if e.Token, err = core.AddToken(edge.NewToken{Email: e.Email, Name: "of the test, after a restart"}); err != nil {
		t.Fatalf("make access token: %v", err)
	}
	return e
}

// Stop drains and stops the edge before the test ends, and waits for it. The state file stays: start another edge on it with
// SameState.
func (e *Edge) Stop() { e.stop() }

// SameState makes an edge continue with the state of another that was stopped, on the same addresses: a restart.
func SameState(other *Edge) Option {
	return func(cfg *edge.Config) {
		addrs := other.Addresses()
		cfg.StatePath = other.state
		cfg.APIAddress, cfg.SSHAddress = addrs.API.String(), addrs.SSH.String()
		cfg.HTTPAddress, cfg.HTTPSAddress = addrs.HTTP.String(), addrs.HTTPS.String()
	}
}

// SharedState makes an edge share its state with others, in an etcd. All that it listens on, public ports of tcp sockets among them, is on the
// host, so that edges of one machine don't meet.
func SharedState(server *etcdtest.Etcd, host string) Option {
	return func(cfg *edge.Config) {
		cfg.StatePath, cfg.Etcd = "", store.EtcdConfig{Endpoints: []string{server.URL}}
		address := net.JoinHostPort(host, "0")
		cfg.APIAddress, cfg.SSHAddress, cfg.HTTPAddress, cfg.HTTPSAddress, cfg.AdminAddress = address, address, address, address, address
	}
}

// CAPool holds the edge's authority.
func (e *Edge) CAPool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(e.CAPEM)
	return pool
}

// APIClient is an HTTP client that trusts the API's certificate.
func (e *Edge) APIClient(t testing.TB) *http.Client {
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: e.CAPool(), MinVersion: tls.VersionTLS12}}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: 30 * time.Second}
}

// VisitorClient is an HTTP client to which every http:// and https:// URL is at the edge's fronts, whatever its host.
func (e *Edge) VisitorClient(t testing.TB) *http.Client {
	var dialer net.Dialer
	transport := &http.Transport{
		DialContext: func(ctx context.Context, _, address string) (net.Conn, error) {
			to := e.HTTPAddress
			if _, port, err := net.SplitHostPort(address); err == nil && port == "443" {
				to = e.HTTPSAddress
			}
			return dialer.DialContext(ctx, "tcp", to)
		},
		TLSClientConfig:     &tls.Config{RootCAs: e.CAPool(), MinVersion: tls.VersionTLS12},
		ForceAttemptHTTP2:   true,
		MaxIdleConnsPerHost: 100,
	}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: 30 * time.Second}
}
