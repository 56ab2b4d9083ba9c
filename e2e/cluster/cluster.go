package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Cluster is a running cluster.
type Cluster struct {
	// Kubeconfig is the path of the administrator's kubeconfig. It stays the same over down and up.
	Kubeconfig string
	// BinDir has kubectl, helm, etcd and kube-apiserver.
	BinDir string
	// LogDir has one log per component, and events.log of what started and ended when.
	LogDir string
	// HostIP is the address at which pods reach servers on this machine.
	HostIP string
	// NodeIP is the node's address as this machine and the pods see it.
	NodeIP string
	// Started is when the cluster was started.
	Started time.Time

	opts Options
	init Process
}

// ErrNotRunning is what Open returns when there is no cluster.
var ErrNotRunning = errors.New("no cluster is running: start one with up")

// healthTimeout bounds one look at a running cluster, the answers of all checks together.
const healthTimeout = 20 * time.Second

// Up makes sure that a healthy cluster runs and returns it. It does nothing to one that runs
// already from the same build; it ends and starts anew one that is half dead or of another build.
func Up(ctx context.Context, opts Options) (*Cluster, error) {
	o, err := opts.complete()
	if err != nil {
		return nil, err
	}
	if os.Geteuid() != 0 {
		return nil, errors.New("a cluster needs root (namespaces, cgroups, network links): run it as root")
	}
	unlock, err := lockFile(ctx, o.Out, o.RunDir+".lock")
	if err != nil {
		return nil, err
	}
	defer unlock()
	start := time.Now()
	if err := EnsurePackages(ctx, o.Out, runRequirements); err != nil {
		return nil, err
	}
	built, err := build(ctx, o, nil)
	if err != nil {
		return nil, err
	}
	if c, s, err := open(o); err == nil {
		why := checkSame(s.Built, built)
		if why == nil {
			hctx, cancel := context.WithTimeout(ctx, healthTimeout)
			why = c.Healthy(hctx)
			cancel()
		}
		if why == nil {
			_, _ = fmt.Fprintf(o.Out, "cluster is up since %s and healthy (checked in %s)\n", s.Started.Local().Format(time.TimeOnly), elapsed(time.Since(start)))
			return c, nil
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		_, _ = fmt.Fprintf(o.Out, "the running cluster is started anew: %v\n", why)
	}
	if err := clean(ctx, o); err != nil {
		return nil, err
	}
	c, err := create(ctx, o, built)
	if err != nil {
		return nil, err
	}
	_, _ = fmt.Fprintf(o.Out, "cluster is up after %s\n", elapsed(time.Since(start)))
	return c, nil
}

func checkSame(running, built map[string]string) error {
	for _, name := range slices.Sorted(maps.Keys(built)) {
		if name != "helm" && running[name] != built[name] {
			return fmt.Errorf("it runs another build of %s", name)
		}
	}
	return nil
}

// create starts a cluster from nothing. When it fails the cluster is left as it is, for its
// logs to be read; down or the next up removes it.
func create(ctx context.Context, o Options, built map[string]string) (*Cluster, error) {
	var c *Cluster
	err := Step(o.Out, "starting the node", func() error {
		var err error
		c, err = startNode(ctx, o, built)
		return err
	})
	if err != nil {
		return nil, err
	}
	// From here on the parts come up side by side; the steps are awaited in the order in which
	// they usually end.
	loaded := make(chan error, 1)
	go func() {
		loaded <- c.loadWhenReady(ctx, o.archive("pause"), o.archive("coredns"))
	}()
	api, err := newAPIClient(o.pkiDir())
	if err != nil {
		return nil, err
	}
	wait := func(what string, ok func(context.Context) error) error {
		return Step(o.Out, "waiting for "+what, func() error {
			ctx, cancel := context.WithTimeout(ctx, startTimeout)
			defer cancel()
			return c.explain(waitFor(ctx, 50*time.Millisecond, func() error {
				if !c.init.Alive() {
					cancel()
					return errors.New("the node's first process has ended")
				}
				return ok(ctx)
			}))
		})
	}
	if err := wait("the API server", api.ready); err != nil {
		return nil, err
	}
	if err := Step(o.Out, "deploying CoreDNS", func() error { return c.deployCoreDNS(ctx) }); err != nil {
		return nil, err
	}
	if err := Step(o.Out, "waiting for the pause and CoreDNS images in containerd", func() error { return c.explain(<-loaded) }); err != nil {
		return nil, err
	}
	for _, w := range []struct {
		what string
		ok   func(context.Context) error
	}{
		{"node " + NodeName + " to be Ready", api.nodeReady},
		{"the default ServiceAccount", api.defaultServiceAccount},
		{"CoreDNS to be available", api.coreDNSAvailable},
		{"DNS through kube-proxy", resolves},
	} {
		if err := wait(w.what, w.ok); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// startNode writes the configuration and starts the first process with its network.
func startNode(ctx context.Context, o Options, built map[string]string) (*Cluster, error) {
	containerd, err := lookPath("containerd")
	if err != nil {
		return nil, err
	}
	if alias, ok := linkOwner(); ok {
		return nil, fmt.Errorf("network link %s is there already (it says %q): one cluster at a time per machine", hostLink, alias)
	}
	for _, dir := range []string{o.RunDir, o.logDir()} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, err
		}
	}
	// The state is written before anything is made outside, so that down knows the directory as
	// ours and finds what an interrupted up left.
	s := state{Built: built, Started: time.Now()}
	for _, dir := range privateDirs {
		if !exists(dir) {
			s.Made = append(s.Made, dir)
		}
	}
	if err := s.write(o.statePath()); err != nil {
		return nil, err
	}
	if err := makePrivateDirs(o); err != nil {
		return nil, err
	}
	p, err := newPKI(time.Now())
	if err != nil {
		return nil, err
	}
	if err := errors.Join(p.write(o.pkiDir()), writeConfig(o, p)); err != nil {
		return nil, err
	}
	b, err := json.MarshalIndent(newPlan(o, containerd), "", "  ")
	if err != nil {
		return nil, err
	}
	if err := writeFile(o.planPath(), b, 0o600); err != nil {
		return nil, err
	}
	if err := makeCgroups(cgroupMount); err != nil {
		return nil, err
	}
	if s.Init, err = startInit(o); err != nil {
		return nil, err
	}
	if err := s.write(o.statePath()); err != nil {
		return nil, err
	}
	if err := connectNode(ctx, o, s.Init.PID); err != nil {
		return nil, err
	}
	return newCluster(o, s), nil
}

func newCluster(o Options, s state) *Cluster {
	return &Cluster{
		Kubeconfig: o.kubeconfig(), BinDir: o.binDir(), LogDir: o.logDir(), HostIP: HostIP, NodeIP: NodeIP,
		Started: s.Started, opts: o, init: s.Init,
	}
}

// Open returns the cluster that runs, without a look at its health, or ErrNotRunning.
func Open(opts Options) (*Cluster, error) {
	o, err := opts.complete()
	if err != nil {
		return nil, err
	}
	c, _, err := open(o)
	return c, err
}

func open(o Options) (*Cluster, state, error) {
	s, err := readState(o.statePath())
	if errors.Is(err, fs.ErrNotExist) || err == nil && !s.Init.Alive() {
		return nil, s, ErrNotRunning
	}
	if err != nil {
		return nil, s, err
	}
	return newCluster(o, s), s, nil
}

// Healthy is nil when the node is Ready and Services and DNS answer.
func (c *Cluster) Healthy(ctx context.Context) error {
	api, err := newAPIClient(c.opts.pkiDir())
	if err != nil {
		return err
	}
	for _, ok := range []func(context.Context) error{api.ready, api.nodeReady, api.coreDNSAvailable, resolves} {
		// A second chance each: a machine that is busy with a build may drop one packet of DNS.
		if err := ok(ctx); err != nil {
			if err := pause(ctx, time.Second); err != nil {
				return err
			}
			if err := ok(ctx); err != nil {
				return err
			}
		}
	}
	return nil
}

// explain adds to an error where the logs are and what the supervisor saw last.
func (c *Cluster) explain(err error) error {
	if err == nil {
		return nil
	}
	seen := ""
	for _, name := range []string{"init.log", "events.log"} {
		b, _ := os.ReadFile(filepath.Join(c.LogDir, name))
		seen += tail(string(b), 1000)
	}
	return fmt.Errorf("%w; logs are in %s%s", err, c.LogDir, seen)
}

// loadWhenReady imports images as soon as containerd listens.
func (c *Cluster) loadWhenReady(ctx context.Context, files ...string) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	socket := fmt.Sprintf("/proc/%d/root%s", c.init.PID, containerdSocket)
	return waitFor(ctx, 100*time.Millisecond, func() error {
		if !c.init.Alive() {
			cancel()
			return errors.New("the node's first process has ended")
		}
		if _, err := os.Stat(socket); err != nil {
			return err
		}
		return c.LoadImage(ctx, files...)
	})
}

// LoadImage imports image archives ("docker save" or OCI layout) into the node's containerd,
// under the names they have inside.
func (c *Cluster) LoadImage(ctx context.Context, files ...string) error {
	for _, file := range files {
		if err := c.loadOne(ctx, file); err != nil {
			return fmt.Errorf("load image %s: %w", file, err)
		}
	}
	return nil
}

func (c *Cluster) loadOne(ctx context.Context, file string) error {
	// The archive goes in through a pipe: the node may not see the caller's directory.
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	cmd := c.Enter(ctx, "ctr", "-n", "k8s.io", "images", "import", "--digests=false", "-")
	cmd.Stdin = f
	return runCmd(cmd)
}

// Enter returns a command that will run inside the cluster's namespaces, as root on the node.
func (c *Cluster) Enter(ctx context.Context, args ...string) *exec.Cmd {
	nsenter, err := lookPath("nsenter")
	if err != nil {
		nsenter = "nsenter" // Start then says that it is missing
	}
	all := append([]string{"-t", strconv.Itoa(c.init.PID), "-m", "-n", "-p", "--"}, args...)
	cmd := exec.CommandContext(ctx, nsenter, all...)
	cmd.Env = append(os.Environ(), defaultPath)
	return cmd
}

// Kubectl returns a kubectl command as the cluster's administrator.
func (c *Cluster) Kubectl(ctx context.Context, args ...string) *exec.Cmd {
	return c.tool(ctx, "kubectl", args)
}

// Helm returns a helm command as the cluster's administrator.
func (c *Cluster) Helm(ctx context.Context, args ...string) *exec.Cmd {
	return c.tool(ctx, "helm", args)
}

func (c *Cluster) tool(ctx context.Context, name string, args []string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, filepath.Join(c.BinDir, name), args...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+c.Kubeconfig)
	return cmd
}

func (c *Cluster) deployCoreDNS(ctx context.Context) error {
	manifest, err := render("coredns.yaml", c.opts.settings())
	if err != nil {
		return err
	}
	cmd := c.Kubectl(ctx, "apply", "-f", "-")
	cmd.Stdin = strings.NewReader(string(manifest))
	return runCmd(cmd)
}

// Down ends the cluster and removes what up made: the processes, with them their mounts and
// network rules, the link and its routes, the cgroups, the mount points and the run directory.
// What is built stays in the cache. Without a cluster it does nothing.
func Down(ctx context.Context, opts Options) error {
	o, err := opts.complete()
	if err != nil {
		return err
	}
	if !exists(o.RunDir) {
		return nil
	}
	if os.Geteuid() != 0 {
		return errors.New("the cluster was started by root: run down as root")
	}
	unlock, err := lockFile(ctx, o.Out, o.RunDir+".lock")
	if err != nil {
		return err
	}
	defer unlock()
	return Step(o.Out, "taking the cluster down", func() error { return clean(ctx, o) })
}

// clean removes a cluster, whole or in part. It touches nothing when the run directory is not
// one that up made.
func clean(ctx context.Context, o Options) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	s, err := readState(o.statePath())
	if errors.Is(err, fs.ErrNotExist) {
		entries, err := os.ReadDir(o.RunDir)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		if len(entries) > 0 {
			return fmt.Errorf("run directory %s is not empty and has no state.json: it is not a cluster's; choose another with MYSOCKET_E2E_RUN", o.RunDir)
		}
		return os.Remove(o.RunDir)
	}
	if err != nil {
		return err
	}
	if err := s.Init.End(ctx, syscall.SIGKILL); err != nil {
		return err
	}
	if err := removeLink(ctx, o); err != nil {
		return err
	}
	if err := removeCgroups(ctx, cgroupMount); err != nil {
		return err
	}
	for _, dir := range slices.Backward(s.Made) {
		if !slices.Contains(privateDirs, dir) {
			return fmt.Errorf("%s lists %s, which up never makes", o.statePath(), dir)
		}
		// Only when empty: what others have put there meanwhile is theirs.
		if err := syscall.Rmdir(dir); err != nil && !errors.Is(err, syscall.ENOENT) && !errors.Is(err, syscall.ENOTEMPTY) {
			return &os.PathError{Op: "rmdir", Path: dir, Err: err}
		}
	}
	return waitFor(ctx, 100*time.Millisecond, func() error { return removeRunDir(o.RunDir) })
}

// removeRunDir removes the directory unless something is still mounted in it. The state goes
// last: without it the next down would not know the rest as ours.
func removeRunDir(dir string) error {
	mounts, err := mountsBelow("/proc/self/mountinfo", dir)
	if err != nil {
		return err
	}
	if len(mounts) > 0 {
		return fmt.Errorf("something is mounted at %s", strings.Join(mounts, ", "))
	}
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Name() == "state.json" {
			continue
		}
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	return os.RemoveAll(dir)
}
