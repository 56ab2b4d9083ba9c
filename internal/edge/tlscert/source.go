// Package tlscert chooses the certificate that a visitor is shown, by the name that he asks for: the one in files, one
// from an ACME authority, or the edge's own. It must not know what is spoken inside TLS, nor what sockets are.
package tlscert

import (
	"crypto/tls"
	"strings"
)

// Own is the certificate of the edge's own authority, which is always there. *pki.Serving is one.
type Own interface {
	GetCertificate(*tls.ClientHelloInfo) (*tls.Certificate, error)
}

// Source has all the certificates of one listener. Only Own is required.
type Source struct {
	Own   Own
	Files *Files
	ACME  *ACME
}

// Config is that of a listener for visitors.
func (s *Source) Config() *tls.Config {
	c := &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: s.GetCertificate}
	if s.ACME != nil {
		c.GetConfigForClient = s.ACME.challengeConfig
	}
	return c
}

// GetCertificate is for tls.Config. A client that names nothing gets the edge's own certificate.
func (s *Source) GetCertificate(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	return s.For(Name(hello), hello)
}

// For returns the certificate for a name, whatever name the client's hello has.
func (s *Source) For(name string, hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	if name != "" && s.Files != nil {
		if cert := s.Files.certificate(name); cert != nil {
			return cert, nil
		}
	}
	if name != "" && s.ACME != nil {
		if cert := s.ACME.certificate(name, hello); cert != nil {
			return cert, nil
		}
	}
	return s.Own.GetCertificate(hello)
}

// Name is the name that a client asks for, in lower case, empty if it asks for none.
func Name(hello *tls.ClientHelloInfo) string {
	return strings.ToLower(strings.TrimSuffix(hello.ServerName, "."))
}
