package inject

import (
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"

	"github.com/mysocketio/mysocket-injector/internal/annotations"
)

// Reason is why a pod gets no sidecar: a CamelCase word that is at once the label of a metric, the reason of an Event
// and part of an admission warning.
type Reason string

// The reasons that lie in the pod itself.
const (
	ReasonMirrorPod    Reason = "MirrorPod"
	ReasonOptedOut     Reason = "OptedOut"
	ReasonHostNetwork  Reason = "HostNetwork"
	ReasonWindows      Reason = "Windows"
	ReasonNameConflict Reason = "NameConflict"
)

// ReasonNoService is a reason that only a caller that knows the Services can give.
const ReasonNoService Reason = "NoService"

// Skip says why a pod gets no sidecar.
type Skip struct {
	Reason Reason
	// Message is a sentence for the pod's owner: what is in the way, and what to do.
	Message string
}

// String returns the reason and the message.
func (s *Skip) String() string { return string(s.Reason) + ": " + s.Message }

// Check says why the pod can have no sidecar, or returns nil if it can. It also serves for the template of a workload,
// when nothing but metadata and spec is set.
func Check(pod *corev1.Pod) *Skip {
	switch spec := &pod.Spec; {
	case pod.Annotations[corev1.MirrorPodAnnotationKey] != "":
		return &Skip{ReasonMirrorPod, "a static pod belongs to its node's kubelet and can't have a ServiceAccount token; run the app from a Deployment"}
	case pod.Labels[annotations.PodInject] == "false":
		return &Skip{ReasonOptedOut, fmt.Sprintf(`the label %s is "false"; remove it to get a tunnel`, annotations.PodInject)}
	case spec.HostNetwork:
		return &Skip{ReasonHostNetwork, "with hostNetwork the pod has its node's address, and a tunnel would reach whatever listens there; set hostNetwork to false"}
	case isWindows(spec):
		return &Skip{ReasonWindows, "the tunnel sidecar runs on Linux only"}
	case slices.ContainsFunc(spec.Containers, isOurContainer):
		return &Skip{ReasonNameConflict, fmt.Sprintf("a container of the pod is named %s, the reserved name of the tunnel's; rename it", ContainerName)}
	case sharesOurVolume(spec):
		return &Skip{ReasonNameConflict, fmt.Sprintf("a container of the pod mounts a volume named %s, the reserved name of the tunnel's; rename it", VolumeName)}
	}
	return nil
}

func isWindows(spec *corev1.PodSpec) bool {
	return spec.OS != nil && spec.OS.Name == corev1.Windows || spec.NodeSelector[corev1.LabelOSStable] == string(corev1.Windows)
}

// sharesOurVolume tells whether a container other than ours would see the sidecar's token.
func sharesOurVolume(spec *corev1.PodSpec) bool {
	return slices.ContainsFunc(slices.Concat(spec.InitContainers, spec.Containers), func(c corev1.Container) bool {
		return !isOurContainer(c) && slices.ContainsFunc(c.VolumeMounts, func(m corev1.VolumeMount) bool { return m.Name == VolumeName })
	})
}
