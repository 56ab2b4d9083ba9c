// Command clusterbench takes the numbers of the control plane that the documentation states, from the real cmd/webhook as a process
// against a real kube-apiserver and etcd, with the real cmd/mysocket-edge as its API. There is no kubelet: pods are objects
// that nothing runs. Run it from the repository's root with make bench, on a machine that does nothing else. It is no test: it
// prints, and judges nothing.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/go-logr/logr"
	ctrl "sigs.k8s.io/controller-runtime"
)

const usage = `usage: clusterbench [flags] COMMAND, in the repository's root

  admission   latency of creating a pod: without a webhook, with one that does nothing, with ours
  scale       memory, start and speed of the control plane with thousands of Services and pods

flags:
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	ctrl.SetLogger(logr.Discard())
	err := mainErr(ctx, os.Args[1:], os.Stdout)
	stop()
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "clusterbench:", err)
		os.Exit(1)
	}
}

func mainErr(ctx context.Context, args []string, out io.Writer) error {
	if len(args) > 0 && args[0] == noopCommand {
		return serveNoop(ctx, args[1:])
	}
	o, command, err := parse(args, os.Getenv, os.Stderr)
	if err != nil {
		return err
	}
	switch command {
	case "admission":
		return admission(ctx, o, out)
	case "scale":
		return scale(ctx, o, out)
	}
	return fmt.Errorf("%q is no command; there are admission and scale", command)
}

// options are the sizes of what is measured, and where the programs are.
type options struct {
	assets  string
	log     string
	rounds  int
	creates int
	leader  bool

	namespaces, services, pods, streams, edits int
	memoryLimit                                int64
}

func parse(args []string, getenv func(string) string, stderr io.Writer) (o options, command string, err error) {
	f := flag.NewFlagSet("clusterbench", flag.ContinueOnError)
	f.SetOutput(stderr)
	f.Usage = func() {
		_, _ = fmt.Fprint(stderr, usage)
		f.PrintDefaults()
	}
	f.StringVar(&o.assets, "assets", getenv("KUBEBUILDER_ASSETS"), "directory with kube-apiserver, etcd and helm (default: env KUBEBUILDER_ASSETS)")
	f.StringVar(&o.log, "log", "", "file for the logs of the measured programs; none: they are thrown away")
	f.IntVar(&o.rounds, "rounds", 9, "admission: how many rounds to take the median of")
	f.IntVar(&o.creates, "creates", 500, "admission: pods of each kind in a round")
	f.BoolVar(&o.leader, "leader", true, "admission: measure the replica that leads; false: one that only admits pods and serves sidecars")
	f.IntVar(&o.namespaces, "namespaces", 40, "scale: namespaces")
	f.IntVar(&o.services, "services", 2000, "scale: Services, in all namespaces together")
	f.IntVar(&o.pods, "pods", 20000, "scale: pods, in all namespaces together")
	f.IntVar(&o.streams, "streams", 10000, "scale: streams to the gateway, at most one for each pod")
	f.IntVar(&o.edits, "edits", 15, "scale: edits of a Service to take the median of")
	f.Int64Var(&o.memoryLimit, "memory-limit", 300<<20, "scale: the control plane's --memory-limit, in bytes")
	if err := f.Parse(args); err != nil {
		return o, "", err
	}
	if f.NArg() != 1 {
		return o, "", errors.New("give one command: admission or scale")
	}
	if o.assets == "" {
		return o, "", errors.New("--assets is missing, and so is the environment variable KUBEBUILDER_ASSETS")
	}
	for _, n := range []struct {
		flag  string
		value int
	}{{"rounds", o.rounds}, {"creates", o.creates}, {"namespaces", o.namespaces}, {"services", o.services}, {"pods", o.pods}, {"streams", o.streams}, {"edits", o.edits}} {
		if n.value < 1 {
			return o, "", fmt.Errorf("--%s %d: it must be at least 1", n.flag, n.value)
		}
	}
	if o.services%o.namespaces != 0 || o.pods%o.services != 0 {
		return o, "", fmt.Errorf("--services %d must be a multiple of --namespaces %d, and --pods %d one of --services", o.services, o.namespaces, o.pods)
	}
	if o.streams > o.pods {
		return o, "", fmt.Errorf("--streams %d: there are only %d pods", o.streams, o.pods)
	}
	return o, f.Arg(0), nil
}
