// Command tunnelbench measures what a tunnel costs: our sidecar's tunnel and the OpenSSH client, each against our edge and
// against OpenSSH's sshd, and as the floor two plain TCP relays in the same places. All of it runs on loopback, with one
// backend, one load generator and AES-128-GCM, in rounds that take turns, so that a busy machine is as busy for each. It
// must not be used by the product.
//
//	make bench-tunnel
//
// With "edge" as its first argument it measures the edge instead: against haproxy, with many tunnels, and with apps of unequal speed.
//
//	make bench-edge
//
// Bulk is measured also with 50 ms of round trip between the tunnel and its server; a relay that delays makes them, since
// not every kernel has netem and it would need root.
//
// A replica's tunnel, the backend and the relays are processes of their own (this program with a role as its first argument),
// so that their time and memory can be read from /proc.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"
)

// settings say what is measured and for how long.
type settings struct {
	rounds  int
	seconds float64
	open    int
	only    string
	edge    string
}

func (s settings) duration() time.Duration { return time.Duration(s.seconds * float64(time.Second)) }

// measurements are what --only may name.
var measurements = []string{"bulk", "small", "new", "memory", "rtt"}

func (s settings) wants(what string) bool {
	return s.only == "" || slices.Contains(strings.Split(s.only, ","), what)
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	err := run(ctx, os.Args[1:])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "tunnelbench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) > 0 {
		switch args[0] {
		case "backend":
			return serveBackend(ctx)
		case "relay":
			return serveRelay(ctx, args[1:])
		case "delay":
			return serveDelay(ctx, args[1:])
		case "tunnel":
			return serveTunnel(ctx, args[1:])
		case "apps":
			return serveApps(ctx, args[1:])
		case "profiled":
			return serveProfiled(ctx, args[1:])
		case "edge":
			return benchEdge(ctx, args[1:])
		}
	}
	var s settings
	f := flag.NewFlagSet("tunnelbench", flag.ContinueOnError)
	f.IntVar(&s.rounds, "rounds", 5, "how often each measurement is repeated; medians are reported")
	f.Float64Var(&s.seconds, "seconds", 2, "how long one measurement lasts")
	f.IntVar(&s.open, "open", 1000, "connections that are open at once when memory is measured")
	f.StringVar(&s.only, "only", "", "only these measurements, comma separated: "+strings.Join(measurements, ", "))
	f.StringVar(&s.edge, "edge", "", "the mysocket-edge program (required)")
	if err := f.Parse(args); err != nil {
		return err
	}
	if err := checkRuns(f, s.rounds, s.seconds, s.only, measurements, s.edge); err != nil {
		return err
	}
	if s.open < 1 || s.open > 5000 {
		return fmt.Errorf("--open %d: allowed are 1 to 5000", s.open)
	}
	return measureAll(ctx, s)
}

// checkRuns checks the settings that all benches have; known are the measurements that only may name.
func checkRuns(f *flag.FlagSet, rounds int, seconds float64, only string, known []string, edge string) error {
	switch {
	case f.NArg() > 0:
		return fmt.Errorf("unexpected argument %q", f.Arg(0))
	case rounds < 1 || rounds > 100:
		return fmt.Errorf("--rounds %d: allowed are 1 to 100", rounds)
	case seconds < 0.1 || seconds > 60:
		return fmt.Errorf("--seconds %g: allowed are 0.1 to 60", seconds)
	case only != "" && slices.ContainsFunc(strings.Split(only, ","), func(what string) bool { return !slices.Contains(known, what) }):
		return fmt.Errorf("--only %q: allowed are %s, comma separated", only, strings.Join(known, ", "))
	case edge == "":
		return errors.New("--edge is missing: the path of the mysocket-edge program")
	}
	return nil
}
