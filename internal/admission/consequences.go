package admission

import (
	"context"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/mysocketio/mysocket-injector/internal/annotations"
	"github.com/mysocketio/mysocket-injector/internal/inject"
)

// namesInWarning bounds the workloads that a warning names.
const namesInWarning = 5

// podTemplateHash is the label that a Deployment puts on its pods. The name of their ReplicaSet ends in it.
const podTemplateHash = "pod-template-hash"

// consequences says what follows from a change of a Service that is right. What the cache can't tell is left out: the
// conditions of the Service will say it.
func (s *ServiceValidator) consequences(ctx context.Context, svc *corev1.Service, spec annotations.Spec, c change) []string {
	if !annotations.IsEnabled(svc) {
		return nil
	}
	var out []string
	if len(c.written) > 0 {
		are := "is"
		if len(c.written) > 1 {
			are = "are"
		}
		out = append(out, warning(fmt.Sprintf("%s %s written by the control plane and will be put right", strings.Join(c.written, ", "), are)))
	}
	ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
	defer cancel()
	labelled := true
	var ns corev1.Namespace
	if err := s.cluster.Get(ctx, client.ObjectKey{Name: svc.Namespace}, &ns); err != nil {
		s.log.DebugContext(ctx, "look for the namespace in the cache", "namespace", svc.Namespace, "err", err)
	} else if labelled = annotations.InjectionEnabled(&ns, s.namespace); !labelled {
		out = append(out, warning(annotations.NotLabelled(svc.Namespace)))
	}
	var pods corev1.PodList
	// The items are only read, so the cache need not copy them.
	if err := s.cluster.List(ctx, &pods, client.InNamespace(svc.Namespace), client.MatchingLabels(svc.Spec.Selector), client.UnsafeDisableDeepCopy); err != nil {
		s.log.DebugContext(ctx, "look for pods in the cache", "namespace", svc.Namespace, "err", err)
		return out
	}
	workloads, others := withoutSidecar(pods.Items)
	switch {
	case spec.Rollout == annotations.RolloutNever:
		out = append(out, enumerate(fmt.Sprintf("%s is %q, so restart yourself to get the tunnel sidecar: ", annotations.RolloutMode, annotations.RolloutNever), workloads)...)
	case labelled:
		out = append(out, enumerate("will be restarted to get the tunnel sidecar, unless paused or OnDelete: ", workloads)...)
	default:
		out = append(out, enumerate("will be restarted to get the tunnel sidecar once the namespace is labelled: ", workloads)...)
	}
	return append(out, enumerate("can't be restarted from here; make anew to get the tunnel sidecar: ", others)...)
}

func neverInjectedWarning(namespace string) string {
	return warning(fmt.Sprintf("pods of namespace %s are never injected, so the Service will have no tunnels; move the app to a namespace of its own", namespace))
}

// withoutSidecar names what owns the pods that lack the sidecar and could have it: workloads that the rollout controller
// restarts, and others. A Deployment is known by its pods' label, so that nobody has to be asked for the ReplicaSet.
func withoutSidecar(pods []corev1.Pod) (workloads, others []string) {
	for i := range pods {
		pod := &pods[i]
		if pod.DeletionTimestamp != nil || pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed {
			continue
		}
		if inject.HasSidecar(pod) || inject.IsBroken(pod) || inject.Check(pod) != nil {
			continue
		}
		owner := metav1.GetControllerOf(pod)
		if owner == nil {
			others = append(others, "Pod "+pod.Name)
			continue
		}
		switch owner.Kind {
		case "StatefulSet", "DaemonSet":
			workloads = append(workloads, owner.Kind+" "+owner.Name)
			continue
		case "ReplicaSet":
			if name, ok := strings.CutSuffix(owner.Name, "-"+pod.Labels[podTemplateHash]); ok && pod.Labels[podTemplateHash] != "" {
				workloads = append(workloads, "Deployment "+name)
				continue
			}
		}
		others = append(others, owner.Kind+" "+owner.Name)
	}
	slices.Sort(workloads)
	slices.Sort(others)
	return slices.Compact(workloads), slices.Compact(others)
}

// enumerate makes a warning that names the first few and counts the rest; none if there are no names.
func enumerate(text string, names []string) []string {
	if len(names) == 0 {
		return nil
	}
	const rest = ", and 1000000 more" // the longest; what follows has to fit, too
	text += names[0]
	n := 1
	for n < min(len(names), namesInWarning) && len(warningPrefix)+len(text)+len(", ")+len(names[n])+len(rest) <= warningLimit {
		text += ", " + names[n]
		n++
	}
	if more := len(names) - n; more > 0 {
		text += fmt.Sprintf(", and %d more", more)
	}
	return []string{warning(text)}
}
