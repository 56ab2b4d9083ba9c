package edge

import (
	"context"
	"errors"
	"net"
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
}

func (v *Visitors) validate() []error {
	var errs []error
	if (v.TLSCert == "") != (v.TLSKey == "") {
		errs = append(errs, errors.New("tls-cert and tls-key belong together: give both or none"))
	}
	return errs
}

// visitors is what an edge has because of its Visitors.
type visitors struct {
	files *tlscert.Files
}

// openVisitors makes what the listeners of visitors need.
func (e *Edge) openVisitors(m *metrics.Metrics) (err error) {
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
	return nil
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
	return &tlscert.Source{Own: own, Files: e.visitors.files}
}

// runVisitors starts what goes on beside the listeners, in wg, until stop is called.
func (e *Edge) runVisitors(wg *sync.WaitGroup) (stop func()) {
	ctx, stop := context.WithCancel(context.Background())
	if files := e.visitors.files; files != nil {
		wg.Go(func() { files.Watch(ctx, e.cfg.Timings.CertificateCheck) })
	}
	return stop
}
