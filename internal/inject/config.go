package inject

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/mysocketio/mysocket-injector/internal/edgeproxy"
)

// Defaults of [Config].
const (
	DefaultCAConfigMap = "mysocket-gateway-ca"
	DefaultAdminPort   = 14180
	DefaultReadyGrace  = 60 * time.Second
	DefaultLogLevel    = "info"
	DefaultLogFormat   = "text"
	DefaultPullPolicy  = corev1.PullIfNotPresent
)

var (
	logLevels    = []string{"debug", "info", "warn", "error"}
	logFormats   = []string{"text", "json"}
	pullPolicies = []string{string(corev1.PullAlways), string(corev1.PullIfNotPresent), string(corev1.PullNever)}
)

// Config is what is the same in every injected pod. The zero value of a field that has a default means the default.
type Config struct {
	// Image is the sidecar's image, whose entry point is SidecarCommand. Required.
	Image string
	// ImagePullPolicy is Always, IfNotPresent or Never.
	ImagePullPolicy corev1.PullPolicy
	// GatewayURL is where the sidecar finds the gateway: https://host:port, without a path. Required.
	GatewayURL string
	// CAConfigMap is the name of the ConfigMap in the pod's namespace whose key CAKey is the gateway's CA.
	CAConfigMap string
	// Resources of the sidecar's container. Both requests and limits should be set: a HorizontalPodAutoscaler needs the
	// requests of every container, a ResourceQuota may demand both.
	Resources corev1.ResourceRequirements
	// AdminPort is where the sidecar answers probes and metrics, 1024 to 65535. A pod that uses the port itself gets
	// the next free one.
	AdminPort int32
	// ReadyGrace is how long the sidecar keeps the pod unready while it has no tunnel yet.
	ReadyGrace time.Duration
	// EdgeProxy is the proxy through which sidecars reach the edge, SCHEME://HOST:PORT with http, https, socks5 or socks5h;
	// empty for none. It can't hold credentials, since everybody who may read pods reads it.
	EdgeProxy string `json:",omitempty"`
	// PreStopSleep is for how many seconds containers without a preStop hook sleep before they are told to end, 0 to
	// MaxPreStopSleep; 0 for not at all. A pod's annotation overrides it.
	PreStopSleep int `json:",omitempty"`
	// LogLevel is one of debug, info, warn, error.
	LogLevel string
	// LogFormat is text or json.
	LogFormat string

	hash string // of Prepared
}

// Prepared returns the configuration with its hash worked out, for whoever asks for it with every pod. Its fields must not be
// changed after that.
func (c Config) Prepared() Config {
	c = c.withDefaults()
	c.hash = c.Hash()
	return c
}

// withDefaults fills in what was left out.
func (c Config) withDefaults() Config {
	if c.ImagePullPolicy == "" {
		c.ImagePullPolicy = DefaultPullPolicy
	}
	if c.CAConfigMap == "" {
		c.CAConfigMap = DefaultCAConfigMap
	}
	if c.AdminPort == 0 {
		c.AdminPort = DefaultAdminPort
	}
	if c.ReadyGrace == 0 {
		c.ReadyGrace = DefaultReadyGrace
	}
	if c.LogLevel == "" {
		c.LogLevel = DefaultLogLevel
	}
	if c.LogFormat == "" {
		c.LogFormat = DefaultLogFormat
	}
	c.Resources = *c.Resources.DeepCopy()
	for name, limit := range c.Resources.Limits { // as the API server does
		if _, ok := c.Resources.Requests[name]; !ok {
			if c.Resources.Requests == nil {
				c.Resources.Requests = corev1.ResourceList{}
			}
			c.Resources.Requests[name] = limit.DeepCopy()
		}
	}
	return c
}

// Validate says what is wrong with the configuration. [Inject] must be given only a valid one: the API server would
// refuse the pods.
func (c Config) Validate() error {
	c = c.withDefaults()
	if c.Image == "" || strings.TrimSpace(c.Image) != c.Image {
		return fmt.Errorf("sidecar image %q: give the image that holds %s", c.Image, SidecarCommand)
	}
	if !slices.Contains(pullPolicies, string(c.ImagePullPolicy)) {
		return fmt.Errorf("sidecar image pull policy %q: allowed are %s", c.ImagePullPolicy, strings.Join(pullPolicies, ", "))
	}
	if err := validateGatewayURL(c.GatewayURL); err != nil {
		return err
	}
	if problems := validation.IsDNS1123Subdomain(c.CAConfigMap); len(problems) > 0 {
		return fmt.Errorf("gateway CA ConfigMap name %q: %s", c.CAConfigMap, strings.Join(problems, "; "))
	}
	if c.AdminPort < minAdminPort || c.AdminPort > maxAdminPort {
		return fmt.Errorf("sidecar admin port %d: allowed are %d to %d, since the sidecar has no privileges", c.AdminPort, minAdminPort, maxAdminPort)
	}
	if c.ReadyGrace < 0 {
		return fmt.Errorf("sidecar ready grace %s: it can't be negative", c.ReadyGrace)
	}
	if !slices.Contains(logLevels, c.LogLevel) {
		return fmt.Errorf("sidecar log level %q: allowed are %s", c.LogLevel, strings.Join(logLevels, ", "))
	}
	if !slices.Contains(logFormats, c.LogFormat) {
		return fmt.Errorf("sidecar log format %q: allowed are %s", c.LogFormat, strings.Join(logFormats, ", "))
	}
	if err := validateProxy(c.EdgeProxy); err != nil {
		return err
	}
	if c.PreStopSleep < 0 || c.PreStopSleep > MaxPreStopSleep {
		return fmt.Errorf("sidecar preStop sleep %d: allowed are 0 to %d, in seconds", c.PreStopSleep, MaxPreStopSleep)
	}
	return validateResources(c.Resources)
}

func validateProxy(s string) error {
	if s == "" {
		return nil
	}
	u, err := url.Parse(s)
	if err != nil {
		return errors.New("sidecar edge proxy: it is no URL") // which may hold a password, so it is not repeated
	}
	err = edgeproxy.Check(u)
	switch {
	case err == nil:
		return nil
	case u.User != nil:
		return fmt.Errorf("sidecar edge proxy: %w", err)
	}
	return fmt.Errorf("sidecar edge proxy %q: %w", s, err)
}

func validateGatewayURL(s string) error {
	u, err := url.Parse(s)
	if err != nil || u.Scheme != "https" || u.Hostname() == "" || u.User != nil || u.Path != "" || u.RawQuery != "" || u.Fragment != "" {
		return fmt.Errorf("gateway URL %q: it has to be https://host:port and nothing after", s)
	}
	if p := u.Port(); p != "" {
		if n, err := strconv.ParseUint(p, 10, 16); err != nil || n == 0 {
			return fmt.Errorf("gateway URL %q: port %q is not between 1 and 65535", s, p)
		}
	}
	return nil
}

func validateResources(r corev1.ResourceRequirements) error {
	for _, list := range []corev1.ResourceList{r.Requests, r.Limits} {
		for name, quantity := range list {
			if quantity.Sign() < 0 {
				return fmt.Errorf("sidecar resource %s %s: it can't be negative", name, quantity.String())
			}
		}
	}
	for name, request := range r.Requests {
		if limit, ok := r.Limits[name]; ok && request.Cmp(limit) > 0 {
			return fmt.Errorf("sidecar resource %s: the request %s is above the limit %s", name, request.String(), limit.String())
		}
	}
	return nil
}

// Hash is a short name for what this configuration, and this version of the program, injects into a pod that asks for
// nothing special. It changes exactly when running sidecars become outdated.
func (c Config) Hash() string {
	if c.hash != "" {
		return c.hash
	}
	c = c.withDefaults()
	plain := &corev1.Pod{}
	what, err := json.Marshal(struct {
		Container    corev1.Container
		Volume       corev1.Volume
		PreStopSleep int `json:",omitempty"` // without one, the hash is that of versions that knew none
	}{sidecar(plain, c), gatewayVolume(c), c.PreStopSleep})
	if err != nil {
		// Both are plain API types, whose encoding has no way to fail.
		panic(fmt.Sprintf("encode the sidecar's container: %v", err))
	}
	sum := sha256.Sum256(what)
	return hex.EncodeToString(sum[:6])
}
