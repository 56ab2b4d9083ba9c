package certs

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"time"
)

// Keys of the Secret.
const (
	keyCACert   = "ca.crt"
	keyCAKey    = "ca.key"
	keyLeafCert = "tls.crt"
	keyLeafKey  = "tls.key"
	keyOthers   = "ca-previous.crt" // empty or missing but during a rotation of the CA
	keySince    = "ca-since"        // see material.since
)

const (
	typeCert = "CERTIFICATE"
	typeKey  = "PRIVATE KEY"

	// backdate is how much before its creation a certificate becomes valid, for clients whose clock is slow.
	backdate = 5 * time.Minute
)

// material is the content of the Secret. It never changes once made.
type material struct {
	ca   pair // signs leaves; without a key when it is cert-manager's
	leaf pair // is served; signed by ca or, during a rotation, by one of others
	// chain is what leads from the leaf to the CA and is served with it. Our own CA needs none.
	chain []*x509.Certificate
	// others are other CAs to trust, the newest first; none but during a rotation, unless an issuer of cert-manager's names
	// several. We have no key of them.
	others []*x509.Certificate
	// since is when a CA was last added, or the leaf of another CA first served. Only cert-manager mode needs it: our own
	// certificates tell when they were made.
	since time.Time
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
	if len(data[keyCAKey]) == 0 {
		m.ca.cert, err = parseCert(data, keyCACert)
	} else {
		m.ca, err = parsePair(data, keyCACert, keyCAKey)
	}
	if err != nil {
		return nil, err
	}
	leaf, err := parseCerts(data, keyLeafCert)
	if err != nil {
		return nil, err
	}
	if m.leaf, err = withKey(leaf[0], data, keyLeafCert, keyLeafKey); err != nil {
		return nil, err
	}
	m.chain = leaf[1:]
	if selfSigned := m.ca.key == nil && m.ca.cert.Equal(m.leaf.cert); !m.ca.cert.IsCA && !selfSigned {
		return nil, fmt.Errorf("%s is not a CA's certificate", keyCACert)
	}
	if len(data[keyOthers]) > 0 {
		if m.others, err = parseCerts(data, keyOthers); err != nil {
			return nil, err
		}
	}
	if len(data[keySince]) > 0 {
		if m.since, err = time.Parse(time.RFC3339, string(data[keySince])); err != nil {
			return nil, fmt.Errorf("%s is not a time", keySince)
		}
	}
	if m.signer() == nil {
		return nil, fmt.Errorf("%s is signed neither by %s nor by %s", keyLeafCert, keyCACert, keyOthers)
	}
	return &m, nil
}

func parsePair(data map[string][]byte, certName, keyName string) (pair, error) {
	cert, err := parseCert(data, certName)
	if err != nil {
		return pair{}, err
	}
	return withKey(cert, data, certName, keyName)
}

// withKey adds its key to a certificate.
func withKey(cert *x509.Certificate, data map[string][]byte, certName, keyName string) (pair, error) {
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
	certs, err := parseCerts(data, name)
	switch {
	case err != nil:
		return nil, err
	case len(certs) > 1:
		return nil, fmt.Errorf("%s is not one PEM block %q", name, typeCert)
	}
	return certs[0], nil
}

// maxCerts is more than any chain or bundle has that could be meant.
const maxCerts = 32

// parseCerts reads one certificate or several, and nothing else.
func parseCerts(data map[string][]byte, name string) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	for rest := data[name]; certs == nil || len(bytes.TrimSpace(rest)) > 0; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil || block.Type != typeCert || len(certs) == maxCerts {
			return nil, fmt.Errorf("%s is not one PEM block %q, or a few", name, typeCert)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		certs = append(certs, cert)
	}
	return certs, nil
}

// encode is the opposite of parse.
func (m *material) encode() (map[string][]byte, error) {
	data := map[string][]byte{
		keyCACert: encodeCert(m.ca.cert), keyCAKey: {}, keyLeafCert: encodeCerts(append([]*x509.Certificate{m.leaf.cert}, m.chain...)),
		keyOthers: encodeCerts(m.others), keySince: {},
	}
	if !m.since.IsZero() {
		data[keySince] = []byte(m.since.UTC().Format(time.RFC3339))
	}
	for name, key := range map[string]*ecdsa.PrivateKey{keyCAKey: m.ca.key, keyLeafKey: m.leaf.key} {
		if key == nil {
			continue
		}
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

func encodeCerts(certs []*x509.Certificate) []byte {
	text := []byte{}
	for _, c := range certs {
		text = append(text, encodeCert(c)...)
	}
	return text
}

// trusted is what clients are to trust.
func (m *material) trusted() []*x509.Certificate {
	return append([]*x509.Certificate{m.ca.cert}, m.others...)
}

// bundle is trusted as PEM.
func (m *material) bundle() []byte { return encodeCerts(m.trusted()) }

func (m *material) signedByCA() bool { return leadsTo(m.leaf.cert, m.chain, m.ca.cert) }

// signer is the trusted CA that the leaf leads to.
func (m *material) signer() *x509.Certificate {
	for _, ca := range m.trusted() {
		if leadsTo(m.leaf.cert, m.chain, ca) {
			return ca
		}
	}
	return nil
}

// tls is what is served.
func (m *material) tls() *tls.Certificate {
	c := &tls.Certificate{Certificate: [][]byte{m.leaf.cert.Raw}, PrivateKey: m.leaf.key, Leaf: m.leaf.cert}
	for _, i := range m.chain {
		c.Certificate = append(c.Certificate, i.Raw)
	}
	return c
}

// leadsTo tells whether each certificate is signed by the next, and the last by the CA, whatever the time. A certificate
// that signed itself is its own CA.
func leadsTo(leaf *x509.Certificate, chain []*x509.Certificate, ca *x509.Certificate) bool {
	for _, next := range append(slices.Clone(chain), ca) {
		if leaf.Equal(ca) {
			return true
		}
		if leaf.CheckSignatureFrom(next) != nil {
			return false
		}
		leaf = next
	}
	return true
}

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
