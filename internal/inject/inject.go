// Package inject turns a pod into the same pod with the tunnel sidecar: (pod, [Config]) -> pod. It does no I/O, knows
// no Service and no Mysocket, and never decides whether a pod should have a tunnel, only whether it can.
//
// The sidecar knows nothing but how to reach the gateway. Which sockets it serves, and on which port, comes over the
// gateway at run time, so that a changed annotation needs no new pod.
package inject

import (
	"slices"

	corev1 "k8s.io/api/core/v1"

	"github.com/mysocketio/mysocket-injector/internal/annotations"
)

// Names in an injected pod. All are reserved: what bears them is ours.
const (
	// ContainerName is the sidecar's container.
	ContainerName = "mysocket-tunnel"
	// VolumeName is the volume with the sidecar's token and the gateway's CA.
	VolumeName = "mysocket-gateway"
	// AdminPortName is the port with /metrics, /livez and /readyz.
	AdminPortName = "mysocket-admin"
	// MountPath is where the sidecar finds TokenFile and CAKey.
	MountPath = "/var/run/secrets/mysocket.io/gateway"
	// TokenFile is the ServiceAccount token for the gateway.
	TokenFile = "token"
	// CAKey is the key of the CA in Config.CAConfigMap, and its file name.
	CAKey = "ca.crt"
	// SidecarCommand is the program in the sidecar's image.
	SidecarCommand = "/tunnel-sidecar"
)

// Inject returns a copy of the pod with the sidecar in it, or why there can be none. It is idempotent: a sidecar that
// is there already, in whatever state another webhook left it, is rebuilt in its place. Nothing else of the pod
// changes, but for a preStop hook that sleeps, where one is asked for.
func Inject(pod *corev1.Pod, cfg Config) (*corev1.Pod, *Skip) {
	if skip := Check(pod); skip != nil {
		return nil, skip
	}
	cfg = cfg.withDefaults()
	pod = pod.DeepCopy()

	// A new sidecar goes first: ordinary init containers then run beside it, and the kubelet ends native sidecars in
	// reverse order, so that ours outlives the app's own.
	pod.Spec.InitContainers = put(pod.Spec.InitContainers, sidecar(pod, cfg), 0, isOurContainer)
	addPreStop(pod, cfg)
	pod.Spec.Volumes = put(pod.Spec.Volumes, gatewayVolume(cfg), len(pod.Spec.Volumes), isOurVolume)
	if pod.Annotations == nil {
		pod.Annotations = map[string]string{}
	}
	pod.Annotations[annotations.PodInjected] = cfg.Hash()
	return pod, nil
}

// put replaces the first of ours in the list and removes any others of ours; without one, it inserts item at the index.
func put[T any](list []T, item T, index int, ours func(T) bool) []T {
	at := slices.IndexFunc(list, ours)
	if at < 0 {
		return slices.Insert(list, index, item)
	}
	list[at] = item
	return slices.Concat(list[:at+1], slices.DeleteFunc(list[at+1:], ours))
}

func isOurContainer(c corev1.Container) bool { return c.Name == ContainerName }

func isOurVolume(v corev1.Volume) bool { return v.Name == VolumeName }

// HasSidecar tells whether the pod has the sidecar as a native one. Without restartPolicy Always, which another
// webhook that doesn't know the field can strip, it would be an init container that never ends.
func HasSidecar(pod *corev1.Pod) bool {
	return slices.ContainsFunc(pod.Spec.InitContainers, func(c corev1.Container) bool {
		return isOurContainer(c) && c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways
	})
}

// IsCurrent tells whether the pod has the sidecar that cfg would inject today.
func IsCurrent(pod *corev1.Pod, cfg Config) bool {
	return HasSidecar(pod) && pod.Annotations[annotations.PodInjected] == cfg.Hash()
}

// IsBroken tells whether the sidecar was put into the pod, and then another webhook made an ordinary init container of it
// (see HasSidecar): the pod never starts.
func IsBroken(pod *corev1.Pod) bool {
	return slices.ContainsFunc(pod.Spec.InitContainers, isOurContainer) && !HasSidecar(pod)
}
