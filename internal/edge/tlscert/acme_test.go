package tlscert_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mysocketio/mysocket-injector/internal/edge"
	"github.com/mysocketio/mysocket-injector/internal/edge/edgetest"
)

const patience = 30 * time.Second

func certificatePEM(c *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
}

// newSocket makes a socket and returns its public name.
func newSocket(t *testing.T, e *edgetest.Edge, name string) string {
	t.Helper()
	body := fmt.Sprintf(`{"name": %q}`, name)
	req, err := http.NewRequestWithContext(t.Context(), "POST", e.APIURL+"/api/v1/socket", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+e.Token)
	resp, err := e.APIClient(t).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	var made struct{ DNSName string }
	if err := json.NewDecoder(resp.Body).Decode(&made); err != nil || made.DNSName == "" {
		t.Fatalf("%d: %v", resp.StatusCode, err)
	}
	return made.DNSName
}

// shown is the certificate for a name, and whether the roots verify it.
func shown(t *testing.T, address, name string, roots *x509.CertPool) (cert *x509.Certificate, protocol string, err error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	d := tls.Dialer{Config: &tls.Config{ServerName: name, RootCAs: roots, NextProtos: []string{"h2", "http/1.1"}, MinVersion: tls.VersionTLS12}}
	conn, err := d.DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, "", err
	}
	defer func() { _ = conn.Close() }()
	state := conn.(*tls.Conn).ConnectionState()
	return state.PeerCertificates[0], state.NegotiatedProtocol, nil
}

// awaitShown waits until the roots verify what is shown for a name. While an order takes longer than a handshake may, the
// edge's own certificate is.
func awaitShown(t *testing.T, address, name string, roots *x509.CertPool) (cert *x509.Certificate, protocol string) {
	t.Helper()
	deadline := time.Now().Add(patience)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		cert, protocol, err := shown(t, address, name, roots)
		if err == nil {
			return cert, protocol
		}
		if time.Now().After(deadline) {
			t.Errorf("%s: %v", name, err)
			return nil, ""
		}
		<-tick.C
	}
}

// metric reads one number from /metrics.
func metric(t *testing.T, e *edgetest.Edge, name string) float64 {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: patience}
	resp, err := client.Get(e.AdminURL + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	body, _ := io.ReadAll(resp.Body)
	for line := range strings.Lines(string(body)) {
		var v float64
		if n, _ := fmt.Sscanf(line, name+" %g", &v); n == 1 {
			return v
		}
	}
	t.Fatalf("there is no metric %s", name)
	return 0
}

// lockedBuffer takes the log of a running edge.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

func TestACME(t *testing.T) {
	for _, challenge := range []string{"http-01", "tls-alpn-01"} {
		t.Run(challenge, func(t *testing.T) {
			a := newAuthority(t)
			log := &lockedBuffer{}
			logged := func(c *edge.Config) {
				c.Log = slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelDebug}))
			}
			e := a.edge(t, logged, func(c *edge.Config) {
				c.Visitors.RedirectHTTP = true // Challenges are answered all the same.
				c.Visitors.ACMEEmail = "owner@example.com"
			})
			// Only one of the two leads to the edge.
			if challenge == "http-01" {
				a.http.to.Store(e.HTTPAddress)
			} else {
				a.tls.to.Store(e.HTTPSAddress)
			}
			name := newSocket(t, e, "web")

			// Many visitors at once are one order.
			var visitors sync.WaitGroup
			for range 10 {
				visitors.Go(func() {
					if _, protocol := awaitShown(t, e.HTTPSAddress, name, a.roots); protocol != "h2" {
						t.Errorf("protocol %q", protocol)
					}
				})
			}
			visitors.Wait()
			// At the authority there may be a second one, for the other kind of challenge.
			before := a.orders.Load()
			if before > 2 {
				t.Errorf("%d orders, want 1 or 2", before)
			}
			if n := metric(t, e, `mysocket_edge_acme_orders_total{result="obtained"}`); n != 1 {
				t.Errorf("%g orders are counted, want 1", n)
			}
			cert, _ := awaitShown(t, e.HTTPSAddress, strings.ToUpper(name), a.roots)

			// Names that nobody has: the edge's own certificate, and no order.
			for _, stranger := range []string{"no-such-name-0000." + e.Domain, e.Domain} {
				if _, _, err := shown(t, e.HTTPSAddress, stranger, e.CAPool()); err != nil {
					t.Errorf("%s: %v", stranger, err)
				}
			}
			if n := a.orders.Load(); n != before {
				t.Errorf("%d orders after unknown names, want %d", n, before)
			}
			// The API has one for its name, and its own for others.
			awaitShown(t, e.Addresses().API.String(), "api."+e.Domain, a.roots)
			if _, _, err := shown(t, e.Addresses().API.String(), "localhost", e.CAPool()); err != nil {
				t.Errorf("another name of the API: %v", err)
			}

			// After a restart the certificate is there without an order.
			before = a.orders.Load()
			e.Stop()
			e = a.edge(t, edgetest.SameState(e), logged)
			again, _ := awaitShown(t, e.HTTPSAddress, name, a.roots)
			if !again.Equal(cert) || a.orders.Load() != before {
				t.Errorf("after a restart: another certificate, or %d orders, want %d", a.orders.Load(), before)
			}
			if strings.Contains(log.String(), "PRIVATE KEY") {
				t.Error("a key is in the log")
			}
		})
	}
}

func TestFailedOrder(t *testing.T) {
	a := newAuthority(t) // It reaches nothing.
	var clock struct {
		sync.Mutex
		ahead time.Duration
	}
	e := a.edge(t, func(c *edge.Config) {
		c.Now = func() time.Time {
			clock.Lock()
			defer clock.Unlock()
			return time.Now().Add(clock.ahead)
		}
	})
	name := newSocket(t, e, "web")
	const failures = `mysocket_edge_acme_orders_total{result="failed"}`
	awaitShown(t, e.HTTPSAddress, name, e.CAPool())
	for deadline := time.Now().Add(patience); metric(t, e, failures) == 0 && time.Now().Before(deadline); {
		awaitShown(t, e.HTTPSAddress, name, e.CAPool())
	}
	for range 3 {
		awaitShown(t, e.HTTPSAddress, name, e.CAPool())
	}
	orders := a.orders.Load()
	if failed := metric(t, e, failures); failed != 1 || orders == 0 || orders > 2 { // one for each kind of challenge
		t.Errorf("%g failed attempts and %d orders after some visitors", failed, orders)
	}
	clock.Lock()
	clock.ahead = 6 * time.Minute
	clock.Unlock()
	a.http.to.Store(e.HTTPAddress)
	awaitShown(t, e.HTTPSAddress, name, a.roots)
}
