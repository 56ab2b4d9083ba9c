// Command tunnel-sidecar keeps a pod's tunnels to the edge open. It runs as a native sidecar beside the app, and as that
// container's preStop hook.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"syscall"

	"github.com/mysocketio/mysocket-injector/internal/sidecar"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/drain"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/tunnel"
)

// version is set by the linker.
var version = "dev"

const usage = `tunnel-sidecar keeps a pod's tunnels to the edge open.

Usage:
  tunnel-sidecar run --gateway https://HOST:PORT [flags]   serve until SIGTERM
  tunnel-sidecar drain [flags]                             leave the edge's rotation and let connections finish (preStop)
  tunnel-sidecar version                                   print the version

"tunnel-sidecar run -h" and "tunnel-sidecar drain -h" list the flags.
`

func main() {
	os.Exit(mainCode(os.Args[1:], os.Getenv, os.Stdout, os.Stderr))
}

// mainCode returns the exit code: 0, 1 when something failed, 2 when the command line is wrong.
func mainCode(args []string, getenv func(string) string, stdout, stderr io.Writer) int {
	if len(args) == 0 {
		_, _ = io.WriteString(stderr, usage)
		return 2
	}
	var err error
	switch args[0] {
	case "run":
		err = run(args[1:], getenv, stderr)
	case "drain":
		err = runDrain(args[1:], stdout, stderr)
	case "version":
		_, err = fmt.Fprintln(stdout, version)
	case "help", "-h", "--help":
		_, err = io.WriteString(stdout, usage)
	default:
		err = &usageError{fmt.Errorf("%q is no command; there are run, drain and version", args[0])}
	}
	if errors.Is(err, flag.ErrHelp) {
		return 0
	}
	if err == nil {
		return 0
	}
	_, _ = fmt.Fprintf(stderr, "tunnel-sidecar: %v\n", err)
	if _, wrong := errors.AsType[*usageError](err); wrong {
		return 2
	}
	return 1
}

func run(args []string, getenv func(string) string, stderr io.Writer) error {
	cfg, err := parseRun(args, getenv, stderr)
	if err != nil {
		return err
	}
	if getenv("GOGC") == "" {
		debug.SetGCPercent(tunnel.GCPercent)
	}
	if getenv("GOMAXPROCS") == "" {
		cfg.Tunnels = useProcessors(runtime.GOMAXPROCS(0))
	}
	agent, err := sidecar.New(cfg)
	if err != nil {
		return &usageError{err}
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	go func() {
		first := <-signals
		cfg.Logger.Info("ending", "signal", first.String())
		cancel()
		<-signals
		cfg.Logger.Warn("ending at once, since a second signal came")
		os.Exit(1)
	}()
	return agent.Run(ctx)
}

// useProcessors gives each tunnel a processor, up to most. What one tunnel moves goes through one goroutine of x/crypto/ssh
// after the other: a second processor adds little, and each hand-over to it costs system calls, of a container's CPU limit.
func useProcessors(most int) func(tunnels int) {
	return func(tunnels int) { runtime.GOMAXPROCS(min(max(1, tunnels), most)) }
}

// runDrain always succeeds once its flags are right: a hook that fails becomes a FailedPreStopHook event on the pod, and
// there is nothing that a person could do about a sidecar that has gone.
func runDrain(args []string, stdout, stderr io.Writer) error {
	name, err := parseDrain(args, stderr)
	if err != nil {
		return err
	}
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer cancel()
	if err := drain.Ask(ctx, name, stdout); err != nil {
		_, err = fmt.Fprintf(stdout, "not drained: %v\n", err)
		return err
	}
	return nil
}
