// Command demo shows the product at work, from nothing to public requests that are balanced over
// pods. It prints every command that a user would type. Run it with make demo, make
// demo-existing and make demo-down.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/mysocketio/mysocket-injector/e2e/cluster"
	"github.com/mysocketio/mysocket-injector/e2e/lab"
)

const (
	namespace = "shop"
	replicas  = 3
	requests  = 60
	patience  = 90 * time.Second

	usage = `usage: demo new|existing|down

  new       a Service is annotated, then its pods are made: they start with the sidecar
  existing  pods run first, then the Service is annotated: they are restarted one by one
  down      end the edge and the cluster and remove what the demo made
`
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	err := mainErr(ctx, os.Args[1:])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

func mainErr(ctx context.Context, args []string) error {
	if len(args) != 1 {
		_, _ = fmt.Fprint(os.Stderr, usage)
		return errors.New("one command is needed")
	}
	options := lab.Options{Options: cluster.Options{Out: os.Stdout}}
	switch args[0] {
	case "new", "existing":
		d := &demo{out: os.Stdout, start: time.Now()}
		var err error
		if d.Lab, err = lab.Up(ctx, options); err != nil {
			return err
		}
		return d.run(ctx, args[0] == "existing")
	case "down":
		return lab.Down(ctx, options)
	}
	_, _ = fmt.Fprint(os.Stderr, usage)
	return fmt.Errorf("%q is no command", args[0])
}

type demo struct {
	*lab.Lab
	out   io.Writer
	start time.Time
}

func (d *demo) printf(format string, args ...any) { _, _ = fmt.Fprintf(d.out, format, args...) }

// run plays one half of the demo.
func (d *demo) run(ctx context.Context, existing bool) error {
	d.printf("\nThe chart was installed from the repository's root with:\n\n$ kubectl create namespace %s\n$ kubectl %s\n$ helm %s\n\n",
		lab.Namespace, strings.Join(d.SecretArgs(), " "), strings.Join(d.HelmArgs(), " "))
	if _, err := d.Kube(ctx, "delete", "namespace", namespace, "--ignore-not-found", "--wait"); err != nil {
		return err
	}
	steps := [][]string{
		{"create", "namespace", namespace},
		{"label", "namespace", namespace, "mysocket.io/injection=enabled"},
		{"apply", "-n", namespace, "-f", "e2e/demoapp/service.yaml"},
	}
	deploy := [][]string{
		{"apply", "-n", namespace, "-f", "e2e/demoapp/deployment.yaml"},
		{"rollout", "status", "-n", namespace, "deployment/web", "--timeout=90s"},
	}
	annotate := []string{"annotate", "service", "web", "-n", namespace, "mysocket.io/enabled=true"}
	if existing {
		steps = append(append(steps, deploy...), annotate)
	} else {
		steps = append(append(steps, annotate), deploy...)
	}
	var annotated time.Time
	for _, s := range steps {
		if err := d.show(ctx, s...); err != nil {
			return err
		}
		if s[0] == "annotate" {
			annotated = time.Now()
		}
	}
	url, err := d.awaitURL(ctx)
	if err != nil {
		return err
	}
	if err := d.awaitFirst(ctx, url, annotated); err != nil {
		return err
	}
	if err := d.awaitConnected(ctx); err != nil {
		return err
	}
	counts, err := d.visit(ctx, url)
	if err != nil {
		return err
	}
	for _, s := range [][]string{
		{"get", "pods,services,tunnels", "-n", namespace},
		{"logs", "-n", namespace, "deployment/web", "-c", "mysocket-tunnel", "--tail=8"},
	} {
		if err := d.show(ctx, s...); err != nil {
			return err
		}
	}
	if len(counts) != replicas {
		return fmt.Errorf("%d pods took part in answering, not %d", len(counts), replicas)
	}
	d.printf("\nDone in %s: %d requests, %d answers from %d pods.\n", time.Since(d.start).Round(time.Second), requests, requests, len(counts))
	d.printf("The cluster stays up. Use it with\n\n  export KUBECONFIG=%s PATH=%s:$PATH\n  kubectl get tunnels -n %s\n  curl %s\n\nand end it with: make demo-down\n",
		d.Kubeconfig, d.BinDir, namespace, strings.Join(d.Edge.CurlArgs(url), " "))
	return nil
}

// show prints a kubectl command as a user would type it, runs it, and prints what it says.
func (d *demo) show(ctx context.Context, args ...string) error {
	d.printf("$ kubectl %s\n", strings.Join(args, " "))
	cmd := d.Kubectl(ctx, args...)
	cmd.Dir = d.Root
	cmd.Stdout, cmd.Stderr = d.out, d.out
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("kubectl %s: %w", strings.Join(args, " "), err)
	}
	d.printf("\n")
	return nil
}

func (d *demo) awaitURL(ctx context.Context) (url string, err error) {
	err = lab.WaitFor(ctx, patience, func() error {
		url, err = d.Kube(ctx, "get", "service", "web", "-n", namespace, "-o", `jsonpath={.metadata.annotations.mysocket\.io/url}`)
		if err == nil && url == "" {
			err = errors.New("the Service has no public name yet; kubectl describe service says why")
		}
		return err
	})
	d.printf("public name: %s\n", url)
	return url, err
}

func (d *demo) awaitFirst(ctx context.Context, url string, since time.Time) error {
	err := lab.WaitFor(ctx, patience, func() error {
		_, err := d.curl(ctx, url)
		return err
	})
	if err == nil {
		d.printf("first public answer %.1f s after the annotation\n", time.Since(since).Seconds())
	}
	return err
}

// awaitConnected waits until the Service says that all its pods are connected and none is left
// of those before.
func (d *demo) awaitConnected(ctx context.Context) error {
	const path = `jsonpath={.status.conditions[?(@.type=="mysocket.io/TunnelsReady")].message}`
	last := ""
	return lab.WaitFor(ctx, patience, func() error {
		message, err := d.Kube(ctx, "get", "service", "web", "-n", namespace, "-o", path)
		if err != nil {
			return err
		}
		if message != last {
			d.printf("%s\n", message)
			last = message
		}
		if want := fmt.Sprintf("%d of %d pods connected", replicas, replicas); message != want {
			return fmt.Errorf("the Service says %q, not %q", message, want)
		}
		return nil
	})
}

// visit makes the requests one after the other and counts who answered.
func (d *demo) visit(ctx context.Context, url string) (map[string]int, error) {
	d.printf("\n$ for i in {1..%d}; do curl %s; done | sort | uniq -c\n", requests, strings.Join(d.Edge.CurlArgs(url), " "))
	counts := map[string]int{}
	for i := range requests {
		answer, err := d.curl(ctx, url)
		if err != nil {
			return nil, fmt.Errorf("request %d of %d: %w", i+1, requests, err)
		}
		counts[answer]++
	}
	for _, answer := range slices.Sorted(maps.Keys(counts)) {
		d.printf("%7d %s\n", counts[answer], answer)
	}
	d.printf("\n")
	return counts, nil
}

func (d *demo) curl(ctx context.Context, url string) (string, error) {
	cmd := exec.CommandContext(ctx, "curl", d.Edge.CurlArgs(url)...)
	var errOut strings.Builder
	cmd.Stderr = &errOut
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s: %w: %s", filepath.Base(cmd.Path), err, strings.TrimSpace(errOut.String()))
	}
	return strings.TrimSpace(string(out)), nil
}
