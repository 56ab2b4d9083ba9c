package edge

import (
	"cmp"
	"crypto/tls"
	"crypto/x509"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/mysocketio/mysocket-injector/internal/edge/front"
	"github.com/mysocketio/mysocket-injector/internal/edge/status"
)

const (
	// maxShown bounds the certificates that are remembered, and shownOnPage those of them that the status page has.
	maxShown    = 10_000
	shownOnPage = 10
	// keepShown is for how long a certificate is remembered that is not shown any more. Those of sockets that are gone would end first, and fill
	// the page, for ever.
	keepShown = 7 * 24 * time.Hour

	acmeALPN = "acme-tls/1"
)

// shownCertificates remembers which certificates the edge has shown to whoever connected, whatever they come from.
type shownCertificates struct {
	now    func() time.Time
	mu     sync.Mutex
	byName map[string]shownCertificate
}

type shownCertificate struct{ ends, last time.Time }

// watch has what a server shows noted. It must be called before the server serves.
func (s *shownCertificates) watch(config *tls.Config) *tls.Config {
	get := config.GetCertificate
	if get == nil {
		return config
	}
	config = config.Clone()
	config.GetCertificate = func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
		cert, err := get(hello)
		if err == nil && cert != nil && cert.Leaf != nil && !slices.Contains(hello.SupportedProtos, acmeALPN) {
			s.note(cert.Leaf)
		}
		return cert, err
	}
	return config
}

// watchSockets does the same for tls sockets.
func (s *shownCertificates) watchSockets(get front.Certificate) front.Certificate {
	return func(name string, hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
		cert, err := get(name, hello)
		if err == nil && cert != nil && cert.Leaf != nil {
			s.note(cert.Leaf)
		}
		return cert, err
	}
}

func (s *shownCertificates) note(leaf *x509.Certificate) {
	name := leaf.Subject.CommonName
	if len(leaf.DNSNames) > 0 {
		name = leaf.DNSNames[0]
	}
	now := s.now()
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, known := s.byName[name]; !known && len(s.byName) >= maxShown {
		if s.forget(now); len(s.byName) >= maxShown {
			return
		}
	}
	if s.byName == nil {
		s.byName = map[string]shownCertificate{}
	}
	s.byName[name] = shownCertificate{ends: leaf.NotAfter, last: now}
}

// forget drops what is not shown any more. The caller holds mu.
func (s *shownCertificates) forget(now time.Time) {
	for name, c := range s.byName {
		if now.Sub(c.last) > keepShown {
			delete(s.byName, name)
		}
	}
}

// soonest returns those that end first.
func (s *shownCertificates) soonest() []status.Certificate {
	now := s.now()
	s.mu.Lock()
	s.forget(now)
	all := make([]status.Certificate, 0, len(s.byName))
	for name, c := range s.byName {
		all = append(all, status.Certificate{Name: name, NotAfter: c.ends})
	}
	s.mu.Unlock()
	slices.SortFunc(all, func(a, b status.Certificate) int {
		return cmp.Or(a.NotAfter.Compare(b.NotAfter), cmp.Compare(a.Name, b.Name))
	})
	return all[:min(len(all), shownOnPage)]
}

// statusPage is the page for the operator.
func (e *Edge) statusPage() http.Handler {
	return status.Handler(status.Config{
		Domain: e.cfg.Domain, Version: e.cfg.Version, Started: time.Now(), Now: time.Now, Log: e.log.With("part", "admin"),
		Sockets: e.statusOfSockets, Stats: e.stats.Of, Total: e.stats.Total,
		Certificates: func() []status.Certificate {
			return append(e.shown.soonest(), status.Certificate{Name: "this edge's own authority", NotAfter: e.keys.CA.NotAfter})
		},
	})
}

func (e *Edge) statusOfSockets() []status.Socket {
	connected := e.registry.Snapshot()
	emails := map[string]string{}
	for _, u := range e.store.Users() {
		emails[u.ID] = u.Email
	}
	var out []status.Socket
	for _, k := range e.store.AllSockets() {
		s := status.Socket{
			ID: k.ID, Name: k.Name, Type: string(k.Type), URL: e.publicURL(k), Account: emails[k.UserID], Registered: len(e.store.Tunnels(k.ID)),
		}
		for _, t := range connected[k.ID] {
			s.Tunnels = append(s.Tunnels, status.Tunnel{
				ID: t.TunnelID, Name: t.Name, Remote: t.RemoteAddr, Since: t.Since, Open: t.Outstanding, Total: t.Total, Ejected: t.Ejected,
			})
		}
		out = append(out, s)
	}
	return out
}
