package sidecar

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/mysocketio/mysocket-injector/internal/gatewayapi"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/gatewayclient"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/retry"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/tunnel"
)

const (
	backoffMin = time.Second
	backoffMax = 32 * time.Second
	// sustained is how long a tunnel must have been connected before losing it counts as a first failure.
	sustained = 30 * time.Second

	// withdrawTimeout bounds the waiting for the edge to acknowledge that a tunnel left its rotation.
	withdrawTimeout = 5 * time.Second
	// retireLinger is how long the connections of a socket that was taken away may still run.
	retireLinger  = 10 * time.Second
	deleteTimeout = 10 * time.Second
	// stopTimeout bounds all that is done after SIGTERM, and hurriedWithdraw the edge's part of it.
	stopTimeout     = 3 * time.Second
	hurriedWithdraw = time.Second

	// refusalsBeforeNew is how many logins in a row an edge may refuse, with new certificates, before the tunnel
	// itself is taken for gone and registered anew.
	refusalsBeforeNew = 3
)

// gateway is what a supervisor asks of the gateway.
type gateway interface {
	Register(ctx context.Context, of gatewayclient.Connection, publicKey string) (gatewayapi.Registration, error)
	Renew(ctx context.Context, of gatewayclient.Connection, tunnelID, publicKey string) (gatewayapi.Registration, error)
	Report(ctx context.Context, of gatewayclient.Connection, report gatewayapi.StatusReport) error
	Delete(ctx context.Context, of gatewayclient.Connection, tunnelID string) error
}

// edgeTunnel is what a supervisor does with a connected tunnel.
type edgeTunnel interface {
	Forward(ctx context.Context) error
	Withdraw(ctx context.Context) error
	WaitIdle(ctx context.Context) error
	Home() bool
	Address() netip.Addr
	Done() <-chan struct{}
	Err() error
	ReconnectAsked() <-chan struct{}
	ComeBack() time.Duration
	Open() int
	LastDial() time.Time
	Close()
}

// surroundings is what all supervisors of a process share.
type surroundings struct {
	gateway gateway
	// connect opens a tunnel; its errors are of type *tunnel.StepError.
	connect func(context.Context, tunnel.Config) (edgeTunnel, error)
	// reach asks whether the connection's own address of the edge takes connections.
	reach func(context.Context, tunnel.Config) error
	// dialApp connects a visitor to a port of the pod, checkApp asks whether the app there takes connections, and probeApp
	// whether it is ready.
	dialApp  func(ctx context.Context, port int32) (*net.TCPConn, error)
	checkApp func(ctx context.Context, port int32, proxyProtocol string) error
	probeApp func(ctx context.Context, of *gatewayapi.Probe) error

	proxy func(address string) (*url.URL, error) // that leads to the edge; a nil URL for none
	// resolver finds the edge's addresses; nil for the machine's own. spread is where this pod's connections begin in them.
	resolver tunnel.Resolver
	spread   tunnel.Spread

	key     ssh.Signer
	version string
	name    string // who serves, as the edge shows it
	clock   retry.Clock
	random  func() float64
	metrics *metrics
	logger  *slog.Logger
	// connected is called whenever a tunnel gets connected.
	connected func()
}

// supervisor keeps one connection of one socket up: it waits for the app, registers, connects, watches, and begins
// again; until it is told to drain or to retire, or its context ends.
//
//	WaitingForApp -> Registering -> Connecting -> Connected -> Draining
//	      ^                            |  ^           |
//	      |                            |  +-----------+  connection lost: back-off, no call to the gateway
//	      +----------------------------+--------------+  app gone
type supervisor struct {
	around     *surroundings
	logger     *slog.Logger
	connection gatewayclient.Connection
	assignment atomic.Pointer[gatewayapi.Assignment]
	backoff    retry.Backoff
	status     *statusReporter

	// Owned by the goroutine of run.
	health       health
	login        *login
	loginRefused int
	detours      int // how often the edge failed us; each time it is gone to at its next address
	homeward     retry.Backoff
	state        gatewayapi.State
	message      string
	lingering    sync.WaitGroup

	tunnel      atomic.Pointer[edgeTunnel]
	everWorked  atomic.Bool
	withdrawn   chan struct{} // closed when no new visitors come
	drained     chan struct{} // closed when no visitors are left
	drainOnce   sync.Once
	drainAsked  chan struct{}
	retireOnce  sync.Once
	retireAsked chan struct{}
}

// newSupervisor returns a supervisor of connection n of a socket.
func newSupervisor(around *surroundings, assignment gatewayapi.Assignment, n int) *supervisor {
	logger := around.logger.With("socket", assignment.SocketName, "service", assignment.Service)
	if n > 0 {
		logger = logger.With("connection", n)
	}
	s := &supervisor{
		around:      around,
		health:      health{around: around},
		logger:      logger,
		connection:  gatewayclient.Connection{SocketID: assignment.SocketID, Number: n},
		backoff:     retry.Backoff{Min: backoffMin, Max: backoffMax, Sustained: sustained, Random: around.random},
		homeward:    retry.Backoff{Min: backoffMin, Max: backoffMax, Sustained: sustained, Random: around.random},
		withdrawn:   make(chan struct{}),
		drained:     make(chan struct{}),
		drainAsked:  make(chan struct{}),
		retireAsked: make(chan struct{}),
	}
	s.assignment.Store(&assignment)
	s.status = newStatusReporter(around, s.logger, s.connection)
	return s
}

// update takes a changed assignment. New connections use it at once.
func (s *supervisor) update(assignment gatewayapi.Assignment) {
	old := s.assignment.Swap(&assignment)
	if old.Port != assignment.Port {
		s.logger.Info("the app's port changed; new connections use it", "from", old.Port, "to", assignment.Port)
	}
	if old.ProxyProtocol != assignment.ProxyProtocol {
		s.logger.Info("the PROXY protocol changed; new connections use it", "from", old.ProxyProtocol, "to", assignment.ProxyProtocol)
	}
}

// drain asks to leave the edge's rotation and to let open connections finish. The tunnel then stays until the context
// of run ends.
func (s *supervisor) drain() { s.drainOnce.Do(func() { close(s.drainAsked) }) }

// retire asks to leave the edge's rotation, finish soon, and delete the tunnel. Then run returns.
func (s *supervisor) retire() { s.retireOnce.Do(func() { close(s.retireAsked) }) }

// openConnections returns how many visitors are connected through this supervisor's tunnel.
func (s *supervisor) openConnections() int {
	if t := s.tunnel.Load(); t != nil {
		return (*t).Open()
	}
	return 0
}

// run returns when the tunnel is closed and, as far as that was possible in the time, deleted.
func (s *supervisor) run(ctx context.Context) {
	defer s.setGone()
	stopReporting := s.status.start(ctx)
	defer stopReporting()
	s.state = gatewayapi.StateWaitingForApp
	s.around.metrics.moveTunnel("", s.state)

	// work ends when there is to be no new tunnel, for whatever reason.
	work, cancel := context.WithCancel(ctx)
	defer cancel()
	asked := make(chan struct{})
	go func() {
		defer close(asked)
		select {
		case <-s.drainAsked:
		case <-s.retireAsked:
		case <-work.Done():
		}
		cancel()
	}()
	// ending outlives ctx by what may still be done then.
	ending, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	stop := context.AfterFunc(ctx, func() { time.AfterFunc(stopTimeout, end) })
	defer stop()
	t := s.keepConnected(work)
	<-asked
	s.finish(ctx, ending, t, stopReporting)
	s.lingering.Wait()
}

// keepConnected returns when work ends, with the tunnel if one is connected.
func (s *supervisor) keepConnected(work context.Context) edgeTunnel {
	for {
		t := s.establish(work)
		if t == nil {
			return nil
		}
		ended := s.watch(work, t)
		for ended == endHome {
			t = s.goHome(work, t)
			ended = s.watch(work, t)
		}
		if ended == endAsked {
			return t
		}
		s.tunnel.Store(nil)
		s.detours++
		var wish time.Duration   // the edge's
		if ended != endForward { // of which the edge knows nothing yet
			wish = t.ComeBack()
		}
		delay := s.backoff.Next(wish)
		s.around.metrics.reconnects.WithLabelValues(string(ended)).Inc()
		level, message := slog.LevelWarn, "tunnel lost"
		var err error
		switch ended {
		case endSession:
			level, message = slog.LevelInfo, "the edge asks to reconnect"
			s.linger(t)
		default:
			if err = t.Err(); err == nil {
				err = errors.New("the edge does not take the tunnel back into its rotation")
			}
			t.Close()
		}
		s.enter(gatewayapi.StateConnecting, errorMessage(err))
		s.logger.Log(work, level, message, "tunnel", s.login.tunnelID, "edge", s.login.address, "err", err, "edge_wants", wish, "retry_in", round(delay))
		if retry.Sleep(work, s.around.clock, delay) != nil {
			return nil
		}
	}
}

// linger lets the connections of a tunnel that is being replaced run for a while.
func (s *supervisor) linger(t edgeTunnel) {
	if t.Open() == 0 {
		t.Close()
		return
	}
	s.lingering.Go(func() {
		ctx, cancel := context.WithTimeout(context.Background(), retireLinger)
		defer cancel()
		_ = t.WaitIdle(ctx)
		t.Close()
	})
}

// establish tries until a tunnel is connected. It returns nil when work ends before that.
func (s *supervisor) establish(work context.Context) edgeTunnel {
	for {
		if !s.waitForApp(work) {
			return nil
		}
		began := s.around.clock.Now()
		t, err := s.attempt(work)
		if err == nil {
			s.around.metrics.connectSeconds.Observe(s.around.clock.Now().Sub(began).Seconds())
			s.loginRefused = 0
			s.tunnel.Store(&t)
			s.everWorked.Store(true)
			assignment := s.assignment.Load()
			s.enter(gatewayapi.StateConnected, "")
			s.logger.Info("tunnel connected", "url", assignment.URL, "tunnel", s.login.tunnelID, "edge", s.login.address, "port", assignment.Port)
			s.around.connected()
			return t
		}
		if work.Err() != nil {
			return nil
		}
		if tunnel.FailedStep(err) != "" {
			s.detours++
		}
		delay := s.backoff.Next(gatewayclient.RetryAfter(err))
		step := string(tunnel.FailedStep(err))
		if step == "" {
			step = "register"
		}
		s.around.metrics.connectFailures.WithLabelValues(step).Inc()
		s.enter(s.state, errorMessage(err))
		s.logger.Warn("no tunnel yet", "step", step, "err", err, "hint", hint(err), "retry_in", round(delay))
		if retry.Sleep(work, s.around.clock, delay) != nil {
			return nil
		}
	}
}

// attempt registers or renews if that is necessary, and connects.
func (s *supervisor) attempt(work context.Context) (edgeTunnel, error) {
	if err := s.ensureLogin(work); err != nil {
		return nil, err
	}
	if s.enter(gatewayapi.StateConnecting, s.message) {
		s.logger.Info("connecting to the edge", "tunnel", s.login.tunnelID, "edge", s.login.address)
	}
	s.login.used = true
	cfg, err := s.tunnelConfig()
	if err != nil {
		return nil, err
	}
	t, err := s.around.connect(work, cfg)
	switch tunnel.FailedStep(err) {
	case tunnel.StepAuth, tunnel.StepForward, tunnel.StepHostKey:
		// The edge doesn't want this login, or the gateway knows the edge better than we do: ask it before the next attempt.
		s.login.refused = true
		s.loginRefused++
	}
	return t, err
}

// tunnelConfig says where to connect with the login there is.
func (s *supervisor) tunnelConfig() (tunnel.Config, error) {
	proxy, err := s.around.proxy(s.login.address)
	if err != nil {
		return tunnel.Config{}, &tunnel.StepError{Step: tunnel.StepProxy, Err: err}
	}
	return tunnel.Config{
		Address:       s.login.address,
		Proxy:         proxy,
		Resolver:      s.around.resolver,
		Spread:        tunnel.Spread{Turn: s.around.spread.Turn + s.connection.Number, Detour: s.detours, IPv6: s.around.spread.IPv6},
		User:          s.login.user,
		Signer:        s.login.signer,
		HostKeys:      s.login.hostKeys,
		ForwardHost:   s.login.forwardHost,
		ForwardPort:   s.login.forwardPort,
		Name:          s.around.name,
		ClientVersion: "SSH-2.0-mysocket-sidecar_" + s.around.version,
		DialApp: func(ctx context.Context) (*net.TCPConn, error) {
			return s.around.dialApp(ctx, s.assignment.Load().Port)
		},
		Preface: func(visitor netip.AddrPort, app *net.TCPConn) []byte {
			return proxyHeader(s.assignment.Load().ProxyProtocol, visitor, app.RemoteAddr())
		},
		Clock:    s.around.clock,
		Logger:   s.logger.With("tunnel", s.login.tunnelID),
		Observer: s.around.metrics,
	}, nil
}

// ensureLogin makes sure that there is a login that the edge may accept, with as few calls to the gateway as possible:
// none while the certificate is valid.
func (s *supervisor) ensureLogin(work context.Context) error {
	if s.login.usable(s.around.clock.Now(), s.assignment.Load().EdgeAddress) {
		return nil
	}
	if s.enter(gatewayapi.StateRegistering, s.message) {
		s.logger.Info("asking the gateway for a tunnel or its certificate")
	}
	publicKey := authorizedKey(s.around.key.PublicKey())
	if s.login != nil && s.loginRefused < refusalsBeforeNew {
		registration, err := s.around.gateway.Renew(work, s.connection, s.login.tunnelID, publicKey)
		if err == nil {
			return s.takeLogin(registration)
		}
		if !gatewayclient.IsNotFound(err) {
			return err
		}
		s.logger.Info("the gateway no longer knows the tunnel; registering anew", "tunnel", s.login.tunnelID)
	}
	registration, err := s.around.gateway.Register(work, s.connection, publicKey)
	if err != nil {
		return err
	}
	s.loginRefused = 0
	s.status.registered()
	return s.takeLogin(registration)
}

func (s *supervisor) takeLogin(registration gatewayapi.Registration) error {
	l, err := newLogin(registration, s.around.key)
	if err != nil {
		return fmt.Errorf("the gateway's registration can't be used: %w", err)
	}
	s.login = l
	return nil
}

// enter changes the state and tells whether it was another. Only changes are counted and reported, and the caller logs
// them in its own words. message is what a person should know about the state.
func (s *supervisor) enter(state gatewayapi.State, message string) bool {
	changed := s.state != state
	if !changed && s.message == message {
		return false
	}
	if changed {
		s.around.metrics.moveTunnel(s.state, state)
	}
	s.state, s.message = state, message
	if state == gatewayapi.StateRegistering && message == "" {
		// The gateway sees that from the registration itself, which a report at the same moment would only disturb.
		return changed
	}
	s.status.report(gatewayapi.StatusReport{State: state, Message: message})
	return changed
}

func (s *supervisor) setGone() {
	s.around.metrics.moveTunnel(s.state, "")
	s.state = ""
}

func authorizedKey(key ssh.PublicKey) string {
	line := ssh.MarshalAuthorizedKey(key)
	return string(line[:len(line)-1]) // without the newline
}

// errorMessage fits an error into a status report.
func errorMessage(err error) string {
	if err == nil {
		return ""
	}
	message := err.Error()
	if len(message) > gatewayapi.MaxMessageBytes {
		message = cutUTF8(message, gatewayapi.MaxMessageBytes-len("…")) + "…"
	}
	return message
}

func round(d time.Duration) time.Duration { return d.Round(10 * time.Millisecond) }
