package pki

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"net"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
)

type memory map[string][]byte

func (m memory) Secret(name string, create func() ([]byte, error)) ([]byte, error) {
	if v, ok := m[name]; ok {
		return v, nil
	}
	v, err := create()
	m[name] = v
	return v, err
}

type clock struct{ t time.Time }

func (c *clock) now() time.Time { return c.t }

func load(t *testing.T, m memory, c *clock) *Keys {
	t.Helper()
	k, err := Load(m, "test", c.now)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func newClock() *clock { return &clock{time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC)} }

func TestKeysAreTheSameAfterReload(t *testing.T) {
	m, c := memory{}, newClock()
	a, b := load(t, m, c), load(t, m, c)
	if !bytes.Equal(a.CAPEM, b.CAPEM) || a.HostKeyLine() != b.HostKeyLine() || a.SSHCALine() != b.SSHCALine() || !bytes.Equal(a.TokenKey, b.TokenKey) {
		t.Error("reloaded keys differ")
	}
	for name := range m {
		broken := memory{}
		for k, v := range m {
			broken[k] = v
		}
		broken[name] = []byte("broken")
		if _, err := Load(broken, "test", nil); err == nil {
			t.Errorf("a broken %s was taken", name)
		}
	}
}

func TestServingCertificateRenewsItself(t *testing.T) {
	c := newClock()
	k := load(t, memory{}, c)
	s, err := k.Serving("*.edge.test", "edge.test", "10.1.2.3", "::1")
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(k.CAPEM)
	check := func() *x509.Certificate {
		t.Helper()
		cert, err := s.GetCertificate(nil)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"a.edge.test", "edge.test", "10.1.2.3", "::1"} {
			if _, err := cert.Leaf.Verify(x509.VerifyOptions{DNSName: name, Roots: roots, CurrentTime: c.t}); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
		return cert.Leaf
	}
	first := check()
	if _, err := first.Verify(x509.VerifyOptions{DNSName: "a.b.edge.test", Roots: roots, CurrentTime: c.t}); err == nil {
		t.Error("the certificate is good for a name it should not have")
	}
	c.t = c.t.Add(59 * 24 * time.Hour)
	if !check().Equal(first) {
		t.Error("renewed too early")
	}
	c.t = c.t.Add(2 * 24 * time.Hour)
	if check().Equal(first) {
		t.Error("not renewed with a third of its life to go")
	}
	c.t = c.t.Add(-2 * time.Hour)
	check() // a clock that was ahead goes back: one that is valid now
}

// TestClockAheadAtTheFirstStart: it is set right, and the certificates are valid.
func TestClockAheadAtTheFirstStart(t *testing.T) {
	c := newClock()
	c.t = c.t.Add(20 * time.Hour)
	k := load(t, memory{}, c)
	s, err := k.Serving("edge.test")
	if err != nil {
		t.Fatal(err)
	}
	c.t = c.t.Add(-20 * time.Hour)
	cert, err := s.GetCertificate(nil)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(k.CAPEM)
	if _, err := cert.Leaf.Verify(x509.VerifyOptions{DNSName: "edge.test", Roots: roots, CurrentTime: c.t}); err != nil {
		t.Error(err)
	}
}

type conn struct {
	ssh.ConnMetadata
	user string
}

func (c conn) User() string         { return c.user }
func (c conn) RemoteAddr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)} }

func TestTunnelCertificate(t *testing.T) {
	c := newClock()
	k, other := load(t, memory{}, c), load(t, memory{}, c)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	pub, err := ssh.NewPublicKey(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	start := c.t
	binding := Binding{SocketID: "socket", TunnelID: "tunnel"}
	sign := func(ca *Keys, change func(*ssh.Certificate)) *ssh.Certificate {
		t.Helper()
		cert, err := ca.SignTunnel(pub, "user", binding)
		if err != nil {
			t.Fatal(err)
		}
		if change != nil {
			change(cert)
			if err := cert.SignCert(rand.Reader, ca.SSHCA); err != nil {
				t.Fatal(err)
			}
		}
		// As it goes over the wire.
		parsed, err := ssh.ParsePublicKey(cert.Marshal())
		if err != nil {
			t.Fatal(err)
		}
		return parsed.(*ssh.Certificate)
	}
	for _, tc := range []struct {
		name string
		cert *ssh.Certificate
		user string
		at   time.Duration
		ok   bool
	}{
		{"good", sign(k, nil), "user", 0, true},
		{"a minute behind", sign(k, nil), "user", -time.Minute, true},
		{"before", sign(k, nil), "user", -time.Minute - time.Second, false},
		{"at the end", sign(k, nil), "user", TunnelCertLifetime - time.Second, true},
		{"after", sign(k, nil), "user", TunnelCertLifetime, false},
		{"another user", sign(k, nil), "root", 0, false},
		{"another authority", sign(other, nil), "user", 0, false},
		{"a host certificate", sign(k, func(c *ssh.Certificate) { c.CertType = ssh.HostCert }), "user", 0, false},
		{"an unknown critical option", sign(k, func(c *ssh.Certificate) { c.CriticalOptions["force-command"] = "x" }), "user", 0, false},
		{"no socket", sign(k, func(c *ssh.Certificate) { delete(c.CriticalOptions, optionSocket) }), "user", 0, false},
		{"an empty tunnel", sign(k, func(c *ssh.Certificate) { c.CriticalOptions[optionTunnel] = "" }), "user", 0, false},
	} {
		c.t = start.Add(tc.at)
		got, err := k.CheckTunnelCert(conn{user: tc.user}, tc.cert)
		if (err == nil) != tc.ok {
			t.Errorf("%s: %v", tc.name, err)
		}
		if err == nil && got != binding {
			t.Errorf("%s: bound to %+v", tc.name, got)
		}
	}
	c.t = start
	cert, err := k.SignTunnel(pub, "user", Binding{SocketID: "socket"})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := k.CheckTunnelCert(conn{user: "user"}, cert); err != nil || got != (Binding{SocketID: "socket"}) {
		t.Errorf("for a socket: %+v, %v", got, err)
	}
}

func FuzzParsePublicKey(f *testing.F) {
	f.Add("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl comment")
	f.Add("ssh-rsa AAAA")
	f.Add("")
	f.Fuzz(func(t *testing.T, line string) {
		key, err := ParsePublicKey(line)
		if err != nil {
			return
		}
		switch key.Type() {
		case ssh.KeyAlgoECDSA256, ssh.KeyAlgoECDSA384, ssh.KeyAlgoED25519, ssh.KeyAlgoRSA:
		default:
			t.Errorf("a key of type %s was taken", key.Type())
		}
		if strings.ContainsAny(authorizedKey(key), "\r\n") {
			t.Error("a line end in a line")
		}
	})
}
