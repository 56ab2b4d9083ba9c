package inject

import (
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/yaml"

	"github.com/mysocketio/mysocket-injector/internal/annotations"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func testConfig() Config {
	return Config{
		Image:      "registry.example/tunnel-sidecar:1.0",
		GatewayURL: "https://mysocket-gateway.mysocket-system.svc:8443",
		Resources: corev1.ResourceRequirements{
			Requests: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("10m"), corev1.ResourceMemory: resource.MustParse("24Mi")},
			Limits:   corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("500m"), corev1.ResourceMemory: resource.MustParse("64Mi")},
		},
	}
}

func readPod(t testing.TB, file string) *corev1.Pod {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	pod := &corev1.Pod{}
	if err := yaml.UnmarshalStrict(data, pod); err != nil {
		t.Fatalf("%s: %v", file, err)
	}
	return pod
}

func goldenInputs(t testing.TB) []string {
	t.Helper()
	files, err := filepath.Glob("testdata/*.in.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("no input pods in testdata (%v)", err)
	}
	return files
}

func TestGolden(t *testing.T) {
	cfg := testConfig()
	for _, file := range goldenInputs(t) {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".in.yaml"), func(t *testing.T) {
			in := readPod(t, file)
			before := in.DeepCopy()
			got, skip := Inject(in, cfg)
			if skip != nil {
				t.Fatalf("skipped: %s", skip)
			}
			if !apiequality.Semantic.DeepEqual(in, before) {
				t.Error("Inject changed its argument")
			}
			if !HasSidecar(got) || !IsCurrent(got, cfg) {
				t.Errorf("HasSidecar %v, IsCurrent %v after injection", HasSidecar(got), IsCurrent(got, cfg))
			}
			again, skip := Inject(got, cfg)
			if skip != nil || !apiequality.Semantic.DeepEqual(got, again) {
				t.Errorf("injecting again is not idempotent (skip %v)", skip)
			}
			onlyOursChanged(t, in, got)

			golden := strings.TrimSuffix(file, ".in.yaml") + ".out.yaml"
			text, err := yaml.Marshal(got)
			if err != nil {
				t.Fatal(err)
			}
			if *update {
				if err := os.WriteFile(golden, text, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if string(want) != string(text) {
				t.Errorf("the pod differs from %s; run the test with -update and look at the difference:\n%s", golden, text)
			}
		})
	}
}

// onlyOursChanged takes what is ours out of both pods and compares the rest.
func onlyOursChanged(t *testing.T, before, after *corev1.Pod) {
	t.Helper()
	rest := func(pod *corev1.Pod) *corev1.Pod {
		pod = pod.DeepCopy()
		delete(pod.Annotations, annotations.PodInjected)
		var containers []corev1.Container
		for _, c := range pod.Spec.InitContainers {
			if !isOurContainer(c) {
				containers = append(containers, c)
			}
		}
		pod.Spec.InitContainers = containers
		for i := range pod.Spec.Containers {
			// A sleep is ours to add, and only when it is asked for.
			l := pod.Spec.Containers[i].Lifecycle
			if pod.Annotations[annotations.PodPreStopSleep] == "" || l == nil || l.PreStop == nil || l.PreStop.Sleep == nil {
				continue
			}
			if l.PreStop = nil; *l == (corev1.Lifecycle{}) {
				pod.Spec.Containers[i].Lifecycle = nil
			}
		}
		var volumes []corev1.Volume
		for _, v := range pod.Spec.Volumes {
			if !isOurVolume(v) {
				volumes = append(volumes, v)
			}
		}
		pod.Spec.Volumes = volumes
		return pod
	}
	if b, a := rest(before), rest(after); !apiequality.Semantic.DeepEqual(b, a) {
		t.Errorf("something that isn't ours changed:\nbefore %+v\nafter  %+v", b, a)
	}
}

func TestSkips(t *testing.T) {
	app := corev1.Container{Name: "web"}
	for _, tc := range []struct {
		name string
		pod  corev1.Pod
		want Reason
	}{
		{"mirror pod", corev1.Pod{Spec: corev1.PodSpec{HostNetwork: true}}, ReasonMirrorPod},
		{"opted out", corev1.Pod{}, ReasonOptedOut},
		{"host network", corev1.Pod{Spec: corev1.PodSpec{HostNetwork: true}}, ReasonHostNetwork},
		{"windows by os", corev1.Pod{Spec: corev1.PodSpec{OS: &corev1.PodOS{Name: corev1.Windows}}}, ReasonWindows},
		{"windows by node selector", corev1.Pod{Spec: corev1.PodSpec{NodeSelector: map[string]string{"kubernetes.io/os": "windows"}}}, ReasonWindows},
		{"name of our container", corev1.Pod{Spec: corev1.PodSpec{Containers: []corev1.Container{app, {Name: ContainerName}}}}, ReasonNameConflict},
		{"our volume in another container", corev1.Pod{Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "web", VolumeMounts: []corev1.VolumeMount{{Name: VolumeName}}}}}}, ReasonNameConflict},
		{"linux", corev1.Pod{Spec: corev1.PodSpec{OS: &corev1.PodOS{Name: corev1.Linux}, Containers: []corev1.Container{app}}}, ""},
		{"opted in explicitly", corev1.Pod{Spec: corev1.PodSpec{Containers: []corev1.Container{app}}}, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			switch tc.name {
			case "mirror pod":
				tc.pod.Annotations = map[string]string{corev1.MirrorPodAnnotationKey: "abc"}
			case "opted out":
				tc.pod.Labels = map[string]string{annotations.PodInject: "false"}
			case "opted in explicitly":
				tc.pod.Labels = map[string]string{annotations.PodInject: "true"}
			}
			got, skip := Inject(&tc.pod, testConfig())
			switch {
			case tc.want == "" && (skip != nil || got == nil):
				t.Fatalf("skipped: %v", skip)
			case tc.want == "":
			case skip == nil || skip.Reason != tc.want || got != nil:
				t.Fatalf("got skip %v, want %s", skip, tc.want)
			case len(skip.Message) < 20 || !strings.HasPrefix(skip.String(), string(tc.want)+": "):
				t.Errorf("not a sentence for a person: %q", skip.String())
			}
		})
	}
}

func TestHasSidecarAndIsCurrent(t *testing.T) {
	cfg := testConfig()
	injected, skip := Inject(readPod(t, "testdata/deployment.in.yaml"), cfg)
	if skip != nil {
		t.Fatal(skip)
	}
	for _, tc := range []struct {
		name         string
		change       func(*corev1.Pod)
		has, current bool
	}{
		{"as injected", func(*corev1.Pod) {}, true, true},
		{"restartPolicy stripped", func(p *corev1.Pod) { p.Spec.InitContainers[0].RestartPolicy = nil }, false, false},
		{"restartPolicy of another value", func(p *corev1.Pod) {
			p.Spec.InitContainers[0].RestartPolicy = ptr.To(corev1.ContainerRestartPolicyNever)
		}, false, false},
		{"container removed", func(p *corev1.Pod) { p.Spec.InitContainers = nil }, false, false},
		{"older hash", func(p *corev1.Pod) { p.Annotations[annotations.PodInjected] = "0123456789ab" }, true, false},
		{"no hash", func(p *corev1.Pod) { p.Annotations = nil }, true, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			pod := injected.DeepCopy()
			tc.change(pod)
			if has, current := HasSidecar(pod), IsCurrent(pod, cfg); has != tc.has || current != tc.current {
				t.Errorf("HasSidecar %v, IsCurrent %v, want %v, %v", has, current, tc.has, tc.current)
			}
			if broken := IsBroken(pod); broken != strings.HasPrefix(tc.name, "restartPolicy") {
				t.Errorf("IsBroken %v", broken)
			}
			again, skip := Inject(pod, cfg)
			if skip != nil || !apiequality.Semantic.DeepEqual(again, injected) {
				t.Errorf("injection does not repair it (skip %v)", skip)
			}
		})
	}
}

// FuzzJSON gives Inject whatever decodes as a pod.
func FuzzJSON(f *testing.F) {
	for _, file := range goldenInputs(f) {
		data, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		json, err := yaml.YAMLToJSON(data)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(json)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		pod := &corev1.Pod{}
		if yaml.Unmarshal(data, pod) != nil {
			return
		}
		checkInvariants(t, pod)
	})
}

// FuzzPod builds pods of the parts that Inject looks at; each byte is a choice.
func FuzzPod(f *testing.F) {
	f.Add([]byte("any bytes will do"))
	f.Add([]byte{3, 2, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20})
	f.Fuzz(func(t *testing.T, data []byte) { checkInvariants(t, (&choices{data}).pod()) })
}

func checkInvariants(t *testing.T, pod *corev1.Pod) {
	cfg := testConfig()
	once, skip := Inject(pod, cfg)
	if skip != nil {
		if once != nil || skip.Reason == "" || skip.Message == "" {
			t.Fatalf("a half skip: %v %v", once, skip)
		}
		return
	}
	if !IsCurrent(once, cfg) {
		t.Error("not current after injection")
	}
	twice, skip := Inject(once, cfg)
	if skip != nil || !apiequality.Semantic.DeepEqual(once, twice) {
		t.Errorf("not idempotent (skip %v)", skip)
	}
	onlyOursChanged(t, pod, once)
	sidecars := 0
	for _, c := range once.Spec.InitContainers {
		if isOurContainer(c) {
			sidecars++
			if p := c.Ports[0].ContainerPort; p < minAdminPort || p > maxAdminPort {
				t.Errorf("admin port %d", p)
			}
		}
	}
	if sidecars != 1 {
		t.Errorf("%d sidecars", sidecars)
	}
}

// choices makes a pod of bytes.
type choices struct{ data []byte }

func (c *choices) upTo(n int) int {
	if len(c.data) == 0 {
		return 0
	}
	b := c.data[0]
	c.data = c.data[1:]
	return int(b) % n
}

func (c *choices) pod() *corev1.Pod {
	pod := &corev1.Pod{}
	for range c.upTo(4) {
		pod.Spec.InitContainers = append(pod.Spec.InitContainers, c.container())
	}
	for range c.upTo(3) {
		pod.Spec.Containers = append(pod.Spec.Containers, c.container())
	}
	for range c.upTo(4) {
		v := corev1.Volume{Name: []string{VolumeName, "data", "token"}[c.upTo(3)]}
		if c.upTo(2) == 1 {
			v.Projected = &corev1.ProjectedVolumeSource{DefaultMode: ptr.To([]int32{0o400, 0o644}[c.upTo(2)]),
				Sources: []corev1.VolumeProjection{{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{}}}}
		}
		pod.Spec.Volumes = append(pod.Spec.Volumes, v)
	}
	if c.upTo(2) == 1 {
		pod.Annotations = map[string]string{annotations.PodInjected: "old"}
	}
	if c.upTo(2) == 1 {
		pod.Spec.TerminationGracePeriodSeconds = ptr.To([]int64{0, 1, 5, 6, 30, 1 << 62, -1 << 63}[c.upTo(7)])
	}
	if c.upTo(2) == 1 {
		pod.Spec.SecurityContext = &corev1.PodSecurityContext{RunAsUser: ptr.To(int64(c.upTo(3)))}
	}
	if c.upTo(2) == 1 {
		pod.Spec.Resources = &corev1.ResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("1")}}
	}
	return pod
}

func (c *choices) container() corev1.Container {
	con := corev1.Container{Name: []string{"web", ContainerName, "b"}[c.upTo(3)]}
	if c.upTo(2) == 1 {
		con.RestartPolicy = ptr.To(corev1.ContainerRestartPolicyAlways)
	}
	for range c.upTo(4) {
		con.Ports = append(con.Ports, corev1.ContainerPort{ContainerPort: []int32{14180, 14181, 80, 65535, -1}[c.upTo(5)]})
	}
	if c.upTo(4) == 1 {
		con.VolumeMounts = []corev1.VolumeMount{{Name: VolumeName}}
	}
	if c.upTo(3) == 1 {
		con.SecurityContext = &corev1.SecurityContext{RunAsUser: ptr.To(int64(c.upTo(3)))}
	}
	return con
}

func BenchmarkInject(b *testing.B) {
	pod, cfg := readPod(b, "testdata/deployment.in.yaml"), testConfig()
	for b.Loop() {
		if _, skip := Inject(pod, cfg); skip != nil {
			b.Fatal(skip)
		}
	}
}
