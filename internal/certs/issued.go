package certs

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	certmanagerv1 "github.com/cert-manager/cert-manager/pkg/apis/certmanager/v1"
	cmmeta "github.com/cert-manager/cert-manager/pkg/apis/meta/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// issued is what cert-manager put into the Certificate's Secret.
type issued struct {
	leaf  pair
	chain []*x509.Certificate
	cas   []*x509.Certificate // what its ca.crt says to trust
}

// parseIssued reads the Secret that cert-manager wrote, and says why it can't be served at that time under these names.
func parseIssued(data map[string][]byte, names []string, now time.Time) (*issued, error) {
	if len(data[keyLeafCert]) == 0 {
		return nil, fmt.Errorf("it has no %s", keyLeafCert)
	}
	if len(data[keyCACert]) == 0 {
		return nil, fmt.Errorf("it has no %s: an issuer is needed that says which CA to trust (ACME ones do not)", keyCACert)
	}
	leaf, err := parseCerts(data, keyLeafCert)
	if err != nil {
		return nil, err
	}
	is := &issued{chain: leaf[1:]}
	if is.leaf, err = withKey(leaf[0], data, keyLeafCert, keyLeafKey); err != nil {
		return nil, err
	}
	if is.cas, err = parseCerts(data, keyCACert); err != nil {
		return nil, err
	}
	switch cert := is.leaf.cert; {
	case is.signer() == nil:
		return nil, fmt.Errorf("its %s is not signed by a CA of its %s", keyLeafCert, keyCACert)
	case now.Before(cert.NotBefore):
		return nil, fmt.Errorf("its certificate is valid from %s on", stamp(cert.NotBefore))
	case !now.Before(cert.NotAfter):
		return nil, fmt.Errorf("its certificate expired at %s", stamp(cert.NotAfter))
	}
	for _, name := range names {
		if err := is.leaf.cert.VerifyHostname(name); err != nil {
			return nil, fmt.Errorf("its certificate lacks a name: %w", err)
		}
	}
	return is, nil
}

func (is *issued) signer() *x509.Certificate {
	for _, ca := range is.cas {
		if leadsTo(is.leaf.cert, is.chain, ca) {
			return ca
		}
	}
	return nil
}

// maxOthers bounds what is published beside the CA that is in use, should an issuer come up with a new one every minute.
const maxOthers = 8

// adopt decides what our Secret should hold when cert-manager has issued a certificate. It is what next is for certificates of our
// own, and keeps the same promise: at every moment every client, whether it has the newest bundle or the one before, trusts what
// is served. cert-manager replaces certificate and CA in its Secret in one stroke; so what was served before is kept in ours until the
// new one may be.
//
//	what is                                           | what is done
//	nothing, or the leaf in use has expired           | the issued leaf and its CAs are used at once
//	a CA was issued that is not published             | it is published beside the others; the leaf stays
//	issued leaf of the CA that is in use              | it is used at once
//	issued leaf of another CA                         | once that has been published for Overlap: it is used
//	CAs are published that the issuer no longer names | once the issued leaf has been in use for Overlap: they are dropped
//
// So it is, too, when the mode is changed: the CA before was then one of our own.
func (r rotation) adopt(was *material, is *issued, now time.Time) (*material, []string) {
	fresh := func() *material {
		m := &material{ca: pair{cert: is.signer()}, leaf: is.leaf, chain: is.chain, since: now}
		m.others = without(is.cas, m.ca.cert)
		return m
	}
	if was == nil || !now.Before(was.leaf.cert.NotAfter) {
		return fresh(), []string{"issued certificate " + until(is.leaf.cert)}
	}
	m, said := *was, []string(nil)
	if missing := without(is.cas, m.trusted()...); len(missing) > 0 {
		m.others = append(missing, m.others...)
		m.others = m.others[:min(len(m.others), maxOthers)]
		m.since = now
		for _, ca := range missing {
			said = append(said, fmt.Sprintf("CA %q %s is trusted, too", ca.Subject.CommonName, until(ca)))
		}
	}
	inUse := m.signer()
	switch {
	case m.leaf.cert.Equal(is.leaf.cert):
		if len(without(m.trusted(), is.cas...)) > 0 && !now.Before(m.since.Add(r.overlap)) {
			m = *fresh()
			said = append(said, "CAs that the issuer no longer names are not trusted any more")
		}
	case inUse != nil && leadsTo(is.leaf.cert, is.chain, inUse):
		m.leaf, m.chain = is.leaf, is.chain
		said = append(said, "issued certificate "+until(is.leaf.cert))
	case now.Before(r.useFrom(&m)):
		if len(said) > 0 {
			said = append(said, "its certificate will be used from "+stamp(r.useFrom(&m))+" on")
		}
	default:
		before := m.trusted()
		m = *fresh()
		m.others = append(m.others, without(before, m.trusted()...)...)
		m.others = m.others[:min(len(m.others), maxOthers)]
		said = append(said, "issued certificate "+until(is.leaf.cert)+" of another CA")
	}
	return &m, said
}

// useFrom is when the leaf of a CA may be used that was added last: after the overlap, or when half of what the leaf in use
// had left then is over.
func (r rotation) useFrom(m *material) time.Time {
	half := m.since.Add(m.leaf.cert.NotAfter.Sub(m.since) / 2)
	if from := m.since.Add(r.overlap); from.Before(half) {
		return from
	}
	return half
}

// without returns the certificates that are not among the others.
func without(certs []*x509.Certificate, others ...*x509.Certificate) []*x509.Certificate {
	var out []*x509.Certificate
	for _, c := range certs {
		if !contains(others, c) && !contains(out, c) {
			out = append(out, c)
		}
	}
	return out
}

func contains(certs []*x509.Certificate, c *x509.Certificate) bool {
	for _, other := range certs {
		if other.Equal(c) {
			return true
		}
	}
	return false
}

// readIssued reads the Certificate and its Secret. The result may be used even if there is an error, unless it is nil:
// cert-manager may have failed to renew a certificate that is still good.
func (m *Manager) readIssued(ctx context.Context, now time.Time) (*issued, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	name := m.cfg.Namespace + "/" + m.cfg.Certificate
	certificate := &certmanagerv1.Certificate{}
	switch err := m.client.Get(ctx, client.ObjectKey{Namespace: m.cfg.Namespace, Name: m.cfg.Certificate}, certificate); {
	case meta.IsNoMatchError(err):
		return nil, errors.New("cert-manager is not installed: the API server does not know the kind Certificate of cert-manager.io/v1")
	case apierrors.IsNotFound(err):
		return nil, fmt.Errorf("the Certificate %s of cert-manager does not exist", name)
	case err != nil:
		return nil, fmt.Errorf("read the Certificate %s of cert-manager: %w", name, err)
	}
	if why := notReady(certificate); why != "" {
		return nil, fmt.Errorf("the Certificate %s of cert-manager is not ready: %s", name, why)
	}
	secretName := certificate.Spec.SecretName
	secret := &corev1.Secret{}
	switch err := m.client.Get(ctx, client.ObjectKey{Namespace: m.cfg.Namespace, Name: secretName}, secret); {
	case apierrors.IsNotFound(err):
		return nil, fmt.Errorf("the Secret %s/%s of the Certificate %s does not exist", m.cfg.Namespace, secretName, name)
	case err != nil:
		return nil, fmt.Errorf("read the Secret %s/%s of the Certificate %s: %w", m.cfg.Namespace, secretName, name, err)
	}
	is, err := parseIssued(secret.Data, m.rotation.names, now)
	if err != nil {
		return nil, fmt.Errorf("the Secret %s/%s of the Certificate %s: %w", m.cfg.Namespace, secretName, name, err)
	}
	if c := condition(certificate, certmanagerv1.CertificateConditionIssuing); c != nil && c.Status == cmmeta.ConditionFalse {
		return is, fmt.Errorf("the Certificate %s of cert-manager was not renewed: %s: %s", name, c.Reason, c.Message)
	}
	return is, nil
}

// notReady says in cert-manager's words why the Certificate is not ready, "" if it is.
func notReady(c *certmanagerv1.Certificate) string {
	ready := condition(c, certmanagerv1.CertificateConditionReady)
	issuing := condition(c, certmanagerv1.CertificateConditionIssuing)
	said := ""
	if issuing != nil && issuing.Message != "" {
		said = "; " + issuing.Reason + ": " + issuing.Message
	}
	switch {
	case ready == nil:
		return "cert-manager has not looked at it yet: does its controller run?" + said
	case ready.ObservedGeneration < c.Generation:
		return "cert-manager has not looked at its last change yet: does its controller run?" + said
	case ready.Status != cmmeta.ConditionTrue:
		return ready.Reason + ": " + ready.Message + said
	}
	return ""
}

func condition(c *certmanagerv1.Certificate, kind certmanagerv1.CertificateConditionType) *certmanagerv1.CertificateCondition {
	for i := range c.Status.Conditions {
		if c.Status.Conditions[i].Type == kind {
			return &c.Status.Conditions[i]
		}
	}
	return nil
}

// checkIssued reads what cert-manager issued, and notes what is wrong with it.
func (m *Manager) checkIssued(ctx context.Context, now time.Time) *issued {
	is, problem := m.readIssued(ctx, now)
	if errors.Is(problem, context.Canceled) {
		return is
	}
	m.mu.Lock()
	m.issuance = problem
	m.mu.Unlock()
	m.metrics.issued(problem == nil)
	m.report.report("the certificate of cert-manager", problem)
	return is
}
