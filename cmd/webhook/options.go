package main

import (
	"bytes"
	"crypto/x509"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/mysocketio/mysocket-injector/internal/annotations"
	"github.com/mysocketio/mysocket-injector/internal/certs"
	"github.com/mysocketio/mysocket-injector/internal/inject"
	"github.com/mysocketio/mysocket-injector/internal/mysocket"
)

// options are the program's flags, validated.
type options struct {
	version   bool
	namespace string

	apiURL       string
	apiCAFile    string
	sshAddress   string
	hostKeysFile string
	accountDir   string
	names        annotations.Names

	webhookConfiguration string
	webhookService       string
	gatewayService       string
	certificateSecret    string
	certificate          string
	certificateOverlap   time.Duration
	lease                string
	webhookPort          int
	gatewayPort          int
	metricsAddress       string
	healthAddress        string

	memoryLimit   int64
	shutdownDelay time.Duration

	rolloutMaxConcurrent int
	rolloutOutdated      bool

	sidecar   inject.Config
	logLevel  slog.Level
	logFormat string

	hostKeys []string
	apiCA    *x509.CertPool
}

// Bounds of --certificate-overlap: the shortest is what a CA takes to every client where nothing is slow; the longest is well below
// a third of the lifetime of our certificates.
const (
	minOverlap = 10 * time.Second
	maxOverlap = 7 * 24 * time.Hour
)

var clusterNamePattern = regexp.MustCompile(`^([A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?)?$`)

// parseOptions reads flags and the files that they name. getenv gives the default of --namespace.
func parseOptions(args []string, getenv func(string) string, stderr io.Writer) (*options, error) {
	o := &options{}
	var pullPolicy, resources, level, outdated string
	var adminPort int
	f := flag.NewFlagSet("webhook", flag.ContinueOnError)
	f.SetOutput(stderr)
	f.BoolVar(&o.version, "version", false, "print the version and exit")
	f.StringVar(&o.namespace, "namespace", getenv("POD_NAMESPACE"), "the control plane's own namespace (default: env POD_NAMESPACE)")
	f.StringVar(&o.apiURL, "mysocket-api", "https://api.mysocket.io", "base URL of the Mysocket API; https only")
	f.StringVar(&o.apiCAFile, "mysocket-ca", "", "file with PEM certificates to trust for the API beside the system's; may be empty")
	f.StringVar(&o.sshAddress, "mysocket-ssh", "ssh.mysocket.io:22", "the edge's SSH server, host:port, as pods reach it")
	f.StringVar(&o.hostKeysFile, "mysocket-ssh-host-keys", "", "file with the edge's SSH host keys, one a line in authorized_keys form; when it is not given or holds none, the key that the API gives is used")
	f.StringVar(&o.accountDir, "account-dir", "/etc/mysocket/account", "directory with the files email and password, or token; a change is noticed at the next request")
	f.StringVar(&o.names.Cluster, "cluster-name", "", "this cluster's name in socket names; letters, digits and dashes")
	f.Func("socket-name", "NAME=NAMESPACE[,NAMESPACE...]: a socket name that Services of these namespaces may ask for; may be given many times", o.allowName)
	f.StringVar(&o.webhookConfiguration, "webhook-configuration", "", "name of the MutatingWebhookConfiguration and of the ValidatingWebhookConfiguration, which get our CA")
	f.StringVar(&o.webhookService, "webhook-service", "mysocket-injector-webhook", "name of the Service in front of the webhook")
	f.StringVar(&o.gatewayService, "gateway-service", "mysocket-injector-gateway", "name of the Service in front of the gateway, on port 443")
	f.StringVar(&o.certificateSecret, "certificate-secret", "mysocket-injector-certificates", "name of the Secret for our serving certificate")
	f.StringVar(&o.certificate, "cert-manager-certificate", "", "name of cert-manager's Certificate that the serving certificate comes from; empty: certificates of our own")
	f.DurationVar(&o.certificateOverlap, "certificate-overlap", certs.DefaultOverlap, "how long a new CA is published before a certificate of it is served, and an old one after its last, 10s to 168h")
	f.StringVar(&o.lease, "lease", "mysocket-injector", "name of the leader election's Lease")
	f.IntVar(&o.webhookPort, "webhook-port", 10250, "port of the webhook; 10250 is the one that private GKE clusters let through")
	f.IntVar(&o.gatewayPort, "gateway-port", 10443, "port of the gateway")
	f.StringVar(&o.metricsAddress, "metrics-address", ":8080", "address of /metrics")
	f.StringVar(&o.healthAddress, "health-address", ":8081", "address of /healthz and /readyz")
	f.StringVar(&o.sidecar.Image, "sidecar-image", "", "image of the sidecar (required)")
	f.StringVar(&pullPolicy, "sidecar-pull-policy", string(corev1.PullIfNotPresent), "pull policy of the sidecar's image: Always, IfNotPresent, Never")
	f.StringVar(&resources, "sidecar-resources", `{"requests":{"cpu":"10m","memory":"24Mi"},"limits":{"cpu":"500m","memory":"256Mi"}}`, "resources of the sidecar's container, as JSON")
	f.Int64Var(&o.memoryLimit, "memory-limit", 0, "the container's memory limit in bytes; 0: none")
	f.DurationVar(&o.shutdownDelay, "shutdown-delay", 5*time.Second, "how long admission and gateway go on after SIGTERM, until the cluster has heard that this pod ends; 0s to 15s")
	f.IntVar(&adminPort, "sidecar-admin-port", inject.DefaultAdminPort, "port of the sidecar's probes and metrics")
	f.DurationVar(&o.sidecar.ReadyGrace, "sidecar-ready-grace", inject.DefaultReadyGrace, "how long a new pod may stay unready while it has no tunnel yet")
	f.StringVar(&o.sidecar.EdgeProxy, "sidecar-edge-proxy", "", "proxy through which sidecars reach the edge, SCHEME://HOST:PORT with http, https, socks5 or socks5h; none when empty")
	f.IntVar(&o.sidecar.PreStopSleep, "sidecar-prestop-sleep", 0, "for how many seconds the pod's containers without a preStop hook sleep before they are told to end, 0 to 60; 0: not at all")
	f.StringVar(&o.sidecar.LogLevel, "sidecar-log-level", inject.DefaultLogLevel, "debug, info, warn or error")
	f.StringVar(&o.sidecar.LogFormat, "sidecar-log-format", inject.DefaultLogFormat, "text or json")
	f.IntVar(&o.rolloutMaxConcurrent, "rollout-max-concurrent", 1, "how many workloads may be restarted at once over the cluster to get the sidecar, 1 to 100")
	f.StringVar(&outdated, "rollout-outdated", "never", "auto: workloads whose pods have an outdated sidecar are restarted, too; never: they are only counted")
	f.StringVar(&level, "log-level", "info", "debug, info, warn or error")
	f.StringVar(&o.logFormat, "log-format", "text", "text or json")
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	if o.version {
		return o, nil
	}
	if f.NArg() > 0 {
		return nil, fmt.Errorf("unexpected argument %q: there are only flags", f.Arg(0))
	}
	if o.namespace == "" {
		return nil, errors.New("--namespace is missing, and so is the environment variable POD_NAMESPACE")
	}
	if o.webhookConfiguration == "" {
		return nil, errors.New("--webhook-configuration is missing")
	}
	if _, err := mysocket.ParseBaseURL(o.apiURL); err != nil {
		return nil, fmt.Errorf("--mysocket-api: %w", err)
	}
	host, port, err := net.SplitHostPort(o.sshAddress)
	if n, portErr := strconv.ParseUint(port, 10, 16); err != nil || host == "" || portErr != nil || n == 0 {
		return nil, fmt.Errorf("--mysocket-ssh %q is not host:port", o.sshAddress)
	}
	if !clusterNamePattern.MatchString(o.names.Cluster) {
		return nil, fmt.Errorf("--cluster-name %q: allowed are up to 63 letters, digits and dashes, beginning and ending with a letter or digit", o.names.Cluster)
	}
	for _, p := range []struct {
		flag       string
		value, min int
	}{{"--webhook-port", o.webhookPort, 1}, {"--gateway-port", o.gatewayPort, 1}, {"--sidecar-admin-port", adminPort, 1024}} {
		if p.value < p.min || p.value > 65535 {
			return nil, fmt.Errorf("%s %d: allowed are %d to 65535", p.flag, p.value, p.min)
		}
	}
	if o.webhookPort == o.gatewayPort {
		return nil, fmt.Errorf("--webhook-port and --gateway-port are both %d; they must differ", o.webhookPort)
	}
	if o.sidecar.ReadyGrace <= 0 {
		return nil, fmt.Errorf("--sidecar-ready-grace %s: it must be longer than zero", o.sidecar.ReadyGrace)
	}
	if o.shutdownDelay < 0 || o.shutdownDelay > maxShutdownDelay {
		return nil, fmt.Errorf("--shutdown-delay %s: allowed are 0s to %s", o.shutdownDelay, maxShutdownDelay)
	}
	if o.certificateOverlap < minOverlap || o.certificateOverlap > maxOverlap {
		return nil, fmt.Errorf("--certificate-overlap %s: allowed are %s to %s", o.certificateOverlap, minOverlap, maxOverlap)
	}
	if problems := validation.IsDNS1123Subdomain(o.certificate); o.certificate != "" && len(problems) > 0 {
		return nil, fmt.Errorf("--cert-manager-certificate %q: %s", o.certificate, problems[0])
	}
	if o.memoryLimit < 0 {
		return nil, fmt.Errorf("--memory-limit %d: it can't be negative", o.memoryLimit)
	}
	if err := o.setLogging(level); err != nil {
		return nil, err
	}
	switch outdated {
	case "auto":
		o.rolloutOutdated = true
	case "never":
	default:
		return nil, fmt.Errorf("--rollout-outdated %q: allowed are never, auto", outdated)
	}
	if o.rolloutMaxConcurrent < 1 || o.rolloutMaxConcurrent > 100 {
		return nil, fmt.Errorf("--rollout-max-concurrent %d: allowed are 1 to 100", o.rolloutMaxConcurrent)
	}
	strict := json.NewDecoder(strings.NewReader(resources))
	strict.DisallowUnknownFields()
	if err := strict.Decode(&o.sidecar.Resources); err != nil {
		return nil, fmt.Errorf("--sidecar-resources %s: %w", resources, err)
	}
	if _, err := strict.Token(); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("--sidecar-resources %s: there is something after the JSON object", resources)
	}
	o.sidecar.ImagePullPolicy = corev1.PullPolicy(pullPolicy)
	o.sidecar.AdminPort = int32(adminPort) //nolint:gosec // checked above
	o.sidecar.GatewayURL = "https://" + o.gatewayService + "." + o.namespace + ".svc:443"
	if err := o.sidecar.Validate(); err != nil {
		return nil, err
	}
	if o.hostKeys, err = readHostKeys(o.hostKeysFile); err != nil {
		return nil, err
	}
	if o.apiCA, err = readCA(o.apiCAFile); err != nil {
		return nil, err
	}
	return o, nil
}

// allowName takes one --socket-name.
func (o *options) allowName(value string) error {
	name, list, ok := strings.Cut(value, "=")
	if !ok {
		return errors.New("it must be NAME=NAMESPACE[,NAMESPACE...]")
	}
	if err := annotations.CheckSocketName(name); err != nil {
		return err
	}
	if _, again := o.names.Allowed[name]; again {
		return fmt.Errorf("the name %q is given twice", name)
	}
	namespaces := strings.Split(list, ",")
	for _, ns := range namespaces {
		if problems := validation.IsDNS1123Label(ns); len(problems) > 0 {
			return fmt.Errorf("namespace %q: %s", ns, problems[0])
		}
	}
	if o.names.Allowed == nil {
		o.names.Allowed = map[string][]string{}
	}
	o.names.Allowed[name] = namespaces
	return nil
}

// setLogging checks and sets the level, and checks the format.
func (o *options) setLogging(level string) error {
	if err := o.logLevel.UnmarshalText([]byte(level)); err != nil || !slices.Contains([]string{"debug", "info", "warn", "error"}, level) {
		return fmt.Errorf("--log-level %q: allowed are debug, info, warn, error", level)
	}
	if o.logFormat != "text" && o.logFormat != "json" {
		return fmt.Errorf("--log-format %q: allowed are text, json", o.logFormat)
	}
	return nil
}

// credentials reads the account from its directory, a mounted Secret.
func (o *options) credentials() (mysocket.Account, error) {
	dir := o.accountDir
	// The kubelet replaces all files of a Secret at once, by a link. Through it, no half of two accounts is read.
	if now, err := filepath.EvalSymlinks(filepath.Join(dir, "..data")); err == nil {
		dir = now
	}
	return mysocket.ParseAccount(func(key string) (string, bool) {
		b, err := os.ReadFile(filepath.Join(dir, key)) //nolint:gosec // the operator's own path
		return strings.TrimRight(string(b), "\r\n"), err == nil
	})
}

func readHostKeys(file string) ([]string, error) {
	if file == "" {
		return nil, nil
	}
	b, err := os.ReadFile(file) //nolint:gosec // the operator's own path
	if err != nil {
		return nil, fmt.Errorf("--mysocket-ssh-host-keys: %w", err)
	}
	var keys []string
	for line := range strings.Lines(string(b)) {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		key, _, _, _, err := ssh.ParseAuthorizedKey([]byte(line))
		if err != nil {
			return nil, fmt.Errorf("--mysocket-ssh-host-keys: %.40q is not a public key in authorized_keys form (ssh-ed25519 AAAA...)", line)
		}
		keys = append(keys, strings.TrimSpace(string(ssh.MarshalAuthorizedKey(key))))
	}
	return keys, nil
}

// readCA returns nil, for the system's certificates alone, when the file is not given or empty.
func readCA(file string) (*x509.CertPool, error) {
	if file == "" {
		return nil, nil
	}
	b, err := os.ReadFile(file) //nolint:gosec // the operator's own path
	if err != nil {
		return nil, fmt.Errorf("--mysocket-ca: %w", err)
	}
	if len(bytes.TrimSpace(b)) == 0 {
		return nil, nil
	}
	pool, err := x509.SystemCertPool()
	if err != nil {
		pool = x509.NewCertPool()
	}
	if !pool.AppendCertsFromPEM(b) {
		return nil, fmt.Errorf("--mysocket-ca: %s holds no PEM certificate", file)
	}
	return pool, nil
}

const (
	// shutdownTimeout is how long running admissions and gateway requests may take to end. With the delay before it, it must
	// fit into the pod's grace period of 30 s.
	shutdownTimeout  = 10 * time.Second
	maxShutdownDelay = 15 * time.Second
)
