package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"os"
	"os/exec"
	"strings"
	"time"
)

// haproxyFront is one address of haproxy and the apps behind it.
type haproxyFront struct {
	balance  string
	backends []string
	tls      bool
}

// startHAProxy starts haproxy with a front of each kind, and returns their addresses. It does as little as a reverse proxy can: it keeps
// connections on both sides, adds X-Forwarded-For and logs nothing.
func startHAProxy(ctx context.Context, p place, fronts ...haproxyFront) (*process, []string, error) {
	program, err := exec.LookPath("haproxy")
	if err != nil {
		return nil, nil, errors.New("haproxy is missing: install the Debian package haproxy")
	}
	certificate := p.file("haproxy.pem")
	if err := writeCertificate(certificate); err != nil {
		return nil, nil, err
	}
	var config strings.Builder
	config.WriteString(`global
	maxconn 8192
	ssl-default-bind-ciphersuites TLS_AES_128_GCM_SHA256
defaults
	mode http
	option forwardfor
	http-reuse always
	timeout connect 5s
	timeout client 1m
	timeout server 1m
	timeout http-keep-alive 1m
`)
	var addresses []string
	for i, f := range fronts {
		port, err := freePort()
		if err != nil {
			return nil, nil, err
		}
		address := fmt.Sprintf("127.0.0.1:%d", port)
		addresses = append(addresses, address)
		secure := ""
		if f.tls {
			secure = " ssl crt " + certificate
		}
		fmt.Fprintf(&config, "listen front%d\n\tbind %s%s\n\tbalance %s\n", i, address, secure, f.balance)
		for k, backend := range f.backends {
			fmt.Fprintf(&config, "\tserver app%d %s\n", k, backend)
		}
	}
	if err := os.WriteFile(p.file("haproxy.cfg"), []byte(config.String()), 0o600); err != nil {
		return nil, nil, err
	}
	// Without -W it is one process, whose time is read.
	process, err := start(ctx, program, "-db", "-f", p.file("haproxy.cfg"))
	if err != nil {
		return nil, nil, err
	}
	for _, address := range addresses {
		if err := await(ctx, "haproxy", func() error { return knock(ctx, address) }); err != nil {
			return process, nil, fmt.Errorf("%w: %s", err, process.log)
		}
	}
	return process, addresses, nil
}

// writeCertificate makes a certificate like the edge's own, with its key in the same file, as haproxy wants it.
func writeCertificate(file string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "bench"}, DNSNames: []string{"bench"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
	}
	certificate, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return err
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	text := append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: certificate}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})...)
	return os.WriteFile(file, text, 0o600)
}
