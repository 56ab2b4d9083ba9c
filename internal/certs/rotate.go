package certs

import (
	"crypto/x509"
	"fmt"
	"time"
)

// rotation decides what the Secret should hold at a time. It is pure but for the keys it makes.
//
// At every moment every client, whether it has the newest bundle or the one before, must trust what is served:
//
//	what is                              | what is done
//	nothing, or a CA that has expired    | new CA, leaf signed by it
//	leaf at 2/3, expired or lacks a name | new leaf from the CA
//	CA at 2/3, or its key is not ours    | new CA, the old one stays in the bundle among the others; the leaf stays
//	leaf of another CA                   | once the new CA has been published for Overlap: new leaf from it
//	others, leaf of the current CA       | once that leaf has been served for Overlap: the others are dropped
//
// The old CA's key is gone as soon as there is a new one. A CA whose key is not ours was cert-manager's.
type rotation struct {
	names                             []string
	leafLifetime, caLifetime, overlap time.Duration
}

// next returns what the Secret should hold, and sentences about what is new in it, none if was is right as it is. was may
// be nil.
func (r rotation) next(was *material, now time.Time) (*material, []string, error) {
	if was == nil || !now.Before(was.ca.cert.NotAfter) {
		ca, err := newCA(now, r.caLifetime)
		if err != nil {
			return nil, nil, err
		}
		leaf, err := newLeaf(ca, r.names, now, r.leafLifetime)
		if err != nil {
			return nil, nil, err
		}
		return &material{ca: ca, leaf: leaf}, []string{"new CA " + until(ca.cert), "new certificate " + until(leaf.cert)}, nil
	}
	m, said := *was, []string(nil)
	if m.ca.key == nil {
		rotated, err := r.rotateCA(&m, now)
		if err != nil {
			return nil, nil, err
		}
		m = *rotated
		said = append(said, r.willSign(&m))
	}
	if r.leafDue(&m, now) {
		leaf, err := newLeaf(m.ca, r.names, now, r.leafLifetime)
		if err != nil {
			return nil, nil, err
		}
		m.leaf, m.chain = leaf, nil
		said = append(said, "new certificate "+until(leaf.cert))
	}
	switch {
	case !m.signedByCA(): // a rotation of the CA is under way
	case len(m.others) > 0:
		if !now.Before(created(m.leaf.cert).Add(r.overlap)) {
			m.others = nil
			said = append(said, "old CA no longer trusted")
		}
	case !now.Before(renewAt(m.ca.cert)):
		rotated, err := r.rotateCA(&m, now)
		if err != nil {
			return nil, nil, err
		}
		m = *rotated
		said = append(said, r.willSign(&m))
	}
	return &m, said, nil
}

// replace returns what follows material that must not be used again, though it is still served: a new CA, by way of an
// ordinary rotation, so that no client notices.
func (r rotation) replace(served *material, now time.Time) (*material, []string, error) {
	switch {
	case served == nil || !now.Before(served.leaf.cert.NotAfter):
		return r.next(nil, now)
	case !served.signedByCA():
		// In the middle of a rotation its new CA is not replaced, too.
		return served, []string{"restored as it was"}, nil
	}
	m, err := r.rotateCA(served, now)
	if err != nil {
		return nil, nil, err
	}
	return m, []string{"new CA " + until(m.ca.cert)}, nil
}

func (r rotation) rotateCA(m *material, now time.Time) (*material, error) {
	ca, err := newCA(now, r.caLifetime)
	if err != nil {
		return nil, err
	}
	return &material{ca: ca, leaf: m.leaf, chain: m.chain, others: m.trusted()}, nil
}

func (r rotation) willSign(m *material) string {
	return fmt.Sprintf("new CA %s, which will sign from %s on", until(m.ca.cert), stamp(created(m.ca.cert).Add(r.overlap)))
}

func (r rotation) leafDue(m *material, now time.Time) bool {
	leaf := m.leaf.cert
	switch {
	case !now.Before(leaf.NotAfter):
		return true // nothing to lose
	case !hasNames(leaf, r.names):
		return true // nobody can connect by a name that is missing, whatever CA they trust
	case m.signedByCA():
		return !now.Before(renewAt(leaf))
	}
	return !now.Before(created(m.ca.cert).Add(r.overlap))
}

// hasNames tells whether the certificate is for all the names. It may be for others, too: an issuer of cert-manager's decides that.
func hasNames(c *x509.Certificate, names []string) bool {
	for _, name := range names {
		if c.VerifyHostname(name) != nil {
			return false
		}
	}
	return true
}

func created(c *x509.Certificate) time.Time { return c.NotBefore.Add(backdate) }

func renewAt(c *x509.Certificate) time.Time {
	return created(c).Add(c.NotAfter.Sub(created(c)) / 3 * 2)
}

func until(c *x509.Certificate) string { return "until " + stamp(c.NotAfter) }

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }
