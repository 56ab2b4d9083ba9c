package tunnel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/mysocketio/mysocket-injector/internal/sshguard"
)

const (
	connectTimeout = 10 * time.Second
	// userTimeout is how long sent bytes may stay without an acknowledgement before the kernel drops the connection.
	userTimeout = 20 * time.Second
	maxBanner   = 256
	// maxLogin is how much an edge may send until it has let us in. A handshake with long banners takes a few tens of KiB.
	maxLogin = 256 << 10
)

// dialEdge opens the TCP connection to the edge, or one to a proxy that leads to it. home tells whether there is no better address for it: a
// proxy chooses by itself.
func dialEdge(ctx context.Context, cfg Config) (conn net.Conn, home bool, err error) {
	dialer := &net.Dialer{
		Timeout:         connectTimeout,
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 10 * time.Second, Interval: 5 * time.Second, Count: 4},
		Control: func(_, _ string, raw syscall.RawConn) error {
			var failed error
			err := raw.Control(func(fd uintptr) {
				failed = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(userTimeout.Milliseconds()))
			})
			return errors.Join(err, failed)
		},
	}
	if cfg.Proxy != nil {
		conn, err := dialProxy(ctx, dialer, cfg.Proxy, cfg.Address)
		return conn, true, err
	}
	return dialName(ctx, dialer, cfg)
}

// handshake logs in over conn, which it closes when that fails.
func handshake(ctx context.Context, conn net.Conn, cfg Config, flood *flood) (ssh.Conn, <-chan ssh.NewChannel, <-chan *ssh.Request, error) {
	// A deadline of the connection bounds the handshake, and closing it ends one that is no longer wanted: the
	// library knows no contexts.
	if err := conn.SetDeadline(time.Now().Add(cfg.HandshakeTimeout)); err != nil {
		return nil, nil, nil, &StepError{StepHandshake, errors.Join(err, conn.Close())}
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })

	var trusted bool
	var refused *HostKeyError
	var banner string
	config := &ssh.ClientConfig{
		Config: ssh.Config{Ciphers: []string{
			// AES-GCM first: on CPUs with AES instructions it is several times as fast as the others.
			ssh.CipherAES128GCM, ssh.CipherAES256GCM, ssh.CipherChaCha20Poly1305, ssh.CipherAES256CTR, ssh.CipherAES128CTR,
		}},
		User:              cfg.User,
		Auth:              []ssh.AuthMethod{ssh.PublicKeys(cfg.Signer)},
		ClientVersion:     cfg.ClientVersion,
		HostKeyAlgorithms: hostKeyAlgorithms(cfg.HostKeys),
		HostKeyCallback: func(_ string, _ net.Addr, key ssh.PublicKey) error {
			if refused = checkHostKey(cfg, key); refused != nil {
				return refused
			}
			trusted = true
			return flood.add(floodKeyExchange) // this is called for each key exchange
		},
		BannerCallback: func(message string) error {
			banner = strings.Clone(message[:min(len(message), maxBanner)])
			return nil
		},
	}
	login := &loginConn{Conn: newBufferedConn(conn), left: maxLogin}
	guarded := sshguard.New(login, cfg.LoginPause)
	sshConn, channels, requests, err := ssh.NewClientConn(guarded, cfg.Address, config)
	login.over.Store(true)
	guarded.LoginOver()
	if !stop() && err == nil {
		err = ctx.Err()
		_ = sshConn.Close()
		go func() {
			ssh.DiscardRequests(requests)
			sshguard.Drain(sshConn)
		}()
		for open := range channels {
			_ = open.Reject(ssh.ConnectionFailed, "closing")
		}
	}
	if err == nil {
		err = conn.SetDeadline(time.Time{})
	}
	switch {
	case err == nil:
		return sshConn, channels, requests, nil
	case ctx.Err() != nil:
		return nil, nil, nil, &StepError{StepHandshake, context.Cause(ctx)}
	case refused != nil:
		return nil, nil, nil, &StepError{StepHostKey, refused}
	}
	return nil, nil, nil, handshakeError(err, cfg, trusted, banner)
}

var errLongLogin = fmt.Errorf("it sent more than %d KiB before the login was over", maxLogin>>10)

// loginConn reads no more than left bytes until the login is over.
type loginConn struct {
	net.Conn
	left int // of the one goroutine that reads
	over atomic.Bool
}

func (c *loginConn) Read(p []byte) (int, error) {
	if c.over.Load() {
		return c.Conn.Read(p)
	}
	if c.left == 0 {
		return 0, errLongLogin
	}
	n, err := c.Conn.Read(p[:min(len(p), c.left)])
	c.left -= n
	return n, err
}

// handshakeError finds the step that a failed handshake failed in.
func handshakeError(err error, cfg Config, trusted bool, banner string) error {
	if negotiation, ok := errors.AsType[*ssh.AlgorithmNegotiationError](err); ok && strings.Contains(negotiation.What, "host key") {
		return &StepError{StepHostKey, fmt.Errorf("the edge %s has no host key of a pinned type: it has %s, pinned are %s",
			cfg.Address, strings.Join(negotiation.RequestedAlgorithms, ", "), strings.Join(fingerprints(cfg.HostKeys), ", "))}
	}
	if !trusted {
		if isTimeout(err) {
			return &StepError{StepHandshake, fmt.Errorf("%s accepted the connection but did not finish the handshake within %s: is it an SSH server? %w",
				cfg.Address, cfg.HandshakeTimeout, err)}
		}
		return &StepError{StepHandshake, fmt.Errorf("no SSH connection with %s: %w", cfg.Address, err)}
	}
	if errors.Is(err, errLongLogin) {
		return &StepError{StepHandshake, fmt.Errorf("no SSH connection with %s: %w", cfg.Address, err)}
	}
	// From here on it was the login. An edge that hangs up in the middle of it refuses as clearly as one that says so; a network that
	// fails is not a refusal, and must not cost a new certificate.
	if _, ok := errors.AsType[net.Error](err); ok && !errors.Is(err, io.EOF) {
		return &StepError{StepHandshake, fmt.Errorf("the connection with %s broke during the login: %w", cfg.Address, err)}
	}
	if banner = strings.TrimSpace(banner); banner != "" {
		return &StepError{StepAuth, fmt.Errorf("the edge %s refused the login of %q: %w (it said: %q)", cfg.Address, cfg.User, err, banner)}
	}
	return &StepError{StepAuth, fmt.Errorf("the edge %s refused the login of %q: %w", cfg.Address, cfg.User, err)}
}

func isTimeout(err error) bool {
	failed, ok := errors.AsType[net.Error](err)
	return ok && failed.Timeout()
}

func checkHostKey(cfg Config, key ssh.PublicKey) *HostKeyError {
	shown := string(key.Marshal())
	for _, pinned := range cfg.HostKeys {
		if string(pinned.Marshal()) == shown {
			return nil
		}
	}
	return &HostKeyError{Address: cfg.Address, Got: fingerprint(key), Pinned: fingerprints(cfg.HostKeys)}
}

func fingerprints(keys []ssh.PublicKey) []string {
	var list []string
	for _, key := range keys {
		list = append(list, fingerprint(key))
	}
	return list
}

// hostKeyAlgorithms returns the algorithms of the pinned keys: an edge with several keys must show one that is pinned.
func hostKeyAlgorithms(keys []ssh.PublicKey) []string {
	var algorithms []string
	for _, key := range keys {
		names := []string{key.Type()}
		if key.Type() == ssh.KeyAlgoRSA {
			names = []string{ssh.KeyAlgoRSASHA512, ssh.KeyAlgoRSASHA256}
		}
		for _, name := range names {
			if !slices.Contains(algorithms, name) {
				algorithms = append(algorithms, name)
			}
		}
	}
	return algorithms
}
