package cluster

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestPKI(t *testing.T) {
	now := time.Now()
	p, err := newPKI(now)
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name  string
		pair  keyPair
		ca    authority
		usage x509.ExtKeyUsage
		host  string
		cn    string
		org   string
	}{
		{"apiserver by Service name", p.apiserver, p.ca, x509.ExtKeyUsageServerAuth, "kubernetes.default.svc", "kube-apiserver", ""},
		{"apiserver by ClusterIP", p.apiserver, p.ca, x509.ExtKeyUsageServerAuth, apiServiceIP, "kube-apiserver", ""},
		{"apiserver by node", p.apiserver, p.ca, x509.ExtKeyUsageServerAuth, NodeIP, "kube-apiserver", ""},
		{"kubelet's server", p.kubeletServing, p.ca, x509.ExtKeyUsageServerAuth, NodeIP, "system:node:node1", "system:nodes"},
		{"kubelet's client", p.clients["kubelet"], p.ca, x509.ExtKeyUsageClientAuth, "", "system:node:node1", "system:nodes"},
		{"admin", p.clients["admin"], p.ca, x509.ExtKeyUsageClientAuth, "", "admin", "system:masters"},
		{"front proxy", p.frontProxyClient, p.frontProxyCA, x509.ExtKeyUsageClientAuth, "", "front-proxy-client", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			pair, err := tls.X509KeyPair(tc.pair.cert, tc.pair.key)
			if err != nil {
				t.Fatal(err)
			}
			roots := x509.NewCertPool()
			roots.AppendCertsFromPEM(tc.ca.cert)
			_, err = pair.Leaf.Verify(x509.VerifyOptions{
				Roots: roots, DNSName: tc.host, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{tc.usage},
			})
			if err != nil {
				t.Error(err)
			}
			if got := pair.Leaf.Subject; got.CommonName != tc.cn || strings.Join(got.Organization, ",") != tc.org {
				t.Errorf("subject %s, want CN %s, O %q", got, tc.cn, tc.org)
			}
		})
	}
}

func TestPKIFilesArePrivate(t *testing.T) {
	p, err := newPKI(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "pki")
	if err := p.write(dir); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %o", e.Name(), info.Mode().Perm())
		}
	}
	if _, err := newAPIClient(dir); err != nil {
		t.Errorf("the harness's own client: %v", err)
	}
}

func TestKubeconfig(t *testing.T) {
	p, err := newPKI(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	b, err := kubeconfig(p, "kube-proxy")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"server: https://172.31.255.1:6443", "user: kube-proxy}",
		"client-certificate-data: " + base64.StdEncoding.EncodeToString(p.clients["kube-proxy"].cert),
	} {
		if !strings.Contains(string(b), want) {
			t.Errorf("no %q in\n%s", want, b)
		}
	}
	if _, err := kubeconfig(p, "nobody"); err == nil {
		t.Error("a kubeconfig for nobody")
	}
}
