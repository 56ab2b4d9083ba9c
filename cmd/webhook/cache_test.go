package main

import (
	"crypto/sha256"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
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
	slimmer := newPodSlimmer(sharedKinds) // one for all: none may get what is another's
	for name, pod := range pods(t) {
		pod.Namespace, pod.Name, pod.UID, pod.ResourceVersion = "shop", "web-1", "uid", "7"
		pod.OwnerReferences = []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: "web", UID: "rs", Controller: ptr.To(true)}}
		now := metav1.Now()
		pod.DeletionTimestamp, pod.Status.Phase = &now, corev1.PodFailed
		before := pod.DeepCopy()
		got, err := slimmer.slim(pod)
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
	if got, err := newPodSlimmer(1).slim(stone); err != nil || got != stone {
		t.Errorf("got %v, %v", got, err)
	}
}

// replica is a pod of a workload, as the API server sends it: with storage of its own.
func replica(name string) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "shop", Name: name, UID: types.UID("uid-" + name), ResourceVersion: "7",
			Labels: map[string]string{"app": "web", "pod-template-hash": "5d4f8c7b9"}, Annotations: map[string]string{annotations.PodInjected: "hash", "other": name},
			OwnerReferences: []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: "web-5d4f8c7b9", UID: "rs", Controller: ptr.To(true)}},
		},
		Spec: corev1.PodSpec{
			NodeName: "node-of-" + name, NodeSelector: map[string]string{"disk": "fast"},
			InitContainers: []corev1.Container{{Name: inject.ContainerName, RestartPolicy: ptr.To(corev1.ContainerRestartPolicyAlways)}},
			Containers: []corev1.Container{{
				Name: "app", Ports: []corev1.ContainerPort{{Name: "http", ContainerPort: 8080}},
				Env:            []corev1.EnvVar{{Name: "WHO", Value: name}},
				VolumeMounts:   []corev1.VolumeMount{{Name: "data", MountPath: "/" + name}},
				ReadinessProbe: &corev1.Probe{ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: "/healthz", Port: intstr.FromInt32(8080)}}},
			}},
		},
		Status: corev1.PodStatus{Phase: corev1.PodRunning},
	}
}

func slimmed(t *testing.T, s *podSlimmer, pod *corev1.Pod) *corev1.Pod {
	t.Helper()
	out, err := s.slim(pod)
	if err != nil {
		t.Fatal(err)
	}
	slim, ok := out.(*corev1.Pod)
	if !ok {
		t.Fatalf("got %T", out)
	}
	return slim
}

// sharing tells what two pods share: what they have in common of their metadata, and of their spec.
func sharing(a, b *corev1.Pod) (meta, shape bool) {
	address := func(m map[string]string) uintptr { return reflect.ValueOf(m).Pointer() }
	meta = address(a.Labels) == address(b.Labels) && address(a.Annotations) == address(b.Annotations) && &a.OwnerReferences[0] == &b.OwnerReferences[0]
	shape = &a.Spec.Containers[0] == &b.Spec.Containers[0] && &a.Spec.InitContainers[0] == &b.Spec.InitContainers[0] && address(a.Spec.NodeSelector) == address(b.Spec.NodeSelector)
	return meta, shape
}

func TestPodsShareWhatTheyHaveInCommon(t *testing.T) {
	for name, tc := range map[string]struct {
		change      func(*corev1.Pod)
		meta, shape bool
	}{
		"a replica":                {func(*corev1.Pod) {}, true, true},
		"another phase":            {func(pod *corev1.Pod) { pod.Status.Phase = corev1.PodFailed }, true, true},
		"what nobody reads":        {func(pod *corev1.Pod) { pod.Spec.Containers[0].Image = "other" }, true, true},
		"another value":            {func(pod *corev1.Pod) { pod.Labels["app"] = "api" }, false, true},
		"a label more":             {func(pod *corev1.Pod) { pod.Labels["statefulset.kubernetes.io/pod-name"] = pod.Name }, false, true},
		"another hash":             {func(pod *corev1.Pod) { pod.Annotations[annotations.PodInjected] = "older" }, false, true},
		"another owner":            {func(pod *corev1.Pod) { pod.OwnerReferences[0].UID = "rs2" }, false, true},
		"not its controller":       {func(pod *corev1.Pod) { pod.OwnerReferences[0].Controller = nil }, false, true},
		"another port":             {func(pod *corev1.Pod) { pod.Spec.Containers[0].Ports[0].ContainerPort = 8081 }, true, false},
		"another probe":            {func(pod *corev1.Pod) { pod.Spec.Containers[0].ReadinessProbe.HTTPGet.Path = "/ready" }, true, false},
		"another volume":           {func(pod *corev1.Pod) { pod.Spec.Containers[0].VolumeMounts[0].Name = "other" }, true, false},
		"no restart policy":        {func(pod *corev1.Pod) { pod.Spec.InitContainers[0].RestartPolicy = nil }, true, false},
		"the host's network":       {func(pod *corev1.Pod) { pod.Spec.HostNetwork = true }, true, false},
		"another operating system": {func(pod *corev1.Pod) { pod.Spec.OS = &corev1.PodOS{Name: corev1.Windows} }, true, false},
		"other nodes":              {func(pod *corev1.Pod) { pod.Spec.NodeSelector["disk"] = "slow" }, true, false},
	} {
		t.Run(name, func(t *testing.T) {
			slimmer := newPodSlimmer(sharedKinds)
			first := slimmed(t, slimmer, replica("web-1"))
			was := first.DeepCopy()
			pod := replica("web-2")
			tc.change(pod)
			second := slimmed(t, slimmer, pod.DeepCopy())
			if meta, shape := sharing(first, second); meta != tc.meta || shape != tc.shape {
				t.Errorf("they share metadata %t, spec %t, want %t, %t", meta, shape, tc.meta, tc.shape)
			}
			if alone := slimPod(pod); !equality.Semantic.DeepEqual(second, alone) {
				t.Errorf("a pod that shares is %+v, one that does not is %+v", second, alone)
			}
			if !equality.Semantic.DeepEqual(first, was) {
				t.Errorf("the first pod was changed to %+v", first)
			}
			if meta, shape := sharing(second, slimmed(t, slimmer, second)); !meta || !shape {
				t.Error("a pod that is slim already lost what it shares")
			}
			copied := second.DeepCopy()
			if meta, shape := sharing(second, copied); meta || shape {
				t.Error("a copy shares what it may change")
			}
		})
	}
}

func TestRecentIsBounded(t *testing.T) {
	r := recent[int]{most: 2}
	hash := func(n byte) [sha256.Size]byte { return [sha256.Size]byte{n} }
	for i, step := range []struct {
		hash        byte
		value, want int
	}{
		{1, 10, 10}, {1, 11, 10},
		{2, 20, 20}, {3, 30, 30}, // 1 and 2 are the older now
		{1, 12, 10},              // and 1 one of the newer again
		{4, 40, 40}, {2, 21, 21}, // 2 is forgotten
		{1, 13, 10},
	} {
		if got := r.same(hash(step.hash), step.value); got != step.want {
			t.Errorf("step %d: %d, want %d", i, got, step.want)
		}
		if len(r.newer) > 2 || len(r.older) > 2 {
			t.Errorf("step %d: it remembers %d and %d", i, len(r.newer), len(r.older))
		}
	}
}

func TestServiceNames(t *testing.T) {
	got := strings.Join(serviceNames("ns", "a", "b"), " ")
	if want := "a.ns.svc a.ns.svc.cluster.local b.ns.svc b.ns.svc.cluster.local"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}
