// Package cluster brings up a real single-node Kubernetes on a Linux machine for the
// end-to-end tests and the demo, and takes it down again without a trace: etcd, the control
// plane, a kubelet on containerd and runc, kube-proxy and CoreDNS, built from Go modules.
//
// Everything runs in one private set of pid, mount and network namespaces whose first process
// is this program (see Inner): when that process ends, the kernel ends all the others and
// drops their mounts, links and netfilter rules. What remains outside is one veth end with two
// routes, a cgroup directory per hierarchy, a few empty mount points and the run directory;
// Down removes these.
//
// The package knows nothing of the product: it runs Kubernetes, builds images from Dockerfiles
// whose last stage is scratch, and loads them.
package cluster
