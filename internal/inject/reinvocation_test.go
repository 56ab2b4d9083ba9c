package inject_test

import (
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	"sigs.k8s.io/yaml"

	"github.com/mysocketio/mysocket-injector/internal/inject"
	"github.com/mysocketio/mysocket-injector/internal/inject/injecttest"
)

func config() inject.Config {
	return inject.Config{Image: "registry.example/tunnel-sidecar:1.0", GatewayURL: "https://mysocket-gateway.mysocket-system.svc:8443"}
}

// golden are the input pods, by name.
func golden(t testing.TB) map[string]*corev1.Pod {
	t.Helper()
	files, err := filepath.Glob("testdata/*.in.yaml")
	if err != nil || len(files) < 25 {
		t.Fatalf("%d golden pods, %v", len(files), err)
	}
	out := map[string]*corev1.Pod{}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		pod := &corev1.Pod{}
		if err := yaml.UnmarshalStrict(data, pod); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		out[strings.TrimSuffix(filepath.Base(file), ".in.yaml")] = pod
	}
	return out
}

// TestAfterOtherWebhooks injects each golden pod, lets other webhooks meddle with it, and injects again, several times.
func TestAfterOtherWebhooks(t *testing.T) {
	for name, pod := range golden(t) {
		t.Run(name, func(t *testing.T) {
			for seed := range uint64(20) {
				checkReinvocations(t, pod, seed)
				if t.Failed() {
					t.Fatalf("seed %d", seed)
				}
			}
		})
	}
}

// FuzzAfterOtherWebhooks does the same with other seeds.
func FuzzAfterOtherWebhooks(f *testing.F) {
	pods := golden(f)
	var names []string
	for name := range pods {
		names = append(names, name)
	}
	slices.Sort(names)
	f.Add(uint(0), uint64(0))
	f.Fuzz(func(t *testing.T, which uint, seed uint64) {
		checkReinvocations(t, pods[names[which%uint(len(names))]], seed)
	})
}

func checkReinvocations(t *testing.T, pod *corev1.Pod, seed uint64) {
	t.Helper()
	r := rand.New(rand.NewPCG(seed, 0))
	pod, skip := inject.Inject(pod, config())
	if skip != nil {
		t.Fatal(skip)
	}
	for range 3 {
		injecttest.Meddle(pod, r)
		again, skip := inject.Inject(pod, config())
		if skip != nil {
			t.Fatal(skip)
		}
		if !inject.IsCurrent(again, config()) || inject.IsBroken(again) {
			t.Error("it does not have the current sidecar")
		}
		// All that is not ours is as the others left it.
		if a, b := injecttest.Never(pod), injecttest.Never(again); !apiequality.Semantic.DeepEqual(a, b) {
			t.Errorf("something that is not ours changed:\n%+v\n%+v", a, b)
		}
		// And what is ours is as it would be in a pod that comes for the first time.
		first, skip := inject.Inject(injecttest.Never(pod), config())
		if skip != nil {
			t.Fatal(skip)
		}
		if a, b := sidecars(first), sidecars(again); len(b) != 1 || !apiequality.Semantic.DeepEqual(a, b) {
			t.Errorf("sidecars, at first:\n%+v\nand again:\n%+v", a, b)
		}
		if a, b := volumes(first), volumes(again); len(b) != 1 || !apiequality.Semantic.DeepEqual(a, b) {
			t.Errorf("volumes, at first:\n%+v\nand again:\n%+v", a, b)
		}
		pod = again
	}
}

func sidecars(pod *corev1.Pod) []corev1.Container {
	return slices.DeleteFunc(slices.Clone(pod.Spec.InitContainers), func(c corev1.Container) bool { return c.Name != inject.ContainerName })
}

func volumes(pod *corev1.Pod) []corev1.Volume {
	return slices.DeleteFunc(slices.Clone(pod.Spec.Volumes), func(v corev1.Volume) bool { return v.Name != inject.VolumeName })
}
