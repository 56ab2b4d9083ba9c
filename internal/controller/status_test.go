package controller

import (
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/mysocketio/mysocket-injector/api/v1alpha1"
	"github.com/mysocketio/mysocket-injector/internal/annotations"
)

func TestSummarize(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "web", Annotations: enabled(annotations.SocketID, "1")}}
	spec := annotations.Spec{ServicePort: corev1.ServicePort{Port: 80}, Rollout: annotations.RolloutAuto, Connections: 1}
	labelled := map[string]string{annotations.NamespaceInjection: annotations.NamespaceInjectionEnabled}
	optedOut := func(pod *corev1.Pod) { pod.Labels[annotations.PodInject] = "false" }
	ended := func(pod *corev1.Pod) { pod.Status.Phase = corev1.PodSucceeded }
	leaving := func(pod *corev1.Pod) { pod.DeletionTimestamp = &metav1.Time{Time: now} }
	connected := v1alpha1.TunnelStatus{State: "Connected"}
	waiting := func(since time.Duration) v1alpha1.TunnelStatus {
		return v1alpha1.TunnelStatus{State: "WaitingForApp", Message: "nothing answers on port 80", LastTransitionTime: &metav1.Time{Time: now.Add(-since)}}
	}
	failing := v1alpha1.TunnelStatus{State: "Connecting", Message: "auth: refused"}
	old := func(pod *corev1.Pod) {
		injected(pod)
		pod.Annotations = map[string]string{annotations.PodInjected: "old"}
	}
	r := &ServiceReconciler{Namespace: "mysocket-system", Outdated: outdated}
	type pods = []corev1.Pod
	type tunnels = []v1alpha1.Tunnel
	pod := func(name string, changes ...func(*corev1.Pod)) corev1.Pod { return *newPod(name, changes...) }
	of := func(name string, status v1alpha1.TunnelStatus) v1alpha1.Tunnel {
		return *newTunnel(svc, newPod(name), status)
	}
	other := func(change func(*v1alpha1.Tunnel)) v1alpha1.Tunnel {
		t := of("a", connected)
		change(&t)
		return t
	}
	nth := func(t v1alpha1.Tunnel, n int32) v1alpha1.Tunnel {
		t.Spec.Connection = n
		return t
	}
	two := func(s *annotations.Spec, _ *corev1.Namespace) { s.Connections = 2 }
	for _, tc := range []struct {
		name    string
		pods    pods
		tunnels tunnels
		change  func(*annotations.Spec, *corev1.Namespace)
		ok      bool
		trouble bool
		reason  string
		message string
	}{
		{"no pods", nil, nil, nil, false, false, "NoPods", "the Service selects no running pod"},
		{"none that runs", pods{pod("a", ended), pod("b", leaving)}, nil, nil, false, false, "NoPods", "the Service selects no running pod"},
		{"all connected", pods{pod("a", injected), pod("b", injected), pod("c", ended)}, tunnels{of("a", connected), of("b", connected)}, nil,
			true, false, "AllConnected", "2 of 2 pods connected"},
		{"one without a tunnel yet", pods{pod("a", injected), pod("b", injected)}, tunnels{of("a", connected)}, nil,
			false, false, "Connecting", "1 of 2 pods connected"},
		{"the tunnel of a pod's predecessor", pods{pod("a", injected)}, tunnels{other(func(t *v1alpha1.Tunnel) { t.OwnerReferences[0].UID = "old" })}, nil,
			false, false, "Connecting", "0 of 1 pods connected"},
		{"the tunnel of a former socket", pods{pod("a", injected)}, tunnels{other(func(t *v1alpha1.Tunnel) { t.Spec.SocketID = "0" })}, nil,
			false, false, "Connecting", "0 of 1 pods connected"},
		{"the tunnel of another Service with the same socket", pods{pod("a", injected)}, tunnels{other(func(t *v1alpha1.Tunnel) { t.Spec.ServiceName = "api" })}, nil,
			true, false, "AllConnected", "1 of 1 pods connected"},
		{"a tunnel that goes", pods{pod("a", injected)}, tunnels{other(func(t *v1alpha1.Tunnel) { t.DeletionTimestamp = &metav1.Time{Time: now} })}, nil,
			false, false, "Connecting", "0 of 1 pods connected"},
		{"the app starts", pods{pod("a", injected)}, tunnels{of("a", waiting(14*time.Second))}, nil,
			false, false, "WaitingForApp", "0 of 1 pods connected"},
		{"the app does not start", pods{pod("a", injected)}, tunnels{of("a", waiting(15*time.Second))}, nil,
			false, true, "TunnelFailing", "0 of 1 pods connected: pod a: nothing answers on port 80"},
		{"two fail", pods{pod("b", injected), pod("a", injected)}, tunnels{of("a", failing), of("b", failing)}, nil,
			false, true, "TunnelFailing", "0 of 2 pods connected: pod a: auth: refused"},
		{"all connections", pods{pod("a", injected)}, tunnels{of("a", connected), nth(of("a", connected), 1)}, two,
			true, false, "AllConnected", "1 of 1 pods connected"},
		{"one connection of two", pods{pod("a", injected), pod("b", injected)}, tunnels{of("a", connected), nth(of("a", connected), 1), of("b", connected)}, two,
			false, false, "Connecting", "1 of 2 pods connected"},
		{"the second connection fails", pods{pod("a", injected)}, tunnels{of("a", connected), nth(of("a", failing), 1)}, two,
			false, true, "TunnelFailing", "0 of 1 pods connected: pod a, connection 1: auth: refused"},
		{"the first is on its way and the second fails", pods{pod("a", injected)}, tunnels{nth(of("a", failing), 1)}, two,
			false, true, "TunnelFailing", "0 of 1 pods connected: pod a, connection 1: auth: refused"},
		{"a connection too many", pods{pod("a", injected)}, tunnels{of("a", connected), nth(of("a", failing), 1)}, nil,
			true, false, "AllConnected", "1 of 1 pods connected"},
		{"waiting for a restart", pods{pod("a"), pod("b", injected)}, tunnels{of("b", connected)}, nil,
			false, false, "WaitingForRestart", "1 of 2 pods connected, 1 waiting for a restart"},
		{"outdated", pods{pod("a", old), pod("b", injected)}, tunnels{of("a", connected), of("b", connected)}, nil,
			true, false, "AllConnected", "2 of 2 pods connected, 1 with an outdated sidecar"},
		{"a namespace that is never injected", pods{pod("a")}, nil, func(_ *annotations.Spec, ns *corev1.Namespace) { ns.Name = "kube-system" },
			false, true, "NamespaceExcluded", "0 of 1 pods connected, 1 waiting for a restart: pods of namespace kube-system are never injected; move the app to a namespace of its own"},
		{"restarts are off", pods{pod("a")}, nil, func(s *annotations.Spec, _ *corev1.Namespace) { s.Rollout = annotations.RolloutNever },
			false, false, "RestartIsOff", `0 of 1 pods connected, 1 waiting for a restart: mysocket.io/rollout is "never", so restart their workloads yourself (kubectl rollout restart)`},
		{"namespace is not labelled", pods{pod("a")}, nil, func(_ *annotations.Spec, ns *corev1.Namespace) { ns.Labels = nil },
			false, true, "NamespaceNotLabelled", "0 of 1 pods connected, 1 waiting for a restart: namespace shop is not labelled for injection; run: kubectl label namespace shop mysocket.io/injection=enabled"},
		{"all opted out", pods{pod("a", optedOut)}, nil, nil,
			false, true, "OptedOut", `0 of 0 pods connected, 1 can have no tunnel (OptedOut: the label mysocket.io/inject is "false"; remove it to get a tunnel)`},
		{"one opted out", pods{pod("a", optedOut), pod("b", injected)}, tunnels{of("b", connected)}, nil,
			true, false, "AllConnected", `1 of 1 pods connected, 1 can have no tunnel (OptedOut: the label mysocket.io/inject is "false"; remove it to get a tunnel)`},
		{"the target port has no name in the pod", pods{pod("a", injected)}, nil,
			func(s *annotations.Spec, _ *corev1.Namespace) { s.ServicePort.TargetPort = intstr.FromString("web") },
			false, true, "PortNotFound", `0 of 1 pods connected: port 80 of the Service has the target port "web", and no container of the pod has a port of that name`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s, ns := spec, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop", Labels: labelled}}
			if tc.change != nil {
				tc.change(&s, ns)
			}
			got := r.summarize(svc, s, tc.pods, tc.tunnels, ns, halt{}, now)
			if want := (condition{annotations.TunnelsReady, tc.ok, tc.reason, tc.message, tc.trouble}); got != want {
				t.Errorf("got  %+v\nwant %+v", got, want)
			}
		})
	}
}

func TestSetConditions(t *testing.T) {
	s := newStage(t)
	svc := s.service(enabled())
	svc.Status.Conditions = []metav1.Condition{{Type: "example.com/Theirs", Status: metav1.ConditionTrue, Reason: "X", LastTransitionTime: metav1.Now()}}
	if err := cluster.Client.Status().Update(t.Context(), svc); err != nil {
		t.Fatal(err)
	}
	r := s.reconciler()
	set := func(c condition) {
		t.Helper()
		cluster.Get(t, svc)
		if err := r.setConditions(t.Context(), svc, c); err != nil {
			t.Fatal(err)
		}
		cluster.Get(t, svc)
	}
	long := strings.Repeat("é", maxMessage)
	set(condition{annotations.SocketReady, false, "Bad", long, true})
	if events := s.events.take(); len(events) != 1 || len(events[0]) > maxMessage+len("Warning Bad: ") || !strings.HasSuffix(events[0], "é...") {
		t.Errorf("events %q", events)
	}
	set(condition{annotations.SocketReady, false, "Bad", "other words", true})
	wantCondition(t, svc, annotations.SocketReady, metav1.ConditionFalse, "Bad", "other words")
	set(condition{annotations.TunnelsReady, false, "OnTheWay", "", false})
	if events := s.events.take(); len(events) != 0 {
		t.Errorf("events %q of a changed message and a step on the way", events)
	}
	wantCondition(t, svc, "example.com/Theirs", metav1.ConditionTrue, "X", "")
	if err := r.clearConditions(t.Context(), svc); err != nil {
		t.Fatal(err)
	}
	cluster.Get(t, svc)
	if len(svc.Status.Conditions) != 1 || svc.Status.Conditions[0].Type != "example.com/Theirs" {
		t.Errorf("conditions %+v", svc.Status.Conditions)
	}
	cluster.Delete(t, svc)
	if err := r.setConditions(t.Context(), svc, condition{annotations.SocketReady, true, "Ready", "", false}); err != nil {
		t.Errorf("on a Service that is gone: %v", err)
	}
}
