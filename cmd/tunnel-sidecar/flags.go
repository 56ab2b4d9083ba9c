package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/mysocketio/mysocket-injector/internal/edgeproxy"
	"github.com/mysocketio/mysocket-injector/internal/sidecar"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/drain"
)

// usageError is a mistake on the command line.
type usageError struct{ err error }

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

const drainSocketHelp = "`name` of the abstract unix socket between run and drain; both must say the same"

var validSocketName = regexp.MustCompile(`^[A-Za-z0-9._-]{1,64}$`)

func parseRun(args []string, getenv func(string) string, stderr io.Writer) (sidecar.Config, error) {
	flags := newFlagSet("run", stderr)
	gateway := flags.String("gateway", "", "the control plane's gateway, `https://host:port` (required)")
	tokenFile := flags.String("token-file", "/var/run/secrets/mysocket.io/gateway/token", "`file` with the pod's token for the gateway; read whenever it is used")
	caFile := flags.String("ca-file", "/var/run/secrets/mysocket.io/gateway/ca.crt", "`file` with the gateway's CA bundle; may come later; read whenever it is used")
	podIP := flags.String("pod-ip", getenv("POD_IP"), "`address` at which the app is dialled; $POD_IP when not given")
	admin := flags.String("admin-address", ":14180", "`address` for /metrics, /livez and /readyz")
	drainSocket := flags.String("drain-socket", drain.DefaultName, drainSocketHelp)
	drainTimeout := flags.Duration("drain-timeout", 25*time.Second, "how long drain waits for open connections")
	readyGrace := flags.Duration("ready-grace", 60*time.Second, "after this time the pod is ready though tunnels are not connected")
	edgeProxy := flags.String("edge-proxy", "", "`URL` of a proxy to the edge: http, https, socks5 or socks5h; when not given, the environment's HTTPS_PROXY and NO_PROXY count")
	logLevel := flags.String("log-level", "info", "debug, info, warn or error")
	logFormat := flags.String("log-format", "text", "text or json")
	if err := parse(flags, args); err != nil {
		return sidecar.Config{}, err
	}
	logger, err := newLogger(stderr, *logLevel, *logFormat)
	if err != nil {
		return sidecar.Config{}, &usageError{err}
	}
	podName := ""
	if pod, namespace := getenv("POD_NAME"), getenv("POD_NAMESPACE"); pod != "" {
		podName = strings.TrimPrefix(namespace+"/"+pod, "/")
		logger = logger.With("pod", podName)
	}
	for _, err := range []error{
		checkGateway(*gateway),
		checkFile("--token-file", *tokenFile),
		checkFile("--ca-file", *caFile),
		checkPodIP(*podIP),
		checkListen("--admin-address", *admin),
		checkSocketName(*drainSocket),
		checkDuration("--drain-timeout", *drainTimeout, time.Millisecond),
		checkDuration("--ready-grace", *readyGrace, 0),
	} {
		if err != nil {
			return sidecar.Config{}, &usageError{err}
		}
	}
	proxy, err := proxyFor(*edgeProxy)
	if err != nil {
		return sidecar.Config{}, &usageError{err}
	}
	return sidecar.Config{
		GatewayURL:   *gateway,
		EdgeProxy:    proxy,
		TokenFile:    *tokenFile,
		CAFile:       *caFile,
		PodName:      podName,
		PodIP:        *podIP,
		AdminAddress: *admin,
		DrainSocket:  *drainSocket,
		DrainTimeout: *drainTimeout,
		ReadyGrace:   *readyGrace,
		Version:      version,
		Logger:       logger,
	}, nil
}

func parseDrain(args []string, stderr io.Writer) (socketName string, err error) {
	flags := newFlagSet("drain", stderr)
	name := flags.String("drain-socket", drain.DefaultName, drainSocketHelp)
	if err := parse(flags, args); err != nil {
		return "", err
	}
	if err := checkSocketName(*name); err != nil {
		return "", &usageError{err}
	}
	return *name, nil
}

func newFlagSet(name string, stderr io.Writer) *flag.FlagSet {
	flags := flag.NewFlagSet("tunnel-sidecar "+name, flag.ContinueOnError)
	flags.SetOutput(stderr)
	return flags
}

func parse(flags *flag.FlagSet, args []string) error {
	output := flags.Output()
	// The package prints the whole list of flags under every mistake; the sentence is enough.
	flags.SetOutput(io.Discard)
	err := flags.Parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		flags.SetOutput(output)
		flags.Usage()
		return err
	case err != nil:
		return &usageError{err}
	case flags.NArg() > 0:
		return &usageError{fmt.Errorf("%q is not a flag; %s takes only flags", flags.Arg(0), flags.Name())}
	}
	return nil
}

func newLogger(out io.Writer, level, format string) (*slog.Logger, error) {
	var options slog.HandlerOptions
	switch level {
	case "debug":
		options.Level = slog.LevelDebug
	case "info":
		options.Level = slog.LevelInfo
	case "warn":
		options.Level = slog.LevelWarn
	case "error":
		options.Level = slog.LevelError
	default:
		return nil, fmt.Errorf("--log-level is %q; it must be debug, info, warn or error", level)
	}
	options.ReplaceAttr = dropEmpty
	switch format {
	case "text":
		return slog.New(slog.NewTextHandler(out, &options)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(out, &options)), nil
	}
	return nil, fmt.Errorf("--log-format is %q; it must be text or json", format)
}

// dropEmpty leaves out what says nothing, so that lines stay short.
func dropEmpty(_ []string, attr slog.Attr) slog.Attr {
	switch value := attr.Value.Any().(type) {
	case nil:
		return slog.Attr{}
	case string:
		if value == "" {
			return slog.Attr{}
		}
	case time.Duration:
		// The JSON handler would write nanoseconds.
		return slog.String(attr.Key, value.String())
	}
	return attr
}

func checkGateway(address string) error {
	if address == "" {
		return errors.New("--gateway is missing; it must be the gateway's address, https://host:port")
	}
	parsed, err := url.Parse(address)
	if err != nil || parsed.Scheme != "https" || parsed.Hostname() == "" {
		return fmt.Errorf("--gateway is %q; it must look like https://host:port", address)
	}
	return nil
}

func checkFile(name, path string) error {
	if !strings.HasPrefix(path, "/") {
		return fmt.Errorf("%s is %q; it must be an absolute path", name, path)
	}
	return nil
}

func checkPodIP(address string) error {
	if address == "" {
		return errors.New("--pod-ip is missing and $POD_IP is not set; one must be the pod's IP address")
	}
	if _, err := netip.ParseAddr(address); err != nil {
		return fmt.Errorf("--pod-ip is %q; it must be an IP address", address)
	}
	return nil
}

func checkListen(name, address string) error {
	_, port, err := net.SplitHostPort(address)
	if err == nil {
		_, err = strconv.ParseUint(port, 10, 16)
	}
	if err != nil {
		return fmt.Errorf("%s is %q; it must look like :14180 or 127.0.0.1:14180", name, address)
	}
	return nil
}

func checkSocketName(name string) error {
	if !validSocketName.MatchString(name) {
		return fmt.Errorf("--drain-socket is %q; it must be 1 to 64 letters, digits, dots, dashes or underscores", name)
	}
	return nil
}

func checkDuration(name string, value, least time.Duration) error {
	if value < least {
		return fmt.Errorf("%s is %s; it must be %s or more, such as 25s", name, value, least)
	}
	return nil
}

// proxyFor returns how to find the proxy to an edge: the one that the flag names, or what the environment says of HTTPS.
func proxyFor(flag string) (func(address string) (*url.URL, error), error) {
	if flag == "" {
		return func(address string) (*url.URL, error) {
			return http.ProxyFromEnvironment(&http.Request{URL: &url.URL{Scheme: "https", Host: address}})
		}, nil
	}
	u, err := url.Parse(flag)
	if err != nil {
		return nil, errors.New("--edge-proxy is no URL") // which may hold a password, so it is not repeated
	}
	if err := edgeproxy.Check(u); err != nil {
		return nil, fmt.Errorf("--edge-proxy: %w", err)
	}
	return func(string) (*url.URL, error) { return u, nil }, nil
}
