package certs

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"time"
)

// Keys of the Secret.
const (
	keyCACert   = "ca.crt"
	keyCAKey    = "ca.key"
	keyLeafCert = "tls.crt"
	keyLeafKey  = "tls.key"
	keyPrevious = "ca-previous.crt" // empty or missing but during a rotation of the CA
)

const (
	typeCert = "CERTIFICATE"
	typeKey  = "PRIVATE KEY"

	// backdate is how much before its creation a certificate becomes valid, for clients whose clock is slow.
	backdate = 5 * time.Minute
)

// material is the content of the Secret. It never changes once made.
type material struct {
	ca       pair              // signs leaves
	leaf     pair              // is served; signed by ca or, during a rotation, by previous
	previous *x509.Certificate // another CA to trust; nil but during a rotation. Its key is gone.
}

type pair struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// parse reads the Secret's data. It looks at what belongs together, not at the time or the names.
func parse(data map[string][]byte) (*material, error) {
	if len(data[keyCACert]) == 0 && len(data[keyLeafCert]) == 0 {
		return nil, errors.New("it holds no certificate")
	}
	var m material
	var err error
	if m.ca, err = parsePair(data, keyCACert, keyCAKey); err != nil {
		return nil, err
	}
	if !m.ca.cert.IsCA {
		return nil, fmt.Errorf("%s is not a CA's certificate", keyCACert)
	}
	if m.leaf, err = parsePair(data, keyLeafCert, keyLeafKey); err != nil {
		return nil, err
	}
	if len(data[keyPrevious]) > 0 {
		if m.previous, err = parseCert(data, keyPrevious); err != nil {
			return nil, err
		}
	}
	if !m.signedByCA() && (m.previous == nil || m.leaf.cert.CheckSignatureFrom(m.previous) != nil) {
		return nil, fmt.Errorf("%s is signed neither by %s nor by %s", keyLeafCert, keyCACert, keyPrevious)
	}
	return &m, nil
}

func parsePair(data map[string][]byte, certName, keyName string) (pair, error) {
	cert, err := parseCert(data, certName)
	if err != nil {
		return pair{}, err
	}
	block, _ := pem.Decode(data[keyName])
	if block == nil || block.Type != typeKey {
		return pair{}, fmt.Errorf("%s has no PEM block %q", keyName, typeKey)
	}
	// The error of the parser could tell about the key's bytes, so it is left out.
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return pair{}, fmt.Errorf("%s is not a PKCS #8 key", keyName)
	}
	key, ok := parsed.(*ecdsa.PrivateKey)
	if !ok || !key.PublicKey.Equal(cert.PublicKey) {
		return pair{}, fmt.Errorf("%s is not the ECDSA key of %s", keyName, certName)
	}
	return pair{cert, key}, nil
}

func parseCert(data map[string][]byte, name string) (*x509.Certificate, error) {
	block, rest := pem.Decode(data[name])
	if block == nil || block.Type != typeCert || len(bytes.TrimSpace(rest)) > 0 {
		return nil, fmt.Errorf("%s is not one PEM block %q", name, typeCert)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return cert, nil
}

// encode is the opposite of parse.
func (m *material) encode() (map[string][]byte, error) {
	data := map[string][]byte{keyCACert: encodeCert(m.ca.cert), keyLeafCert: encodeCert(m.leaf.cert), keyPrevious: {}}
	if m.previous != nil {
		data[keyPrevious] = encodeCert(m.previous)
	}
	for name, key := range map[string]*ecdsa.PrivateKey{keyCAKey: m.ca.key, keyLeafKey: m.leaf.key} {
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			return nil, fmt.Errorf("encode %s: %w", name, err)
		}
		data[name] = pem.EncodeToMemory(&pem.Block{Type: typeKey, Bytes: der})
	}
	return data, nil
}

func encodeCert(c *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: typeCert, Bytes: c.Raw})
}

// bundle is what clients are to trust.
func (m *material) bundle() []byte {
	b := encodeCert(m.ca.cert)
	if m.previous != nil {
		b = append(b, encodeCert(m.previous)...)
	}
	return b
}

func (m *material) signedByCA() bool { return m.leaf.cert.CheckSignatureFrom(m.ca.cert) == nil }

func newCA(now time.Time, lifetime time.Duration) (pair, error) {
	return sign(&x509.Certificate{
		// The time keeps two CAs apart for a person who reads the bundle.
		Subject:               pkix.Name{CommonName: "mysocket-injector CA " + now.UTC().Format("2006-01-02 15:04:05")},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(lifetime),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
		IsCA:                  true,
		BasicConstraintsValid: true,
		MaxPathLenZero:        true,
	}, nil)
}

func newLeaf(ca pair, names []string, now time.Time, lifetime time.Duration) (pair, error) {
	end := now.Add(lifetime)
	if end.After(ca.cert.NotAfter) {
		end = ca.cert.NotAfter
	}
	return sign(&x509.Certificate{
		Subject:               pkix.Name{CommonName: "mysocket-injector"},
		DNSNames:              names,
		NotBefore:             now.Add(-backdate),
		NotAfter:              end,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true,
	}, &ca)
}

// sign makes a key and a certificate for it from the template, signed by the CA or, without one, by itself.
func sign(template *x509.Certificate, ca *pair) (pair, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return pair{}, fmt.Errorf("generate a key: %w", err)
	}
	if template.SerialNumber, err = rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127)); err != nil {
		return pair{}, fmt.Errorf("generate a serial number: %w", err)
	}
	if ca == nil {
		ca = &pair{template, key}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca.cert, key.Public(), ca.key)
	if err != nil {
		return pair{}, fmt.Errorf("sign a certificate: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return pair{}, fmt.Errorf("read back a certificate: %w", err)
	}
	return pair{cert, key}, nil
}
