package store

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"regexp"
	"strconv"
	"strings"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/transport"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

// DefaultEtcdPrefix is where the state is when the configuration names no prefix.
const DefaultEtcdPrefix = "/mysocket-edge"

const (
	maxEtcdEndpoints = 32
	maxEtcdPrefix    = 200
	maxPasswordFile  = 4096
	// etcdSilence is after what silence a connection to etcd is asked whether it lives, and how long it may take to say so.
	etcdSilence = 5 * time.Second
)

// EtcdConfig says which etcd edges share their state in. The zero value is none.
type EtcdConfig struct {
	// Endpoints are the members' client URLs, http or https.
	Endpoints []string
	// Prefix is what all keys begin with, such as /mysocket-edge, which it is if empty.
	Prefix string
	// CertFile and KeyFile are a client certificate in PEM form; CAFile the authority of the members' certificates, the system's
	// if empty.
	CertFile, KeyFile, CAFile string
	// User and PasswordFile log in to an etcd that asks for it; the first line of the file is the password.
	User, PasswordFile string
}

var etcdPrefixPattern = regexp.MustCompile(`^(/[A-Za-z0-9_.-]+)+$`)

func (c *EtcdConfig) prefix() string {
	if c.Prefix == "" {
		return DefaultEtcdPrefix
	}
	return c.Prefix
}

// Validate says what is wrong, in one sentence for each fault, which begins with the name of its flag.
func (c *EtcdConfig) Validate() error {
	var errs []error
	if len(c.Endpoints) == 0 {
		for _, of := range []struct{ name, value string }{
			{"cert", c.CertFile}, {"key", c.KeyFile}, {"ca", c.CAFile}, {"user", c.User}, {"password-file", c.PasswordFile},
		} {
			if of.value != "" {
				errs = append(errs, fmt.Errorf("etcd-%s needs etcd-endpoints", of.name))
			}
		}
		if c.prefix() != DefaultEtcdPrefix {
			errs = append(errs, errors.New("etcd-prefix needs etcd-endpoints"))
		}
		return errors.Join(errs...)
	}
	if len(c.Endpoints) > maxEtcdEndpoints {
		errs = append(errs, fmt.Errorf("etcd-endpoints has %d endpoints; allowed are %d", len(c.Endpoints), maxEtcdEndpoints))
	}
	plain := 0
	for _, endpoint := range c.Endpoints {
		if err := checkEndpoint(endpoint); err != nil {
			errs = append(errs, fmt.Errorf("etcd-endpoints %q %w", endpoint, err))
		}
		if strings.HasPrefix(endpoint, "http://") {
			plain++
		}
	}
	if p := c.prefix(); !etcdPrefixPattern.MatchString(p) || len(p) > maxEtcdPrefix {
		errs = append(errs, fmt.Errorf("etcd-prefix %q is not a path such as %s, of letters, digits, dashes, dots and underscores", p, DefaultEtcdPrefix))
	}
	if (c.CertFile == "") != (c.KeyFile == "") {
		errs = append(errs, errors.New("etcd-cert and etcd-key go together: give both or none"))
	}
	if plain > 0 && plain < len(c.Endpoints) {
		errs = append(errs, errors.New("etcd-endpoints has both http:// and https:// endpoints: all must be the same"))
	}
	if plain > 0 && (c.CertFile != "" || c.CAFile != "") {
		errs = append(errs, errors.New("etcd-endpoints has an http:// endpoint, which etcd-cert and etcd-ca do not protect: use https://"))
	}
	if (c.User == "") != (c.PasswordFile == "") {
		errs = append(errs, errors.New("etcd-user and etcd-password-file go together: give both or none"))
	}
	return errors.Join(errs...)
}

func checkEndpoint(endpoint string) error {
	u, err := url.Parse(endpoint)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.User != nil || strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.Fragment != "" {
		return errors.New("is not a URL such as https://10.0.0.1:2379")
	}
	host, port, err := net.SplitHostPort(u.Host)
	if n, portErr := strconv.Atoi(port); err != nil || portErr != nil || host == "" || n < 1 || n > 65535 {
		return errors.New("has no host and port, such as https://10.0.0.1:2379")
	}
	return nil
}

// PlainText says whether the edges' private keys travel unencrypted to another machine.
func (c *EtcdConfig) PlainText() bool {
	for _, endpoint := range c.Endpoints {
		u, err := url.Parse(endpoint)
		if err != nil || u.Scheme != "http" {
			continue
		}
		if ip := net.ParseIP(u.Hostname()); u.Hostname() != "localhost" && (ip == nil || !ip.IsLoopback()) {
			return true
		}
	}
	return false
}

func (c *EtcdConfig) client() (*clientv3.Client, error) {
	security, err := c.tls()
	if err != nil {
		return nil, err
	}
	password := ""
	if c.PasswordFile != "" {
		if password, err = readPassword(c.PasswordFile); err != nil {
			return nil, err
		}
	}
	client, err := clientv3.New(clientv3.Config{
		Endpoints: c.Endpoints, TLS: security, Username: c.User, Password: password,
		DialTimeout: etcdTimeout, DialKeepAliveTime: etcdSilence, DialKeepAliveTimeout: etcdSilence, PermitWithoutStream: true,
		Logger: zap.NewNop(), // What matters of it is in the errors.
	})
	if err != nil {
		return nil, away(err)
	}
	return client, nil
}

func (c *EtcdConfig) tls() (*tls.Config, error) {
	if !strings.HasPrefix(c.Endpoints[0], "https://") {
		return nil, nil //nolint:nilnil // no TLS
	}
	info := transport.TLSInfo{CertFile: c.CertFile, KeyFile: c.KeyFile, TrustedCAFile: c.CAFile, Logger: zap.NewNop()}
	cfg, err := info.ClientConfig()
	if err != nil {
		return nil, fmt.Errorf("etcd-cert, etcd-key, etcd-ca: %w", err)
	}
	cfg.MinVersion = tls.VersionTLS12
	return cfg, nil
}

func readPassword(path string) (string, error) {
	f, err := os.Open(path) // #nosec G304 -- the operator names the file
	if err != nil {
		return "", fmt.Errorf("etcd-password-file: %w", err)
	}
	defer func() { _ = f.Close() }()
	data, err := io.ReadAll(io.LimitReader(f, maxPasswordFile))
	if err != nil {
		return "", fmt.Errorf("etcd-password-file: %w", err)
	}
	line, _, _ := bytes.Cut(data, []byte("\n"))
	if line = bytes.TrimRight(line, "\r"); len(line) == 0 {
		return "", fmt.Errorf("etcd-password-file: there is no password on the first line of %s", path)
	}
	return string(line), nil
}
