package cluster

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const cgroupMount = "/sys/fs/cgroup"

// connectNode makes the link between the host and the network namespace of the process, and
// the host's routes to pods and Services.
func connectNode(ctx context.Context, o Options, pid int) error {
	for _, args := range [][]string{
		{"link", "add", hostLink, "type", "veth", "peer", "name", nodeLink, "netns", strconv.Itoa(pid)},
		{"link", "set", hostLink, "alias", linkAlias(o.RunDir)},
		{"addr", "add", HostIP + "/" + linkPrefix, "dev", hostLink},
		{"link", "set", hostLink, "up"},
		{"route", "add", ServiceCIDR, "via", NodeIP},
		{"route", "add", PodCIDR, "via", NodeIP},
	} {
		if err := runIP(ctx, args...); err != nil {
			return err
		}
	}
	return nil
}

// linkAlias marks the link as the one of the cluster in a run directory.
func linkAlias(runDir string) string { return "mysocket-injector e2e cluster in " + runDir }

// linkOwner returns the alias of the host's link; ok is false when there is no such link.
func linkOwner() (alias string, ok bool) {
	if _, err := net.InterfaceByName(hostLink); err != nil {
		return "", false
	}
	b, _ := os.ReadFile("/sys/class/net/" + hostLink + "/ifalias")
	return strings.TrimSpace(string(b)), true
}

// removeLink removes the host's link and with it the routes, when it is this cluster's own.
func removeLink(ctx context.Context, o Options) error {
	alias, ok := linkOwner()
	if !ok {
		return nil
	}
	if alias != linkAlias(o.RunDir) {
		return fmt.Errorf("network link %s is not this cluster's (it says %q): end that cluster first, with MYSOCKET_E2E_RUN set to its directory", hostLink, alias)
	}
	err := runIP(ctx, "link", "del", hostLink)
	if _, still := linkOwner(); !still {
		return nil // the kernel was faster: the link goes with the namespace
	}
	return err
}

// cgroupRoots returns the hierarchies in which pods are accounted: one per controller with
// cgroup v1, also beside an empty v2 hierarchy ("hybrid"), and the single one with v2.
func cgroupRoots(mount string) (roots []string, v2 bool, err error) {
	if exists(filepath.Join(mount, "cgroup.controllers")) {
		return []string{mount}, true, nil
	}
	entries, err := os.ReadDir(mount)
	if err != nil {
		return nil, false, err
	}
	for _, e := range entries {
		dir := filepath.Join(mount, e.Name())
		if e.IsDir() && !exists(filepath.Join(dir, "cgroup.controllers")) { // a symbolic link (cpu -> cpu,cpuacct) is no directory
			roots = append(roots, dir)
		}
	}
	if len(roots) == 0 {
		return nil, false, fmt.Errorf("no cgroup hierarchy is mounted at %s", mount)
	}
	return roots, false, nil
}

// makeCgroups makes the directory below which all pods are accounted, in every hierarchy.
func makeCgroups(mount string) error {
	roots, v2, err := cgroupRoots(mount)
	if err != nil {
		return err
	}
	for _, root := range roots {
		dir := filepath.Join(root, cgroupName)
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
		if v2 {
			delegate(root)
			delegate(dir)
			continue
		}
		// A new v1 cpuset is empty, and no process can enter it.
		for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
			b, err := os.ReadFile(filepath.Join(root, file))
			if errors.Is(err, os.ErrNotExist) {
				continue
			}
			if err != nil {
				return err
			}
			if err := os.WriteFile(filepath.Join(dir, file), b, 0o600); err != nil {
				return err
			}
		}
	}
	return nil
}

// delegate lets the children of a v2 cgroup have its controllers. What the kernel refuses stays
// out; the kubelet says so if it cannot do without.
func delegate(dir string) {
	b, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return
	}
	for _, c := range strings.Fields(string(b)) {
		_ = os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+c), 0o600)
	}
}

// removeCgroups removes the directories of makeCgroups and all below them. The kernel lets go
// of a cgroup a moment after its last process.
func removeCgroups(ctx context.Context, mount string) error {
	roots, _, err := cgroupRoots(mount)
	if err != nil {
		return err
	}
	for _, root := range roots {
		dir := filepath.Join(root, cgroupName)
		err := waitFor(ctx, 50*time.Millisecond, func() error { return removeCgroup(dir) })
		if err != nil {
			return fmt.Errorf("remove cgroup %s: %w", dir, err)
		}
	}
	return nil
}

func removeCgroup(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeCgroup(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	if err := syscall.Rmdir(dir); err != nil && !errors.Is(err, syscall.ENOENT) {
		return &os.PathError{Op: "rmdir", Path: dir, Err: err}
	}
	return nil
}

// mountsBelow returns the mount points of a mountinfo file that are at or below dir.
func mountsBelow(mountinfo, dir string) ([]string, error) {
	b, err := os.ReadFile(mountinfo)
	if err != nil {
		return nil, err
	}
	var out []string
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) > 4 && (f[4] == dir || strings.HasPrefix(f[4], dir+"/")) {
			out = append(out, f[4])
		}
	}
	return out, nil
}

// startInit starts the first process of new namespaces and returns who it is. The process
// outlives this one.
func startInit(o Options) (Process, error) {
	out, err := os.OpenFile(filepath.Join(o.logDir(), "init.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return Process{}, err
	}
	defer func() { _ = out.Close() }()
	cmd := exec.Command(filepath.Join(o.binDir(), initBinary), innerCommand, o.planPath()) //nolint:noctx // it is to outlive us
	cmd.Dir = "/"
	cmd.Env = componentEnv()
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setsid:     true,
		Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS | syscall.CLONE_NEWNET,
	}
	if err := cmd.Start(); err != nil {
		return Process{}, fmt.Errorf("start the node's first process in its own namespaces: %w", err)
	}
	// When it ends while this process lives, it must not stay a zombie.
	go func() { _ = cmd.Wait() }()
	return Identify(cmd.Process.Pid)
}
