// Package lab sets up all that the demo, the benchmarks and the end-to-end tests work with: the
// cluster, an edge outside of it (as in life), and the product installed by its chart. It uses
// the product only as a user does: through its programs, its chart and kubectl.
package lab

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/mysocketio/mysocket-injector/e2e/cluster"
)

const (
	// Release is the chart's release.
	Release = "mysocket"
	// Namespace is the control plane's.
	Namespace = "mysocket-system"
	// AccountSecret is the Secret with the account's e-mail and password. It is made with kubectl and not by the chart,
	// because Helm keeps a copy of every value it is given.
	AccountSecret = "mysocket-account"
	// Tag is the tag of the images.
	Tag = "dev"

	installTimeout = 2 * time.Minute
)

// Lab is a running lab.
type Lab struct {
	*cluster.Cluster
	Edge *Edge
	// Root is the root of the repository.
	Root string
	// Images are the project's images, all loaded into the cluster.
	Images []cluster.Image
	// Out is where progress goes.
	Out io.Writer
}

// Options say where the lab is; the zero value is right for most callers.
type Options struct {
	cluster.Options
	// Values are further helm --set arguments.
	Values []string
}

// Up makes sure that cluster, images, edge and product are up and current.
func Up(ctx context.Context, o Options) (*Lab, error) {
	if o.Out == nil {
		o.Out = io.Discard
	}
	if err := cluster.EnsurePackages(ctx, o.Out, []cluster.Requirement{{What: "curl", Package: "curl"}}); err != nil {
		return nil, err
	}
	c, err := cluster.Up(ctx, o.Options)
	if err != nil {
		return nil, err
	}
	l := &Lab{Cluster: c, Out: o.Out}
	if l.Root, err = root(o.Root); err != nil {
		return nil, err
	}
	if l.Images, err = cluster.BuildImages(ctx, o.Options, Tag); err != nil {
		return nil, err
	}
	if err := cluster.Step(o.Out, "loading the images", func() error {
		for _, img := range l.Images {
			if err := c.LoadImage(ctx, img.Archive); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		return nil, err
	}
	if l.Edge, err = startEdge(ctx, l, edgeDir(o.Options)); err != nil {
		return nil, err
	}
	return l, l.Install(ctx, o.Values...)
}

// Open returns the lab that is running, or cluster.ErrNotRunning.
func Open(o Options) (*Lab, error) {
	c, err := cluster.Open(o.Options)
	if err != nil {
		return nil, err
	}
	l := &Lab{Cluster: c, Out: o.Out}
	if l.Root, err = root(o.Root); err != nil {
		return nil, err
	}
	l.Edge, err = openEdge(l, edgeDir(o.Options))
	return l, err
}

// Down ends the edge and the cluster and removes what Up made. The edge's state goes with the cluster's: sockets that nobody
// owns any more would be adopted by, and counted in, the next.
func Down(ctx context.Context, o Options) error {
	err := stopEdge(ctx, edgeDir(o.Options))
	if err == nil {
		err = os.RemoveAll(edgeDir(o.Options))
	}
	return errors.Join(err, cluster.Down(ctx, o.Options))
}

// root finds the repository's root, as the cluster package does.
func root(dir string) (string, error) {
	if dir != "" {
		return dir, nil
	}
	wd, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for d := wd; ; d = filepath.Dir(d) {
		if _, err := os.Stat(filepath.Join(d, "charts", "mysocket-injector")); err == nil {
			return d, nil
		}
		if d == filepath.Dir(d) {
			return "", fmt.Errorf("no repository of mysocket-injector around %s", wd)
		}
	}
}

// SecretArgs are the kubectl arguments that make the account's Secret, as a user would type them.
// The password is read from a file: an argument is seen by everybody.
func (l *Lab) SecretArgs() []string {
	return []string{
		"create", "secret", "generic", AccountSecret, "--namespace", Namespace,
		"--from-literal=email=" + l.Edge.Email, "--from-file=password=" + l.Edge.PasswordFile,
	}
}

// HelmArgs are the arguments with which the chart is installed from the repository's root, as a
// user would type them.
func (l *Lab) HelmArgs() []string {
	return []string{
		"upgrade", "--install", Release, "charts/mysocket-injector", "--namespace", Namespace, "--wait",
		"--set", "account.existingSecret=" + AccountSecret,
		"--set", "mysocket.api=" + l.Edge.APIURL, "--set", "mysocket.ssh=" + l.Edge.SSHAddress, "--set-file", "mysocket.caBundle=" + l.Edge.CAFile,
		"--set", "image.repository=" + cluster.ImageRepository + "webhook", "--set", "image.tag=" + Tag,
		"--set", "sidecar.image.repository=" + cluster.ImageRepository + "tunnel-sidecar", "--set", "sidecar.image.tag=" + Tag,
	}
}

// Install installs the chart, or brings the release in line with the lab as it is now; values are
// further --set arguments. The tag stays the same over rebuilds, so the image's content goes into
// an annotation: a rebuilt control plane is rolled out.
func (l *Lab) Install(ctx context.Context, values ...string) error {
	args := l.HelmArgs()
	for _, img := range l.Images {
		if img.Name != "webhook" && img.Name != "tunnel-sidecar" {
			continue
		}
		b, err := os.ReadFile(img.Archive)
		if err != nil {
			return err
		}
		sum := sha256.Sum256(b)
		args = append(args, "--set-string", "podAnnotations.image-"+img.Name+"="+hex.EncodeToString(sum[:8]))
	}
	for _, v := range values {
		args = append(args, "--set", v)
	}
	return cluster.Step(l.Out, "installing the chart", func() error {
		ctx, cancel := context.WithTimeout(ctx, installTimeout)
		defer cancel()
		for _, create := range [][]string{{"create", "namespace", Namespace}, l.SecretArgs()} {
			// Applied, so that what is there already is no error.
			manifest, err := l.Kube(ctx, append(create, "--dry-run=client", "-o", "yaml")...)
			if err != nil {
				return err
			}
			if err := l.Apply(ctx, Namespace, manifest); err != nil {
				return err
			}
		}
		// Helm installs the chart's CRDs once and never upgrades them.
		crds := l.Kubectl(ctx, "apply", "--server-side", "--force-conflicts", "-f", "charts/mysocket-injector/crds")
		crds.Dir = l.Root
		if err := run(crds); err != nil {
			return err
		}
		cmd := l.Helm(ctx, args...)
		cmd.Dir = l.Root
		return run(cmd)
	})
}

// Kube runs kubectl and returns what it printed, without white space around it.
func (l *Lab) Kube(ctx context.Context, args ...string) (string, error) {
	return output(l.Kubectl(ctx, args...))
}

// Apply applies a manifest to a namespace.
func (l *Lab) Apply(ctx context.Context, namespace, manifest string) error {
	cmd := l.Kubectl(ctx, "apply", "-n", namespace, "-f", "-")
	cmd.Stdin = strings.NewReader(manifest)
	return run(cmd)
}

// WaitFor calls ok every 100 ms until it returns nil, at most for the time given; the error is
// then the last one.
func WaitFor(ctx context.Context, atMost time.Duration, ok func() error) error {
	ctx, cancel := context.WithTimeout(ctx, atMost)
	defer cancel()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		err := ok()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("after %s: %w", atMost, err)
		case <-tick.C:
		}
	}
}

func run(cmd *exec.Cmd) error {
	_, err := output(cmd)
	return err
}

func output(cmd *exec.Cmd) (string, error) {
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s %s: %w: %s", filepath.Base(cmd.Path), strings.Join(cmd.Args[1:], " "), err, strings.TrimSpace(errOut.String()+out.String()))
	}
	return strings.TrimSpace(out.String()), nil
}
