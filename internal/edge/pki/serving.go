package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"net"
	"sync"
	"time"
)

const (
	servingLifetime = 90 * 24 * time.Hour
	// renewBefore leaves long-lived connections and slow clocks alone: a certificate is replaced with a third of its
	// life to go.
	renewBefore = servingLifetime / 3
)

// Serving is a serving certificate from the edge's own authority that renews itself, in memory, before it expires.
type Serving struct {
	keys  *Keys
	names []string
	ips   []net.IP

	mu      sync.Mutex
	current *tls.Certificate
}

// Serving makes the first certificate for the names, each a DNS name or an IP address.
func (k *Keys) Serving(names ...string) (*Serving, error) {
	s := &Serving{keys: k}
	for _, name := range names {
		if ip := net.ParseIP(name); ip != nil {
			s.ips = append(s.ips, ip)
		} else {
			s.names = append(s.names, name)
		}
	}
	if _, err := s.GetCertificate(nil); err != nil {
		return nil, err
	}
	return s, nil
}

// GetCertificate is for tls.Config. It ignores the client's hello: all names are in one certificate.
func (s *Serving) GetCertificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.keys.now()
	// A clock that was ahead and went back leaves one that is not valid yet.
	if s.current != nil && now.Before(s.current.Leaf.NotAfter.Add(-renewBefore)) && !now.Before(s.current.Leaf.NotBefore) {
		return s.current, nil
	}
	cert, err := s.keys.sign(s.names, s.ips, now)
	if err != nil {
		return nil, fmt.Errorf("make serving certificate: %w", err)
	}
	s.current = cert
	return cert, nil
}

func (k *Keys) sign(names []string, ips []net.IP, now time.Time) (*tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: serial,
		NotBefore:    now.Add(-skew),
		NotAfter:     now.Add(servingLifetime),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		DNSNames:     names,
		IPAddresses:  ips,
	}
	if len(names) > 0 && len(names[0]) <= 64 {
		template.Subject = pkix.Name{CommonName: names[0]}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, k.CA, key.Public(), k.caKey)
	if err != nil {
		return nil, err
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	return &tls.Certificate{Certificate: [][]byte{der, k.CA.Raw}, PrivateKey: key, Leaf: leaf}, nil
}
