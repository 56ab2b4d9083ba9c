package main

import (
	"crypto/sha256"
	"sync"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mysocketio/mysocket-injector/internal/annotations"
)

// sharedKinds bounds what a podSlimmer remembers: twice as many of each at most, with about 3 kB each.
const sharedKinds = 4096

// podSlimmer makes the pods that the informer keeps small. What the pods of a workload have in common they share: cached
// objects are only read, and a copy of one (DeepCopy) shares nothing.
type podSlimmer struct {
	mu     sync.Mutex
	metas  recent[metav1.ObjectMeta] // labels, annotations, owners
	shapes recent[corev1.PodSpec]
}

func newPodSlimmer(kinds int) *podSlimmer {
	return &podSlimmer{metas: recent[metav1.ObjectMeta]{most: kinds}, shapes: recent[corev1.PodSpec]{most: kinds}}
}

// slim is the informer's transform.
func (s *podSlimmer) slim(obj any) (any, error) {
	pod, ok := obj.(*corev1.Pod)
	if !ok {
		return obj, nil // a tombstone
	}
	pod = slimPod(pod)
	common := metav1.ObjectMeta{Labels: pod.Labels, Annotations: pod.Annotations, OwnerReferences: pod.OwnerReferences}
	// Both encodings are deterministic: the keys of maps are sorted.
	meta, err := common.Marshal()
	if err != nil {
		return nil, err
	}
	shape, err := pod.Spec.Marshal()
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	common = s.metas.same(sha256.Sum256(meta), common)
	pod.Labels, pod.Annotations, pod.OwnerReferences = common.Labels, common.Annotations, common.OwnerReferences
	pod.Spec = s.shapes.same(sha256.Sum256(shape), pod.Spec)
	return pod, nil
}

// recent remembers the values that were asked for last, by a hash of what they hold. The zero map is ready.
type recent[T any] struct {
	most         int // in each of the two; when the newer is full, the older is forgotten
	newer, older map[[sha256.Size]byte]T
}

// same returns the value that it remembers under the hash, else the one given, which it remembers then.
func (r *recent[T]) same(hash [sha256.Size]byte, fresh T) T {
	if known, ok := r.newer[hash]; ok {
		return known
	}
	if known, ok := r.older[hash]; ok {
		fresh = known
	}
	if r.newer == nil || len(r.newer) >= r.most {
		r.newer, r.older = map[[sha256.Size]byte]T{}, r.newer
	}
	r.newer[hash] = fresh
	return fresh
}

// slimPod keeps of a pod what the program reads: identity, labels, our annotation, owners, container names and ports,
// volume mounts by name (inject.Check looks for ours), readiness probes of injected pods, and how it is. A cluster's pods are most of what is cached.
func slimPod(pod *corev1.Pod) *corev1.Pod {
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
	return slim
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
