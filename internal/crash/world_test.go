package crash

import (
	"bytes"
	"cmp"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/mysocketio/mysocket-injector/api/v1alpha1"
	"github.com/mysocketio/mysocket-injector/internal/annotations"
	"github.com/mysocketio/mysocket-injector/internal/edge/edgetest"
	"github.com/mysocketio/mysocket-injector/internal/gatewayapi"
	"github.com/mysocketio/mysocket-injector/internal/inject"
	"github.com/mysocketio/mysocket-injector/internal/kubetest"
	"github.com/mysocketio/mysocket-injector/internal/mysocket"
)

var cluster kubetest.Cluster

func TestMain(m *testing.M) {
	os.Exit(kubetest.Main(m, &cluster))
}

func typeName(o any) string { return reflect.TypeOf(o).String() }

func copyInto(o, from client.Object) { reflect.ValueOf(o).Elem().Set(reflect.ValueOf(from).Elem()) }

// place is an edge with an account, and who asks it what there is.
type place struct {
	edge    *edgetest.Edge
	account *mysocket.Client
}

func newPlace(t *testing.T) *place {
	t.Helper()
	edge := edgetest.Start(t)
	account, err := mysocket.New(mysocket.Config{
		BaseURL: edge.APIURL, Transport: edge.APIClient(t).Transport, Version: "test",
		Credentials: func() (mysocket.Account, error) {
			return mysocket.Account{Email: edge.Email, Password: edge.Password}, nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	return &place{edge, account}
}

// world is all that outlives the control plane: a namespace of a real API server, the account at a real edge, and the
// sidecars. Time passes when the test says so.
type world struct {
	*place

	t   *testing.T
	ns  string
	key string // of the sidecars
	// sidecars are what each running sidecar knows of its tunnel, by the pod's name.
	sidecars map[string]*sidecar
	now      time.Time
	id       string // of the socket that a scenario wants to keep
}

type sidecar struct {
	pod            types.UID
	socket, tunnel string
	reported       bool
}

func newWorld(t *testing.T, p *place, pods int) *world {
	t.Helper()
	public, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ssh.NewPublicKey(public)
	if err != nil {
		t.Fatal(err)
	}
	w := &world{
		t: t, place: p, now: time.Now(), sidecars: map[string]*sidecar{},
		ns:  cluster.Namespace(t, map[string]string{annotations.NamespaceInjection: annotations.NamespaceInjectionEnabled}),
		key: strings.TrimSpace(string(ssh.MarshalAuthorizedKey(key))),
	}
	cluster.Create(t, w.service())
	for i := range pods {
		w.addPod(fmt.Sprintf("web-%d", i+1))
	}
	return w
}

func (w *world) service() *corev1.Service {
	return &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: w.ns, Name: "web"},
		Spec:       corev1.ServiceSpec{ClusterIP: corev1.ClusterIPNone, Selector: map[string]string{"app": "web"}, Ports: []corev1.ServicePort{{Port: 8000}}},
	}
}

// annotate writes annotations on the Service, as its owner does; one without a value is removed.
func (w *world) annotate(pairs ...string) {
	w.t.Helper()
	svc := w.service()
	cluster.Change(w.t, svc, func() {
		if svc.Annotations == nil {
			svc.Annotations = map[string]string{}
		}
		for i := 0; i+1 < len(pairs); i += 2 {
			svc.Annotations[pairs[i]] = pairs[i+1]
			if pairs[i+1] == "" {
				delete(svc.Annotations, pairs[i])
			}
		}
	})
}

// addPod makes a running pod whose sidecar knows of no tunnel.
func (w *world) addPod(name string) {
	w.t.Helper()
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: w.ns, Name: name, Labels: map[string]string{"app": "web"}},
		Spec: corev1.PodSpec{
			InitContainers: []corev1.Container{{Name: inject.ContainerName, Image: "example.com/sidecar", RestartPolicy: ptr.To(corev1.ContainerRestartPolicyAlways)}},
			Containers:     []corev1.Container{{Name: "app", Image: "example.com/app"}},
		},
		Status: corev1.PodStatus{Phase: corev1.PodRunning},
	}
	cluster.Create(w.t, pod)
	w.sidecars[name] = &sidecar{pod: pod.UID}
}

// killPod takes a pod away without a word from its sidecar.
func (w *world) killPod(name string) {
	w.t.Helper()
	cluster.Delete(w.t, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: w.ns, Name: name}})
	delete(w.sidecars, name)
}

// ask sends a sidecar's request to the gateway. There is no answer from a dead one.
func (w *world) ask(p *process, pod string, s *sidecar, method, path string, body, into any) bool {
	w.t.Helper()
	text, err := json.Marshal(body)
	if err != nil {
		w.t.Fatal(err)
	}
	if p.isDead() {
		return false
	}
	r := httptest.NewRequestWithContext(p.ctx, method, path, bytes.NewReader(text))
	r.Header.Set("Authorization", "Bearer "+w.ns+"/"+pod+"/"+string(s.pod))
	answer := httptest.NewRecorder()
	p.gateway(w.t, w).ServeHTTP(answer, r)
	if p.isDead() || answer.Code >= 300 {
		return false
	}
	return into == nil || json.Unmarshal(answer.Body.Bytes(), into) == nil
}

// sidecar has a sidecar do what is next: withdraw what is not asked for any more, register, report.
func (w *world) runSidecar(p *process, pod string, s *sidecar) {
	w.t.Helper()
	svc := w.service()
	assigned := ""
	if err := cluster.Client.Get(w.t.Context(), client.ObjectKeyFromObject(svc), svc); err == nil && svc.DeletionTimestamp == nil && annotations.IsEnabled(svc) {
		assigned = svc.Annotations[annotations.SocketID]
	}
	path := func(socket string) string { return gatewayapi.SocketsPath + socket }
	if s.tunnel != "" && s.socket != assigned && w.ask(p, pod, s, http.MethodDelete, path(s.socket)+"/tunnels/"+s.tunnel, nil, nil) {
		s.socket, s.tunnel, s.reported = "", "", false
	}
	if s.tunnel == "" && assigned != "" {
		var got gatewayapi.Registration
		if w.ask(p, pod, s, http.MethodPost, path(assigned)+"/tunnels", gatewayapi.RegisterRequest{PublicKey: w.key}, &got) {
			s.socket, s.tunnel = assigned, got.TunnelID
		}
	}
	if s.tunnel != "" && s.socket == assigned && !s.reported {
		s.reported = w.ask(p, pod, s, http.MethodPut, path(s.socket)+"/status", gatewayapi.StatusReport{State: gatewayapi.StateConnected}, nil)
	}
}

// round has every part of the control plane do what there is to do once, and Kubernetes collect garbage.
func (w *world) round(p *process) (failed bool) {
	w.t.Helper()
	ctx := p.ctx
	if _, err := p.services.Reconcile(ctx, reconcile.Request{NamespacedName: client.ObjectKeyFromObject(w.service())}); err != nil {
		failed = true
	}
	for _, pod := range slices.Sorted(keys(w.sidecars)) {
		w.runSidecar(p, pod, w.sidecars[pod])
	}
	for _, t := range w.objects() {
		pod := &corev1.Pod{}
		err := cluster.Client.Get(w.t.Context(), client.ObjectKey{Namespace: w.ns, Name: t.Spec.PodName}, pod)
		if t.DeletionTimestamp == nil && (apierrors.IsNotFound(err) || err == nil && pod.UID != t.OwnerReferences[0].UID) {
			cluster.Delete(w.t, &t)
		}
		if _, err := p.tunnels.Reconcile(ctx, reconcile.Request{NamespacedName: client.ObjectKeyFromObject(&t)}); err != nil {
			failed = true
		}
	}
	return failed
}

// sweepSoon is more than the wait for what was found, and less than that for nothing.
const sweepSoon = 4 * time.Minute

// prepare has a process without faults do what follows from one change. It takes two rounds: tunnels come after their
// socket, and what is said of them after that.
func (w *world) prepare() {
	w.t.Helper()
	p := w.start(0, none)
	for range 2 {
		if w.round(p) {
			w.t.Fatal("a part of the control plane failed without a fault")
		}
	}
}

// settle runs a process until it has nothing to do any more, or dies.
func (w *world) settle(p *process) {
	w.t.Helper()
	for range 40 {
		before := p.written()
		failed := w.round(p)
		if p.isDead() {
			return
		}
		if failed || p.written() != before {
			continue
		}
		for again := time.Duration(0); again < sweepSoon; { // what is left over has to be seen twice
			var err error
			if again, err = p.sweeper.Sweep(p.ctx); err != nil {
				failed = true
				break
			}
			w.now = w.now.Add(again)
		}
		if p.isDead() {
			return
		}
		if !failed && p.written() == before {
			return
		}
	}
	w.t.Errorf("it does not settle; the last calls: %q", p.calls[max(0, len(p.calls)-20):])
}

func (w *world) objects() []v1alpha1.Tunnel {
	w.t.Helper()
	var list v1alpha1.TunnelList
	if err := cluster.Client.List(w.t.Context(), &list, client.InNamespace(w.ns)); err != nil {
		w.t.Fatal(err)
	}
	return list.Items
}

// want is what there must be in the end.
type want struct {
	sockets, tunnels int
	// kept is that the socket is the one of the beginning.
	kept   bool
	kind   string // of the socket
	name   string // of the socket, when it is not that of the Service
	reason string // of SocketReady; empty for a Service that bears nothing of ours, or is gone
}

func (w *world) check(want want) {
	w.t.Helper()
	sockets, err := w.account.Sockets(w.t.Context(), 0)
	if err != nil {
		w.t.Fatal(err)
	}
	remote := []string{}
	for _, k := range sockets {
		if k.Name != cmp.Or(want.name, "k8s "+w.ns+".web") || want.kind != "" && k.Type != want.kind || want.kept && k.ID != w.id {
			w.t.Errorf("socket %s %q %s, want %+v and the id %s", k.ID, k.Name, k.Type, want, w.id)
		}
		for _, t := range k.Tunnels {
			remote = append(remote, t.ID)
		}
	}
	if len(sockets) != want.sockets || len(remote) != want.tunnels {
		w.t.Errorf("%d sockets and %d tunnels at Mysocket, want %d and %d", len(sockets), len(remote), want.sockets, want.tunnels)
	}
	known, running := []string{}, []string{}
	for _, t := range w.objects() {
		known = append(known, t.Status.TunnelID)
	}
	for _, s := range w.sidecars {
		if s.tunnel != "" {
			running = append(running, s.tunnel)
		}
	}
	slices.Sort(remote)
	slices.Sort(known)
	slices.Sort(running)
	if !slices.Equal(remote, known) || !slices.Equal(remote, running) {
		w.t.Errorf("tunnels at Mysocket %v, Tunnel objects of %v, sidecars have %v", remote, known, running)
	}
	w.checkService(want, sockets)
}

func (w *world) checkService(want want, sockets []mysocket.Socket) {
	w.t.Helper()
	svc := w.service()
	err := cluster.Client.Get(w.t.Context(), client.ObjectKeyFromObject(svc), svc)
	if apierrors.IsNotFound(err) && want.reason == "" {
		return
	}
	if err != nil {
		w.t.Fatal(err)
	}
	if svc.DeletionTimestamp != nil {
		w.t.Errorf("the Service is still being deleted: finalizers %v", svc.Finalizers)
	}
	if want.reason == "" {
		for _, a := range annotations.Own() {
			if v, ok := svc.Annotations[a]; ok {
				w.t.Errorf("annotation %s is still %q", a, v)
			}
		}
		if len(svc.Status.Conditions) > 0 || len(svc.Finalizers) > 0 {
			w.t.Errorf("the Service still has the conditions %v and finalizers %v", svc.Status.Conditions, svc.Finalizers)
		}
		return
	}
	if len(sockets) == 1 && svc.Annotations[annotations.SocketID] != sockets[0].ID {
		w.t.Errorf("the Service names the socket %q, and there is %s", svc.Annotations[annotations.SocketID], sockets[0].ID)
	}
	ready := apimeta.FindStatusCondition(svc.Status.Conditions, annotations.SocketReady)
	if ready == nil || ready.Reason != want.reason {
		w.t.Errorf("SocketReady is %+v, want the reason %s", ready, want.reason)
	}
	message := fmt.Sprintf("%d of %d pods connected", want.tunnels, len(w.sidecars))
	if c := apimeta.FindStatusCondition(svc.Status.Conditions, annotations.TunnelsReady); c == nil || !strings.Contains(c.Message, message) {
		w.t.Errorf("TunnelsReady is %+v, want %q", c, message)
	}
}

// clear takes all away, for the next case on the same edge.
func (w *world) clear() {
	sockets, err := w.account.Sockets(w.t.Context(), 0)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, k := range sockets {
		if err := w.account.DeleteSocket(context.Background(), k.ID); err != nil {
			w.t.Error(err)
		}
	}
}

func keys[K comparable, V any](m map[K]V) func(func(K) bool) {
	return func(yield func(K) bool) {
		for k := range m {
			if !yield(k) {
				return
			}
		}
	}
}
