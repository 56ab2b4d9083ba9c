package edge

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/mysocketio/mysocket-injector/internal/edge/control"
	"github.com/mysocketio/mysocket-injector/internal/edge/store"
	"github.com/mysocketio/mysocket-injector/internal/sshguard"
)

// Config says what an edge is and where it listens. The zero value of every optional field is its default.
type Config struct {
	// Domain is the parent of all public names, such as edge.example.com. Required.
	Domain string
	// StatePath is the state file; it is made if there is none. Required unless the state is in Etcd.
	StatePath string
	// Etcd is where edges that work together share their state, instead of StatePath.
	Etcd store.EtcdConfig

	// Addresses to listen on, host:port; an empty host is all addresses, port 0 any free port. All required.
	APIAddress   string
	SSHAddress   string
	HTTPAddress  string
	HTTPSAddress string
	AdminAddress string
	// APIHosts are further names and IP addresses in the API's certificate.
	APIHosts []string
	// TCPPorts are the public ports for tcp and tls sockets. Required.
	TCPPorts PortRange

	// Visitors says how visitors come in: certificates, redirects, proxies in front.
	Visitors Visitors

	// AllowRegistration lets strangers make accounts with POST /user.
	AllowRegistration bool
	// CAOut and SSHHostKeyOut are files to write the CA certificate (PEM) and the SSH host key (authorized_keys form) to.
	CAOut         string
	SSHHostKeyOut string

	// ComeBack is what tunnel clients are told when the edge stops: to come back after that time. Zero says nothing; at most
	// MaxComeBack.
	ComeBack time.Duration

	// StartupWait is how long the edge may wait after its start, until every socket has a tunnel, before it says that it is ready. ShutdownDelay is for
	// how long it goes on serving after it was told to stop, and has said that it isn't. At most MaxTurn.
	StartupWait   time.Duration
	ShutdownDelay time.Duration
	// ControlSocket is the Unix socket for the operator's commands; none if empty.
	ControlSocket string
	// SlowStart is for how long a tunnel that has just connected gets less than its share of requests. Zero is not at all; at
	// most MaxSlowStart.
	SlowStart time.Duration

	// PasswordCost is the bcrypt cost of account passwords; bcrypt's default if 0.
	PasswordCost int
	// Version is shown in the SSH banner.
	Version string
	// Log is where the edge logs; slog.Default() if nil.
	Log *slog.Logger
	// AccessLog gets a line for each request and connection of a visitor; none if nil.
	AccessLog *slog.Logger
	// Web is how long the HTTP and HTTPS fronts wait for what; see DefaultWebTimeouts.
	Web WebTimeouts
	// Now is the clock of certificates, tokens and throttling; time.Now if nil.
	Now func() time.Time
	// Timings are the edge's patience; see DefaultTimings.
	Timings Timings
}

// MaxComeBack is the longest time that clients may be sent away for: sidecars wait no longer.
const MaxComeBack = 5 * time.Minute

// MaxSlowStart is the longest slow start that may be asked for.
const MaxSlowStart = 10 * time.Minute

// Timings are how long the edge waits for what. A zero field has its default.
type Timings struct {
	// Hold is how long a request waits for a tunnel when its socket has none that is usable.
	Hold time.Duration
	// OpenTimeout is how long a tunnel client may take to open a channel.
	OpenTimeout time.Duration
	// Penalty is how long a tunnel that failed to open a channel is the last choice.
	Penalty time.Duration
	// HandshakeTimeout is how long an SSH client may take to log in.
	HandshakeTimeout time.Duration
	// LoginPause is how long the reading of an SSH login pauses between its parts, see package sshguard.
	LoginPause time.Duration
	// KeepaliveInterval and KeepaliveMisses say when a silent SSH client is dead.
	KeepaliveInterval time.Duration
	KeepaliveMisses   int
	// Drain is how long requests may go on after the edge was told to stop. Everything is over two seconds later.
	Drain time.Duration
	// VisitorHandshake is how long a visitor of a tls socket may take to agree on TLS, and a proxy in front to send its
	// PROXY header.
	VisitorHandshake time.Duration
	// CertificateCheck is how often the files of a certificate are read again.
	CertificateCheck time.Duration
}

// DefaultTimings are what a zero Timings means.
func DefaultTimings() Timings {
	return Timings{
		Hold: time.Second, OpenTimeout: 5 * time.Second, Penalty: time.Second, HandshakeTimeout: 10 * time.Second, LoginPause: sshguard.Pause,
		KeepaliveInterval: 5 * time.Second, KeepaliveMisses: 3, Drain: 6 * time.Second,
		VisitorHandshake: 10 * time.Second, CertificateCheck: 5 * time.Second,
	}
}

func (t *Timings) setDefaults() {
	d := DefaultTimings()
	for _, p := range []struct{ value, fallback *time.Duration }{
		{&t.Hold, &d.Hold}, {&t.OpenTimeout, &d.OpenTimeout}, {&t.Penalty, &d.Penalty},
		{&t.HandshakeTimeout, &d.HandshakeTimeout}, {&t.LoginPause, &d.LoginPause}, {&t.KeepaliveInterval, &d.KeepaliveInterval}, {&t.Drain, &d.Drain},
		{&t.VisitorHandshake, &d.VisitorHandshake}, {&t.CertificateCheck, &d.CertificateCheck},
	} {
		if *p.value == 0 {
			*p.value = *p.fallback
		}
	}
	if t.KeepaliveMisses == 0 {
		t.KeepaliveMisses = d.KeepaliveMisses
	}
}

// PortRange is a range of ports, both ends included.
type PortRange struct{ Min, Max int }

// ParsePortRange reads a range such as 20000-29999.
func ParsePortRange(s string) (PortRange, error) {
	low, high, ok := strings.Cut(s, "-")
	minimum, err1 := strconv.Atoi(low)
	maximum, err2 := strconv.Atoi(high)
	r := PortRange{Min: minimum, Max: maximum}
	if !ok || err1 != nil || err2 != nil || !r.valid() {
		return PortRange{}, fmt.Errorf("%q is not a range of ports; give one such as 20000-29999, within 1-65535", s)
	}
	return r, nil
}

func (r PortRange) valid() bool { return 1 <= r.Min && r.Min <= r.Max && r.Max <= 65535 }

func (r PortRange) String() string { return fmt.Sprintf("%d-%d", r.Min, r.Max) }

var domainPattern = regexp.MustCompile(`^([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)*[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

// maxDomain leaves room for the label of a socket in front.
const maxDomain = 253 - 64

// Validate says what is wrong with a configuration, in one sentence for each fault.
func (c *Config) Validate() error {
	var errs []error
	if !domainPattern.MatchString(c.Domain) || len(c.Domain) > maxDomain || net.ParseIP(c.Domain) != nil {
		errs = append(errs, fmt.Errorf("domain %q is not a DNS name in lower case, such as edge.example.com", c.Domain))
	}
	switch shared := len(c.Etcd.Endpoints) > 0; {
	case c.StatePath == "" && !shared:
		errs = append(errs, errors.New("state: give the path of the state file, or etcd-endpoints"))
	case c.StatePath != "" && shared:
		errs = append(errs, errors.New("state and etcd-endpoints are two places for one state: give one"))
	}
	errs = append(errs, c.Etcd.Validate())
	for _, a := range []struct{ name, value string }{
		{"api-address", c.APIAddress}, {"ssh-address", c.SSHAddress}, {"http-address", c.HTTPAddress},
		{"https-address", c.HTTPSAddress}, {"admin-address", c.AdminAddress},
	} {
		if err := checkAddress(a.value); err != nil {
			errs = append(errs, fmt.Errorf("%s %q %w", a.name, a.value, err))
		}
	}
	for _, host := range c.APIHosts {
		if net.ParseIP(host) == nil && !domainPattern.MatchString(strings.ToLower(host)) {
			errs = append(errs, fmt.Errorf("api-hosts: %q is neither a DNS name nor an IP address", host))
		}
	}
	if !c.TCPPorts.valid() {
		errs = append(errs, fmt.Errorf("tcp-ports %s is not a range of ports within 1-65535", c.TCPPorts))
	}
	if c.ComeBack < 0 || c.ComeBack > MaxComeBack {
		errs = append(errs, fmt.Errorf("come-back is %s; allowed are 0s to %s", c.ComeBack, MaxComeBack))
	}
	errs = append(errs, c.validateTurn())
	errs = append(errs, c.Visitors.validate()...)
	if len(c.ControlSocket) > control.MaxPath {
		errs = append(errs, fmt.Errorf("control-socket %q has %d bytes; a socket's path may have %d", c.ControlSocket, len(c.ControlSocket), control.MaxPath))
	}
	if c.SlowStart < 0 || c.SlowStart > MaxSlowStart {
		errs = append(errs, fmt.Errorf("slow-start is %s; allowed are 0s to %s", c.SlowStart, MaxSlowStart))
	}
	errs = append(errs, c.Web.validate()...)
	return errors.Join(errs...)
}

func checkAddress(address string) error {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return errors.New("is not host:port; leave the host empty for all addresses, as in :8443")
	}
	if n, err := strconv.Atoi(port); err != nil || n < 0 || n > 65535 {
		return errors.New("has no port within 0-65535")
	}
	if host != "" && net.ParseIP(host) == nil && !domainPattern.MatchString(strings.ToLower(host)) {
		return errors.New("has a host that is neither a name nor an IP address")
	}
	return nil
}
