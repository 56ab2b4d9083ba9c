package tlscert

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/caddyserver/certmagic"
	"github.com/mholt/acmez/v3"
	"go.uber.org/zap"

	"github.com/mysocketio/mysocket-injector/internal/edge/store"
)

const (
	// orderWait is how long a handshake waits for a certificate. It is below the time that a handshake may take, so that the
	// visitor still gets the edge's own.
	orderWait = 8 * time.Second
	// orderTimeout bounds one order.
	orderTimeout = 2 * time.Minute
	// maxOrders bounds the orders at a time, over all names: an account that makes thousands of sockets must not make
	// thousands of orders at once.
	maxOrders = 16
	// After a failed order the name has to wait. Public authorities allow some 5 failed validations of a name an hour, and
	// one order may fail two.
	firstRetry = 5 * time.Minute
	lastRetry  = 6 * time.Hour
	// stateRetry is after what time a certificate is looked for again that could not be, because the state is away.
	stateRetry = 5 * time.Second
	// tidyInterval is how often certificates of names that are gone are forgotten.
	tidyInterval = 10 * time.Minute
	// keepExpired is how long an expired certificate is kept in the state.
	keepExpired = 14 * 24 * time.Hour
)

// ACMEConfig says where certificates are ordered, and for which names.
type ACMEConfig struct {
	// Directory is the URL of the authority's directory.
	Directory string
	// Email is the contact of the account there; may be empty.
	Email string
	// Roots verify the authority's own HTTPS; nil for the system's.
	Roots *x509.CertPool
	// Blobs keep the account, certificates and challenges.
	Blobs store.Blobs
	// Allowed says whether there may be a certificate for a name.
	Allowed func(name string) bool
	// HTTPHost and HTTPPort are where the HTTP front listens.
	HTTPHost string
	HTTPPort int
	Log      *slog.Logger
	Now      func() time.Time
	// Done is told of each order that ended.
	Done func(obtained bool)
}

// ACME gets a certificate for each allowed name when it is first asked for, and renews those that it has.
type ACME struct {
	cfg    ACMEConfig
	log    *slog.Logger
	cache  *certmagic.Cache
	magic  *certmagic.Config
	issuer *certmagic.ACMEIssuer
	zap    *zap.Logger

	ctx  context.Context
	stop context.CancelFunc
	wg   sync.WaitGroup

	orders chan struct{}
	mu     sync.Mutex
	names  map[string]*nameState
}

// nameState is what is known of a name that visitors asked for. There are no more than allowed names.
type nameState struct {
	// working is closed when the certificate was loaded or ordered, or could not be; nil when nothing is under way.
	working chan struct{}
	// ready means that certmagic has a certificate in its cache, and renews it.
	ready bool
	// After failures in a row, nothing is tried before next.
	failures int
	next     time.Time
}

// order is one attempt to get a certificate.
type order struct {
	cancel context.CancelFunc
	err    error
}

type orderKey struct{}

// NewACME makes an ACME. It must be closed.
func NewACME(cfg ACMEConfig) *ACME {
	a := &ACME{cfg: cfg, log: cfg.Log, zap: zap.New(zapToSlog{cfg.Log}), orders: make(chan struct{}, maxOrders), names: map[string]*nameState{}}
	a.ctx, a.stop = context.WithCancel(context.Background())
	a.cache = certmagic.NewCache(certmagic.CacheOptions{
		GetConfigForCert: func(certmagic.Certificate) (*certmagic.Config, error) { return a.magic, nil },
		Logger:           a.zap,
	})
	a.magic = certmagic.New(a.cache, certmagic.Config{
		Storage: storage{cfg.Blobs}, Logger: a.zap, OnEvent: a.event,
		// Stapling asks an address in the certificate, and public authorities have given OCSP up.
		OCSP: certmagic.OCSPConfig{DisableStapling: true},
	})
	a.issuer = certmagic.NewACMEIssuer(a.magic, certmagic.ACMEIssuer{
		CA: cfg.Directory, Email: cfg.Email, Agreed: true, TrustedRoots: cfg.Roots, Logger: a.zap,
		// certmagic would listen for both kinds of challenge, unless somebody does so there: the HTTP front. Who comes to the
		// HTTPS front with a challenge finds it by the name.
		ListenHost: cfg.HTTPHost, AltHTTPPort: cfg.HTTPPort, AltTLSALPNPort: cfg.HTTPPort,
	})
	a.magic.Issuers = []certmagic.Issuer{a.issuer}
	a.wg.Go(a.tidy)
	return a
}

// Close ends orders that are under way and waits for them.
func (a *ACME) Close() {
	a.mu.Lock() // no order begins after it
	a.stop()
	a.mu.Unlock()
	a.wg.Wait()
	a.cache.Stop()
}

// event hears of orders and renewals that ended.
func (a *ACME) event(ctx context.Context, event string, data map[string]any) error {
	switch event {
	case "cert_obtained":
		a.log.Info("certificate obtained", "name", data["identifier"], "renewal", data["renewal"])
		a.cfg.Done(true)
	case "cert_failed":
		if o, ok := ctx.Value(orderKey{}).(*order); ok {
			// certmagic would try again within a minute, and for 30 days. A visitor's name does so at the pace of firstRetry.
			o.err, _ = data["error"].(error)
			o.cancel()
		}
		if a.ctx.Err() == nil { // else the edge stops
			a.log.Warn("certificate could not be obtained", "name", data["identifier"], "renewal", data["renewal"], "err", data["error"])
			a.cfg.Done(false)
		}
	}
	return nil
}

// certificate returns the one for a name, nil if there is none. It orders one the first time.
func (a *ACME) certificate(name string, hello *tls.ClientHelloInfo) *tls.Certificate {
	state := a.begin(name)
	if state == nil {
		return nil
	}
	if state.working != nil {
		timer := time.NewTimer(orderWait)
		defer timer.Stop()
		select {
		case <-state.working:
		case <-timer.C:
			return nil
		case <-hello.Context().Done():
			return nil
		case <-a.ctx.Done():
			return nil
		}
	}
	return a.cached(name)
}

// cached returns what certmagic has in memory.
func (a *ACME) cached(name string) *tls.Certificate {
	// Of all the certificates of the name: an old one may be there for a moment beside its renewal.
	var best *certmagic.Certificate
	for _, c := range a.cache.AllMatchingCertificates(name) {
		if best == nil || c.Leaf.NotAfter.After(best.Leaf.NotAfter) {
			best = &c
		}
	}
	if best == nil {
		return nil
	}
	return &best.Certificate
}

// begin starts to get a certificate unless there is one or it is not the time. It returns nil if there is none to wait for.
func (a *ACME) begin(name string) *nameState {
	a.mu.Lock()
	defer a.mu.Unlock()
	state := a.names[name]
	switch {
	case state != nil && (state.ready || state.working != nil):
		return &nameState{working: state.working}
	case !a.cfg.Allowed(name) || a.ctx.Err() != nil:
		return nil
	case state != nil && a.cfg.Now().Before(state.next):
		return nil
	case state == nil:
		state = &nameState{}
		a.names[name] = state
	}
	working := make(chan struct{})
	state.working = working
	a.wg.Go(func() {
		defer close(working)
		a.finish(name, a.get(name))
	})
	return &nameState{working: working}
}

// errBusy means that as many orders are under way as may be.
var errBusy = errors.New("too many certificates are being ordered")

// errAway means that nothing was ordered either. An order whose certificate can't be kept is none of these: another would be one more at
// the authority.
var errAway = errors.New("what is kept can't be looked at")

// get loads a name's certificate, or orders one.
func (a *ACME) get(name string) error {
	ctx, cancel := context.WithTimeout(a.ctx, orderTimeout)
	defer cancel()
	cert, err := a.magic.CacheManagedCertificate(ctx, name)
	if err == nil {
		if cert.NeedsRenewal(a.magic) {
			return a.cache.RenewManagedCertificates(a.ctx) // It goes on by itself.
		}
		return nil
	}
	if errors.Is(err, store.ErrUnavailable) {
		return fmt.Errorf("%w: %w", errAway, err)
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("load certificate: %w", err)
	}
	select {
	case a.orders <- struct{}{}:
		defer func() { <-a.orders }()
	default:
		return errBusy
	}
	// Not ObtainCertSync: without an e-mail address it asks for one on the terminal.
	o := &order{cancel: cancel}
	if err := a.magic.ObtainCertAsync(context.WithValue(ctx, orderKey{}, o), name); err != nil {
		return cmp.Or(o.err, err)
	}
	_, err = a.magic.CacheManagedCertificate(ctx, name)
	return err
}

func (a *ACME) finish(name string, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	state := a.names[name]
	state.working = nil
	switch {
	case err == nil || len(a.cache.AllMatchingCertificates(name)) > 0:
		state.ready, state.failures = true, 0
	case errors.Is(err, errBusy):
		a.log.Warn("certificate not ordered", "name", name, "err", err)
	case errors.Is(err, errAway):
		state.next = a.cfg.Now().Add(stateRetry)
		a.log.Warn("certificate can't be looked for; visitors of the name get the edge's own", "name", name, "retry_after", stateRetry, "err", err)
	case a.ctx.Err() == nil:
		wait := min(firstRetry<<min(state.failures, 10), lastRetry)
		state.failures++
		state.next = a.cfg.Now().Add(wait)
		a.log.Warn("no certificate; visitors of the name get the edge's own", "name", name, "retry_after", wait, "err", err)
	}
}

// tidy forgets names that are gone, so that their certificates are not renewed, and what has expired.
func (a *ACME) tidy() {
	ticker := time.NewTicker(tidyInterval)
	defer ticker.Stop()
	for {
		select {
		case <-a.ctx.Done():
			return
		case <-ticker.C:
		}
		a.forgetGone()
		err := certmagic.CleanStorage(a.ctx, a.magic.Storage, certmagic.CleanStorageOptions{
			Logger: a.zap, ExpiredCerts: true, ExpiredCertGracePeriod: keepExpired, Interval: 24 * time.Hour,
		})
		if err != nil && a.ctx.Err() == nil {
			a.log.Warn("expired certificates are not removed from the state", "err", err)
		}
	}
}

func (a *ACME) forgetGone() {
	a.mu.Lock()
	defer a.mu.Unlock()
	for name, state := range a.names {
		if state.working == nil && !a.cfg.Allowed(name) {
			delete(a.names, name)
			a.cache.RemoveManaged([]certmagic.SubjectIssuer{{Subject: name}})
		}
	}
}

// challengeConfig is for a client that is an authority, and makes a TLS-ALPN-01 challenge; nil for others.
func (a *ACME) challengeConfig(hello *tls.ClientHelloInfo) (*tls.Config, error) {
	if len(hello.SupportedProtos) != 1 || hello.SupportedProtos[0] != acmez.ACMETLS1Protocol {
		return nil, nil
	}
	if !a.cfg.Allowed(Name(hello)) {
		return &tls.Config{MinVersion: tls.VersionTLS12}, nil // without a certificate: unrecognized_name
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS12, NextProtos: []string{acmez.ACMETLS1Protocol}, GetCertificate: a.magic.GetCertificate,
	}, nil
}

// Handler answers HTTP-01 challenges of the edge's own orders, and has next answer everything else: apps may have orders
// of their own.
func (a *ACME) Handler(next http.Handler) http.Handler {
	challenge := a.issuer.HTTPChallengeHandler(next)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host := r.Host
		if name, _, err := net.SplitHostPort(host); err == nil {
			host = name
		}
		if certmagic.LooksLikeHTTPChallenge(r) && a.cfg.Allowed(strings.ToLower(host)) {
			challenge.ServeHTTP(w, r)
			return
		}
		next.ServeHTTP(w, r)
	})
}
