package admission

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	jsonpatch "gopkg.in/evanphx/json-patch.v4"
	admissionv1 "k8s.io/api/admission/v1"
	corev1 "k8s.io/api/core/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/webhook/admission"
	"sigs.k8s.io/yaml"

	"github.com/mysocketio/mysocket-injector/internal/annotations"
	"github.com/mysocketio/mysocket-injector/internal/index"
	"github.com/mysocketio/mysocket-injector/internal/inject"
	"github.com/mysocketio/mysocket-injector/internal/inject/injecttest"
)

const namespace = "shop"

func sidecarConfig() inject.Config {
	return inject.Config{
		Image:      "registry.example/tunnel-sidecar:1.0",
		GatewayURL: "https://gateway.mysocket-system.svc:8443",
		Resources:  corev1.ResourceRequirements{Limits: corev1.ResourceList{corev1.ResourceMemory: resource.MustParse("64Mi")}},
	}
}

func service(name string, enabled string, selector ...string) *corev1.Service {
	svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name}}
	if enabled != "" {
		svc.Annotations = map[string]string{annotations.Enabled: enabled}
	}
	if len(selector) > 0 {
		svc.Spec.Selector = map[string]string{"app": selector[0]}
	}
	return svc
}

func webPod() *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{GenerateName: "web-", Labels: map[string]string{"app": "web"}},
		Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "web", Image: "registry.example/web:1"}}},
	}
}

// reader makes a client as the informer cache is, or the API server.
func reader(services ...client.Object) client.Reader {
	return fake.NewClientBuilder().WithObjects(services...).WithIndex(&corev1.Service{}, string(indexOfServices), index.Keys).Build()
}

// readerFunc is a client.Reader whose List is the function.
type readerFunc func(ctx context.Context, list *corev1.ServiceList, opts *client.ListOptions) error

func (readerFunc) Get(context.Context, client.ObjectKey, client.Object, ...client.GetOption) error {
	return errors.New("nobody should read single objects")
}

func (f readerFunc) List(ctx context.Context, list client.ObjectList, opts ...client.ListOption) error {
	return f(ctx, list.(*corev1.ServiceList), (&client.ListOptions{}).ApplyOptions(opts))
}

func newMutator(t testing.TB, cached, live client.Reader) (*PodMutator, *prometheus.Registry) {
	t.Helper()
	registry := prometheus.NewRegistry()
	m, err := NewPodMutator(Options{Services: cached, LiveServices: live, Sidecar: sidecarConfig(), Registerer: registry})
	if err != nil {
		t.Fatal(err)
	}
	return m, registry
}

func reviewOf(t testing.TB, pod any) []byte {
	t.Helper()
	raw, err := json.Marshal(pod)
	if err != nil {
		t.Fatal(err)
	}
	body, err := json.Marshal(admissionv1.AdmissionReview{
		TypeMeta: metav1.TypeMeta{APIVersion: "admission.k8s.io/v1", Kind: "AdmissionReview"},
		Request: &admissionv1.AdmissionRequest{
			UID:       types.UID("0f4b5a2e"),
			Kind:      metav1.GroupVersionKind{Version: "v1", Kind: "Pod"},
			Resource:  metav1.GroupVersionResource{Version: "v1", Resource: "pods"},
			Namespace: namespace,
			Operation: admissionv1.Create,
			Object:    runtime.RawExtension{Raw: raw},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	return body
}

// post sends a body through controller-runtime's webhook as the API server would.
func post(t testing.TB, m *PodMutator, body []byte) *admissionv1.AdmissionResponse {
	t.Helper()
	request := httptest.NewRequestWithContext(context.Background(), http.MethodPost, "/mutate-pods", bytes.NewReader(body))
	request.Header.Set("Content-Type", "application/json")
	recorder := httptest.NewRecorder()
	(&admission.Webhook{Handler: m}).ServeHTTP(recorder, request)
	answer, err := io.ReadAll(recorder.Result().Body)
	if err != nil {
		t.Fatal(err)
	}
	var review admissionv1.AdmissionReview
	if err := json.Unmarshal(answer, &review); err != nil || review.Response == nil {
		t.Fatalf("the answer is no AdmissionReview: %v\n%s", err, answer)
	}
	return review.Response
}

// patched applies the response's patch, with the API server's library, to an object.
func patched(t testing.TB, response *admissionv1.AdmissionResponse, object any) []byte {
	t.Helper()
	raw, err := json.Marshal(object)
	if err != nil {
		t.Fatal(err)
	}
	if len(response.Patch) == 0 {
		return raw
	}
	if response.PatchType == nil || *response.PatchType != admissionv1.PatchTypeJSONPatch {
		t.Fatalf("patch type %v", response.PatchType)
	}
	patch, err := jsonpatch.DecodePatch(response.Patch)
	if err != nil {
		t.Fatal(err)
	}
	out, err := patch.Apply(raw)
	if err != nil {
		t.Fatalf("the patch does not apply: %v\n%s", err, response.Patch)
	}
	return out
}

func count(t testing.TB, registry *prometheus.Registry, name string, labels ...string) float64 {
	t.Helper()
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, family := range families {
		if family.GetName() != name {
			continue
		}
		for _, metric := range family.GetMetric() {
			var have []string
			for _, l := range metric.GetLabel() {
				have = append(have, l.GetName()+"="+l.GetValue())
			}
			if strings.Join(have, ",") == strings.Join(labels, ",") {
				if h := metric.GetHistogram(); h != nil {
					return float64(h.GetSampleCount())
				}
				return metric.GetCounter().GetValue()
			}
		}
	}
	return 0
}

func TestWhichPodsGetASidecar(t *testing.T) {
	broken := service("broken", "true", "web")
	broken.Annotations[annotations.Type] = "carrier-pigeon"
	elsewhere := service("web", "true", "web")
	elsewhere.Namespace = "other"

	for _, tc := range []struct {
		name     string
		services []client.Object
		live     []client.Object // what the cache doesn't know yet
		change   func(*corev1.Pod)
		injected bool
		result   string
		reason   string
		warning  string // part of it; empty for none
	}{
		{name: "selected by an enabled Service", services: []client.Object{service("web", "true", "web")}, injected: true, result: "injected"},
		{name: "by two of them", services: []client.Object{service("web", "true", "web"), service("api", "true", "web")}, injected: true, result: "injected"},
		{name: "by one whose other annotations are wrong", services: []client.Object{broken}, injected: true, result: "injected"},
		{name: "by one that only the API server knows yet", live: []client.Object{service("web", "true", "web")}, injected: true, result: "injected"},
		{name: "no Service", result: "skipped", reason: "NoService"},
		{name: "a disabled Service", services: []client.Object{service("web", "false", "web")}, result: "skipped", reason: "NoService"},
		{name: "a Service that isn't ours", services: []client.Object{service("web", "", "web")}, result: "skipped", reason: "NoService"},
		{name: "enabled with a wrong value", services: []client.Object{service("web", "yes", "web")}, result: "skipped", reason: "NoService"},
		{name: "another selector", services: []client.Object{service("web", "true", "api")}, result: "skipped", reason: "NoService"},
		{name: "no selector", services: []client.Object{service("web", "true")}, result: "skipped", reason: "NoService"},
		{name: "another namespace", services: []client.Object{elsewhere}, result: "skipped", reason: "NoService"},
		{name: "opted out", services: []client.Object{service("web", "true", "web")},
			change: func(p *corev1.Pod) { p.Labels[annotations.PodInject] = "false" },
			result: "skipped", reason: "OptedOut", warning: "mysocket: no tunnel for this pod (OptedOut): "},
		{name: "host network", services: []client.Object{service("web", "true", "web")},
			change: func(p *corev1.Pod) { p.Spec.HostNetwork = true },
			result: "skipped", reason: "HostNetwork", warning: "set hostNetwork to false"},
		{name: "host network that nobody wants a tunnel for",
			change: func(p *corev1.Pod) { p.Spec.HostNetwork = true }, result: "skipped", reason: "HostNetwork"},
		{name: "a preStop sleep", services: []client.Object{service("web", "true", "web")},
			change: func(p *corev1.Pod) {
				p.Annotations = map[string]string{annotations.PodPreStopSleep: "5"}
				p.Spec.Containers = append(p.Spec.Containers,
					corev1.Container{Name: "warm", Image: "warm", Lifecycle: &corev1.Lifecycle{PostStart: &corev1.LifecycleHandler{Sleep: &corev1.SleepAction{Seconds: 1}}}},
					corev1.Container{Name: "hooked", Image: "hooked", Lifecycle: &corev1.Lifecycle{PreStop: &corev1.LifecycleHandler{Sleep: &corev1.SleepAction{Seconds: 2}}}})
			}, injected: true, result: "injected"},
		{name: "a preStop sleep that is none", services: []client.Object{service("web", "true", "web")},
			change:   func(p *corev1.Pod) { p.Annotations = map[string]string{annotations.PodPreStopSleep: "5s"} },
			injected: true, result: "injected",
			warning: `mysocket: annotation mysocket.io/prestop-sleep has the value "5s"; allowed: 0 to 60, in seconds; it is ignored`},
		{name: "injected already", services: []client.Object{service("web", "true", "web")},
			change: func(p *corev1.Pod) {
				injected, _ := inject.Inject(p, sidecarConfig())
				*p = *injected
			}, injected: true, result: "unchanged"},
		{name: "injected and then stripped", services: []client.Object{service("web", "true", "web")},
			change: func(p *corev1.Pod) {
				injected, _ := inject.Inject(p, sidecarConfig())
				*p = *injected
				p.Spec.InitContainers[0].RestartPolicy = nil
			}, injected: true, result: "injected"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			m, registry := newMutator(t, reader(tc.services...), reader(append(tc.services, tc.live...)...))
			pod := webPod()
			if tc.change != nil {
				tc.change(pod)
			}
			response := post(t, m, reviewOf(t, pod))
			if !response.Allowed || response.UID != "0f4b5a2e" {
				t.Fatalf("not allowed: %+v", response)
			}
			var after corev1.Pod
			if err := json.Unmarshal(patched(t, response, pod), &after); err != nil {
				t.Fatal(err)
			}
			if inject.IsCurrent(&after, sidecarConfig()) != tc.injected {
				t.Errorf("injected: %v, want %v", !tc.injected, tc.injected)
			}
			if want, _ := inject.Inject(pod, sidecarConfig()); tc.injected && !apiequality.Semantic.DeepEqual(&after, want) {
				t.Errorf("the patch gives another pod than package inject:\n%+v\n%+v", after, *want)
			}
			if got := strings.Join(response.Warnings, "\n"); (tc.warning == "") != (got == "") || !strings.Contains(got, tc.warning) || len(got) > 256 {
				t.Errorf("warnings %q, want %q", got, tc.warning)
			}
			if n := count(t, registry, "mysocket_admission_pods_total", "reason="+tc.reason, "result="+tc.result); n != 1 {
				t.Errorf("%v admissions counted as %s %s", n, tc.result, tc.reason)
			}
			if n := count(t, registry, "mysocket_admission_duration_seconds"); n != 1 {
				t.Errorf("%v durations observed", n)
			}
		})
	}
}

// TestPatchOfTheDocument shows the pod as the API server sees it, with fields that our types don't know.
func TestPatchOfTheDocument(t *testing.T) {
	m, _ := newMutator(t, reader(service("web", "true", "web")), reader())
	for _, tc := range []struct{ name, pod, want string }{
		{
			"unknown fields stay where they are",
			`{"metadata":{"labels":{"app":"web"},"annotations":{"a":"b"},"future":1},
			  "spec":{"future":{"x":[1]},"initContainers":[{"name":"one","future":"1"},{"name":"two","future":"2"}],
			  "containers":[{"name":"web","future":"3"}],"volumes":[{"name":"v","future":{}}]},"future":9007199254740993}`,
			`{"metadata":{"labels":{"app":"web"},"annotations":{"a":"b","mysocket.io/injected":HASH},"future":1},
			  "spec":{"future":{"x":[1]},"initContainers":[OURS,{"name":"one","future":"1"},{"name":"two","future":"2"}],
			  "containers":[{"name":"web","future":"3"}],"volumes":[{"name":"v","future":{}},VOLUME]},"future":9007199254740993}`,
		},
		{
			"empty and null lists",
			`{"metadata":{"labels":{"app":"web"},"annotations":{}},"spec":{"initContainers":null,"containers":[{"name":"web"}],"volumes":[]}}`,
			`{"metadata":{"labels":{"app":"web"},"annotations":{"mysocket.io/injected":HASH}},"spec":{"initContainers":[OURS],"containers":[{"name":"web"}],"volumes":[VOLUME]}}`,
		},
		{
			"ours doubled, out of order and old",
			`{"metadata":{"labels":{"app":"web"},"annotations":{"mysocket.io/injected":"old"}},"spec":{"initContainers":[{"name":"one","future":1},{"name":"mysocket-tunnel"},{"name":"two","future":2},
			  {"name":"mysocket-tunnel"},{"name":"mysocket-tunnel"}],"containers":[{"name":"web"}],"volumes":[{"name":"mysocket-gateway"},{"name":"v"},{"name":"mysocket-gateway"}]}}`,
			`{"metadata":{"labels":{"app":"web"},"annotations":{"mysocket.io/injected":HASH}},"spec":{"initContainers":[{"name":"one","future":1},OURS,{"name":"two","future":2}],
			  "containers":[{"name":"web"}],"volumes":[VOLUME,{"name":"v"}]}}`,
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			after := patched(t, post(t, m, reviewOf(t, json.RawMessage(tc.pod))), json.RawMessage(tc.pod))
			var pod corev1.Pod
			if err := json.Unmarshal([]byte(tc.pod), &pod); err != nil {
				t.Fatal(err)
			}
			injected, skip := inject.Inject(&pod, sidecarConfig())
			if skip != nil {
				t.Fatal(skip)
			}
			encode := func(v any) string {
				b, err := json.Marshal(v)
				if err != nil {
					t.Fatal(err)
				}
				return string(b)
			}
			var ours corev1.Container
			for _, c := range injected.Spec.InitContainers {
				if c.Name == inject.ContainerName {
					ours = c
				}
			}
			var volume corev1.Volume
			for _, v := range injected.Spec.Volumes {
				if v.Name == inject.VolumeName {
					volume = v
				}
			}
			want := strings.NewReplacer("HASH", encode(sidecarConfig().Hash()), "OURS", encode(ours), "VOLUME", encode(volume)).Replace(tc.want)
			if !jsonpatch.Equal(after, []byte(want)) || bytes.Contains([]byte(want), []byte("9007199254740993")) != bytes.Contains(after, []byte("9007199254740993")) {
				t.Errorf("got  %s\nwant %s", after, want)
			}
		})
	}
}

// TestFaultsOfOurs shows that nothing that goes wrong on our side fails a pod, and how long it can take.
func TestFaultsOfOurs(t *testing.T) {
	broken := readerFunc(func(context.Context, *corev1.ServiceList, *client.ListOptions) error {
		return errors.New("connection refused")
	})
	hangs := readerFunc(func(ctx context.Context, _ *corev1.ServiceList, _ *client.ListOptions) error {
		<-ctx.Done()
		return ctx.Err()
	})
	panics := readerFunc(func(context.Context, *corev1.ServiceList, *client.ListOptions) error { panic("oh") })
	enabled := reader(service("web", "true", "web"))

	for _, tc := range []struct {
		name         string
		cached, live client.Reader
		injected     bool
		reason       string
		took         time.Duration
	}{
		{"the cache fails, the API server knows", broken, enabled, true, "", 0},
		{"the cache hangs, the API server knows", hangs, enabled, true, "", lookupTimeout},
		{"the API server fails", reader(), broken, false, "LookupFailed", 0},
		{"the API server hangs", reader(), hangs, false, "LookupFailed", lookupTimeout},
		{"both hang", hangs, hangs, false, "LookupFailed", 2 * lookupTimeout},
		{"the API server is not asked without need", enabled, panics, true, "", 0},
		{"a panic", panics, reader(), false, "InternalError", 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m, registry := newMutator(t, tc.cached, tc.live)
				start := time.Now()
				response := post(t, m, reviewOf(t, webPod()))
				if took := time.Since(start); took != tc.took {
					t.Errorf("took %s, want %s", took, tc.took)
				}
				if !response.Allowed || (len(response.Patch) > 0) != tc.injected {
					t.Fatalf("allowed %v, patch %s", response.Allowed, response.Patch)
				}
				if tc.injected {
					return
				}
				if len(response.Warnings) != 1 || !strings.Contains(response.Warnings[0], "("+tc.reason+")") {
					t.Errorf("warnings %q", response.Warnings)
				}
				if n := count(t, registry, "mysocket_admission_pods_total", "reason="+tc.reason, "result=failed"); n != 1 {
					t.Errorf("%v admissions counted as failed", n)
				}
			})
		})
	}
}

func TestLiveListReadsPageAfterPage(t *testing.T) {
	var pages []string
	live := readerFunc(func(_ context.Context, list *corev1.ServiceList, opts *client.ListOptions) error {
		if opts.Namespace != namespace || opts.Limit != livePage {
			return fmt.Errorf("namespace %q, limit %d", opts.Namespace, opts.Limit)
		}
		pages = append(pages, opts.Continue)
		switch opts.Continue {
		case "":
			list.Continue = "second"
		case "second":
			list.Items = []corev1.Service{*service("web", "true", "web")}
			list.Continue = "third"
		}
		return nil
	})
	m, registry := newMutator(t, reader(), live)
	if response := post(t, m, reviewOf(t, webPod())); len(response.Patch) == 0 {
		t.Errorf("not injected: %+v", response)
	}
	if got := strings.Join(pages, ","); got != ",second" {
		t.Errorf("pages asked for: %q", got)
	}
	if n := count(t, registry, "mysocket_admission_live_lookups_total", "result=found"); n != 1 {
		t.Errorf("%v live lookups counted", n)
	}
}

// TestLiveListsAtOnce shows the bound on requests to the API server in a burst of pods without a Service.
func TestLiveListsAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		atOnce, most := 0, 0 // the bubble's goroutines only run while the others are blocked, but -race wants a lock
		lock := make(chan struct{}, 1)
		live := readerFunc(func(ctx context.Context, _ *corev1.ServiceList, _ *client.ListOptions) error {
			lock <- struct{}{}
			atOnce++
			most = max(most, atOnce)
			<-lock
			<-time.After(lookupTimeout / 2)
			lock <- struct{}{}
			atOnce--
			<-lock
			return ctx.Err()
		})
		m, registry := newMutator(t, reader(), live)
		const burst = 3 * liveLookups
		done := make(chan *admissionv1.AdmissionResponse, burst)
		body := reviewOf(t, webPod())
		for range burst {
			go func() { done <- post(t, m, body) }()
		}
		for range burst {
			if r := <-done; !r.Allowed {
				t.Errorf("refused: %+v", r)
			}
		}
		if most != liveLookups {
			t.Errorf("%d lists at once, want %d", most, liveLookups)
		}
		none := count(t, registry, "mysocket_admission_pods_total", "reason=NoService", "result=skipped")
		late := count(t, registry, "mysocket_admission_pods_total", "reason=LookupFailed", "result=failed")
		if none < liveLookups || none+late != burst || late == 0 {
			t.Errorf("%v answered, %v too late, of %d", none, late, burst)
		}
	})
}

func TestRequestsThatAreNotPods(t *testing.T) {
	m, registry := newMutator(t, reader(service("web", "true", "web")), reader())
	change := func(f func(*admissionv1.AdmissionRequest)) []byte {
		var review admissionv1.AdmissionReview
		if err := json.Unmarshal(reviewOf(t, webPod()), &review); err != nil {
			t.Fatal(err)
		}
		f(review.Request)
		body, err := json.Marshal(review)
		if err != nil {
			t.Fatal(err)
		}
		return body
	}
	for _, tc := range []struct {
		name    string
		body    []byte
		allowed bool
	}{
		{"an update", change(func(r *admissionv1.AdmissionRequest) { r.Operation = admissionv1.Update }), true},
		{"a subresource", change(func(r *admissionv1.AdmissionRequest) { r.SubResource = "binding" }), true},
		{"another resource", change(func(r *admissionv1.AdmissionRequest) { r.Resource.Resource = "services" }), true},
		{"another group", change(func(r *admissionv1.AdmissionRequest) { r.Resource.Group = "example.com" }), true},
		{"no object", change(func(r *admissionv1.AdmissionRequest) { r.Object.Raw = nil }), false},
		{"an object that is no pod", change(func(r *admissionv1.AdmissionRequest) { r.Object.Raw = []byte(`{"spec":{"containers":"none"}}`) }), false},
		{"a Service in a pod's place", change(func(r *admissionv1.AdmissionRequest) { r.Object.Raw = []byte(`{"apiVersion":"v1","kind":"Service"}`) }), false},
		{"no AdmissionReview", []byte(`[]`), false},
		{"no JSON", []byte("\x00"), false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			response := post(t, m, tc.body)
			if response.Allowed != tc.allowed || len(response.Patch) > 0 {
				t.Errorf("allowed %v, patch %s", response.Allowed, response.Patch)
			}
			if !tc.allowed && (response.Result == nil || response.Result.Code != http.StatusBadRequest || response.Result.Message == "") {
				t.Errorf("result %+v", response.Result)
			}
		})
	}
	if n := count(t, registry, "mysocket_admission_pods_total", "reason=NotAPod", "result=skipped"); n != 4 {
		t.Errorf("%v counted as NotAPod", n)
	}
}

func TestDryRunIsAnsweredTheSame(t *testing.T) {
	m, _ := newMutator(t, reader(service("web", "true", "web")), reader())
	body := reviewOf(t, webPod())
	var review admissionv1.AdmissionReview
	if err := json.Unmarshal(body, &review); err != nil {
		t.Fatal(err)
	}
	review.Request.DryRun = ptr.To(true)
	dry, err := json.Marshal(review)
	if err != nil {
		t.Fatal(err)
	}
	if a, b := post(t, m, body), post(t, m, dry); len(a.Patch) == 0 || !bytes.Equal(a.Patch, b.Patch) {
		t.Errorf("patch %s, in a dry run %s", a.Patch, b.Patch)
	}
}

func TestNewPodMutatorSaysWhatIsWrong(t *testing.T) {
	if _, err := NewPodMutator(Options{Services: reader(), Sidecar: sidecarConfig()}); err == nil {
		t.Error("no error without a live reader")
	}
	if _, err := NewPodMutator(Options{Services: reader(), LiveServices: reader()}); err == nil || !strings.Contains(err.Error(), "image") {
		t.Errorf("error without an image: %v", err)
	}
	registry := prometheus.NewRegistry()
	options := Options{Services: reader(), LiveServices: reader(), Sidecar: sidecarConfig(), Registerer: registry}
	if _, err := NewPodMutator(options); err != nil {
		t.Fatal(err)
	}
	if _, err := NewPodMutator(options); err == nil {
		t.Error("no error when the metrics are registered twice")
	}
}

// FuzzReview posts bodies to the real handler: it always answers, and only a request that isn't an API server's is refused.
func FuzzReview(f *testing.F) {
	f.Add(reviewOf(f, webPod()))
	host := webPod()
	host.Spec.HostNetwork = true
	f.Add(reviewOf(f, host))
	injected, _ := inject.Inject(webPod(), sidecarConfig())
	f.Add(reviewOf(f, injected))
	f.Add([]byte(`{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview","request":{"uid":"1","object":{}}}`))
	f.Add([]byte(`{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview"}`))
	f.Add([]byte(`{}`))
	m, _ := newMutator(f, reader(service("web", "true", "web")), reader())
	f.Fuzz(func(t *testing.T, body []byte) {
		response := post(t, m, body)
		if !response.Allowed {
			if response.Result == nil || response.Result.Code != http.StatusBadRequest {
				t.Errorf("refused with %+v", response.Result)
			}
			return
		}
		if len(response.Patch) == 0 {
			return
		}
		var review struct {
			Request struct {
				Object json.RawMessage `json:"object"`
			} `json:"request"`
		}
		if err := json.Unmarshal(body, &review); err != nil {
			return // what Kubernetes reads and encoding/json does not, such as YAML
		}
		var pod corev1.Pod
		if err := json.Unmarshal(patched(t, response, review.Request.Object), &pod); err == nil && !inject.IsCurrent(&pod, sidecarConfig()) {
			t.Errorf("patched, and not current: %s", response.Patch)
		}
	})
}

func BenchmarkHandle(b *testing.B) {
	for _, n := range []int{1, 500} {
		b.Run(fmt.Sprintf("%d enabled Services", n), func(b *testing.B) {
			// The cache hands out its own objects, without a copy; the last one selects.
			var items []corev1.Service
			for i := range n {
				items = append(items, *service(fmt.Sprintf("web-%d", i), "true", fmt.Sprintf("web-%d", i+1)))
			}
			items[n-1].Spec.Selector["app"] = "web"
			cached := readerFunc(func(_ context.Context, list *corev1.ServiceList, _ *client.ListOptions) error {
				list.Items = items
				return nil
			})
			m, _ := newMutator(b, cached, reader())
			body := reviewOf(b, webPod())
			for b.Loop() {
				if response := post(b, m, body); len(response.Patch) == 0 {
					b.Fatal("not injected")
				}
			}
		})
	}
}

// TestPatchAfterOtherWebhooks has other webhooks meddle with each golden pod between two calls of ours: the patch of the second
// makes of the document what Inject makes of the pod.
func TestPatchAfterOtherWebhooks(t *testing.T) {
	m, _ := newMutator(t, reader(service("web", "true", "web")), reader())
	files, err := filepath.Glob("../inject/testdata/*.in.yaml")
	if err != nil || len(files) < 25 {
		t.Fatalf("%d golden pods, %v", len(files), err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".in.yaml"), func(t *testing.T) {
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			in := &corev1.Pod{}
			if err := yaml.Unmarshal(data, in); err != nil {
				t.Fatal(err)
			}
			metav1.SetMetaDataLabel(&in.ObjectMeta, "app", "web")
			for seed := range uint64(5) {
				pod := &corev1.Pod{}
				if err := json.Unmarshal(patched(t, post(t, m, reviewOf(t, in)), in), pod); err != nil {
					t.Fatal(err)
				}
				injecttest.Meddle(pod, rand.New(rand.NewPCG(seed, 0)))
				want, skip := inject.Inject(pod, sidecarConfig())
				if skip != nil {
					t.Fatal(skip)
				}
				got := &corev1.Pod{}
				if err := json.Unmarshal(patched(t, post(t, m, reviewOf(t, pod)), pod), got); err != nil {
					t.Fatal(err)
				}
				if !apiequality.Semantic.DeepEqual(got, want) {
					t.Fatalf("seed %d: patched to\n%+v\nwant\n%+v", seed, got, want)
				}
				if again := post(t, m, reviewOf(t, got)); len(again.Patch) != 0 {
					t.Fatalf("seed %d: once more it patches %s", seed, again.Patch)
				}
			}
		})
	}
}
