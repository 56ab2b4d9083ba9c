package pki

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"time"

	"golang.org/x/crypto/ssh"
)

const (
	// TunnelCertLifetime is long enough to log in; the connection outlives the certificate.
	TunnelCertLifetime = 5 * time.Minute

	// What a tunnel certificate is bound to stands in critical options, so that a server that trusts our authority but
	// does not know them must refuse the login.
	optionSocket = "socket-id@mysocket.io"
	optionTunnel = "tunnel-id@mysocket.io"

	maxPublicKeyLine = 16 << 10
	minRSABits       = 2048
	maxRSABits       = 16384
)

// Binding is what a tunnel certificate allows: to serve one tunnel of one socket. An empty TunnelID allows
// any tunnel of the socket.
type Binding struct {
	SocketID string
	TunnelID string
}

// ParsePublicKey reads a user's public key, one line in authorized_keys form, and refuses kinds and sizes that are not safe.
func ParsePublicKey(line string) (ssh.PublicKey, error) {
	if len(line) > maxPublicKeyLine {
		return nil, fmt.Errorf("the public key is longer than %d bytes", maxPublicKeyLine)
	}
	key, _, _, _, err := ssh.ParseAuthorizedKey([]byte(line))
	if err != nil {
		return nil, errors.New("the public key is not one line in authorized_keys form, such as \"ecdsa-sha2-nistp256 AAAA...\"")
	}
	return key, CheckPublicKey(key)
}

// CheckPublicKey refuses keys of kinds and sizes that are not safe.
func CheckPublicKey(key ssh.PublicKey) error {
	const allowed = "use ECDSA (P-256 or P-384), Ed25519, or RSA with 2048 bits or more"
	switch key.Type() {
	case ssh.KeyAlgoECDSA256, ssh.KeyAlgoECDSA384, ssh.KeyAlgoED25519:
		return nil
	case ssh.KeyAlgoRSA:
		if k, ok := key.(ssh.CryptoPublicKey); ok {
			if k, ok := k.CryptoPublicKey().(*rsa.PublicKey); ok {
				if bits := k.N.BitLen(); bits < minRSABits || bits > maxRSABits {
					return fmt.Errorf("RSA keys of %d bits are not accepted: %s", bits, allowed)
				}
				return nil
			}
		}
	}
	return fmt.Errorf("public keys of type %s are not accepted: %s", key.Type(), allowed)
}

// SignTunnel makes the certificate with which user logs in to serve what binding names. It is valid from a minute ago, for
// clocks that are behind, until TunnelCertLifetime from now.
func (k *Keys) SignTunnel(key ssh.PublicKey, user string, binding Binding) (*ssh.Certificate, error) {
	if err := CheckPublicKey(key); err != nil {
		return nil, err
	}
	var serial [8]byte
	if _, err := rand.Read(serial[:]); err != nil {
		return nil, err
	}
	now := k.now()
	options := map[string]string{optionSocket: binding.SocketID}
	id := "mysocket user " + user + " socket " + binding.SocketID
	if binding.TunnelID != "" {
		options[optionTunnel] = binding.TunnelID
		id += " tunnel " + binding.TunnelID
	}
	cert := &ssh.Certificate{
		Key:             key,
		Serial:          binary.BigEndian.Uint64(serial[:]),
		CertType:        ssh.UserCert,
		KeyId:           id,
		ValidPrincipals: []string{user},
		ValidAfter:      unixTime(now.Add(-skew)),
		ValidBefore:     unixTime(now.Add(TunnelCertLifetime)),
		Permissions: ssh.Permissions{
			CriticalOptions: options,
			Extensions:      map[string]string{"permit-port-forwarding": "", "permit-pty": ""},
		},
	}
	if err := cert.SignCert(rand.Reader, k.SSHCA); err != nil {
		return nil, fmt.Errorf("sign tunnel certificate: %w", err)
	}
	return cert, nil
}

// CheckTunnelCert authenticates a login with a certificate: our authority, a user certificate, now valid, for this
// user. It returns what the certificate is bound to.
func (k *Keys) CheckTunnelCert(conn ssh.ConnMetadata, cert *ssh.Certificate) (Binding, error) {
	checker := &ssh.CertChecker{
		SupportedCriticalOptions: []string{optionSocket, optionTunnel},
		IsUserAuthority: func(auth ssh.PublicKey) bool {
			return bytes.Equal(auth.Marshal(), k.SSHCA.PublicKey().Marshal())
		},
		Clock: k.now,
	}
	if _, err := checker.Authenticate(conn, cert); err != nil {
		return Binding{}, err
	}
	binding := Binding{SocketID: cert.CriticalOptions[optionSocket], TunnelID: cert.CriticalOptions[optionTunnel]}
	if binding.SocketID == "" {
		return Binding{}, errors.New("the certificate names no socket")
	}
	if _, named := cert.CriticalOptions[optionTunnel]; named && binding.TunnelID == "" {
		return Binding{}, errors.New("the certificate names an empty tunnel")
	}
	return binding, nil
}

func unixTime(t time.Time) uint64 {
	sec := t.Unix()
	if sec < 0 || sec == math.MaxInt64 {
		return 0
	}
	return uint64(sec)
}
