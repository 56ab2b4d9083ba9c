// Package injecttest does to pods what other admission webhooks do to them between two calls of ours. It is for tests.
package injecttest

import (
	"math/rand/v2"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/mysocketio/mysocket-injector/internal/annotations"
	"github.com/mysocketio/mysocket-injector/internal/inject"
)

// Meddle changes a pod in some of the ways that are known of other webhooks: they reorder what they decode into maps, drop the
// fields that their version of the types does not know, put their own things first, and add what they add to every container. It
// never takes the reserved names for itself, which is a case of its own.
func Meddle(pod *corev1.Pod, r *rand.Rand) {
	for range 1 + r.IntN(6) {
		ways[r.IntN(len(ways))](pod, r)
	}
}

func shuffle[T any](r *rand.Rand, list []T) {
	r.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
}

// ours calls do for each container that has the sidecar's name.
func ours(pod *corev1.Pod, do func(*corev1.Container)) {
	for i := range pod.Spec.InitContainers {
		if c := &pod.Spec.InitContainers[i]; c.Name == inject.ContainerName {
			do(c)
		}
	}
}

// ofOurs makes a way of what is done to the sidecar.
func ofOurs(do func(*corev1.Container)) func(*corev1.Pod, *rand.Rand) {
	return func(pod *corev1.Pod, _ *rand.Rand) { ours(pod, do) }
}

// everywhere calls do for all containers, as injectors of environment and volumes do.
func everywhere(pod *corev1.Pod, do func(*corev1.Container)) {
	for i := range pod.Spec.InitContainers {
		do(&pod.Spec.InitContainers[i])
	}
	for i := range pod.Spec.Containers {
		do(&pod.Spec.Containers[i])
	}
}

var ways = []func(*corev1.Pod, *rand.Rand){
	// Order.
	func(pod *corev1.Pod, r *rand.Rand) { shuffle(r, pod.Spec.InitContainers) },
	func(pod *corev1.Pod, r *rand.Rand) { shuffle(r, pod.Spec.Containers) },
	func(pod *corev1.Pod, r *rand.Rand) { shuffle(r, pod.Spec.Volumes) },
	func(pod *corev1.Pod, r *rand.Rand) { everywhere(pod, func(c *corev1.Container) { shuffle(r, c.Env) }) },
	func(pod *corev1.Pod, r *rand.Rand) {
		everywhere(pod, func(c *corev1.Container) { shuffle(r, c.VolumeMounts) })
	},
	func(pod *corev1.Pod, r *rand.Rand) {
		pod.Spec.InitContainers = append([]corev1.Container{{Name: "mesh-init", Image: "example.com/mesh"}}, pod.Spec.InitContainers...)
		shuffle(r, pod.Spec.InitContainers[1:])
	},
	func(pod *corev1.Pod, _ *rand.Rand) {
		pod.Spec.Volumes = append([]corev1.Volume{{Name: "mesh"}}, pod.Spec.Volumes...)
	},
	// What goes.
	ofOurs(func(c *corev1.Container) { c.RestartPolicy = nil }),
	ofOurs(func(c *corev1.Container) { c.Env = nil }),
	ofOurs(func(c *corev1.Container) { c.Args = nil }),
	ofOurs(func(c *corev1.Container) { c.Ports = nil }),
	ofOurs(func(c *corev1.Container) { c.VolumeMounts = nil }),
	ofOurs(func(c *corev1.Container) { c.SecurityContext = nil }),
	ofOurs(func(c *corev1.Container) { c.Lifecycle = nil }),
	ofOurs(func(c *corev1.Container) { c.StartupProbe, c.ReadinessProbe, c.LivenessProbe = nil, nil, nil }),
	ofOurs(func(c *corev1.Container) { c.Resources = corev1.ResourceRequirements{} }),
	ofOurs(func(c *corev1.Container) { *c = corev1.Container{Name: c.Name, Image: c.Image} }),
	func(pod *corev1.Pod, _ *rand.Rand) { delete(pod.Annotations, annotations.PodInjected) },
	func(pod *corev1.Pod, _ *rand.Rand) { pod.Annotations = nil },
	func(pod *corev1.Pod, _ *rand.Rand) { dropOurs(pod) },
	func(pod *corev1.Pod, _ *rand.Rand) {
		pod.Spec.Volumes = without(pod.Spec.Volumes, func(v corev1.Volume) bool { return v.Name == inject.VolumeName })
	},
	func(pod *corev1.Pod, _ *rand.Rand) {
		for i := range pod.Spec.Volumes {
			if v := &pod.Spec.Volumes[i]; v.Name == inject.VolumeName {
				v.VolumeSource = corev1.VolumeSource{} // the sources that it does not know
			}
		}
	},
	// What comes.
	func(pod *corev1.Pod, _ *rand.Rand) {
		ours(pod, func(c *corev1.Container) { c.Image = "mirror.example.com/" + c.Image })
	},
	func(pod *corev1.Pod, _ *rand.Rand) {
		everywhere(pod, func(c *corev1.Container) {
			c.Env = append(c.Env, corev1.EnvVar{Name: "HTTPS_PROXY", Value: "http://proxy.example.com:3128"})
		})
	},
	func(pod *corev1.Pod, _ *rand.Rand) {
		everywhere(pod, func(c *corev1.Container) {
			c.VolumeMounts = append(c.VolumeMounts, corev1.VolumeMount{Name: "mesh", MountPath: "/mesh"})
		})
	},
	func(pod *corev1.Pod, _ *rand.Rand) {
		everywhere(pod, func(c *corev1.Container) {
			c.Resources.Requests = corev1.ResourceList{corev1.ResourceEphemeralStorage: resource.MustParse("1Gi")}
		})
	},
	func(pod *corev1.Pod, _ *rand.Rand) {
		ours(pod, func(c *corev1.Container) { pod.Spec.InitContainers = append(pod.Spec.InitContainers, *c.DeepCopy()) })
	},
	func(pod *corev1.Pod, _ *rand.Rand) {
		if n := len(pod.Spec.Containers); n > 0 {
			c := &pod.Spec.Containers[n-1]
			c.Ports = append(c.Ports, corev1.ContainerPort{ContainerPort: inject.DefaultAdminPort})
		}
	},
}

func without[T any](list []T, drop func(T) bool) []T {
	var out []T
	for _, item := range list {
		if !drop(item) {
			out = append(out, item)
		}
	}
	return out
}

func dropOurs(pod *corev1.Pod) {
	pod.Spec.InitContainers = without(pod.Spec.InitContainers, func(c corev1.Container) bool { return c.Name == inject.ContainerName })
}

// Never returns a copy of the pod as if it had never been ours.
func Never(pod *corev1.Pod) *corev1.Pod {
	pod = pod.DeepCopy()
	delete(pod.Annotations, annotations.PodInjected)
	dropOurs(pod)
	pod.Spec.Volumes = without(pod.Spec.Volumes, func(v corev1.Volume) bool { return v.Name == inject.VolumeName })
	return pod
}
