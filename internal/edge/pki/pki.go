// Package pki holds the edge's own keys: the X.509 authority of its API and fronts, the SSH authority of tunnel
// certificates, the SSH host key and the key that signs tokens. It must not know users, sockets or networks.
package pki

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"time"

	"golang.org/x/crypto/ssh"
)

// SecretStore remembers secrets between runs. *store.Store is one.
type SecretStore interface {
	Secret(name string, create func() ([]byte, error)) ([]byte, error)
}

const (
	caLifetime = 10 * 365 * 24 * time.Hour
	// caBackdate is how far ahead the clock may be when an edge first starts, and be set right after that: the authority is made only once.
	caBackdate   = 24 * time.Hour
	tokenKeySize = 32
	// skew is how far a client's clock may be behind ours.
	skew = time.Minute
)

// Keys are all the keys of one edge.
type Keys struct {
	// CA is the X.509 authority; CAPEM is its certificate.
	CA    *x509.Certificate
	CAPEM []byte
	caKey *ecdsa.PrivateKey
	// SSHCA signs tunnel certificates; HostKey is the SSH server's.
	SSHCA   ssh.Signer
	HostKey ssh.Signer
	// TokenKey signs API tokens.
	TokenKey []byte
	now      func() time.Time
}

// Load reads the keys from the store and makes those that are missing. now may be nil.
func Load(secrets SecretStore, name string, now func() time.Time) (*Keys, error) {
	if now == nil {
		now = time.Now
	}
	k := &Keys{now: now}
	caPEM, err := secrets.Secret("x509-ca", func() ([]byte, error) { return newCA(name, now()) })
	if err != nil {
		return nil, err
	}
	if err := k.parseCA(caPEM); err != nil {
		return nil, fmt.Errorf("certificate authority in the state file: %w", err)
	}
	if k.SSHCA, err = loadSSHKey(secrets, "ssh-ca"); err != nil {
		return nil, err
	}
	if k.HostKey, err = loadSSHKey(secrets, "ssh-host-key"); err != nil {
		return nil, err
	}
	if k.TokenKey, err = LoadTokenKey(secrets); err != nil {
		return nil, err
	}
	return k, nil
}

// LoadTokenKey reads the key that signs API tokens, and makes it if it is missing.
func LoadTokenKey(secrets SecretStore) ([]byte, error) {
	key, err := secrets.Secret("token-key", func() ([]byte, error) {
		key := make([]byte, tokenKeySize)
		_, err := rand.Read(key)
		return key, err
	})
	if err != nil {
		return nil, err
	}
	if len(key) != tokenKeySize {
		return nil, fmt.Errorf("token key in the state file has %d bytes, not %d", len(key), tokenKeySize)
	}
	return key, nil
}

// HostKeyLine is the SSH host key in authorized_keys form, without a newline.
func (k *Keys) HostKeyLine() string { return authorizedKey(k.HostKey.PublicKey()) }

// HostKeyWire is the SSH host key as base64 of its wire form, as the API's answers carry it.
func (k *Keys) HostKeyWire() string {
	return base64.StdEncoding.EncodeToString(k.HostKey.PublicKey().Marshal())
}

// SSHCALine is the public key of the SSH authority in authorized_keys form, without a newline.
func (k *Keys) SSHCALine() string { return authorizedKey(k.SSHCA.PublicKey()) }

func authorizedKey(key ssh.PublicKey) string {
	line := ssh.MarshalAuthorizedKey(key)
	return string(line[:len(line)-1])
}

func loadSSHKey(secrets SecretStore, name string) (ssh.Signer, error) {
	data, err := secrets.Secret(name, func() ([]byte, error) {
		_, key, err := ed25519.GenerateKey(rand.Reader)
		if err != nil {
			return nil, err
		}
		block, err := ssh.MarshalPrivateKey(key, "mysocket-edge "+name)
		if err != nil {
			return nil, err
		}
		return pem.EncodeToMemory(block), nil
	})
	if err != nil {
		return nil, err
	}
	signer, err := ssh.ParsePrivateKey(data)
	if err != nil {
		return nil, fmt.Errorf("%s in the state file: %w", name, err)
	}
	return signer, nil
}

func newCA(name string, now time.Time) ([]byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: name, Organization: []string{"mysocket-edge"}},
		NotBefore:             now.Add(-caBackdate),
		NotAfter:              now.Add(caLifetime),
		IsCA:                  true,
		BasicConstraintsValid: true,
		MaxPathLenZero:        true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	out := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	return append(out, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})...), nil
}

func (k *Keys) parseCA(data []byte) error {
	certBlock, rest := pem.Decode(data)
	keyBlock, _ := pem.Decode(rest)
	if certBlock == nil || keyBlock == nil {
		return errors.New("not a certificate and a key in PEM form")
	}
	cert, err := x509.ParseCertificate(certBlock.Bytes)
	if err != nil {
		return err
	}
	key, err := x509.ParsePKCS8PrivateKey(keyBlock.Bytes)
	if err != nil {
		return err
	}
	ec, ok := key.(*ecdsa.PrivateKey)
	if !ok {
		return fmt.Errorf("key is a %T, not an ECDSA key", key)
	}
	k.CA, k.caKey, k.CAPEM = cert, ec, pem.EncodeToMemory(certBlock)
	return nil
}

func newSerial() (*big.Int, error) {
	return rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
}
