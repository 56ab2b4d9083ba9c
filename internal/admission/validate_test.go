package admission

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	admissionv1 "k8s.io/api/admission/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	utiljson "k8s.io/apimachinery/pkg/util/json"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/webhook/admission"

	"github.com/mysocketio/mysocket-injector/internal/annotations"
	"github.com/mysocketio/mysocket-injector/internal/inject"
)

const ownNamespace = "mysocket-system"

func newValidator(t testing.TB, cluster client.Reader) (*ServiceValidator, *prometheus.Registry) {
	t.Helper()
	registry := prometheus.NewRegistry()
	v, err := NewServiceValidator(ValidatorOptions{Cluster: cluster, Namespace: ownNamespace, Registerer: registry})
	if err != nil {
		t.Fatal(err)
	}
	return v, registry
}

// publicService is a Service of the pods app=web with these annotations, given as name and value without the prefix.
func publicService(nameValue ...string) *corev1.Service {
	svc := service("web", "", "web")
	svc.Spec.Type = corev1.ServiceTypeClusterIP
	svc.Spec.Ports = []corev1.ServicePort{{Name: "http", Port: 8000, Protocol: corev1.ProtocolTCP}}
	return annotated(svc, nameValue...)
}

func annotated(svc *corev1.Service, nameValue ...string) *corev1.Service {
	for i := 0; i < len(nameValue); i += 2 {
		metav1.SetMetaDataAnnotation(&svc.ObjectMeta, annotations.Prefix+nameValue[i], nameValue[i+1])
	}
	return svc
}

func changed(svc *corev1.Service, change func(*corev1.Service)) *corev1.Service {
	svc = svc.DeepCopy()
	change(svc)
	return svc
}

// serviceReview is the request for a Service that is created, if was is nil, or changed.
func serviceReview(t testing.TB, was, is *corev1.Service, more ...func(*admissionv1.AdmissionRequest)) []byte {
	t.Helper()
	encode := func(svc *corev1.Service) (raw runtime.RawExtension) {
		var err error
		if raw.Raw, err = json.Marshal(svc); err != nil {
			t.Fatal(err)
		}
		return raw
	}
	request := &admissionv1.AdmissionRequest{
		UID:       types.UID("0f4b5a2e"),
		Kind:      metav1.GroupVersionKind{Version: "v1", Kind: "Service"},
		Resource:  metav1.GroupVersionResource{Version: "v1", Resource: "services"},
		Namespace: namespace,
		Name:      "web",
		Operation: admissionv1.Create,
		Object:    encode(is),
	}
	request.UserInfo.Username = "jane"
	if was != nil {
		request.Operation, request.OldObject = admissionv1.Update, encode(was)
	}
	for _, f := range more {
		f(request)
	}
	body, err := json.Marshal(admissionv1.AdmissionReview{TypeMeta: metav1.TypeMeta{APIVersion: "admission.k8s.io/v1", Kind: "AdmissionReview"}, Request: request})
	if err != nil {
		t.Fatal(err)
	}
	return body
}

func postService(t testing.TB, v *ServiceValidator, body []byte) *admissionv1.AdmissionResponse {
	t.Helper()
	request := httptest.NewRequestWithContext(context.Background(), http.MethodPost, "/validate-service", bytes.NewReader(body))
	request.Header.Set("Content-Type", "application/json")
	recorder := httptest.NewRecorder()
	(&admission.Webhook{Handler: v}).ServeHTTP(recorder, request)
	answer, err := io.ReadAll(recorder.Result().Body)
	if err != nil {
		t.Fatal(err)
	}
	var review admissionv1.AdmissionReview
	if err := json.Unmarshal(answer, &review); err != nil || review.Response == nil {
		t.Fatalf("the answer is no AdmissionReview: %v\n%s", err, answer)
	}
	if len(review.Response.Patch) > 0 {
		t.Errorf("a patch: %s", review.Response.Patch)
	}
	for _, w := range review.Response.Warnings {
		if len(w) > 256 || !strings.HasPrefix(w, "mysocket: ") {
			t.Errorf("warning %q", w)
		}
	}
	return review.Response
}

const (
	saysType  = `annotation mysocket.io/type has the value "htpp"; allowed: http, https, tcp, tls`
	saysPort  = `annotation mysocket.io/port: the Service has no TCP port "9999"; it has 8000 (http)`
	saysProt  = `annotation "mysocket.io/prot" is not known; known are `
	saysNoPod = "the Service has no selector, so there are no pods to put a tunnel into; set spec.selector"
)

func TestWhichServicesAreRefused(t *testing.T) {
	right := publicService("enabled", "true")
	wrong := publicService("enabled", "true", "type", "htpp")
	none := publicService()
	noPods := func(svc *corev1.Service) { svc.Spec.Selector = nil }
	swapped := func(svc *corev1.Service) { svc.Spec.Selector = map[string]string{"app": "green"} }
	otherPorts := func(svc *corev1.Service) { svc.Spec.Ports = []corev1.ServicePort{{Port: 9000}} }

	for _, tc := range []struct {
		name     string
		was, is  *corev1.Service // was is nil for a Service that is created
		request  func(*admissionv1.AdmissionRequest)
		refused  string // the beginning of the sentence; empty for allowed
		result   string
		reason   string
		warnings []string // of allowed
	}{
		{name: "created right", is: right, result: "allowed"},
		{name: "created with a wrong value", is: wrong, refused: saysType, result: "refused", reason: "InvalidAnnotation"},
		{name: "created with an unknown annotation", is: publicService("enabled", "true", "prot", "8000"), refused: saysProt, result: "refused", reason: "InvalidAnnotation"},
		{name: "created with an unclear enabled", is: publicService("enabled", "yes"), refused: `annotation mysocket.io/enabled has the value "yes"; allowed: "true" or "false"`, result: "refused", reason: "InvalidAnnotation"},
		{name: "created without pods", is: changed(right, noPods), refused: saysNoPod, result: "refused", reason: "NoSelector"},
		{name: "created as an ExternalName", is: changed(right, func(s *corev1.Service) { s.Spec.Type = corev1.ServiceTypeExternalName }),
			refused: "a Service of type ExternalName has no pods of its own", result: "refused", reason: "NoSelector"},
		{name: "created with a port that it lacks", is: publicService("enabled", "true", "port", "9999"), refused: saysPort, result: "refused", reason: "PortNotFound"},
		{name: "created, not ours", is: changed(none, noPods), result: "skipped", reason: "NotEnabled"},
		{name: "created, not ours, with somebody else's annotations", is: changed(none, func(s *corev1.Service) { s.Annotations = map[string]string{"notmysocket.io/type": "x"} }),
			result: "skipped", reason: "NotEnabled"},
		{name: "created with enabled misspelt", is: publicService("enable", "true"), result: "skipped", reason: "NotEnabled",
			warnings: []string{"mysocket: mysocket.io/enable has no effect, since the Service has no annotation mysocket.io/enabled"}},

		{name: "annotated right", was: none, is: right, result: "allowed"},
		{name: "annotated wrong", was: none, is: wrong, refused: saysType, result: "refused", reason: "InvalidAnnotation"},
		{name: "switched on, wrong before", was: publicService("enabled", "false", "type", "htpp"), is: wrong, refused: saysType, result: "refused", reason: "InvalidAnnotation"},
		{name: "annotated while it has no pods", was: changed(none, noPods), is: changed(right, noPods), refused: saysNoPod, result: "refused", reason: "NoSelector"},
		{name: "the selector goes", was: right, is: changed(right, noPods), refused: saysNoPod, result: "refused", reason: "NoSelector"},
		{name: "the port that is public goes", was: publicService("enabled", "true", "port", "http"), is: changed(publicService("enabled", "true", "port", "http"), otherPorts),
			refused: `annotation mysocket.io/port: the Service has no TCP port "http"; it has 9000`, result: "refused", reason: "PortNotFound"},
		{name: "other ports, and the port stays", was: right, is: changed(right, otherPorts), result: "allowed"},
		{name: "mended", was: wrong, is: publicService("enabled", "true", "type", "tcp"), result: "allowed"},
		{name: "one of two mended", was: publicService("enabled", "true", "type", "htpp", "port", "9999"), is: publicService("enabled", "true", "type", "tcp", "port", "9999"),
			refused: saysPort, result: "refused", reason: "PortNotFound"},
		{name: "one of two taken away", was: publicService("enabled", "true", "type", "htpp", "port", "9999"), is: publicService("enabled", "true", "port", "9999"),
			result: "allowed", reason: "PortNotFound", warnings: []string{"mysocket: the Service is still not public: " + saysPort}},
		{name: "right by taking away", was: wrong, is: right, result: "allowed"},

		// What is wrong already stops nobody who does not touch it.
		{name: "wrong, and its finalizer goes", was: changed(wrong, func(s *corev1.Service) { s.Finalizers = []string{annotations.Finalizer} }), is: wrong, result: "skipped", reason: "Untouched"},
		{name: "wrong, and labelled", was: wrong, is: changed(wrong, func(s *corev1.Service) { s.Labels = map[string]string{"a": "b"} }), result: "skipped", reason: "Untouched"},
		{name: "wrong, and annotated by others", was: wrong, is: changed(wrong, func(s *corev1.Service) { s.Annotations["example.com/a"] = "b" }), result: "skipped", reason: "Untouched"},
		{name: "wrong, and its status changes", was: wrong, is: changed(wrong, func(s *corev1.Service) {
			s.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: "10.0.0.1"}}
		}),
			result: "skipped", reason: "Untouched"},
		{name: "wrong, and another part of its spec changes", was: wrong, is: changed(wrong, func(s *corev1.Service) { s.Spec.SessionAffinity = corev1.ServiceAffinityClientIP }), result: "skipped", reason: "Untouched"},
		{name: "wrong, and a rollout swaps its selector", was: wrong, is: changed(wrong, swapped), result: "allowed", reason: "InvalidAnnotation",
			warnings: []string{"mysocket: the Service is still not public: " + saysType}},
		{name: "wrong, and made worse by others", was: wrong, is: changed(wrong, noPods), result: "allowed", reason: "InvalidAnnotation",
			warnings: []string{"mysocket: the Service is still not public: " + saysType}},
		{name: "without pods, and other ports", was: changed(right, noPods), is: changed(changed(right, noPods), otherPorts), result: "allowed", reason: "NoSelector",
			warnings: []string{"mysocket: the Service is still not public: " + saysNoPod}},
		{name: "without its port, and others again", was: publicService("enabled", "true", "port", "9999"), is: changed(publicService("enabled", "true", "port", "9999"), otherPorts),
			refused: `annotation mysocket.io/port: the Service has no TCP port "9999"; it has 9000`, result: "refused", reason: "PortNotFound"},
		{name: "without pods, and of another type without", was: changed(right, noPods),
			is:      changed(right, func(s *corev1.Service) { s.Spec.Selector, s.Spec.Type = nil, corev1.ServiceTypeExternalName }),
			refused: "a Service of type ExternalName", result: "refused", reason: "NoSelector"},
		{name: "wrong, and on its way out", was: none, is: changed(wrong, func(s *corev1.Service) { s.DeletionTimestamp = ptr.To(metav1.Now()) }), result: "skipped", reason: "Deleting"},

		// Off is the way out.
		{name: "wrong, and enabled goes", was: wrong, is: publicService("type", "htpp"), result: "skipped", reason: "NotEnabled"},
		{name: "wrong, and all of ours goes", was: wrong, is: none, result: "skipped", reason: "NotEnabled"},
		{name: "wrong, and switched off", was: wrong, is: publicService("enabled", "false", "type", "htpp"), result: "skipped", reason: "NotEnabled", warnings: []string{"mysocket: " + saysType}},
		{name: "switched off with a wrong policy", was: right, is: publicService("enabled", "false", "deletion-policy", "keep"), result: "skipped", reason: "NotEnabled",
			warnings: []string{`mysocket: annotation mysocket.io/deletion-policy has the value "keep"; allowed: delete, retain`}},
		{name: "switched off", was: right, is: publicService("enabled", "false"), result: "skipped", reason: "NotEnabled"},
		{name: "off, and the selector goes", was: publicService("enabled", "false"), is: changed(publicService("enabled", "false"), noPods), result: "skipped", reason: "NotEnabled"},

		// What we write ourselves.
		{name: "the control plane writes", was: wrong, is: annotated(wrong.DeepCopy(), "socket-id", "1", "port", "9999"),
			request: func(r *admissionv1.AdmissionRequest) {
				r.UserInfo.Username = "system:serviceaccount:mysocket-system:mysocket-injector"
			},
			result: "skipped", reason: "ControlPlane"},
		{name: "another ServiceAccount is nobody special", was: none, is: wrong,
			request: func(r *admissionv1.AdmissionRequest) {
				r.UserInfo.Username = "system:serviceaccount:mysocket-system-2:mysocket-injector"
			},
			refused: saysType, result: "refused", reason: "InvalidAnnotation"},
		{name: "somebody writes another socket's id", was: annotated(right.DeepCopy(), "socket-id", "1"), is: annotated(right.DeepCopy(), "socket-id", "2"), result: "allowed",
			warnings: []string{"mysocket: mysocket.io/socket-id is written by the control plane and will be put right"}},
		{name: "somebody takes the name and the address away", was: annotated(right.DeepCopy(), "socket-id", "1", "dnsname", "a", "url", "b"), is: annotated(right.DeepCopy(), "socket-id", "1"), result: "allowed",
			warnings: []string{"mysocket: mysocket.io/dnsname, mysocket.io/url are written by the control plane and will be put right"}},
		{name: "a copy of another Service", is: annotated(right.DeepCopy(), "url", "https://a"), result: "allowed",
			warnings: []string{"mysocket: mysocket.io/url is written by the control plane and will be put right"}},

		{name: "in kube-system, wrong", is: wrong, request: func(r *admissionv1.AdmissionRequest) { r.Namespace = "kube-system" }, result: "allowed",
			warnings: []string{"mysocket: pods of namespace kube-system are never injected, so the Service will have no tunnels; move the app to a namespace of its own"}},
		{name: "in our own namespace", is: right, request: func(r *admissionv1.AdmissionRequest) { r.Namespace = ownNamespace }, result: "allowed",
			warnings: []string{"mysocket: pods of namespace mysocket-system are never injected, so the Service will have no tunnels; move the app to a namespace of its own"}},

		{name: "deleted", was: wrong, is: wrong, request: func(r *admissionv1.AdmissionRequest) { r.Operation = admissionv1.Delete }, result: "skipped", reason: "NotAService"},
		{name: "its status", was: wrong, is: right, request: func(r *admissionv1.AdmissionRequest) { r.SubResource = "status" }, result: "skipped", reason: "NotAService"},
		{name: "another resource", is: wrong, request: func(r *admissionv1.AdmissionRequest) { r.Resource.Resource = "pods" }, result: "skipped", reason: "NotAService"},
		{name: "another group", is: wrong, request: func(r *admissionv1.AdmissionRequest) { r.Resource.Group = "serving.knative.dev" }, result: "skipped", reason: "NotAService"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			v, registry := newValidator(t, fake.NewClientBuilder().WithObjects(namespaceOf(true)).Build())
			var more []func(*admissionv1.AdmissionRequest)
			if tc.request != nil {
				more = append(more, tc.request)
			}
			response := postService(t, v, serviceReview(t, tc.was, tc.is, more...))
			if response.Allowed != (tc.refused == "") {
				t.Fatalf("allowed %v: %+v", response.Allowed, response.Result)
			}
			if !response.Allowed && (!strings.HasPrefix(response.Result.Message, tc.refused) || response.Result.Code != http.StatusForbidden) {
				t.Errorf("refused with %d %q, want %q", response.Result.Code, response.Result.Message, tc.refused)
			}
			if got, want := strings.Join(response.Warnings, "\n"), strings.Join(tc.warnings, "\n"); got != want {
				t.Errorf("warnings\n%s\nwant\n%s", got, want)
			}
			if n := count(t, registry, "mysocket_admission_services_total", "reason="+tc.reason, "result="+tc.result); n != 1 {
				t.Errorf("not counted as %s %s", tc.result, tc.reason)
			}
			if n := count(t, registry, "mysocket_admission_service_duration_seconds"); n != 1 {
				t.Errorf("%v durations observed", n)
			}
			// Nothing is done but answer, so a dry run is answered the same.
			dry := postService(t, v, serviceReview(t, tc.was, tc.is, append(more, func(r *admissionv1.AdmissionRequest) { r.DryRun = ptr.To(true) })...))
			if dry.Allowed != response.Allowed || dry.Result.Message != response.Result.Message || len(dry.Warnings) != len(response.Warnings) {
				t.Errorf("in a dry run: %+v", dry)
			}
		})
	}
}

func namespaceOf(labelled bool) *corev1.Namespace {
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}}
	if labelled {
		ns.Labels = map[string]string{annotations.NamespaceInjection: annotations.NamespaceInjectionEnabled}
	}
	return ns
}

// ownedPod is a pod app=web of an owner such as "ReplicaSet/web-5d4f"; empty for none.
func ownedPod(name, owner string, change ...func(*corev1.Pod)) *corev1.Pod {
	pod := webPod()
	pod.Namespace, pod.Name, pod.GenerateName = namespace, name, ""
	if kind, of, ok := strings.Cut(owner, "/"); ok {
		pod.OwnerReferences = []metav1.OwnerReference{{APIVersion: "any/v1", Kind: kind, Name: of, UID: types.UID(of), Controller: ptr.To(true)}}
		if i := strings.LastIndexByte(of, '-'); kind == "ReplicaSet" && i > 0 {
			pod.Labels[podTemplateHash] = of[i+1:]
		}
	}
	for _, f := range change {
		f(pod)
	}
	return pod
}

func TestWarningsOfWhatFollows(t *testing.T) {
	injected := func(p *corev1.Pod) {
		with, _ := inject.Inject(p, sidecarConfig())
		*p = *with
	}
	many := func(n int, length int) (pods []client.Object) {
		for i := range n {
			name := fmt.Sprintf("db-%d", i)
			name += strings.Repeat("x", max(0, length-len(name)))
			pods = append(pods, ownedPod(fmt.Sprint("pod-", i), "StatefulSet/"+name))
		}
		return pods
	}
	for _, tc := range []struct {
		name     string
		bare     bool // the namespace is not labelled
		service  *corev1.Service
		pods     []client.Object
		warnings []string
	}{
		{name: "no pods"},
		{name: "one Deployment with two pods", pods: []client.Object{ownedPod("a", "ReplicaSet/web-5d4f"), ownedPod("b", "ReplicaSet/web-5d4f")},
			warnings: []string{"will be restarted to get the tunnel sidecar, unless paused or OnDelete: Deployment web"}},
		{name: "two ReplicaSets of a Deployment in a rollout", pods: []client.Object{ownedPod("a", "ReplicaSet/web-5d4f"), ownedPod("b", "ReplicaSet/web-77aa")},
			warnings: []string{"will be restarted to get the tunnel sidecar, unless paused or OnDelete: Deployment web"}},
		{name: "all kinds", pods: []client.Object{ownedPod("a", "ReplicaSet/web-5d4f"), ownedPod("b", "StatefulSet/db"), ownedPod("c", "DaemonSet/agent"),
			ownedPod("d", "Job/report"), ownedPod("e", ""), ownedPod("f", "ReplicaSet/plain")},
			warnings: []string{
				"will be restarted to get the tunnel sidecar, unless paused or OnDelete: DaemonSet agent, Deployment web, StatefulSet db",
				"can't be restarted from here; make anew to get the tunnel sidecar: Job report, Pod e, ReplicaSet plain",
			}},
		{name: "pods that have it, can't have it, have ended or are of others", pods: []client.Object{
			ownedPod("a", "StatefulSet/has", injected),
			ownedPod("b", "DaemonSet/host", func(p *corev1.Pod) { p.Spec.HostNetwork = true }),
			ownedPod("c", "Job/done", func(p *corev1.Pod) { p.Status.Phase = corev1.PodSucceeded }),
			ownedPod("d", "Job/broken", func(p *corev1.Pod) { p.Status.Phase = corev1.PodFailed }),
			ownedPod("e", "StatefulSet/other", func(p *corev1.Pod) { p.Labels = map[string]string{"app": "api"} }),
			ownedPod("f", "StatefulSet/elsewhere", func(p *corev1.Pod) { p.Namespace = "elsewhere" }),
			ownedPod("g", "StatefulSet/ending", func(p *corev1.Pod) { p.DeletionTimestamp, p.Finalizers = ptr.To(metav1.Now()), []string{"a/b"} }),
		}},
		{name: "no label", bare: true, pods: []client.Object{ownedPod("a", "StatefulSet/db")}, warnings: []string{
			"namespace shop is not labelled for injection; run: kubectl label namespace shop mysocket.io/injection=enabled",
			"will be restarted to get the tunnel sidecar once the namespace is labelled: StatefulSet db",
		}},
		{name: "rollout never", service: publicService("enabled", "true", "rollout", "never"), pods: []client.Object{ownedPod("a", "StatefulSet/db")},
			warnings: []string{`mysocket.io/rollout is "never", so restart yourself to get the tunnel sidecar: StatefulSet db`}},
		{name: "rollout never, and nothing to do", service: publicService("enabled", "true", "rollout", "never")},
		{name: "five", pods: many(5, 0), warnings: []string{"will be restarted to get the tunnel sidecar, unless paused or OnDelete: " +
			"StatefulSet db-0, StatefulSet db-1, StatefulSet db-2, StatefulSet db-3, StatefulSet db-4"}},
		{name: "seven", pods: many(7, 0), warnings: []string{"will be restarted to get the tunnel sidecar, unless paused or OnDelete: " +
			"StatefulSet db-0, StatefulSet db-1, StatefulSet db-2, StatefulSet db-3, StatefulSet db-4, and 2 more"}},
		{name: "long names", pods: many(7, 80), warnings: []string{"will be restarted to get the tunnel sidecar, unless paused or OnDelete: " +
			"StatefulSet db-0" + strings.Repeat("x", 76) + ", and 6 more"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			v, _ := newValidator(t, fake.NewClientBuilder().WithObjects(append(tc.pods, namespaceOf(!tc.bare))...).Build())
			if tc.service == nil {
				tc.service = publicService("enabled", "true")
			}
			response := postService(t, v, serviceReview(t, publicService(), tc.service))
			if !response.Allowed {
				t.Fatalf("refused: %+v", response.Result)
			}
			var want []string
			for _, w := range tc.warnings {
				want = append(want, "mysocket: "+w)
			}
			if got, want := strings.Join(response.Warnings, "\n"), strings.Join(want, "\n"); got != want {
				t.Errorf("warnings\n%s\nwant\n%s", got, want)
			}
		})
	}
}

// clusterFuncs is a client.Reader made of two functions.
type clusterFuncs struct {
	get  func(context.Context) error
	list func(context.Context) error
}

func (f clusterFuncs) Get(ctx context.Context, _ client.ObjectKey, _ client.Object, _ ...client.GetOption) error {
	return f.get(ctx)
}

func (f clusterFuncs) List(ctx context.Context, _ client.ObjectList, _ ...client.ListOption) error {
	return f.list(ctx)
}

// TestFaultsRefuseNoService shows that a Service that is right is written whatever goes wrong on our side, and how long
// that can take.
func TestFaultsRefuseNoService(t *testing.T) {
	broken := func(context.Context) error { return errors.New("not in step") }
	hangs := func(ctx context.Context) error {
		<-ctx.Done()
		return ctx.Err()
	}
	panics := func(context.Context) error { panic("oh") }
	for _, tc := range []struct {
		name    string
		cluster clusterFuncs
		result  string
		reason  string
		took    time.Duration
	}{
		{"the cache fails", clusterFuncs{broken, broken}, "allowed", "", 0},
		{"the cache hangs", clusterFuncs{hangs, hangs}, "allowed", "", lookupTimeout},
		{"a panic", clusterFuncs{panics, panics}, "failed", "InternalError", 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				v, registry := newValidator(t, tc.cluster)
				start := time.Now()
				response := postService(t, v, serviceReview(t, publicService(), publicService("enabled", "true")))
				if took := time.Since(start); took != tc.took {
					t.Errorf("took %s, want %s", took, tc.took)
				}
				if !response.Allowed || len(response.Warnings) > 0 {
					t.Errorf("%+v", response)
				}
				if n := count(t, registry, "mysocket_admission_services_total", "reason="+tc.reason, "result="+tc.result); n != 1 {
					t.Errorf("not counted as %s %s", tc.result, tc.reason)
				}
			})
		})
	}
}

func TestRequestsThatAreNotServices(t *testing.T) {
	v, registry := newValidator(t, fake.NewClientBuilder().Build())
	right := publicService("enabled", "true")
	raw := func(object, old string) []byte {
		return serviceReview(t, right, right, func(r *admissionv1.AdmissionRequest) {
			r.Object.Raw, r.OldObject.Raw = nil, nil
			if object != "" {
				r.Object.Raw = []byte(object)
			}
			if old != "" {
				r.OldObject.Raw = []byte(old)
			}
		})
	}
	for name, body := range map[string][]byte{
		"no object":               raw("", "{}"),
		"no old object":           raw("{}", ""),
		"an object that is none":  raw(`{"spec":{"ports":"none"}}`, "{}"),
		"a pod in its place":      raw(`{"apiVersion":"v1","kind":"Pod"}`, "{}"),
		"an old one that is none": raw("{}", `{"metadata":{"annotations":[]}}`),
	} {
		response := postService(t, v, body)
		if response.Allowed || response.Result.Code != http.StatusBadRequest || response.Result.Message == "" {
			t.Errorf("%s: %+v", name, response)
		}
	}
	if n := count(t, registry, "mysocket_admission_services_total", "reason=Undecodable", "result=malformed"); n != 5 {
		t.Errorf("%v counted", n)
	}
	for _, body := range []string{"[]", "\x00"} {
		if response := postService(t, v, []byte(body)); response.Allowed {
			t.Errorf("%q is allowed", body)
		}
	}
}

func TestNewServiceValidatorSaysWhatIsWrong(t *testing.T) {
	cluster := fake.NewClientBuilder().Build()
	if _, err := NewServiceValidator(ValidatorOptions{Namespace: ownNamespace}); err == nil {
		t.Error("no error without a reader")
	}
	if _, err := NewServiceValidator(ValidatorOptions{Cluster: cluster}); err == nil {
		t.Error("no error without a namespace: every ServiceAccount would be the control plane's")
	}
	options := ValidatorOptions{Cluster: cluster, Namespace: ownNamespace, Registerer: prometheus.NewRegistry()}
	if _, err := NewServiceValidator(options); err != nil {
		t.Fatal(err)
	}
	if _, err := NewServiceValidator(options); err == nil {
		t.Error("no error when the metrics are registered twice")
	}
}

// FuzzServiceReview posts bodies to the real handler. It always answers, and what it refuses is wrong, and was touched.
func FuzzServiceReview(f *testing.F) {
	right, wrong := publicService("enabled", "true"), publicService("enabled", "true", "type", "htpp")
	for _, pair := range [][2]*corev1.Service{{nil, right}, {nil, wrong}, {right, wrong}, {wrong, wrong}, {wrong, publicService("enabled", "false")},
		{publicService(), annotated(right.DeepCopy(), "socket-id", "1")}, {nil, publicService("enable", "true")}} {
		f.Add(serviceReview(f, pair[0], pair[1]))
	}
	f.Add([]byte(`{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview","request":{"uid":"1","operation":"CREATE","resource":{"resource":"services"},"object":{}}}`))
	f.Add([]byte(`{}`))
	v, _ := newValidator(f, fake.NewClientBuilder().WithObjects(namespaceOf(false), ownedPod("a", "ReplicaSet/web-5d4f"), ownedPod("b", "")).Build())
	f.Fuzz(func(t *testing.T, body []byte) {
		response := postService(t, v, body)
		if response.Allowed || response.Result != nil && response.Result.Code == http.StatusBadRequest {
			return
		}
		var review struct {
			Request struct {
				Object    corev1.Service  `json:"object"`
				OldObject *corev1.Service `json:"oldObject"`
			} `json:"request"`
		}
		if err := utiljson.Unmarshal(body, &review); err != nil {
			return // what is not JSON, such as YAML
		}
		is, was := &review.Request.Object, review.Request.OldObject
		if was == nil {
			was = &corev1.Service{}
		}
		_, err := annotations.Parse(is, annotations.Names{})
		if !annotations.IsOurs(is) || is.DeletionTimestamp != nil || err == nil || response.Result == nil || response.Result.Message != err.Error() {
			t.Errorf("refused with %+v; it says %v", response.Result, err)
		}
		if compare(was, is).nothing() {
			t.Error("refused, and nothing was touched")
		}
	})
}
