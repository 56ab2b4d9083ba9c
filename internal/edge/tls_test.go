package edge_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/mysocketio/mysocket-injector/internal/edge"
	"github.com/mysocketio/mysocket-injector/internal/edge/edgetest"
	"github.com/mysocketio/mysocket-injector/internal/edge/tlscert/tlscerttest"
)

// shown is the certificate that a listener shows for a name, verified against the roots, with the protocol it agreed on.
func shown(t testing.TB, address, name string, roots *x509.CertPool, protocols ...string) (*x509.Certificate, string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	dialer := tls.Dialer{Config: &tls.Config{ServerName: name, RootCAs: roots, NextProtos: protocols, MinVersion: tls.VersionTLS12}}
	conn, err := dialer.DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, "", err
	}
	defer func() { _ = conn.Close() }()
	state := conn.(*tls.Conn).ConnectionState()
	return state.PeerCertificates[0], state.NegotiatedProtocol, nil
}

func TestCertificateFiles(t *testing.T) {
	authority := tlscerttest.New(t)
	dir := t.TempDir()
	cert, key := authority.Issue(time.Hour, "*.edge.mysocket.test")
	certPath, keyPath := tlscerttest.Write(t, dir, cert, key)
	e := edgetest.Start(t, func(c *edge.Config) {
		c.Visitors.TLSCert, c.Visitors.TLSKey = certPath, keyPath
		c.Timings.CertificateCheck = 5 * time.Millisecond
	})
	a := login(t, e) // The API has the edge's own certificate for an address.
	s := a.newSocket("http")
	a.connect(s, appAddress(newApp(t, "app")))

	for _, c := range []struct {
		what, address, name string
		roots               *x509.CertPool
	}{
		{"a public name", e.HTTPSAddress, s.DNSName, authority.Pool},
		{"a name that is not in the certificate", e.HTTPSAddress, e.Domain, e.CAPool()},
		{"the API's name", e.Addresses().API.String(), "api." + e.Domain, authority.Pool},
		{"another name of the API", e.Addresses().API.String(), "localhost", e.CAPool()},
	} {
		_, protocol, err := shown(t, c.address, c.name, c.roots, "h2", "http/1.1")
		if err != nil || protocol != "h2" {
			t.Errorf("%s: protocol %q, %v", c.what, protocol, err)
		}
	}
	visitor := &http.Client{Timeout: patience, Transport: &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: authority.Pool, MinVersion: tls.VersionTLS12}, ForceAttemptHTTP2: true, DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "tcp", e.HTTPSAddress)
		},
	}}
	if status, body := get(t, visitor, "https://"+s.DNSName+"/"); status != 200 || body != "Server: app\n" {
		t.Errorf("got %d %s", status, body)
	}

	cert, key = authority.Issue(2*time.Hour, "*.edge.mysocket.test")
	tlscerttest.Write(t, dir, cert, key)
	want, _ := tls.X509KeyPair(cert, key)
	eventually(t, "the new certificate to be served", func() bool {
		got, _, err := shown(t, e.HTTPSAddress, s.DNSName, authority.Pool)
		return err == nil && got.Equal(want.Leaf)
	})
	if got := metric(t, e, "mysocket_edge_certificate_file_expiry_seconds"); got != float64(want.Leaf.NotAfter.Unix()) {
		t.Errorf("the metric says %f, want %d", got, want.Leaf.NotAfter.Unix())
	}
}

func TestRedirectHTTP(t *testing.T) {
	e := edgetest.Start(t, func(c *edge.Config) { c.Visitors.RedirectHTTP = true })
	a := login(t, e)
	var s socket
	a.must("POST", "/socket", map[string]any{"name": "p", "protected_socket": true, "protected_username": "me", "protected_password": "s3cret"}, &s)
	visitor := e.VisitorClient(t)
	visitor.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	_, port, _ := net.SplitHostPort(e.HTTPSAddress)
	there := "https://" + net.JoinHostPort(s.DNSName, port)
	for _, c := range []struct {
		method, url, host string
		status            int
		location          string
	}{
		{"GET", "http://x/", s.DNSName, 308, there + "/"},
		{"POST", "http://x/a%2Fb/%C3%A9?q=1&a%20b=%zz", s.DNSName + ":8080", 308, there + "/a%2Fb/%C3%A9?q=1&a%20b=%zz"},
		{"GET", "http://x//other.example/?", strings.ToUpper(s.DNSName), 308, there + "//other.example/?"},
		{"GET", "http://x/", "other.example", 404, ""},
		{"GET", "https://" + s.DNSName + "/", "", 401, ""},
	} {
		req, err := http.NewRequestWithContext(t.Context(), c.method, c.url, nil)
		if err != nil {
			t.Fatal(err)
		}
		if c.host != "" {
			req.Host = c.host
		}
		resp, err := visitor.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		if got := resp.Header.Get("Location"); resp.StatusCode != c.status || got != c.location {
			t.Errorf("%s %s of %s: %d to %q, want %d to %q", c.method, c.url, c.host, resp.StatusCode, got, c.status, c.location)
		}
	}
}

func TestVisitorsConfig(t *testing.T) {
	good := edge.Config{
		Domain: "edge.test", StatePath: "x.db", APIAddress: ":0", SSHAddress: ":0", HTTPAddress: ":0", HTTPSAddress: ":0", AdminAddress: ":0",
		TCPPorts: edge.PortRange{Min: 1, Max: 2},
	}
	for _, c := range []struct {
		visitors edge.Visitors
		says     string
	}{
		{edge.Visitors{}, ""},
		{edge.Visitors{TLSCert: "a", TLSKey: "b"}, ""},
		{edge.Visitors{TLSCert: "a"}, "tls-cert and tls-key belong together: give both or none"},
		{edge.Visitors{ACMEDirectory: "https://acme.example/directory", ACMEEmail: "a@example.com", ACMECA: "x"}, ""},
		{edge.Visitors{ACMEDirectory: "http://acme.example/directory"}, `acme-directory "http://acme.example/directory" is not the https:// URL of an ACME directory`},
		{edge.Visitors{ACMEDirectory: "acme.example"}, `acme-directory "acme.example" is not the https:// URL of an ACME directory`},
		{edge.Visitors{ACMEEmail: "a@example.com"}, "acme-email needs acme-directory"},
		{edge.Visitors{ACMECA: "x"}, "acme-ca needs acme-directory"},
		{edge.Visitors{ACMEDirectory: "https://a", ACMEEmail: "Me <a@b.c>"}, `acme-email "Me <a@b.c>" is not an e-mail address`},
		{edge.Visitors{TLSKey: "a"}, "tls-cert and tls-key belong together: give both or none"},
	} {
		cfg := good
		cfg.Visitors = c.visitors
		got := ""
		if err := cfg.Validate(); err != nil {
			got = err.Error()
		}
		if got != c.says {
			t.Errorf("%+v: %q, want %q", c.visitors, got, c.says)
		}
	}
}
