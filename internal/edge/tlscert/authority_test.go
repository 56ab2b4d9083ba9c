package tlscert_test

import (
	"crypto/x509"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/letsencrypt/pebble/v2/ca"
	"github.com/letsencrypt/pebble/v2/db"
	"github.com/letsencrypt/pebble/v2/va"
	"github.com/letsencrypt/pebble/v2/wfe"
	"github.com/miekg/dns"
	"go.uber.org/goleak"

	"github.com/mysocketio/mysocket-injector/internal/edge"
	"github.com/mysocketio/mysocket-injector/internal/edge/edgetest"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m,
		// Each is one goroutine for as long as the process lives: certmagic's limit of orders, and the test authority.
		goleak.IgnoreTopFunction("github.com/caddyserver/certmagic.(*RingBufferRateLimiter).permit"),
		goleak.IgnoreTopFunction("github.com/caddyserver/certmagic.(*RingBufferRateLimiter).loop"),
		goleak.IgnoreTopFunction("github.com/letsencrypt/pebble/v2/va.VAImpl.processTasks"),
	)
}

// authority is an ACME authority on loopback. What it validates is at two ports of ours, which lead to where to says.
type authority struct {
	directory string
	// ca is a file with the root of its HTTPS; roots verify the certificates that it issues.
	ca     string
	roots  *x509.CertPool
	http   *relay
	tls    *relay
	orders atomic.Int64
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	t.Setenv("PEBBLE_VA_NOSLEEP", "1")
	t.Setenv("PEBBLE_WFE_NONCEREJECT", "0")
	a := &authority{http: newRelay(t), tls: newRelay(t), roots: x509.NewCertPool()}
	quiet := log.New(io.Discard, "", 0)
	memory := db.NewMemoryStore()
	signer := ca.New(quiet, memory, "", "ecdsa", 0, 1, map[string]ca.Profile{"default": {Description: "default"}})
	validator := va.New(quiet, a.http.port(), a.tls.port(), true, resolver(t), memory)
	frontend := wfe.New(quiet, memory, validator, signer, []string{"authority.test"}, true, false, 0, 0)
	handler := frontend.Handler()
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.Contains(r.URL.Path, "order-plz") {
			a.orders.Add(1)
		}
		handler.ServeHTTP(w, r)
	}))
	t.Cleanup(server.Close)
	a.directory = server.URL + wfe.DirectoryPath
	a.ca = filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(a.ca, certificatePEM(server.Certificate()), 0o600); err != nil {
		t.Fatal(err)
	}
	a.roots.AppendCertsFromPEM(signer.GetRootCert(0).PEM())
	return a
}

// edge starts an edge that orders from the authority.
func (a *authority) edge(t *testing.T, options ...edgetest.Option) *edgetest.Edge {
	t.Helper()
	return edgetest.Start(t, append([]edgetest.Option{func(c *edge.Config) {
		c.Visitors.ACMEDirectory, c.Visitors.ACMECA = a.directory, a.ca
	}}, options...)...)
}

// resolver answers that every name is on this machine.
func resolver(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := &dns.Server{Listener: ln, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, r *dns.Msg) {
		answer := new(dns.Msg).SetReply(r)
		if q := r.Question[0]; q.Qtype == dns.TypeA {
			answer.Answer = append(answer.Answer, &dns.A{
				Hdr: dns.RR_Header{Name: q.Name, Rrtype: dns.TypeA, Class: dns.ClassINET}, A: net.IPv4(127, 0, 0, 1),
			})
		}
		_ = w.WriteMsg(answer)
	})}
	var serving sync.WaitGroup
	serving.Go(func() { _ = server.ActivateAndServe() })
	t.Cleanup(func() { _ = ln.Close(); _ = server.Shutdown(); serving.Wait() })
	return ln.Addr().String()
}

// relay is a port that leads to another, which is known later; to nowhere until then.
type relay struct {
	ln      net.Listener
	to      atomic.Value // string
	serving sync.WaitGroup
}

func newRelay(t *testing.T) *relay {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &relay{ln: ln}
	r.to.Store("")
	r.serving.Go(func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			r.serving.Go(func() { r.serve(conn) })
		}
	})
	t.Cleanup(func() { _ = ln.Close(); r.serving.Wait() })
	return r
}

func (r *relay) port() int { return r.ln.Addr().(*net.TCPAddr).Port }

func (r *relay) serve(conn net.Conn) {
	defer func() { _ = conn.Close() }()
	to := r.to.Load().(string)
	if to == "" {
		return
	}
	there, err := net.Dial("tcp", to)
	if err != nil {
		return
	}
	defer func() { _ = there.Close() }()
	var back sync.WaitGroup
	back.Go(func() { _, _ = io.Copy(conn, there); _ = conn.Close() })
	_, _ = io.Copy(there, conn)
	_ = there.Close()
	back.Wait()
}
