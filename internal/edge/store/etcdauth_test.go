package store

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/mysocketio/mysocket-injector/internal/edge/etcdtest"
)

// authority makes certificates for a test.
type authority struct {
	t    *testing.T
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{t: t, dir: t.TempDir()}
	a.cert, a.key = a.make("ca", &x509.Certificate{IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign})
	return a
}

// make writes a certificate and its key to NAME.crt and NAME.key.
func (a *authority) make(name string, template *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey) {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	template.SerialNumber, template.Subject = big.NewInt(time.Now().UnixNano()), pkix.Name{CommonName: name}
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	parent, signer := a.cert, a.key
	if parent == nil {
		parent, signer = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		a.t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		a.t.Fatal(err)
	}
	a.write(name+".crt", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	a.write(name+".key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}))
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return cert, key
}

func (a *authority) write(name string, data []byte) {
	a.t.Helper()
	if err := os.WriteFile(a.file(name), data, 0o600); err != nil {
		a.t.Fatal(err)
	}
}

func (a *authority) file(name string) string { return filepath.Join(a.dir, name) }

// TestAnEtcdThatAsksWhoIsThere uses one with TLS and client certificates, and users whose role is the prefix, as the documentation has it.
func TestAnEtcdThatAsksWhoIsThere(t *testing.T) {
	a := newAuthority(t)
	a.make("client", &x509.Certificate{ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
	server := etcdtest.StartWith(t, func(host string) []string {
		a.make("server", &x509.Certificate{IPAddresses: []net.IP{net.ParseIP(host)}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}})
		return []string{"--cert-file", a.file("server.crt"), "--key-file", a.file("server.key"), "--trusted-ca-file", a.file("ca.crt"), "--client-cert-auth",
			"--auth-token-ttl", "1"} // seconds; what a login gives is over soon
	})
	a.write("password", []byte("of the edges\r\nand more"))
	a.write("wrong", []byte("of somebody"))
	a.write("empty", []byte("\n"))
	right := EtcdConfig{
		Endpoints: []string{server.URL}, CertFile: a.file("client.crt"), KeyFile: a.file("client.key"), CAFile: a.file("ca.crt"),
		User: "edges", PasswordFile: a.file("password"),
	}
	if err := right.Validate(); err != nil {
		t.Fatal(err)
	}
	anybody := right
	anybody.User, anybody.PasswordFile = "", ""
	enableAuth(t, &anybody)

	open := func(cfg EtcdConfig) (*Store, error) {
		s, err := OpenEtcd(t.Context(), cfg, slog.New(slog.DiscardHandler), nil)
		if err == nil {
			t.Cleanup(func() { _ = s.Close() })
		}
		return s, err
	}
	s, err := open(right)
	if err != nil {
		t.Fatal(err)
	}
	follow(s)
	other, err := open(right)
	if err != nil {
		t.Fatal(err)
	}
	u := addUser(t, s, "a@example.com")
	eventually(t, "the account at the other edge", func() bool { return len(other.Users()) == 1 })
	if _, err := other.User(u.ID); err != nil {
		t.Error(err)
	}

	t.Run("refused", func(t *testing.T) { whoIsRefused(t, a, right, anybody) })

	// That took longer than the login's token is good for.
	addUser(t, s, "b@example.com")
	eventually(t, "the second account at the other edge", func() bool { return len(other.Users()) == 2 })
}

func whoIsRefused(t *testing.T, a *authority, right, anybody EtcdConfig) {
	for name, change := range map[string]func(*EtcdConfig){
		"no user":           func(c *EtcdConfig) { *c = anybody },
		"a wrong password":  func(c *EtcdConfig) { c.PasswordFile = a.file("wrong") },
		"no password":       func(c *EtcdConfig) { c.PasswordFile = a.file("empty") },
		"no password file":  func(c *EtcdConfig) { c.PasswordFile = a.file("none") },
		"another prefix":    func(c *EtcdConfig) { c.Prefix = "/mysocket-edges" },
		"no certificate":    func(c *EtcdConfig) { c.CertFile, c.KeyFile = "", "" },
		"no such key":       func(c *EtcdConfig) { c.KeyFile = a.file("none") },
		"another authority": func(c *EtcdConfig) { c.CAFile = newAuthority(t).file("ca.crt") },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel() // those whom the transport refuses are tried until the time is over
			cfg := right
			change(&cfg)
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			defer cancel()
			s, err := OpenEtcd(ctx, cfg, slog.New(slog.DiscardHandler), nil)
			if err == nil {
				_ = s.Close()
				t.Fatal("it was opened")
			}
			if strings.Contains(err.Error(), "of somebody") || strings.Contains(err.Error(), "of the edges") {
				t.Errorf("the error carries the password: %v", err)
			}
		})
	}
}

// enableAuth makes a user "edges" that may use only the edges' prefix.
func enableAuth(t *testing.T, cfg *EtcdConfig) {
	t.Helper()
	c, err := cfg.client()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	ctx := t.Context()
	steps := []func() error{
		func() error { _, err := c.RoleAdd(ctx, "edges"); return err },
		func() error {
			_, err := c.RoleGrantPermission(ctx, "edges", DefaultEtcdPrefix+"/", clientv3.GetPrefixRangeEnd(DefaultEtcdPrefix+"/"), clientv3.PermissionType(clientv3.PermReadWrite))
			return err
		},
		func() error { _, err := c.UserAdd(ctx, "edges", "of the edges"); return err },
		func() error { _, err := c.UserGrantRole(ctx, "edges", "edges"); return err },
		func() error { _, err := c.RoleAdd(ctx, "root"); return err },
		func() error { _, err := c.UserAdd(ctx, "root", "of root"); return err },
		func() error { _, err := c.UserGrantRole(ctx, "root", "root"); return err },
		func() error { _, err := c.AuthEnable(ctx); return err },
	}
	for i, step := range steps {
		if err := step(); err != nil {
			t.Fatalf("step %d: %v", i, err)
		}
	}
}
