package cluster

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
)

// plan is what the first process of the namespaces does, in this order. up writes it, Inner
// carries it out.
type plan struct {
	RunDir     string            `json:"runDir"`
	Binds      map[string]string `json:"binds"`   // mount point to the directory shown there
	Sysctls    map[string]string `json:"sysctls"` // below /proc/sys, to the value shown
	Components []component       `json:"components"`
}

// component is a process that is kept running.
type component struct {
	Name string   `json:"name"` // of its log file, too
	Args []string `json:"args"` // with the program
	// After is what must answer first: "", "containerd" or "apiserver".
	After string `json:"after,omitempty"`
}

const (
	afterContainerd = "containerd"
	afterAPIServer  = "apiserver"
)

// privateDirs are where containerd, the CNI library and the kubelet keep state. The cluster sees
// directories of its run directory there; the machine's own stay as they are.
var privateDirs = []string{"/var/lib/kubelet", "/var/lib/containerd", "/var/lib/cni", "/var/log/pods", "/var/log/containers"}

func (o Options) privateDir(dir string) string {
	return filepath.Join(o.RunDir, "data", strings.TrimPrefix(dir, "/"))
}

// newPlan lays out the cluster. containerd is the path of that program.
func newPlan(o Options, containerd string) plan {
	p := plan{
		RunDir: o.RunDir, Binds: map[string]string{},
		// The kubelet insists on these values. It is shown them; the machine keeps its own.
		Sysctls: map[string]string{
			"vm/overcommit_memory": "1", "vm/panic_on_oom": "0", "kernel/panic": "10", "kernel/panic_on_oops": "1",
		},
	}
	for _, dir := range privateDirs {
		p.Binds[dir] = o.privateDir(dir)
	}
	bin := func(name string) string { return filepath.Join(o.binDir(), name) }
	pki := func(name string) string { return filepath.Join(o.pkiDir(), name) }
	cfg := func(name string) string { return filepath.Join(o.configDir(), name) }
	hyperkube := bin("hyperkube")
	const etcdClient, etcdPeer = "http://127.0.0.1:2379", "http://127.0.0.1:2380"
	controllerManager, scheduler := cfg("kube-controller-manager.kubeconfig"), cfg("kube-scheduler.kubeconfig")
	p.Components = []component{
		{Name: "etcd", Args: []string{
			// The data ends with the cluster: there is nothing to keep safe from a power cut.
			hyperkube, "etcd", "--data-dir=" + filepath.Join(o.RunDir, "etcd"), "--unsafe-no-fsync",
			"--listen-client-urls=" + etcdClient, "--advertise-client-urls=" + etcdClient,
			"--listen-peer-urls=" + etcdPeer, "--initial-advertise-peer-urls=" + etcdPeer,
			"--initial-cluster=default=" + etcdPeer, "--log-level=warn",
		}},
		{Name: "containerd", Args: []string{containerd, "--config=" + cfg("containerd.toml")}},
		{Name: "kube-apiserver", Args: []string{
			hyperkube, "kube-apiserver", "--etcd-servers=" + etcdClient,
			"--bind-address=0.0.0.0", "--secure-port=6443", "--advertise-address=" + NodeIP,
			"--service-cluster-ip-range=" + ServiceCIDR, "--allow-privileged=true", "--profiling=false",
			"--tls-cert-file=" + pki("apiserver.crt"), "--tls-private-key-file=" + pki("apiserver.key"),
			"--client-ca-file=" + pki("ca.crt"),
			"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction",
			"--service-account-issuer=https://kubernetes.default.svc.cluster.local",
			"--service-account-key-file=" + pki("sa.pub"), "--service-account-signing-key-file=" + pki("sa.key"),
			"--kubelet-client-certificate=" + pki("apiserver-kubelet-client.crt"),
			"--kubelet-client-key=" + pki("apiserver-kubelet-client.key"),
			"--kubelet-certificate-authority=" + pki("ca.crt"), "--kubelet-preferred-address-types=InternalIP",
			"--requestheader-client-ca-file=" + pki("front-proxy-ca.crt"), "--requestheader-allowed-names=front-proxy-client",
			"--requestheader-username-headers=X-Remote-User", "--requestheader-group-headers=X-Remote-Group",
			"--requestheader-extra-headers-prefix=X-Remote-Extra-",
			"--proxy-client-cert-file=" + pki("front-proxy-client.crt"), "--proxy-client-key-file=" + pki("front-proxy-client.key"),
		}},
		{Name: "kubelet", After: afterContainerd, Args: []string{
			hyperkube, "kubelet", "--config=" + cfg("kubelet.yaml"), "--kubeconfig=" + cfg("kubelet.kubeconfig"),
			"--hostname-override=" + NodeName, "--node-ip=" + NodeIP, "--v=2",
		}},
		{Name: "kube-controller-manager", After: afterAPIServer, Args: []string{
			hyperkube, "kube-controller-manager", "--kubeconfig=" + controllerManager,
			"--authentication-kubeconfig=" + controllerManager, "--authorization-kubeconfig=" + controllerManager,
			"--bind-address=127.0.0.1", "--leader-elect=false", "--use-service-account-credentials=true",
			"--root-ca-file=" + pki("ca.crt"), "--service-account-private-key-file=" + pki("sa.key"),
			"--cluster-signing-cert-file=" + pki("ca.crt"), "--cluster-signing-key-file=" + pki("ca.key"),
			"--allocate-node-cidrs=true", "--cluster-cidr=" + PodCIDR, "--service-cluster-ip-range=" + ServiceCIDR,
			// At the default rate the start-up of all controllers delays the default ServiceAccount by seconds.
			"--kube-api-qps=500", "--kube-api-burst=1000",
		}},
		{Name: "kube-scheduler", After: afterAPIServer, Args: []string{
			hyperkube, "kube-scheduler", "--kubeconfig=" + scheduler,
			"--authentication-kubeconfig=" + scheduler, "--authorization-kubeconfig=" + scheduler,
			"--bind-address=127.0.0.1", "--leader-elect=false",
		}},
		{Name: "kube-proxy", After: afterAPIServer, Args: []string{hyperkube, "kube-proxy", "--config=" + cfg("kube-proxy.yaml")}},
	}
	return p
}

func (o Options) planPath() string { return filepath.Join(o.configDir(), "plan.json") }

// makePrivateDirs makes the mount points, as far as the machine lacks them, and the directories
// that are shown there.
func makePrivateDirs(o Options) error {
	for _, dir := range privateDirs {
		if err := os.MkdirAll(o.privateDir(dir), 0o711); err != nil {
			return err
		}
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	return nil
}
