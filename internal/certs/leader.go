package certs

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/manager"
)

// writeAttempts bounds how often a write is tried at once when somebody else was faster.
const writeAttempts = 5

// errNotIssued is no news: checkIssued has said why.
var errNotIssued = errors.New("cert-manager has issued nothing that can be used")

// leader is the part of a Manager that writes.
type leader struct{ m *Manager }

var _ manager.LeaderElectionRunnable = leader{}

// Leader returns the runnable that makes and renews the certificates and publishes the CA. It runs on the leader only,
// beside Start.
func (m *Manager) Leader() manager.Runnable { return leader{m} }

// NeedLeaderElection says that only one replica writes.
func (leader) NeedLeaderElection() bool { return true }

// Start writes until the context ends.
func (l leader) Start(ctx context.Context) error {
	return l.m.every(ctx, l.once)
}

func (l leader) once(ctx context.Context) {
	m := l.m
	m.work.Lock()
	defer m.work.Unlock()
	err := m.ensureSecret(ctx)
	if !errors.Is(err, errNotIssued) {
		m.report.report("writing certificates", err, "secret", m.secretName())
	}
	if err != nil {
		return
	}
	// In this order a new CA is in the configurations before it signs anything.
	m.publish(ctx)
	m.checkWebhooks(ctx)
}

// ensureSecret brings the Secret to what it should hold now.
func (m *Manager) ensureSecret(ctx context.Context) error {
	var err error
	for range writeAttempts {
		if err = m.tryEnsureSecret(ctx); !apierrors.IsConflict(err) && !apierrors.IsAlreadyExists(err) && !apierrors.IsNotFound(err) {
			return err
		}
	}
	return err
}

func (m *Manager) tryEnsureSecret(ctx context.Context) error {
	secret, err := m.readSecret(ctx)
	if err != nil {
		return err
	}
	m.mu.Lock()
	served := m.material
	m.mu.Unlock()

	now := time.Now()
	var want *material
	var said []string
	switch was, why := parseSecret(secret); {
	case m.cfg.Certificate != "":
		want, said, err = m.followIssued(ctx, was, why, served, now)
	case why == nil:
		want, said, err = m.rotation.next(was, now)
	case served == nil && secret == nil:
		want, said, err = m.rotation.next(nil, now)
	default:
		want, said, err = m.rotation.replace(served, now)
		said = append(said, "made anew since the Secret can't be used: "+why.Error())
	}
	if err != nil {
		return err
	}
	if len(said) > 0 {
		if err := m.writeSecret(ctx, secret, want); err != nil {
			return err
		}
		for _, s := range said {
			m.log.Info("certificates changed", "secret", m.secretName(), "what", s)
		}
	}
	m.use(want)
	return nil
}

// followIssued is what tryEnsureSecret does in cert-manager mode. was is nil if the Secret can't be used, and why says so.
func (m *Manager) followIssued(ctx context.Context, was *material, why error, served *material, now time.Time) (*material, []string, error) {
	var said []string
	if why != nil && served != nil {
		was, said = served, []string{"restored since the Secret can't be used: " + why.Error()}
	}
	is := m.checkIssued(ctx, now)
	switch {
	case is != nil:
		want, more := m.rotation.adopt(was, is, now)
		return want, append(said, more...), nil
	case was != nil:
		return was, said, nil
	}
	return nil, nil, errNotIssued
}

// writeSecret creates the Secret, or updates the one that was read. The API server refuses either with a conflict if
// somebody else was faster.
func (m *Manager) writeSecret(ctx context.Context, secret *corev1.Secret, want *material) error {
	data, err := want.encode()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	if secret == nil {
		secret = &corev1.Secret{
			ObjectMeta: metav1.ObjectMeta{
				Namespace: m.cfg.Namespace,
				Name:      m.cfg.SecretName,
				Labels:    map[string]string{"app.kubernetes.io/managed-by": "mysocket-injector"},
			},
			Type: corev1.SecretTypeOpaque,
			Data: data,
		}
		return named("create the Secret", m.client.Create(ctx, secret, client.FieldOwner(fieldOwner)))
	}
	secret = secret.DeepCopy()
	if secret.Data == nil {
		secret.Data = map[string][]byte{}
	}
	maps.Copy(secret.Data, data)
	return named("update the Secret", m.client.Update(ctx, secret, client.FieldOwner(fieldOwner)))
}

func named(what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", what, err)
}
