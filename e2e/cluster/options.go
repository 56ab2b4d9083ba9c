package cluster

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
)

// Addresses of the cluster. They are fixed: one cluster at a time per machine.
const (
	// HostIP is this machine's end of the link to the node. Pods reach servers on the host
	// here, and such servers see each pod's own address.
	HostIP = "172.31.255.2"
	// NodeIP is the node's end of the link.
	NodeIP = "172.31.255.1"
	// PodCIDR is the range that pods get their addresses from, routed from the host.
	PodCIDR = "10.244.0.0/16"
	// ServiceCIDR is the range of ClusterIPs, routed from the host.
	ServiceCIDR = "10.96.0.0/16"
	// DNSIP is the ClusterIP of CoreDNS.
	DNSIP = "10.96.0.10"
	// NodeName is the name of the only node.
	NodeName = "node1"
	// HostDomain and every name below it resolve to HostIP inside the cluster.
	HostDomain = "mysocket.test"

	apiServiceIP = "10.96.0.1"
	nodePodCIDR  = "10.244.0.0/24"
	linkPrefix   = "30"
	hostLink     = "msk-e2e"      // at most 15 bytes: IFNAMSIZ
	cgroupName   = "mysocket-e2e" // parent of all pods' cgroups
	moduleLine   = "module github.com/mysocketio/mysocket-injector"
)

// Options say where the cluster is built and run. The zero value is right for most callers.
type Options struct {
	// Root is the root of the repository; when empty it is looked for from the working
	// directory upwards.
	Root string
	// RunDir holds everything that changes while the cluster runs; Down removes it. When empty
	// it is $MYSOCKET_E2E_RUN or /var/tmp/mysocket-e2e.
	RunDir string
	// CacheDir holds what is built; it outlives the cluster. When empty it is
	// $MYSOCKET_E2E_CACHE or mysocket-injector in the user's cache directory.
	CacheDir string
	// Out is where progress goes; nil is nowhere.
	Out io.Writer
}

func (o Options) complete() (Options, error) {
	if o.Out == nil {
		o.Out = io.Discard
	}
	if o.RunDir == "" {
		o.RunDir = os.Getenv("MYSOCKET_E2E_RUN")
	}
	if o.RunDir == "" {
		o.RunDir = "/var/tmp/mysocket-e2e"
	}
	if o.CacheDir == "" {
		o.CacheDir = os.Getenv("MYSOCKET_E2E_CACHE")
	}
	if o.CacheDir == "" {
		dir, err := os.UserCacheDir()
		if err != nil {
			return o, fmt.Errorf("find the cache directory (set MYSOCKET_E2E_CACHE to choose one): %w", err)
		}
		o.CacheDir = filepath.Join(dir, "mysocket-injector")
	}
	if o.Root == "" {
		wd, err := os.Getwd()
		if err != nil {
			return o, err
		}
		if o.Root, err = findRoot(wd); err != nil {
			return o, err
		}
	}
	var err error
	for _, p := range []*string{&o.RunDir, &o.CacheDir, &o.Root} {
		if *p, err = filepath.Abs(*p); err != nil {
			return o, err
		}
	}
	return o, checkRunDir(o.RunDir)
}

// checkRunDir refuses places that the cluster's own mounts would hide from it, and directories
// that Down must never remove.
func checkRunDir(dir string) error {
	if dir == "/" || filepath.Dir(dir) == "/" {
		return fmt.Errorf("run directory %s: it must be at least two levels deep, since down removes it", dir)
	}
	for _, hidden := range append([]string{"/run", "/proc", "/sys", "/dev"}, privateDirs...) {
		if dir == hidden || strings.HasPrefix(dir, hidden+"/") {
			return fmt.Errorf("run directory %s: it cannot be below %s, which the cluster mounts anew for itself", dir, hidden)
		}
	}
	return nil
}

// findRoot walks up from dir to the directory whose go.mod is the product's.
func findRoot(dir string) (string, error) {
	for d := dir; ; d = filepath.Dir(d) {
		b, err := os.ReadFile(filepath.Join(d, "go.mod"))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return "", err
		}
		for line := range strings.Lines(string(b)) {
			if strings.TrimSpace(line) == moduleLine {
				return d, nil
			}
		}
		if d == filepath.Dir(d) {
			return "", fmt.Errorf("no repository of mysocket-injector at %s or above it: name its root with -root", dir)
		}
	}
}

// BinDir is the directory of the built binaries; it serves as envtest's KUBEBUILDER_ASSETS.
func (o Options) binDir() string     { return filepath.Join(o.CacheDir, "bin") }
func (o Options) imageDir() string   { return filepath.Join(o.CacheDir, "images") }
func (o Options) kubeconfig() string { return filepath.Join(o.RunDir, "admin.kubeconfig") }
func (o Options) statePath() string  { return filepath.Join(o.RunDir, "state.json") }
func (o Options) pkiDir() string     { return filepath.Join(o.RunDir, "pki") }
func (o Options) configDir() string  { return filepath.Join(o.RunDir, "config") }
func (o Options) logDir() string     { return filepath.Join(o.RunDir, "log") }
