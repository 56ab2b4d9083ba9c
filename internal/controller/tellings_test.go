package controller

import (
	"context"
	"slices"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/mysocketio/mysocket-injector/internal/annotations"
	"github.com/mysocketio/mysocket-injector/internal/inject"
)

func optedOut(pod *corev1.Pod)    { pod.Labels[annotations.PodInject] = "false" }
func hostNetwork(pod *corev1.Pod) { pod.Spec.HostNetwork = true }

// TestSkippedPodsAreTold has every owner of pods that can have no sidecar hear of it, once, whatever the Service's rollout says.
func TestSkippedPodsAreTold(t *testing.T) {
	for _, mode := range []string{annotations.RolloutAuto, annotations.RolloutNever} {
		t.Run(mode, func(t *testing.T) {
			s := newRollout(t, annotations.RolloutMode, mode)
			d, pod := s.deployment("web")
			cluster.Delete(t, pod)
			s.podOf(d, "web-2", hostNetwork)
			s.podOf(d, "web-3", hostNetwork) // of another ReplicaSet of the same Deployment
			tmpl := template()
			tmpl.Spec.RestartPolicy, tmpl.Labels = corev1.RestartPolicyNever, nil
			job := &batchv1.Job{ObjectMeta: metav1.ObjectMeta{Namespace: s.ns, Name: "once"}, Spec: batchv1.JobSpec{Template: tmpl}}
			cluster.Create(t, job)
			s.pod("once-1", ownedBy("Job", "batch/v1", job), optedOut)
			alone := s.pod("z-alone", hostNetwork)
			s.pod("z-ended", hostNetwork, func(pod *corev1.Pod) { pod.Status.Phase = corev1.PodSucceeded })

			s.run(0)
			if about, want := s.events.abouts(), []string{"Job once", "Deployment web", "Pod z-alone"}; !slices.Equal(about, want) {
				t.Errorf("Events about %q, want %q", about, want)
			}
			host := "Warning HostNetwork: pods that Service web selects get no tunnel: with hostNetwork "
			s.wantEvents("Normal OptedOut: pods that Service web selects get no tunnel: the label ", host, host)

			// The same again, from another Service, too: no news.
			other := &corev1.Service{
				ObjectMeta: metav1.ObjectMeta{Namespace: s.ns, Name: "other", Annotations: enabled(annotations.SocketID, "another id", annotations.RolloutMode, mode)},
				Spec:       *s.svc.Spec.DeepCopy(),
			}
			other.Spec.ClusterIP, other.Spec.ClusterIPs = "", nil
			cluster.Create(t, other)
			for _, svc := range []*corev1.Service{s.svc, other, s.svc, other} {
				if _, err := s.r.Reconcile(t.Context(), request(svc)); err != nil {
					t.Fatal(err)
				}
			}
			s.wantEvents()

			// Another reason is news, and so is the old one when it was away for all.
			cluster.Change(t, alone, func() { optedOut(alone) })
			for range 2 {
				for _, svc := range []*corev1.Service{s.svc, other} {
					if _, err := s.r.Reconcile(t.Context(), request(svc)); err != nil {
						t.Fatal(err)
					}
				}
			}
			s.wantEvents("Normal OptedOut: ")
			cluster.Change(t, alone, func() { delete(alone.Labels, annotations.PodInject) })
			s.run(0)
			s.wantEvents("Warning HostNetwork: ")

			// A Service that is not public any more forgets.
			for _, svc := range []*corev1.Service{s.svc, other} {
				cluster.Delete(t, svc)
				if _, err := s.r.Reconcile(t.Context(), request(svc)); err != nil {
					t.Fatal(err)
				}
			}
			if len(s.r.said) != 0 {
				t.Errorf("remembered %v", s.r.said)
			}
		})
	}
}

// TestSkippedPodsElsewhere has pods that nobody asked to be public.
func TestSkippedPodsElsewhere(t *testing.T) {
	for name, change := range map[string]func(*rollout, *corev1.Pod){
		"unlabelled namespace": func(s *rollout, _ *corev1.Pod) {
			ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: s.ns}}
			cluster.Change(s.t, ns, func() { delete(ns.Labels, annotations.NamespaceInjection) })
		},
		"not selected": func(s *rollout, pod *corev1.Pod) { cluster.Change(s.t, pod, func() { pod.Labels["app"] = "other" }) },
		"Service not enabled": func(s *rollout, _ *corev1.Pod) {
			cluster.Change(s.t, s.svc, func() { s.svc.Annotations[annotations.Enabled] = "false" })
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newRollout(t)
			change(s, s.pod("alone", hostNetwork))
			s.run(0)
			s.wantEvents()
		})
	}
}

// TestEventsAreRecordedOnTheirOwner has the real recorder write what the reconciler says of owners that it knows by name only, and
// wants the reason of the Event to be the reason that the admission gives.
func TestEventsAreRecordedOnTheirOwner(t *testing.T) {
	s := newRollout(t)
	set := &appsv1.StatefulSet{
		ObjectMeta: metav1.ObjectMeta{Namespace: s.ns, Name: "db"},
		Spec:       appsv1.StatefulSetSpec{Selector: selector(), Template: template(), ServiceName: "web"},
	}
	cluster.Create(t, set)
	pod := s.pod("db-0", ownedBy("StatefulSet", "apps/v1", set), hostNetwork)
	s.r = nil
	start(t, s.ns, func(m managed) []setup {
		r := s.leader()
		r.Client, r.Now = m.GetClient(), time.Now
		r.Events = m.GetEventRecorder("mysocket-injector")
		return []setup{r}
	})
	want := string(inject.Check(pod).Reason)
	eventually(t, "the Event on the StatefulSet", func(ctx context.Context) bool {
		var list corev1.EventList
		if cluster.Client.List(ctx, &list, client.InNamespace(s.ns)) != nil {
			return false
		}
		return slices.ContainsFunc(list.Items, func(e corev1.Event) bool {
			return e.InvolvedObject.Kind == "StatefulSet" && e.InvolvedObject.Name == "db" && e.InvolvedObject.UID == set.UID && e.Reason == want && e.Type == corev1.EventTypeWarning
		})
	})
}

// TestSocketThatWasDeletedAtMysocket has somebody delete the socket there: the Service gets another public name, and says so.
func TestSocketThatWasDeletedAtMysocket(t *testing.T) {
	s := newStage(t)
	svc := s.service(enabled())
	s.mustReconcile(svc)
	s.events.take()
	if err := s.api.DeleteSocket(t.Context(), svc.Annotations[annotations.SocketID]); err != nil {
		t.Fatal(err)
	}
	was := svc.Annotations[annotations.DNSName]
	s.mustReconcile(svc)
	if svc.Annotations[annotations.DNSName] == was {
		t.Error("the name is the same")
	}
	s.wantEvents("Warning SocketCreated: the socket \"k8s " + s.ns + ".web\" was gone at Mysocket and was made anew: its public name is now " + svc.Annotations[annotations.DNSName])
	s.mustReconcile(svc)
	s.wantEvents()
}
