package cluster

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

// certLifetime is longer than any cluster of this package lives; each up makes new ones.
const certLifetime = 365 * 24 * time.Hour

// keyPair is a certificate and its key, PEM encoded.
type keyPair struct{ cert, key []byte }

// authority signs certificates.
type authority struct {
	keyPair
	x509   *x509.Certificate
	signer *ecdsa.PrivateKey
}

// pki is every certificate and key of the cluster.
type pki struct {
	ca, frontProxyCA   authority
	apiserver          keyPair
	apiserverToKubelet keyPair
	frontProxyClient   keyPair
	kubeletServing     keyPair
	clients            map[string]keyPair // by component, for the kubeconfigs
	serviceAccountKey  []byte
	serviceAccountPub  []byte
}

// clientSubjects are the identities that Kubernetes' built-in RBAC rules know.
var clientSubjects = map[string]pkix.Name{
	"admin":                   {CommonName: "admin", Organization: []string{"system:masters"}},
	"kube-controller-manager": {CommonName: "system:kube-controller-manager"},
	"kube-scheduler":          {CommonName: "system:kube-scheduler"},
	"kube-proxy":              {CommonName: "system:kube-proxy"},
	"kubelet":                 {CommonName: "system:node:" + NodeName, Organization: []string{"system:nodes"}},
}

func newPKI(now time.Time) (*pki, error) {
	p := &pki{clients: map[string]keyPair{}}
	var err error
	if p.ca, err = newAuthority("kubernetes-ca", now); err != nil {
		return nil, err
	}
	if p.frontProxyCA, err = newAuthority("front-proxy-ca", now); err != nil {
		return nil, err
	}
	server, client := x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth
	for _, c := range []struct {
		to      *keyPair
		by      *authority
		subject pkix.Name
		usage   x509.ExtKeyUsage
		names   []string
		ips     []string
	}{
		{
			to: &p.apiserver, by: &p.ca, subject: pkix.Name{CommonName: "kube-apiserver"}, usage: server,
			names: []string{"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"},
			ips:   []string{"127.0.0.1", NodeIP, apiServiceIP},
		},
		{
			to: &p.apiserverToKubelet, by: &p.ca, usage: client,
			subject: pkix.Name{CommonName: "kube-apiserver-kubelet-client", Organization: []string{"system:masters"}},
		},
		{to: &p.frontProxyClient, by: &p.frontProxyCA, subject: pkix.Name{CommonName: "front-proxy-client"}, usage: client},
		{
			to: &p.kubeletServing, by: &p.ca, subject: clientSubjects["kubelet"], usage: server,
			names: []string{NodeName}, ips: []string{NodeIP, "127.0.0.1"},
		},
	} {
		if *c.to, err = c.by.issue(c.subject, c.usage, c.names, c.ips, now); err != nil {
			return nil, err
		}
	}
	for name, subject := range clientSubjects {
		if p.clients[name], err = p.ca.issue(subject, client, nil, nil, now); err != nil {
			return nil, err
		}
	}
	signer, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	if p.serviceAccountKey, err = encodeKey(signer); err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKIXPublicKey(signer.Public())
	if err != nil {
		return nil, err
	}
	p.serviceAccountPub = pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
	return p, nil
}

func newAuthority(name string, now time.Time) (authority, error) {
	signer, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return authority{}, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(certLifetime),
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign | x509.KeyUsageDigitalSignature,
		IsCA:     true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, signer.Public(), signer)
	if err != nil {
		return authority{}, fmt.Errorf("make authority %s: %w", name, err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return authority{}, err
	}
	key, err := encodeKey(signer)
	return authority{keyPair: keyPair{cert: encodeCert(der), key: key}, x509: cert, signer: signer}, err
}

func (a *authority) issue(subject pkix.Name, usage x509.ExtKeyUsage, names, ips []string, now time.Time) (keyPair, error) {
	signer, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return keyPair{}, err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return keyPair{}, err
	}
	template := &x509.Certificate{
		SerialNumber: serial, Subject: subject, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(certLifetime),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{usage},
		BasicConstraintsValid: true, DNSNames: names,
	}
	for _, ip := range ips {
		template.IPAddresses = append(template.IPAddresses, net.ParseIP(ip))
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.x509, signer.Public(), a.signer)
	if err != nil {
		return keyPair{}, fmt.Errorf("issue a certificate for %s: %w", subject, err)
	}
	key, err := encodeKey(signer)
	return keyPair{cert: encodeCert(der), key: key}, err
}

func encodeCert(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// encodeKey uses the SEC 1 form: Kubernetes' controller manager reads no other for EC keys.
func encodeKey(k *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalECPrivateKey(k)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}), nil
}

// write puts the files where the components' flags say they are.
func (p *pki) write(dir string) error {
	files := map[string][]byte{
		"ca.crt": p.ca.cert, "ca.key": p.ca.key,
		"front-proxy-ca.crt": p.frontProxyCA.cert,
		"sa.key":             p.serviceAccountKey, "sa.pub": p.serviceAccountPub,
	}
	for name, kp := range map[string]keyPair{
		"apiserver": p.apiserver, "apiserver-kubelet-client": p.apiserverToKubelet,
		"front-proxy-client": p.frontProxyClient, "kubelet-serving": p.kubeletServing, "admin": p.clients["admin"],
	} {
		files[name+".crt"], files[name+".key"] = kp.cert, kp.key
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	for name, b := range files {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			return err
		}
	}
	return nil
}
