package controller

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/reference"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/mysocketio/mysocket-injector/api/v1alpha1"
	"github.com/mysocketio/mysocket-injector/internal/annotations"
	"github.com/mysocketio/mysocket-injector/internal/edge/edgetest"
	"github.com/mysocketio/mysocket-injector/internal/inject"
	"github.com/mysocketio/mysocket-injector/internal/kubetest"
	"github.com/mysocketio/mysocket-injector/internal/mysocket"
	"github.com/mysocketio/mysocket-injector/internal/mysocket/mysockettest"
)

var cluster kubetest.Cluster

func TestMain(m *testing.M) {
	os.Exit(kubetest.Main(m, &cluster))
}

// stage is a labelled namespace of a real API server, and a real edge behind a proxy that can fail.
type stage struct {
	t      *testing.T
	ns     string
	edge   *edgetest.Edge
	proxy  *mysockettest.Proxy
	api    *mysocket.Client
	fresh  func(testing.TB) *mysocket.Client // makes another one
	events *recorder
	use    MysocketAPI // in the place of api, when set
	// secrets reads Secrets, with what rights a test likes.
	secrets client.Reader
}

func newStage(t *testing.T) *stage {
	t.Helper()
	cluster.Require(t)
	s := &stage{
		t:      t,
		ns:     cluster.Namespace(t, map[string]string{annotations.NamespaceInjection: annotations.NamespaceInjectionEnabled}),
		edge:   edgetest.Start(t),
		events: &recorder{}, secrets: cluster.Client,
	}
	s.proxy = mysockettest.Start(t, s.edge)
	s.fresh = s.proxy.Client
	s.api = s.fresh(t)
	return s
}

// recorder keeps Events as "Type Reason: note".
type recorder struct {
	mu     sync.Mutex
	events []string
	about  []string // "Kind name" of each
}

// Eventf implements events.EventRecorder.
func (r *recorder) Eventf(regarding, _ runtime.Object, kind, reason, _, note string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	of, err := reference.GetReference(cluster.Scheme, regarding) // as the real one does
	if err != nil {
		of = &corev1.ObjectReference{Kind: err.Error()}
	}
	r.about = append(r.about, of.Kind+" "+of.Name)
	r.events = append(r.events, kind+" "+reason+": "+fmt.Sprintf(note, args...))
}

// take returns the Events since the last call.
func (r *recorder) take() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	events := r.events
	r.events, r.about = nil, nil
	return events
}

// abouts returns what the Events since the last take are about, as "Kind name".
func (r *recorder) abouts() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.about)
}

// wantEvent wants exactly one Event since the last look, with this beginning.
func (s *stage) wantEvent(beginning string) {
	s.t.Helper()
	if events := s.events.take(); len(events) != 1 || !strings.HasPrefix(events[0], beginning) {
		s.t.Errorf("events %q, want one: %s", events, beginning)
	}
}

// wantEvents wants exactly the Events with these beginnings since the last look.
func (s *stage) wantEvents(beginnings ...string) {
	s.t.Helper()
	events := s.events.take()
	if !slices.EqualFunc(events, beginnings, strings.HasPrefix) {
		s.t.Errorf("events %q, want %q", events, beginnings)
	}
}

// service makes a Service "web" with these annotations, which selects pods labelled app=web.
func (s *stage) service(list map[string]string, changes ...func(*corev1.Service)) *corev1.Service {
	s.t.Helper()
	svc := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: s.ns, Name: "web", Annotations: list},
		Spec:       corev1.ServiceSpec{Selector: map[string]string{"app": "web"}, Ports: []corev1.ServicePort{{Port: 8000}}},
	}
	for _, change := range changes {
		change(svc)
	}
	cluster.Create(s.t, svc)
	return svc
}

func enabled(more ...string) map[string]string {
	list := map[string]string{annotations.Enabled: "true"}
	for i := 0; i+1 < len(more); i += 2 {
		list[more[i]] = more[i+1]
	}
	return list
}

func (s *stage) reconciler() *ServiceReconciler {
	var api MysocketAPI = s.api
	if s.use != nil {
		api = s.use
	}
	return &ServiceReconciler{Client: cluster.Client, API: api, Events: s.events, Outdated: outdated, Secrets: s.secrets}
}

// outdated tells whether a pod's sidecar is an old one, in these tests.
func outdated(pod *corev1.Pod) bool { return pod.Annotations[annotations.PodInjected] == "old" }

func request(obj client.Object) reconcile.Request {
	return reconcile.Request{NamespacedName: client.ObjectKeyFromObject(obj)}
}

// reconcile runs the service reconciler once and reads the Service anew, if it is still there.
func (s *stage) reconcile(svc *corev1.Service) (reconcile.Result, error) {
	s.t.Helper()
	result, err := s.reconciler().Reconcile(s.t.Context(), request(svc))
	if getErr := cluster.Client.Get(s.t.Context(), client.ObjectKeyFromObject(svc), svc); client.IgnoreNotFound(getErr) != nil {
		s.t.Fatal(getErr)
	} else if getErr != nil {
		svc.UID = "" // gone
	}
	return result, err
}

func (s *stage) mustReconcile(svc *corev1.Service) reconcile.Result {
	s.t.Helper()
	result, err := s.reconcile(svc)
	if err != nil {
		s.t.Fatal(err)
	}
	return result
}

func (s *stage) sockets() []mysocket.Socket {
	s.t.Helper()
	list, err := s.fresh(s.t).Sockets(s.t.Context(), 0)
	if err != nil {
		s.t.Fatal(err)
	}
	return list
}

func (s *stage) socket(name string) mysocket.Socket {
	s.t.Helper()
	k, err := s.api.CreateSocket(s.t.Context(), mysocket.Socket{Name: name, Type: "http"})
	if err != nil {
		s.t.Fatal(err)
	}
	return k
}

// wantCondition wants a condition of the Service with this status, reason and part of its message.
func wantCondition(t *testing.T, svc *corev1.Service, kind string, status metav1.ConditionStatus, reason, message string) {
	t.Helper()
	c := apimeta.FindStatusCondition(svc.Status.Conditions, kind)
	if c == nil || c.Status != status || c.Reason != reason || !strings.Contains(c.Message, message) {
		t.Errorf("condition %s is %+v, want %s %s with %q", kind, c, status, reason, message)
	}
}

func hasFinalizer(obj client.Object) bool {
	return slices.Contains(obj.GetFinalizers(), annotations.Finalizer)
}

// wantUntouched wants a Service that nobody would see had ever been ours.
func wantUntouched(t *testing.T, svc *corev1.Service) {
	t.Helper()
	for _, a := range annotations.Own() {
		if v, ok := svc.Annotations[a]; ok {
			t.Errorf("annotation %s is still %q", a, v)
		}
	}
	if hasConditions(svc) || hasFinalizer(svc) {
		t.Errorf("conditions %v, finalizers %v", svc.Status.Conditions, svc.Finalizers)
	}
}

// pod makes a running pod of the app, owned by whom it says.
func (s *stage) pod(name string, changes ...func(*corev1.Pod)) *corev1.Pod {
	s.t.Helper()
	pod := newPod(name, changes...)
	pod.Namespace = s.ns
	cluster.Create(s.t, pod)
	return pod
}

func newPod(name string, changes ...func(*corev1.Pod)) *corev1.Pod {
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, UID: types.UID("uid-" + name), Labels: map[string]string{"app": "web"}},
		Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "app", Image: "example.com/app"}}},
		Status:     corev1.PodStatus{Phase: corev1.PodRunning},
	}
	for _, change := range changes {
		change(pod)
	}
	return pod
}

// injected gives a pod the sidecar.
func injected(pod *corev1.Pod) {
	pod.Spec.InitContainers = append(pod.Spec.InitContainers, corev1.Container{
		Name: inject.ContainerName, Image: "example.com/sidecar", RestartPolicy: ptr.To(corev1.ContainerRestartPolicyAlways),
	})
}

func ownedBy(kind, apiVersion string, owner client.Object) func(*corev1.Pod) {
	return func(pod *corev1.Pod) {
		pod.OwnerReferences = []metav1.OwnerReference{{APIVersion: apiVersion, Kind: kind, Name: owner.GetName(), UID: owner.GetUID(), Controller: ptr.To(true)}}
	}
}

// tunnel makes the Tunnel of a pod.
func (s *stage) tunnel(svc *corev1.Service, pod *corev1.Pod, status v1alpha1.TunnelStatus) *v1alpha1.Tunnel {
	s.t.Helper()
	t := newTunnel(svc, pod, status)
	t.Namespace = s.ns
	cluster.Create(s.t, t)
	return t
}

func newTunnel(svc *corev1.Service, pod *corev1.Pod, status v1alpha1.TunnelStatus) *v1alpha1.Tunnel {
	return &v1alpha1.Tunnel{
		ObjectMeta: metav1.ObjectMeta{
			Name: pod.Name, Finalizers: []string{annotations.Finalizer},
			OwnerReferences: []metav1.OwnerReference{{APIVersion: "v1", Kind: "Pod", Name: pod.Name, UID: pod.UID}},
		},
		Spec:   v1alpha1.TunnelSpec{PodName: pod.Name, ServiceName: svc.Name, SocketID: svc.Annotations[annotations.SocketID], SocketName: "k8s a.web"},
		Status: status,
	}
}

func eventually(t *testing.T, what string, condition func(context.Context) bool) {
	t.Helper()
	kubetest.Eventually(t, what, condition)
}

// between tells whether a time to wait lies within bounds.
func between(d, low, high time.Duration) bool { return low <= d && d <= high }
