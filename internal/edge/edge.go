// Package edge is a self-hosted Mysocket edge: the REST API, the SSH server that tunnels log in to, and the public HTTP,
// HTTPS and TCP fronts, over one state file, or a state that several edges share. It puts its sub-packages together and runs them; each of them holds one idea
// and does not know the others' insides. It must not know Kubernetes.
package edge

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mysocketio/mysocket-injector/internal/edge/api"
	"github.com/mysocketio/mysocket-injector/internal/edge/feed"
	"github.com/mysocketio/mysocket-injector/internal/edge/front"
	"github.com/mysocketio/mysocket-injector/internal/edge/metrics"
	"github.com/mysocketio/mysocket-injector/internal/edge/pki"
	"github.com/mysocketio/mysocket-injector/internal/edge/registry"
	"github.com/mysocketio/mysocket-injector/internal/edge/sshd"
	"github.com/mysocketio/mysocket-injector/internal/edge/stats"
	"github.com/mysocketio/mysocket-injector/internal/edge/store"
)

const (
	// Those of the API and the admin address; the fronts have flags.
	readHeaderTimeout = 10 * time.Second
	idleTimeout       = 120 * time.Second
	maxHeaderBytes    = 128 << 10
	// maxStreams bounds the requests of one HTTP/2 connection: an answer that its visitor does not take holds up to
	// 2.6 MiB, since x/crypto/ssh gives each channel a window of 2 MiB, which can't be set.
	maxStreams = 100
	// settleTimeout is well below what a draining client waits for the answer to its cancel.
	settleTimeout = 2 * time.Second
	// stopTimeout bounds what comes after the drain.
	stopTimeout = 2 * time.Second
)

// Edge is one edge. Make it with New, then Run it once; an edge that is not run must be closed.
type Edge struct {
	cfg      Config
	log      *slog.Logger
	store    *store.Store
	keys     *pki.Keys
	registry *registry.Registry
	sshd     *sshd.Server
	web      *front.Web
	tcp      *front.TCP
	servers  []*server
	sshLn    net.Listener
	visitors visitors
	stats    *stats.Stats
	shown    shownCertificates
	// publicURL is how visitors reach a socket.
	publicURL func(store.Socket) string
	ready     atomic.Bool
	leaving   atomic.Bool // no visitor shall keep a connection
	closing   sync.Once
}

// server is one HTTP server and its listener.
type server struct {
	name string
	http *http.Server
	ln   net.Listener
}

// Addresses are where an edge listens, with the ports it really has.
type Addresses struct {
	API, SSH, HTTP, HTTPS, Admin net.Addr
}

// New opens the state, makes the keys that are missing, and listens on all addresses. Nothing is served before Run.
func New(cfg Config) (_ *Edge, err error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	cfg.Timings.setDefaults()
	cfg.Web.setDefaults()
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	e := &Edge{cfg: cfg, log: cfg.Log, shown: shownCertificates{now: cfg.Now}}
	defer func() {
		if err != nil {
			e.Close()
		}
	}()
	if e.store, err = openState(cfg.StatePath, cfg.Etcd, cfg.Log, cfg.Now); err != nil {
		return nil, err
	}
	if e.keys, err = pki.Load(e.store, "Mysocket edge "+cfg.Domain, cfg.Now); err != nil {
		return nil, err
	}
	if err := e.writeOut(); err != nil {
		return nil, err
	}
	if err := e.build(); err != nil {
		return nil, err
	}
	e.store.Follow(e.follow)
	return e, nil
}

// writeOut writes what clients must know of the edge's keys.
func (e *Edge) writeOut() error {
	for _, out := range []struct {
		path string
		data []byte
	}{
		{e.cfg.CAOut, e.keys.CAPEM},
		{e.cfg.SSHHostKeyOut, []byte(e.keys.HostKeyLine() + "\n")},
	} {
		if out.path == "" {
			continue
		}
		// Public keys: anybody may read them.
		if err := os.WriteFile(out.path, out.data, 0o644); err != nil { // #nosec G306
			return fmt.Errorf("write public key: %w", err)
		}
	}
	return nil
}

// build makes all the parts, and the listeners.
func (e *Edge) build() error {
	cfg, timings := e.cfg, e.cfg.Timings
	var m *metrics.Metrics
	e.registry = registry.New(e.balancing(func() *metrics.Metrics { return m }))
	m = metrics.New(e.registry.Count)
	m.WatchState(e.store.Up)
	lines := &feed.Hub{}
	dispatcher := &front.Dispatcher{Registry: e.registry, Metrics: m, Hold: timings.Hold, OpenTimeout: timings.OpenTimeout}
	e.stats = stats.New(nil)
	webConfig := front.WebConfig{Stats: e.stats, Store: e.store, Dispatcher: dispatcher, Metrics: m, Feed: lines, Log: e.log.With("part", "web")}
	e.visitWeb(&webConfig)
	e.completeWeb(&webConfig)
	e.web = front.NewWeb(webConfig)

	var err error
	if e.sshLn, err = listen("ssh-address", cfg.SSHAddress); err != nil {
		return err
	}
	httpServer, err := e.addServer("http-address", "http", cfg.HTTPAddress, e.closingConnections(e.web), nil)
	if err != nil {
		return err
	}
	httpServer.takeHeaders(e.proxyHeaders("http", m))
	webCert, err := e.keys.Serving("*."+cfg.Domain, cfg.Domain)
	if err != nil {
		return err
	}
	httpsServer, err := e.addServer("https-address", "https", cfg.HTTPSAddress, e.closingConnections(e.web), nil)
	if err != nil {
		return err
	}
	httpsServer.takeHeaders(e.proxyHeaders("https", m))
	if err := e.openVisitors(m, httpServer); err != nil {
		return err
	}
	httpsServer.http.TLSConfig = e.certificates(webCert).Config()
	e.boundVisitors(httpServer.http)
	e.boundVisitors(httpsServer.http)
	host, _, err := net.SplitHostPort(cfg.HTTPAddress)
	if err != nil {
		return err
	}
	e.tcp = front.NewTCP(front.TCPConfig{
		Stats:      e.stats,
		Dispatcher: dispatcher, Metrics: m, Feed: lines, Log: e.log.With("part", "tcp"), Access: cfg.AccessLog,
		Host: host, MinPort: cfg.TCPPorts.Min, MaxPort: cfg.TCPPorts.Max, Certificate: e.shown.watchSockets(e.certificates(webCert).For),
		HandshakeTimeout: timings.VisitorHandshake, ProxyHeaders: e.proxyHeaders("tcp", m),
	})
	e.publicURL = func(k store.Socket) string { return publicURL(k, portOf(httpsServer.ln)) }
	e.sshd = sshd.New(sshd.Config{
		Store: e.store, Keys: e.keys, Registry: e.registry, Feed: lines, Metrics: m, Log: e.log.With("part", "ssh"), Version: cfg.Version,
		URL:              e.publicURL,
		HandshakeTimeout: timings.HandshakeTimeout, LoginPause: timings.LoginPause, KeepaliveInterval: timings.KeepaliveInterval,
		KeepaliveMisses: timings.KeepaliveMisses, SettleTimeout: settleTimeout, ComeBack: cfg.ComeBack,
		ProbeTimeout: timings.OpenTimeout,
	})
	apiHandler := api.New(api.Config{
		Store: e.store, Keys: e.keys, Hooks: hooks{e}, Log: e.log.With("part", "api"), Domain: cfg.Domain,
		WebPorts: []int{portOf(httpServer.ln), portOf(httpsServer.ln)}, AllowRegistration: cfg.AllowRegistration,
		PasswordCost: cfg.PasswordCost, Now: cfg.Now,
	})
	apiCert, err := e.keys.Serving(apiNames(cfg)...)
	if err != nil {
		return err
	}
	apiServer, err := e.addServer("api-address", "api", cfg.APIAddress, apiHandler, e.certificates(apiCert).Config())
	if err != nil {
		return err
	}
	// The API's bodies are small: whoever takes long to send one is not a client of ours.
	apiServer.http.ReadTimeout, apiServer.http.WriteTimeout = 30*time.Second, 60*time.Second
	adminServer, err := e.addServer("admin-address", "admin", cfg.AdminAddress, e.admin(m), nil)
	if err != nil {
		return err
	}
	adminServer.http.WriteTimeout = 30 * time.Second
	return e.addControl()
}

func listen(flag, address string) (net.Listener, error) {
	ln, err := net.Listen("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("listen on %s %s: %w", flag, address, err)
	}
	return ln, nil
}

func (e *Edge) addServer(flag, name, address string, handler http.Handler, tlsConfig *tls.Config) (*server, error) {
	ln, err := listen(flag, address)
	if err != nil {
		return nil, err
	}
	s := &server{name: name, ln: ln, http: &http.Server{
		Handler:           handler,
		ReadHeaderTimeout: readHeaderTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		TLSConfig:         tlsConfig,
		HTTP2:             &http.HTTP2Config{MaxConcurrentStreams: maxStreams},
		ErrorLog:          slog.NewLogLogger(e.log.With("part", name).Handler(), slog.LevelDebug),
	}}
	e.servers = append(e.servers, s)
	return s, nil
}

func (s *server) serve() error {
	var err error
	if s.http.TLSConfig != nil {
		err = s.http.ServeTLS(s.ln, "", "")
	} else {
		err = s.http.Serve(s.ln)
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return fmt.Errorf("%s server: %w", s.name, err)
}

// apiNames are the names in the API's certificate.
func apiNames(cfg Config) []string {
	names := append([]string{"api." + cfg.Domain, "localhost", "127.0.0.1", "::1"}, cfg.APIHosts...)
	host, _, _ := net.SplitHostPort(cfg.APIAddress) // validated
	switch ip := net.ParseIP(host); {
	case ip == nil && host != "":
		names = append(names, host)
	case ip != nil && !ip.IsUnspecified():
		names = append(names, host)
	default:
		addrs, err := net.InterfaceAddrs()
		if err != nil {
			return names
		}
		for _, addr := range addrs {
			if n, ok := addr.(*net.IPNet); ok && n.IP.IsGlobalUnicast() {
				names = append(names, n.IP.String())
			}
		}
	}
	return names
}

func portOf(ln net.Listener) int {
	if addr, ok := ln.Addr().(*net.TCPAddr); ok {
		return addr.Port
	}
	return 0
}

func publicURL(k store.Socket, httpsPort int) string {
	switch {
	case k.TCPPort != 0:
		return fmt.Sprintf("%s://%s:%d", k.Type, k.DNSName, k.TCPPort)
	case httpsPort == 443:
		return "https://" + k.DNSName
	default:
		return fmt.Sprintf("https://%s:%d", k.DNSName, httpsPort)
	}
}

// Run serves until ctx ends, then sends visitors away for a while, and drains: it takes no more HTTP visitors, lets requests end, tells tunnel clients to
// reconnect and closes what is left, upgraded connections and those of tcp and tls sockets among it. It returns nil after a
// proper drain.
func (e *Edge) Run(ctx context.Context) error {
	failed := make(chan error, len(e.servers)+1)
	var wg sync.WaitGroup
	for _, s := range e.servers {
		if s.http.TLSConfig != nil {
			s.http.TLSConfig = e.shown.watch(s.http.TLSConfig)
		}
		wg.Go(func() {
			if err := s.serve(); err != nil {
				failed <- err
			}
		})
		e.log.Info("listening", "part", s.name, "address", s.ln.Addr().String())
	}
	wg.Go(func() {
		if err := e.sshd.Serve(e.sshLn); err != nil {
			failed <- err
		}
	})
	e.log.Info("listening", "part", "ssh", "address", e.sshLn.Addr().String())
	stopVisitors := e.runVisitors(&wg)
	defer stopVisitors()
	starting, stopStarting := context.WithCancel(ctx)
	var startup sync.WaitGroup
	startup.Go(func() { e.becomeReady(starting) })

	var err error
	select {
	case <-ctx.Done():
	case err = <-failed:
	}
	stopStarting()
	startup.Wait()
	e.ready.Store(false)
	if err == nil {
		err = e.sendAway(failed)
	}
	e.log.Info("draining", "limit", e.cfg.Timings.Drain)
	e.drain()
	stopVisitors()
	wg.Wait()
	e.Close()
	e.log.Info("stopped")
	return err
}

func (e *Edge) drain() {
	_ = e.sshLn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), e.cfg.Timings.Drain)
	defer cancel()
	var wg sync.WaitGroup
	for _, s := range e.servers {
		wg.Go(func() {
			if err := s.http.Shutdown(ctx); err != nil {
				e.log.Warn("requests were cut off", "part", s.name, "err", err)
				_ = s.http.Close()
			}
		})
	}
	wg.Wait()
	stop, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	if err := e.sshd.Shutdown(stop); err != nil {
		e.log.Warn("SSH server", "err", err)
	}
	e.web.Close()
}

// Close releases everything, without a drain. Run does it by itself.
func (e *Edge) Close() {
	e.closing.Do(func() {
		if e.sshLn != nil {
			_ = e.sshLn.Close()
		}
		for _, s := range e.servers {
			_ = s.http.Close()
			_ = s.ln.Close()
		}
		if e.tcp != nil {
			e.tcp.Close()
		}
		e.visitors.close()
		if e.registry != nil {
			e.registry.Close()
		}
		if e.store != nil {
			if err := e.store.Close(); err != nil {
				e.log.Error("close the state", "err", err)
			}
		}
	})
}

// Addresses are where the edge listens.
func (e *Edge) Addresses() Addresses {
	a := Addresses{SSH: e.sshLn.Addr()}
	for _, s := range e.servers {
		switch s.name {
		case "api":
			a.API = s.ln.Addr()
		case "http":
			a.HTTP = s.ln.Addr()
		case "https":
			a.HTTPS = s.ln.Addr()
		case "admin":
			a.Admin = s.ln.Addr()
		}
	}
	return a
}

// CACertificate is the certificate, in PEM form, of the authority that the API and the HTTPS front have theirs from.
func (e *Edge) CACertificate() []byte { return e.keys.CAPEM }

// SSHHostKey is the SSH server's public key in authorized_keys form, without a newline.
func (e *Edge) SSHHostKey() string { return e.keys.HostKeyLine() }

// AddUser makes an account. Errors are sentences for whoever asked for it.
func (e *Edge) AddUser(n NewUser) (User, error) { return addUser(e.store, n, e.cfg.PasswordCost) }

// AddToken makes an access token and returns it. Errors are sentences for whoever asked for it.
func (e *Edge) AddToken(n NewToken) (string, error) { return addToken(e.store, e.keys.TokenKey, n) }

// Tokens returns the access tokens of all accounts.
func (e *Edge) Tokens() []Token { return e.accounts().tokens() }

// RevokeToken ends the use of an access token.
func (e *Edge) RevokeToken(id string) error { return e.accounts().RevokeToken(id) }

// Users returns all accounts, oldest first.
func (e *Edge) Users() []User { return e.accounts().users() }

// hooks joins the API to the parts that hold connections.
type hooks struct{ edge *Edge }

func (h hooks) ReservePort() (int, error) { return h.edge.tcp.Reserve() }

func (h hooks) PortReleased(port int) { h.edge.tcp.Unreserve(port) }

// follow does what must happen at once when objects come and go, whichever edge's API or command was asked for it.
func (e *Edge) follow(c store.Changes) {
	gone := sshd.Gone{Users: map[string]bool{}, Sockets: map[string]bool{}, Tunnels: map[string]bool{}}
	for _, k := range c.SocketsDeleted {
		gone.Sockets[k.ID] = true
		if k.TCPPort != 0 {
			e.tcp.Release(k)
		}
	}
	for _, k := range c.SocketsMade {
		if k.TCPPort != 0 {
			e.tcp.Serve(k)
		}
	}
	for _, t := range c.TunnelsDeleted {
		gone.Tunnels[t.ID] = true
	}
	for _, u := range c.UsersDeleted {
		gone.Users[u.ID] = true
	}
	if len(gone.Users)+len(gone.Sockets)+len(gone.Tunnels) > 0 {
		e.sshd.Close(gone)
	}
}
