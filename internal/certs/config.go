package certs

import (
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"k8s.io/apimachinery/pkg/util/validation"
)

// Defaults of [Config].
const (
	DefaultLeafLifetime = 90 * 24 * time.Hour
	DefaultCALifetime   = 2 * 365 * 24 * time.Hour
	DefaultOverlap      = 24 * time.Hour
	DefaultInterval     = 5 * time.Second
)

// Config says what the certificates are for and where they are kept. The zero value of a field that has a default means
// the default.
type Config struct {
	// Namespace and SecretName name the Secret that holds everything. Required.
	Namespace  string
	SecretName string
	// Certificate names the Certificate of cert-manager, in the same namespace, from which the serving certificate comes. Empty
	// for certificates of our own.
	Certificate string
	// DNSNames are the names the certificate is for. Required. A change is noticed when the leader next starts.
	DNSNames []string
	// MutatingWebhook and ValidatingWebhook are the names of the configurations that get our CA. Empty for none. The
	// validating one may be missing.
	MutatingWebhook   string
	ValidatingWebhook string

	// LeafLifetime and CALifetime are how long certificates of our own are valid. They are renewed after two thirds of it.
	LeafLifetime time.Duration
	CALifetime   time.Duration
	// Overlap is how long a new CA is published before it signs, and an old one after its last certificate was replaced.
	// It has to be longer than the bundle's way to every client: this program's own interval, the ConfigMap in every
	// namespace, the kubelets' volumes (a minute or two), or the repair of whatever is in the way.
	Overlap time.Duration
	// Interval is how often the Secret and the webhook configurations are looked at.
	Interval time.Duration

	// Log may be nil, for none.
	Log *slog.Logger
	// Registerer takes the metrics, as controller-runtime's metrics.Registry. It may be nil, for none.
	Registerer prometheus.Registerer
}

func (c Config) withDefaults() Config {
	for _, d := range []struct {
		field *time.Duration
		value time.Duration
	}{
		{&c.LeafLifetime, DefaultLeafLifetime}, {&c.CALifetime, DefaultCALifetime}, {&c.Overlap, DefaultOverlap}, {&c.Interval, DefaultInterval},
	} {
		if *d.field == 0 {
			*d.field = d.value
		}
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Registerer == nil {
		c.Registerer = prometheus.NewRegistry()
	}
	return c
}

// Validate says what is wrong with the configuration.
func (c Config) Validate() error {
	c = c.withDefaults()
	if c.Namespace == "" || c.SecretName == "" {
		return fmt.Errorf("certificates: Secret %q in namespace %q: both names are required", c.SecretName, c.Namespace)
	}
	if problems := validation.IsDNS1123Subdomain(c.Certificate); c.Certificate != "" && len(problems) > 0 {
		return fmt.Errorf("certificates: Certificate %q: %s", c.Certificate, problems[0])
	}
	if len(c.DNSNames) == 0 {
		return errors.New("certificates: at least one DNS name is required")
	}
	for _, name := range c.DNSNames {
		if problems := validation.IsDNS1123Subdomain(name); len(problems) > 0 {
			return fmt.Errorf("certificates: DNS name %q: %s", name, problems[0])
		}
	}
	for what, d := range map[string]time.Duration{"leaf lifetime": c.LeafLifetime, "CA lifetime": c.CALifetime, "overlap": c.Overlap, "interval": c.Interval} {
		if d < 0 {
			return fmt.Errorf("certificates: %s %s: it can't be negative", what, d)
		}
	}
	// A certificate of the old CA has to last until the new one may sign, and the old CA as long as what it signed.
	if rest := c.LeafLifetime / 3; c.Overlap >= rest {
		return fmt.Errorf("certificates: overlap %s: it has to be shorter than a third of the leaf lifetime %s", c.Overlap, c.LeafLifetime)
	}
	if rest := c.CALifetime / 3; c.LeafLifetime+2*c.Overlap >= rest {
		return fmt.Errorf("certificates: CA lifetime %s: a third of it has to be longer than the leaf lifetime %s and twice the overlap %s", c.CALifetime, c.LeafLifetime, c.Overlap)
	}
	return nil
}
