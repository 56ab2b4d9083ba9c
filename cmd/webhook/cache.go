package main

import (
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mysocketio/mysocket-injector/internal/annotations"
)

// slimPod keeps of a pod what the program reads: identity, labels, our annotation, owners, container names and ports,
// volume mounts by name (inject.Check looks for ours), readiness probes of injected pods, and how it is. A cluster's pods are most of what is cached.
func slimPod(obj any) (any, error) {
	pod, ok := obj.(*corev1.Pod)
	if !ok {
		return obj, nil // a tombstone
	}
	_, injected := pod.Annotations[annotations.PodInjected]
	slim := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Name:              pod.Name,
			Namespace:         pod.Namespace,
			UID:               pod.UID,
			ResourceVersion:   pod.ResourceVersion,
			CreationTimestamp: pod.CreationTimestamp,
			DeletionTimestamp: pod.DeletionTimestamp,
			Labels:            pod.Labels,
			OwnerReferences:   pod.OwnerReferences,
		},
		Spec: corev1.PodSpec{
			HostNetwork:    pod.Spec.HostNetwork,
			OS:             pod.Spec.OS,
			NodeSelector:   pod.Spec.NodeSelector,
			Containers:     slimContainers(pod.Spec.Containers, injected),
			InitContainers: slimContainers(pod.Spec.InitContainers, injected),
		},
		Status: corev1.PodStatus{Phase: pod.Status.Phase},
	}
	for _, key := range []string{annotations.PodInjected, corev1.MirrorPodAnnotationKey} {
		if v, ok := pod.Annotations[key]; ok {
			if slim.Annotations == nil {
				slim.Annotations = map[string]string{}
			}
			slim.Annotations[key] = v
		}
	}
	return slim, nil
}

func slimContainers(in []corev1.Container, probes bool) []corev1.Container {
	var out []corev1.Container
	for _, c := range in {
		s := corev1.Container{Name: c.Name, Ports: c.Ports, RestartPolicy: c.RestartPolicy}
		if probes && c.ReadinessProbe != nil && c.ReadinessProbe.Exec == nil {
			s.ReadinessProbe = c.ReadinessProbe
		}
		for _, m := range c.VolumeMounts {
			s.VolumeMounts = append(s.VolumeMounts, corev1.VolumeMount{Name: m.Name})
		}
		out = append(out, s)
	}
	return out
}
