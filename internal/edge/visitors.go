package edge

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/mail"
	"net/url"
	"os"
	"sync"

	"github.com/mysocketio/mysocket-injector/internal/edge/front"
	"github.com/mysocketio/mysocket-injector/internal/edge/metrics"
	"github.com/mysocketio/mysocket-injector/internal/edge/tlscert"
)

// Visitors says how visitors come in. The zero value is: certificates of the edge's own authority, and nothing in front.
type Visitors struct {
	// TLSCert and TLSKey are files (PEM) of a certificate for public names; both or none. They are read again when they
	// change.
	TLSCert, TLSKey string
	// RedirectHTTP answers visitors of the HTTP front with a redirect to the HTTPS front.
	RedirectHTTP bool
	// ACMEDirectory is the URL of an ACME authority that public names get certificates from; none if empty. ACMEEmail is the
	// account's contact there, ACMECA a file (PEM) with roots for the authority's own HTTPS. Both are optional.
	ACMEDirectory, ACMEEmail, ACMECA string
}

func (v *Visitors) validate() []error {
	var errs []error
	if (v.TLSCert == "") != (v.TLSKey == "") {
		errs = append(errs, errors.New("tls-cert and tls-key belong together: give both or none"))
	}
	if v.ACMEDirectory != "" {
		if u, err := url.Parse(v.ACMEDirectory); err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil {
			errs = append(errs, fmt.Errorf("acme-directory %q is not the https:// URL of an ACME directory", v.ACMEDirectory))
		}
	}
	for _, of := range []struct{ flag, value string }{{"acme-email", v.ACMEEmail}, {"acme-ca", v.ACMECA}} {
		if of.value != "" && v.ACMEDirectory == "" {
			errs = append(errs, fmt.Errorf("%s needs acme-directory", of.flag))
		}
	}
	if v.ACMEEmail != "" {
		if a, err := mail.ParseAddress(v.ACMEEmail); err != nil || a.Address != v.ACMEEmail {
			errs = append(errs, fmt.Errorf("acme-email %q is not an e-mail address", v.ACMEEmail))
		}
	}
	return errs
}

// visitors is what an edge has because of its Visitors.
type visitors struct {
	files *tlscert.Files
	acme  *tlscert.ACME
}

func (v *visitors) close() {
	if v.acme != nil {
		v.acme.Close()
	}
}

// openVisitors makes what the fronts need.
func (e *Edge) openVisitors(m *metrics.Metrics, plain, secure *server) (err error) {
	v := e.cfg.Visitors
	log := e.log.With("part", "tls")
	if v.TLSCert != "" {
		e.visitors.files, err = tlscert.OpenFiles(tlscert.FilesConfig{
			CertPath: v.TLSCert, KeyPath: v.TLSKey, Domain: e.cfg.Domain, Log: log, Now: e.cfg.Now, Expires: m.FileCertificateExpires,
		})
		if err != nil {
			return err
		}
	}
	if v.ACMEDirectory == "" {
		return nil
	}
	roots, err := acmeRoots(v.ACMECA)
	if err != nil {
		return err
	}
	host, _, err := net.SplitHostPort(e.cfg.HTTPAddress)
	if err != nil {
		return err
	}
	e.visitors.acme = tlscert.NewACME(tlscert.ACMEConfig{
		Directory: v.ACMEDirectory, Email: v.ACMEEmail, Roots: roots, Blobs: e.store, Allowed: e.publicName,
		HTTPHost: host, HTTPPort: portOf(plain.ln), HTTPSPort: portOf(secure.ln), Log: log, Now: e.cfg.Now, Done: m.OrderDone,
	})
	plain.http.Handler = e.visitors.acme.Handler(plain.http.Handler)
	return nil
}

// acmeRoots are the system's roots and those of a file, nil without one.
func acmeRoots(path string) (*x509.CertPool, error) {
	if path == "" {
		return nil, nil
	}
	pem, err := os.ReadFile(path) // #nosec G304 -- the operator names the file
	if err != nil {
		return nil, fmt.Errorf("acme-ca: %w", err)
	}
	pool, err := x509.SystemCertPool()
	if err != nil {
		pool = x509.NewCertPool()
	}
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("acme-ca: there is no certificate in %s", path)
	}
	return pool, nil
}

// publicName says whether the edge serves something under a name: strangers can ask for any.
func (e *Edge) publicName(name string) bool {
	if name == "api."+e.cfg.Domain {
		return true
	}
	_, err := e.store.SocketByDNSName(name)
	return err == nil
}

// visitWeb sets what the web front does because of the Visitors.
func (e *Edge) visitWeb(c *front.WebConfig) {
	if e.cfg.Visitors.RedirectHTTP {
		c.RedirectPort = func() int {
			https, _ := e.Addresses().HTTPS.(*net.TCPAddr) // it serves only when all listen
			return https.Port
		}
	}
}

// certificates are those of a listener whose own one is given.
func (e *Edge) certificates(own tlscert.Own) *tlscert.Source {
	return &tlscert.Source{Own: own, Files: e.visitors.files, ACME: e.visitors.acme}
}

// runVisitors starts what goes on beside the listeners, in wg, until stop is called.
func (e *Edge) runVisitors(wg *sync.WaitGroup) (stop func()) {
	ctx, stop := context.WithCancel(context.Background())
	if files := e.visitors.files; files != nil {
		wg.Go(func() { files.Watch(ctx, e.cfg.Timings.CertificateCheck) })
	}
	return stop
}
