package sidecar

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/mysocketio/mysocket-injector/internal/gatewayapi"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/gatewayclient"
)

const (
	maxHostKeys = 16
	maxUser     = 128
	maxHost     = 255
	// expiryMargin is how long before its end a certificate is no longer tried: the login takes a moment.
	expiryMargin = 10 * time.Second
)

// login is a validated registration.
type login struct {
	tunnelID    string
	address     string
	user        string
	signer      ssh.Signer
	hostKeys    []ssh.PublicKey
	forwardHost string
	forwardPort uint32
	expires     time.Time // zero when it never does

	used    bool // it was tried at least once
	refused bool // the edge did not want it
}

// usable tells whether the login may be tried. A fresh one is tried whatever this machine's clock says: the clock may be
// wrong; and whatever the gateway says of the edge's address, if it says anything: its replicas may not agree for a moment.
func (l *login) usable(now time.Time, edgeAddress string) bool {
	if l == nil || l.refused {
		return false
	}
	if l.used && edgeAddress != "" && edgeAddress != l.address {
		return false
	}
	return !l.used || l.expires.IsZero() || now.Before(l.expires.Add(-expiryMargin))
}

// newLogin checks what the gateway answered.
func newLogin(registration gatewayapi.Registration, key ssh.Signer) (*login, error) {
	l := &login{
		tunnelID:    registration.TunnelID,
		address:     registration.EdgeAddress,
		user:        registration.User,
		forwardHost: registration.ForwardHost,
		forwardPort: registration.ForwardPort,
	}
	switch {
	case !gatewayclient.ValidID(l.tunnelID):
		return nil, fmt.Errorf("the tunnel id %.64q is none", l.tunnelID)
	case l.user == "" || len(l.user) > maxUser:
		return nil, fmt.Errorf("the user name has %d bytes; allowed are 1 to %d", len(l.user), maxUser)
	case len(l.forwardHost) > maxHost:
		return nil, fmt.Errorf("the forward host has %d bytes; allowed are %d", len(l.forwardHost), maxHost)
	case l.forwardPort > 65535:
		return nil, fmt.Errorf("the forward port is %d; allowed are 0 to 65535", l.forwardPort)
	}
	if err := checkAddress(l.address); err != nil {
		return nil, err
	}
	if n := len(registration.HostKeys); n < 1 || n > maxHostKeys {
		return nil, fmt.Errorf("there are %d host keys; allowed are 1 to %d", n, maxHostKeys)
	}
	for i, line := range registration.HostKeys {
		hostKey, _, _, rest, err := ssh.ParseAuthorizedKey([]byte(line))
		if err != nil || len(bytes.TrimSpace(rest)) > 0 {
			return nil, fmt.Errorf("host key %d is not one line in authorized_keys form", i+1)
		}
		l.hostKeys = append(l.hostKeys, hostKey)
	}
	certificate, err := parseCertificate(registration.Certificate, key.PublicKey())
	if err != nil {
		return nil, err
	}
	if certificate.ValidBefore != ssh.CertTimeInfinity {
		l.expires = time.Unix(int64(min(certificate.ValidBefore, 1<<40)), 0)
	}
	if l.signer, err = ssh.NewCertSigner(certificate, key); err != nil {
		return nil, fmt.Errorf("the certificate can't be used: %w", err)
	}
	return l, nil
}

func checkAddress(address string) error {
	host, port, err := net.SplitHostPort(address)
	number, numberErr := strconv.Atoi(port)
	if err != nil || numberErr != nil || host == "" || number < 1 || number > 65535 || len(host) > maxHost || strings.ContainsAny(host, "/@ ") {
		return fmt.Errorf("the edge's address is %.280q; it must be host:port", address)
	}
	return nil
}

func parseCertificate(line string, key ssh.PublicKey) (*ssh.Certificate, error) {
	parsed, _, _, rest, err := ssh.ParseAuthorizedKey([]byte(line))
	if err != nil || len(bytes.TrimSpace(rest)) > 0 {
		return nil, errors.New("the certificate is not one line in authorized_keys form")
	}
	certificate, ok := parsed.(*ssh.Certificate)
	switch {
	case !ok:
		return nil, fmt.Errorf("the certificate is a plain %s key", parsed.Type())
	case certificate.CertType != ssh.UserCert:
		return nil, errors.New("the certificate is not for a user")
	case !bytes.Equal(certificate.Key.Marshal(), key.Marshal()):
		return nil, errors.New("the certificate is for another key than ours")
	}
	return certificate, nil
}
