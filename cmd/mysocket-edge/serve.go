package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"time"

	"github.com/mysocketio/mysocket-injector/internal/edge"
)

// newFlags makes a flag set that prints its own help.
func newFlags(name, about string, stderr io.Writer) *flag.FlagSet {
	fs := flag.NewFlagSet(name, flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.Usage = func() {
		_, _ = fmt.Fprintf(stderr, "Usage: %s [flags]\n\n%s\n\nFlags:\n", name, about)
		fs.PrintDefaults()
	}
	return fs
}

// parse reads the arguments. It returns false and an exit code when there is nothing to go on with.
func parse(fs *flag.FlagSet, args []string, stderr io.Writer) (code int, ok bool) {
	switch err := fs.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		return 0, false
	case err != nil:
		return 2, false // flag has printed it.
	}
	if fs.NArg() > 0 {
		_, _ = fmt.Fprintf(stderr, "%s: unexpected argument %q; flags are --name value\n", fs.Name(), fs.Arg(0))
		return 2, false
	}
	return 0, true
}

func serve(ctx context.Context, args []string, stderr io.Writer) int {
	cfg, log, code, ok := serveConfig(args, stderr)
	if !ok {
		return code
	}
	e, err := edge.New(cfg)
	if err != nil {
		log.Error("mysocket-edge cannot start", "err", err)
		return 1
	}
	if err := e.Run(ctx); err != nil {
		log.Error("mysocket-edge failed", "err", err)
		return 1
	}
	return 0
}

func serveConfig(args []string, stderr io.Writer) (cfg edge.Config, log *slog.Logger, code int, ok bool) {
	fs := newFlags("mysocket-edge serve", "Runs the edge until SIGTERM or SIGINT, which drain it. Each flag may also be given as an environment variable,\nMYSOCKET_EDGE_API_ADDRESS for --api-address, or in a file; see --config.", stderr)
	fs.StringVar(&cfg.Domain, "domain", "edge.mysocket.test", "parent `domain` of all public names; point *.DOMAIN at this machine")
	fs.StringVar(&cfg.StatePath, "state", defaultState, "state `file`: accounts, sockets, tunnels and keys; made with mode 0600 if there is none")
	fs.StringVar(&cfg.APIAddress, "api-address", ":8443", "`address` of the REST API (HTTPS), host:port")
	fs.StringVar(&cfg.SSHAddress, "ssh-address", ":22", "`address` of the SSH server that tunnels log in to, host:port")
	fs.StringVar(&cfg.HTTPAddress, "http-address", ":80", "`address` of the public HTTP front, host:port; its host is also that of tcp and tls sockets")
	fs.StringVar(&cfg.HTTPSAddress, "https-address", ":443", "`address` of the public HTTPS front, host:port")
	fs.StringVar(&cfg.AdminAddress, "admin-address", "127.0.0.1:9090", "`address` of the status page, /metrics, /healthz and /debug/tunnels, host:port; not for the public")
	apiHosts := fs.String("api-hosts", "", "further `names` and IP addresses in the API's certificate, comma separated;\napi.DOMAIN, localhost and this machine's addresses are in it anyway")
	tcpPorts := fs.String("tcp-ports", "20000-29999", "`range` of public ports for tcp and tls sockets")
	fs.BoolVar(&cfg.AllowRegistration, "allow-registration", false, "let anybody make an account with POST /user")
	fs.DurationVar(&cfg.ComeBack, "come-back", time.Second, "`time` after which tunnel clients are told to come back when the edge stops, 0s to 5m;\n0s: nothing is said, and they begin to come at once")
	finishVisitors := visitorFlags(fs, &cfg.Visitors)
	fs.DurationVar(&cfg.SlowStart, "slow-start", 5*time.Second, "for what `time` a tunnel that has just connected gets less than its share of requests, 0s to 10m;\n0s: never")
	fs.StringVar(&cfg.CAOut, "ca-out", "", "`file` to write the certificate of the edge's own authority to (PEM)")
	fs.StringVar(&cfg.SSHHostKeyOut, "ssh-host-key-out", "", "`file` to write the SSH host key to (authorized_keys form)")
	etcd := addEtcdFlags(fs, func(string) string { return "" })
	fs.DurationVar(&cfg.StartupWait, "startup-wait", 0, "at most this `time` after the start, 0s to 10m, /healthz says no until every socket has a tunnel")
	fs.DurationVar(&cfg.ShutdownDelay, "shutdown-delay", 0, "`time`, 0s to 10m, for which a stopping edge goes on serving while /healthz says no")
	socket := fs.String("control-socket", "", "Unix `socket` for the user, token and backup commands, mode 0600; STATE.sock if empty, \"off\" for none")
	access := webFlags(fs, &cfg)
	level := fs.String("log-level", "info", "`level` of the log: debug, info, warn or error")
	format := fs.String("log-format", "text", "`format` of the log on stderr: text or json")
	layers, code, ok := parseLayers(fs, args, os.Environ(), stderr)
	if !ok {
		return cfg, nil, code, false
	}

	logged := &lockedWriter{w: stderr}
	log, logErr := newLogger(*level, *format, logged)
	if *access && logErr == nil {
		cfg.AccessLog, logErr = newLogger("info", *format, logged)
	}
	ports, portsErr := edge.ParsePortRange(*tcpPorts)
	if portsErr != nil {
		portsErr = fmt.Errorf("tcp-ports %w", portsErr)
		ports = edge.PortRange{Min: 1, Max: 1} // Already said; the rest is validated still.
	}
	cfg.TCPPorts = ports
	cfg.Etcd, _ = etcd.take(&cfg.StatePath)
	if cfg.StatePath != "" || *socket != "" { // With etcd the commands need no edge.
		cfg.ControlSocket = controlSocket(*socket, cfg.StatePath)
	}
	for _, host := range strings.Split(*apiHosts, ",") {
		if host = strings.TrimSpace(host); host != "" {
			cfg.APIHosts = append(cfg.APIHosts, host)
		}
	}
	if err := errors.Join(logErr, portsErr, finishVisitors(), cfg.Validate()); err != nil {
		for _, line := range strings.Split(err.Error(), "\n") {
			_, _ = fmt.Fprintln(stderr, "mysocket-edge serve: "+layers.place(line))
		}
		return cfg, nil, 2, false
	}
	cfg.Version, cfg.Log = version, log
	return cfg, log, 0, true
}

func newLogger(level, format string, w io.Writer) (*slog.Logger, error) {
	var l slog.Level
	if err := l.UnmarshalText([]byte(level)); err != nil {
		return nil, fmt.Errorf("log-level %q is not debug, info, warn or error", level)
	}
	options := &slog.HandlerOptions{Level: l}
	switch format {
	case "text":
		return slog.New(slog.NewTextHandler(w, options)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(w, options)), nil
	}
	return nil, fmt.Errorf("log-format %q is not text or json", format)
}
