// Command measure takes the numbers that the README states, on the lab, and prints one a line:
// medians of five rounds. Run it with make bench on a machine that does nothing else.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/mysocketio/mysocket-injector/e2e/cluster"
	"github.com/mysocketio/mysocket-injector/e2e/lab"
)

const (
	rounds   = 5
	replicas = 3
	patience = 2 * time.Minute
	prefix   = "measure-"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	err := mainErr(ctx, os.Stdout)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "measure:", err)
		os.Exit(1)
	}
}

func mainErr(ctx context.Context, out io.Writer) error {
	l, err := lab.Up(ctx, lab.Options{Options: cluster.Options{Out: os.Stderr}})
	if err != nil {
		return err
	}
	m := &measure{Lab: l}
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	injected, resident, anonymous, err := m.injected(ctx)
	if err != nil {
		return err
	}
	first, all, err := m.restarted(ctx)
	if err != nil {
		return err
	}
	row := func(what, format string, args ...any) {
		_, _ = fmt.Fprintf(table, what+"\t"+format+"\n", args...)
	}
	row("kubectl annotate to first public 200, pods already injected", "%.2f s", injected.Seconds())
	row("kubectl annotate to first public 200, with the rolling restart", "%.2f s", first.Seconds())
	row(fmt.Sprintf("kubectl annotate to all %d pods connected, with the rolling restart", replicas), "%.2f s", all.Seconds())
	row("idle sidecar with one tunnel, resident (VmRSS)", "%.1f MiB", mebibytes(resident))
	row("  of which its own and not the program file's pages (RssAnon)", "%.1f MiB", mebibytes(anonymous))
	for _, img := range l.Images {
		if slices.Contains([]string{"tunnel-sidecar", "webhook", "mysocket-edge"}, img.Name) {
			row("image "+img.Name, "%.1f MiB on disk, %.1f MiB in a registry", mebibytes(img.Unpacked), mebibytes(img.Packed))
		}
	}
	return table.Flush()
}

func mebibytes(n int64) float64 { return float64(n) / (1 << 20) }

type measure struct{ *lab.Lab }

// injected measures pods that have the sidecar already, and then how much memory that takes.
func (m *measure) injected(ctx context.Context) (median time.Duration, resident, anonymous int64, err error) {
	ns, end, err := m.stage(ctx)
	if err != nil {
		return 0, 0, 0, err
	}
	defer end()
	// The first annotation is there when the pods are made. It is not measured.
	if err := m.all(ctx, ns, []string{"annotate", "service", "web", "mysocket.io/enabled=true"}, []string{"apply", "-f", "e2e/demoapp/deployment.yaml"}, rolledOut); err != nil {
		return 0, 0, 0, err
	}
	var times []time.Duration
	for range rounds {
		if err := m.all(ctx, ns, []string{"annotate", "service", "web", "mysocket.io/enabled-"}); err != nil {
			return 0, 0, 0, err
		}
		if err := lab.WaitFor(ctx, patience, func() error {
			if k, err := m.socket(ctx, ns); err != nil || k.ID != "" {
				return fmt.Errorf("the socket is still there: %w", err)
			}
			return nil
		}); err != nil {
			return 0, 0, 0, err
		}
		took, err := m.annotate(ctx, ns)
		if err != nil {
			return 0, 0, 0, err
		}
		times = append(times, took)
	}
	if err := m.connected(ctx, ns); err != nil {
		return 0, 0, 0, err
	}
	resident, anonymous, err = memory(ns)
	return middle(times), resident, anonymous, err
}

// restarted measures pods that ran before the annotation.
func (m *measure) restarted(ctx context.Context) (first, all time.Duration, err error) {
	var firsts, alls []time.Duration
	for range rounds {
		err := func() error {
			ns, end, err := m.stage(ctx)
			if err != nil {
				return err
			}
			defer end()
			if err := m.all(ctx, ns, []string{"apply", "-f", "e2e/demoapp/deployment.yaml"}, rolledOut); err != nil {
				return err
			}
			start := time.Now()
			took, err := m.annotate(ctx, ns)
			if err != nil {
				return err
			}
			firsts = append(firsts, took)
			if err := m.connected(ctx, ns); err != nil {
				return err
			}
			alls = append(alls, time.Since(start))
			return nil
		}()
		if err != nil {
			return 0, 0, err
		}
	}
	return middle(firsts), middle(alls), nil
}

var rolledOut = []string{"rollout", "status", "deployment/web", "--timeout=90s"}

// stage makes a namespace with the demo's Service. end deletes it and waits for that, so that
// nothing of one round goes on in the next.
func (m *measure) stage(ctx context.Context) (ns string, end func(), err error) {
	ns = prefix + strconv.FormatInt(time.Now().UnixMilli()%1e9, 10)
	end = func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), patience)
		defer cancel()
		if _, err := m.Kube(ctx, "delete", "namespace", ns); err != nil {
			fmt.Fprintln(os.Stderr, "measure:", err)
		}
	}
	if _, err := m.Kube(ctx, "create", "namespace", ns); err != nil {
		return "", nil, err
	}
	if err := m.all(ctx, ns, []string{"label", "namespace", ns, "mysocket.io/injection=enabled"}, []string{"apply", "-f", "e2e/demoapp/service.yaml"}); err != nil {
		end()
		return "", nil, err
	}
	return ns, end, nil
}

// all runs kubectl commands in a namespace, from the repository's root.
func (m *measure) all(ctx context.Context, ns string, commands ...[]string) error {
	for _, args := range commands {
		cmd := m.Kubectl(ctx, append([]string{"-n", ns}, args...)...)
		cmd.Dir = m.Root
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, out)
		}
	}
	return nil
}

// annotate makes the Service public and returns how long it took from the start of the command to
// the first answer.
func (m *measure) annotate(ctx context.Context, ns string) (time.Duration, error) {
	start := time.Now()
	if err := m.all(ctx, ns, []string{"annotate", "service", "web", "mysocket.io/enabled=true"}); err != nil {
		return 0, err
	}
	err := lab.WaitFor(ctx, patience, func() error {
		k, err := m.socket(ctx, ns)
		if err != nil {
			return err
		}
		if k.ID == "" {
			return errors.New("there is no socket yet")
		}
		return exec.CommandContext(ctx, "curl", m.Edge.CurlArgs("https://"+k.DNSName)...).Run()
	})
	return time.Since(start), err
}

// socket is the namespace's socket at the edge; the zero value when there is none.
func (m *measure) socket(ctx context.Context, ns string) (lab.Socket, error) {
	all, err := m.Edge.Sockets(ctx)
	if i := slices.IndexFunc(all, func(k lab.Socket) bool { return k.Name == "k8s "+ns+".web" }); i >= 0 {
		return all[i], err
	}
	return lab.Socket{}, err
}

// connected waits until exactly the new pods are connected.
func (m *measure) connected(ctx context.Context, ns string) error {
	if err := lab.WaitFor(ctx, patience, func() error {
		if k, err := m.socket(ctx, ns); err != nil || len(k.Tunnels) != replicas || k.Registered != replicas {
			return fmt.Errorf("%d tunnels are connected and %d registered, want %d: %w", len(k.Tunnels), k.Registered, replicas, err)
		}
		return nil
	}); err != nil {
		return err
	}
	return m.all(ctx, ns, rolledOut)
}

func middle(times []time.Duration) time.Duration {
	slices.Sort(times)
	return times[len(times)/2]
}

// memory returns the median memory of the sidecars in a namespace, as this machine's /proc has it:
// the node's processes are in a pid namespace below ours.
func memory(ns string) (resident, anonymous int64, err error) {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return 0, 0, err
	}
	var residents, anonymouses []int64
	for _, dir := range dirs {
		cmdline, err := os.ReadFile(filepath.Join(dir, "cmdline"))
		if err != nil || !strings.HasPrefix(string(cmdline), "/tunnel-sidecar\x00run\x00") {
			continue // it may have ended meanwhile
		}
		environ, err := os.ReadFile(filepath.Join(dir, "environ"))
		if err != nil || !slices.Contains(strings.Split(string(environ), "\x00"), "POD_NAMESPACE="+ns) {
			continue
		}
		status, err := os.ReadFile(filepath.Join(dir, "status"))
		if err != nil {
			return 0, 0, err
		}
		residents = append(residents, kibibytes(string(status), "VmRSS:")<<10)
		anonymouses = append(anonymouses, kibibytes(string(status), "RssAnon:")<<10)
	}
	if len(residents) != replicas {
		return 0, 0, fmt.Errorf("found %d sidecars of namespace %s in /proc, want %d", len(residents), ns, replicas)
	}
	slices.Sort(residents)
	slices.Sort(anonymouses)
	return residents[replicas/2], anonymouses[replicas/2], nil
}

func kibibytes(status, field string) int64 {
	_, rest, _ := strings.Cut(status, "\n"+field)
	n, _ := strconv.ParseInt(strings.Fields(rest + " 0")[0], 10, 64)
	return n
}
