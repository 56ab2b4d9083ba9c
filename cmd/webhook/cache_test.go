package main

import (
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	toolscache "k8s.io/client-go/tools/cache"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/yaml"

	"github.com/mysocketio/mysocket-injector/internal/annotations"
	"github.com/mysocketio/mysocket-injector/internal/inject"
)

// pods are the golden pods of package inject, before and after injection, and one pod for every reason not to inject.
func pods(t *testing.T) map[string]*corev1.Pod {
	t.Helper()
	files, err := filepath.Glob("../../internal/inject/testdata/*.yaml")
	if err != nil || len(files) < 10 {
		t.Fatalf("golden pods %v, %v", files, err)
	}
	out := map[string]*corev1.Pod{}
	for _, name := range files {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		pod := &corev1.Pod{}
		if err := yaml.Unmarshal(text, pod); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		out[strings.TrimSuffix(filepath.Base(name), ".yaml")] = pod
	}
	mounts := []corev1.VolumeMount{{Name: "other"}, {Name: inject.VolumeName}}
	for name, change := range map[string]func(*corev1.Pod){
		"mirror":        func(pod *corev1.Pod) { pod.Annotations = map[string]string{corev1.MirrorPodAnnotationKey: "x"} },
		"opted out":     func(pod *corev1.Pod) { pod.Labels = map[string]string{annotations.PodInject: "false"} },
		"host network":  func(pod *corev1.Pod) { pod.Spec.HostNetwork = true },
		"windows":       func(pod *corev1.Pod) { pod.Spec.OS = &corev1.PodOS{Name: corev1.Windows} },
		"windows node":  func(pod *corev1.Pod) { pod.Spec.NodeSelector = map[string]string{corev1.LabelOSStable: "windows"} },
		"name conflict": func(pod *corev1.Pod) { pod.Spec.Containers[0].Name = inject.ContainerName },
		"shared volume": func(pod *corev1.Pod) { pod.Spec.Containers[0].VolumeMounts = mounts },
		"shared with init": func(pod *corev1.Pod) {
			pod.Spec.InitContainers = []corev1.Container{{Name: "init", VolumeMounts: mounts}}
		},
		"broken sidecar": func(pod *corev1.Pod) { pod.Spec.InitContainers = []corev1.Container{{Name: inject.ContainerName}} },
		"ports in sidecars": func(pod *corev1.Pod) {
			ports := []corev1.ContainerPort{{Name: "web", ContainerPort: 1}, {Name: "quic", ContainerPort: 2, Protocol: corev1.ProtocolUDP}}
			pod.Spec.InitContainers = []corev1.Container{{Name: "init", Ports: ports}, {Name: "proxy", RestartPolicy: ptr.To(corev1.ContainerRestartPolicyAlways), Ports: ports}}
		},
	} {
		pod := &corev1.Pod{Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "app"}}}}
		change(pod)
		out[name] = pod
	}
	return out
}

// TestSlimPodKeepsWhatIsRead asks a pod before and after slimming all that the program ever asks of one.
func TestSlimPodKeepsWhatIsRead(t *testing.T) {
	cfg := inject.Config{Image: "example.com/sidecar"}
	skipped, probes := 0, 0
	for name, pod := range pods(t) {
		pod.Namespace, pod.Name, pod.UID, pod.ResourceVersion = "shop", "web-1", "uid", "7"
		pod.OwnerReferences = []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: "web", UID: "rs", Controller: ptr.To(true)}}
		now := metav1.Now()
		pod.DeletionTimestamp, pod.Status.Phase = &now, corev1.PodFailed
		before := pod.DeepCopy()
		got, err := slimPod(pod)
		slim, ok := got.(*corev1.Pod)
		if err != nil || !ok {
			t.Fatalf("%s: %T, %v", name, got, err)
		}
		if !equality.Semantic.DeepEqual(pod, before) {
			t.Errorf("%s: the argument was changed", name)
		}
		if a, b := inject.Check(pod), inject.Check(slim); (a == nil) != (b == nil) || a != nil && *a != *b {
			t.Errorf("%s: Check %v, slim %v", name, a, b)
		} else if a != nil {
			skipped++
		}
		if inject.HasSidecar(pod) != inject.HasSidecar(slim) || inject.IsCurrent(pod, cfg) != inject.IsCurrent(slim, cfg) || inject.IsBroken(pod) != inject.IsBroken(slim) {
			t.Errorf("%s: HasSidecar, IsCurrent or IsBroken differ", name)
		}
		if pod.Annotations[annotations.PodInjected] != slim.Annotations[annotations.PodInjected] {
			t.Errorf("%s: the hash of the sidecar is lost", name)
		}
		targets := []intstr.IntOrString{{}, intstr.FromInt32(8080), intstr.FromString("nowhere")}
		for _, list := range [][]corev1.Container{pod.Spec.Containers, pod.Spec.InitContainers} {
			for _, c := range list {
				for _, p := range c.Ports {
					targets = append(targets, intstr.FromString(p.Name))
				}
			}
		}
		for _, target := range targets {
			port := corev1.ServicePort{Port: 80, TargetPort: target}
			a, errA := annotations.TargetPort(port, &pod.Spec)
			b, errB := annotations.TargetPort(port, &slim.Spec)
			if a != b || (errA == nil) != (errB == nil) {
				t.Errorf("%s: TargetPort %s is %d, %v; slim %d, %v", name, target.String(), a, errA, b, errB)
			}
		}
		for _, selector := range []map[string]string{maps.Clone(pod.Labels), {"nobody": "has"}} {
			svc := &corev1.Service{Spec: corev1.ServiceSpec{Selector: selector}}
			if annotations.Selects(svc, pod.Labels) != annotations.Selects(svc, slim.Labels) {
				t.Errorf("%s: Selects differs for %v", name, selector)
			}
		}
		if slim.Namespace != "shop" || slim.Name != "web-1" || slim.UID != "uid" || slim.ResourceVersion != "7" || !slim.DeletionTimestamp.Equal(&now) ||
			slim.Status.Phase != corev1.PodFailed || metav1.GetControllerOf(slim) == nil {
			t.Errorf("%s: identity or state is lost: %+v", name, slim)
		}
		for _, c := range slim.Spec.Containers {
			if c.Image != "" || c.Env != nil || c.Command != nil || c.Resources.Limits != nil {
				t.Errorf("%s: kept what nobody reads: %+v", name, c)
			}
		}
		_, injected := pod.Annotations[annotations.PodInjected]
		for i, c := range pod.Spec.Containers {
			want := c.ReadinessProbe
			if !injected || want != nil && want.Exec != nil {
				want = nil
			}
			if !equality.Semantic.DeepEqual(slim.Spec.Containers[i].ReadinessProbe, want) {
				t.Errorf("%s: the readiness probe of %s is %v, want %v", name, c.Name, slim.Spec.Containers[i].ReadinessProbe, want)
			}
			if want != nil {
				probes++
			}
		}
		if slim.Spec.Volumes != nil || slim.ManagedFields != nil {
			t.Errorf("%s: kept what nobody reads", name)
		}
	}
	if probes < 3 {
		t.Errorf("%d pods were injected and have a readiness probe; is every kind here?", probes)
	}
	if skipped < 8 {
		t.Errorf("%d pods were skipped; is every reason here?", skipped)
	}
}

func TestSlimPodLeavesTombstonesAlone(t *testing.T) {
	stone := toolscache.DeletedFinalStateUnknown{Key: "shop/web-1"}
	if got, err := slimPod(stone); err != nil || got != stone {
		t.Errorf("got %v, %v", got, err)
	}
}

func TestServiceNames(t *testing.T) {
	got := strings.Join(serviceNames("ns", "a", "b"), " ")
	if want := "a.ns.svc a.ns.svc.cluster.local b.ns.svc b.ns.svc.cluster.local"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}
