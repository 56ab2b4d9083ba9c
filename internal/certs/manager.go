// Package certs gives the control plane the certificate that its webhook and its gateway are served with, and sees to it
// that those who call them trust it. It owns one Secret, and the caBundle fields of the webhook configurations it is
// told of; whoever publishes the CA elsewhere subscribes to it. It must not know what is served.
//
// The certificates are of its own making, or of cert-manager's: then the leader takes what cert-manager issued into the same
// Secret, in steps that no client notices.
//
// The leader writes ([Manager.Leader]), every replica reads ([Manager.Start]). Nothing of it is in the chart, so no
// upgrade of the chart can replace a certificate, and no tool that compares the chart with the cluster sees a difference.
package certs

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/manager"
)

const (
	// requestTimeout bounds every request to the API server.
	requestTimeout = 10 * time.Second
	// eagerInterval is used instead of a longer Config.Interval until this replica is ready.
	eagerInterval = time.Second
)

var (
	errNoCertificate = errors.New("no certificate yet: the leader makes one in its first seconds")
	errNotRead       = errors.New("it has not been read yet")
)

// Manager holds the serving certificate. It is a runnable for every replica; the leader's part is Leader.
type Manager struct {
	cfg      Config
	client   client.Client
	log      *slog.Logger
	report   *reporter
	rotation rotation
	metrics  *metrics

	// work is held from reading the Secret to using what it holds, so that the follower of the leader's replica can't
	// bring back what the leader has just replaced.
	work sync.Mutex

	mu          sync.Mutex
	material    *material        // the last that was right
	served      *tls.Certificate // of material
	subscribers []chan struct{}
	webhooks    error         // what is wrong with the webhook configurations, as last seen
	published   bool          // they have been right once
	issuance    error         // what is wrong with cert-manager's Certificate, as last seen; nil without cert-manager
	loaded      chan struct{} // closed once material is there
}

var (
	_ manager.Runnable               = (*Manager)(nil)
	_ manager.LeaderElectionRunnable = (*Manager)(nil)
)

// New returns a Manager, or says what is wrong with the configuration. The client must not have a cache for Secrets and
// webhook configurations: it needs get, create and update on the one Secret, and get and patch on the one (or two) webhook
// configurations, and no list or watch. In cert-manager mode it needs get on the Certificate and on its Secret, too.
func New(cfg Config, c client.Client) (*Manager, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	cfg = cfg.withDefaults()
	names := slices.Clone(cfg.DNSNames)
	slices.Sort(names)
	m := &Manager{
		cfg:      cfg,
		client:   c,
		log:      cfg.Log,
		report:   &reporter{log: cfg.Log, last: map[string]string{}},
		rotation: rotation{names: slices.Compact(names), leafLifetime: cfg.LeafLifetime, caLifetime: cfg.CALifetime, overlap: cfg.Overlap},
		webhooks: errors.New("the webhook configurations have not been read yet"),
		loaded:   make(chan struct{}),
	}
	if cfg.Certificate != "" {
		m.issuance = fmt.Errorf("the Certificate %s/%s of cert-manager: %w", cfg.Namespace, cfg.Certificate, errNotRead)
	}
	var err error
	m.metrics, err = newMetrics(cfg.Registerer, cfg.Certificate != "")
	return m, err
}

// NeedLeaderElection says that every replica reads.
func (m *Manager) NeedLeaderElection() bool { return false }

// Start follows the Secret and the webhook configurations until the context ends.
func (m *Manager) Start(ctx context.Context) error {
	return m.every(ctx, m.follow)
}

// every calls do at once and then at each interval, more often until this replica is ready.
func (m *Manager) every(ctx context.Context, do func(context.Context)) error {
	for {
		do(ctx)
		interval := m.cfg.Interval
		if m.Ready() != nil {
			interval = min(interval, eagerInterval)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(interval):
		}
	}
}

// follow reads once. What was read before stays in use while the Secret is no good.
func (m *Manager) follow(ctx context.Context) {
	m.work.Lock()
	defer m.work.Unlock()
	read, err := m.read(ctx)
	if err == nil {
		m.use(read)
	}
	m.report.report("certificates in the Secret", err, "secret", m.secretName())
	if m.cfg.Certificate != "" {
		m.checkIssued(ctx, time.Now())
	}
	m.checkWebhooks(ctx)
}

func (m *Manager) read(ctx context.Context) (*material, error) {
	secret, err := m.readSecret(ctx)
	if err != nil {
		return nil, err
	}
	return parseSecret(secret)
}

// readSecret returns nil if there is none.
func (m *Manager) readSecret(ctx context.Context) (*corev1.Secret, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	secret := &corev1.Secret{}
	err := m.client.Get(ctx, client.ObjectKey{Namespace: m.cfg.Namespace, Name: m.cfg.SecretName}, secret)
	switch {
	case apierrors.IsNotFound(err):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("read the Secret: %w", err)
	}
	return secret, nil
}

// parseSecret takes nil for a Secret that isn't there.
func parseSecret(secret *corev1.Secret) (*material, error) {
	if secret == nil {
		return nil, errors.New("the Secret does not exist")
	}
	return parse(secret.Data)
}

func (m *Manager) secretName() string { return m.cfg.Namespace + "/" + m.cfg.SecretName }

// use serves the material from now on.
func (m *Manager) use(read *material) {
	m.mu.Lock()
	defer m.mu.Unlock()
	was := m.material
	if was != nil && was.leaf.cert.Equal(read.leaf.cert) && bytes.Equal(was.bundle(), read.bundle()) {
		return
	}
	m.material = read
	m.served = read.tls()
	m.metrics.observe(read)
	m.log.Info("certificate in use", "until", read.leaf.cert.NotAfter, "ca_until", read.ca.cert.NotAfter, "ca_rotation", len(read.others) > 0)
	if was == nil {
		close(m.loaded)
	}
	if was == nil || !bytes.Equal(was.bundle(), read.bundle()) {
		for _, s := range m.subscribers {
			signal(s)
		}
	}
}

// signal wakes a subscriber; one that has a signal waiting needs no second.
func signal(s chan struct{}) {
	select {
	case s <- struct{}{}:
	default:
	}
}

// GetCertificate is for tls.Config. It always gives the newest certificate, and an error while there is none.
func (m *Manager) GetCertificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.served == nil {
		return nil, m.noCertificate()
	}
	return m.served, nil
}

// noCertificate says why there is none. The caller holds mu.
func (m *Manager) noCertificate() error {
	if m.issuance != nil {
		return fmt.Errorf("no certificate yet: %w", m.issuance)
	}
	return errNoCertificate
}

// Wait returns once there is a certificate to serve, or with the context's error.
func (m *Manager) Wait(ctx context.Context) error {
	select {
	case <-m.loaded:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for a certificate: %w", ctx.Err())
	}
}

// CABundle returns the CAs to trust, as PEM: the current one and, during a rotation, another. It is nil while there is
// none.
func (m *Manager) CABundle() []byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.material == nil {
		return nil
	}
	return m.material.bundle()
}

// Subscribe returns a channel that gets a value whenever CABundle has changed, at once if there is one already. Signals
// that nobody takes become one.
func (m *Manager) Subscribe() <-chan struct{} {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := make(chan struct{}, 1)
	m.subscribers = append(m.subscribers, s)
	if m.material != nil {
		signal(s)
	}
	return s
}

// Published says why the API server would not call our webhook, as last seen: a webhook configuration is missing, or it
// doesn't trust our certificate.
func (m *Manager) Published() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.webhooks
}

// Ready says why this replica can't serve yet: it has no certificate, its certificate has expired, or the webhook
// configurations don't trust it. Once they have, a later fault in them is logged and mended ([Manager.Published] tells),
// but it doesn't make all replicas unready together: that would take the gateway from sidecars which trust it.
func (m *Manager) Ready() error {
	now := time.Now()
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.material == nil:
		return m.noCertificate()
	case now.After(m.material.leaf.cert.NotAfter):
		expired := "the certificate expired at " + stamp(m.material.leaf.cert.NotAfter)
		if m.issuance != nil {
			return fmt.Errorf("%s: %w", expired, m.issuance)
		}
		return errors.New(expired)
	case !m.published:
		return m.webhooks
	}
	return nil
}
