package controller

import (
	"context"
	"slices"
	"strconv"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"github.com/mysocketio/mysocket-injector/api/v1alpha1"
	"github.com/mysocketio/mysocket-injector/internal/annotations"
)

// several makes Deployments that need a restart, and returns how many of them have been restarted.
func (s *rollout) several(names ...string) ([]*appsv1.Deployment, func() int) {
	s.t.Helper()
	var all []*appsv1.Deployment
	for _, name := range names {
		d, _ := s.deployment(name)
		all = append(all, d)
	}
	return all, func() int {
		s.t.Helper()
		n := 0
		for _, d := range all {
			if s.restartedAt(d, &d.Spec.Template) != "" {
				n++
			}
		}
		return n
	}
}

// moved returns the one of the Deployments that bears the label.
func moved(t *testing.T, all []*appsv1.Deployment) *appsv1.Deployment {
	t.Helper()
	for _, d := range all {
		cluster.Get(t, d)
		if isRestarting(d) {
			return d
		}
	}
	t.Fatal("none is on its way")
	return nil
}

func TestABoundedNumberAtATime(t *testing.T) {
	for _, most := range []int{0, 1, 2} {
		t.Run(strconv.Itoa(most), func(t *testing.T) {
			s := newRollout(t)
			s.r.MaxConcurrent = most
			most := max(1, most)
			all, restarted := s.several("a", "b", "c")
			for range 2 {
				s.run(rolloutWait)
				if n := restarted(); n != most {
					t.Fatalf("%d restarted at once, want %d", n, most)
				}
			}
			s.follow(most)
			s.rolledOut(moved(t, all))
			s.follow(most - 1)
			s.run(rolloutWait)
			if n := restarted(); n != most+1 {
				t.Errorf("%d restarted when one was healthy, want %d", n, most+1)
			}
		})
	}
}

// TestOverNamespaces shows that the bound is the whole cluster's, and that it holds before the informers know of a restart.
func TestOverNamespaces(t *testing.T) {
	a, b := newRollout(t), newRollout(t)
	a.deployment("web")
	a.run(rolloutWait)
	_, restarted := b.several("web")
	b.run(rolloutWait)
	b.r.Client = interceptor.NewClient(withWatch(t), interceptor.Funcs{
		List: func(ctx context.Context, c client.WithWatch, list client.ObjectList, opts ...client.ListOption) error {
			if _, ok := list.(*appsv1.DeploymentList); ok {
				return nil // an informer that is late
			}
			return c.List(ctx, list, opts...)
		},
	})
	b.run(rolloutWait)
	if restarted() != 0 {
		t.Error("restarted while a workload of another namespace was on its way")
	}
}

// TestLeaderChange has another leader, who knows nothing, go on after every step.
func TestLeaderChange(t *testing.T) {
	s := newRollout(t)
	all, restarted := s.several("a", "b")
	s.run(rolloutWait)
	s.r = s.leader()
	s.run(rolloutWait)
	s.follow(1)
	if restarted() != 1 {
		t.Fatal("the next leader restarted the second beside the first")
	}
	first := moved(t, all)
	s.rolledOut(first)
	s.r = s.leader()
	s.run(rolloutWait) // before it has followed up
	if restarted() != 2 {
		t.Error("the next leader did not go on")
	}
	s.r = s.leader()
	s.follow(1)
	second := moved(t, all)
	if second.Name == first.Name {
		t.Error("the first still bears the label")
	}
	s.exceeded(second)
	s.r = s.leader()
	s.follow(1)
	if c := s.tunnelsReady(); c.reason != reasonHalted {
		t.Errorf("condition %+v", c)
	}
}

// tunnelsReady is the Service's condition as the service controller would write it.
func (s *rollout) tunnelsReady() condition {
	s.t.Helper()
	cluster.Get(s.t, s.svc)
	c, err := (&ServiceReconciler{Client: cluster.Client, Outdated: outdated}).tunnelsReady(s.t.Context(), s.svc)
	if err != nil {
		s.t.Fatal(err)
	}
	return c
}

func TestFailedRestartHaltsAll(t *testing.T) {
	for name, mend := range map[string]func(*rollout, *appsv1.Deployment){
		"it gets healthy":  func(s *rollout, d *appsv1.Deployment) { s.rolledOut(d) },
		"it is deleted":    func(s *rollout, d *appsv1.Deployment) { cluster.Delete(s.t, d) },
		"its owner pauses": func(s *rollout, d *appsv1.Deployment) { cluster.Change(s.t, d, func() { d.Spec.Paused = true }) },
		"its owner changes it, and it fails again": func(s *rollout, d *appsv1.Deployment) {
			cluster.Change(s.t, d, func() { d.Spec.Template.Spec.Containers[0].Image = "example.com/app:2" })
			s.exceeded(d)
		},
		"its owner undoes the restart": func(s *rollout, d *appsv1.Deployment) {
			cluster.Change(s.t, d, func() { delete(d.Spec.Template.Annotations, annotations.RestartedAt) })
			s.exceeded(d)
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newRollout(t)
			s.r.MaxConcurrent = 2
			elsewhere := newRollout(t)
			elsewhere.r.MaxConcurrent = 2
			_, restarted := elsewhere.several("patient")
			d, pod := s.deployment("web")
			s.run(rolloutWait)
			s.events.take()
			s.exceeded(d)
			for range 2 {
				s.follow(1)
				elsewhere.run(rolloutWait)
			}
			if about := s.events.abouts(); !slices.Equal(about, []string{"Deployment web"}) {
				t.Errorf("Events about %q", about)
			}
			s.wantEvents("Warning RolloutHalted: not healthy since it was restarted for the tunnel sidecar")
			if restarted() != 0 {
				t.Fatal("another workload was restarted after the failure")
			}
			want := "0 of 1 pods connected, 1 waiting for a restart: Deployment web has not become healthy since it was restarted at 2026-01-02T03:04:05Z for the tunnel sidecar; no workload is restarted until it is healthy or changed"
			if c := s.tunnelsReady(); c.reason != "RolloutHalted" || c.message != want || !c.trouble || c.ok {
				t.Errorf("condition %+v, want %s", c, want)
			}
			if c := elsewhere.tunnelsReady(); c.reason != "WaitingForRestart" || c.message != "0 of 1 pods connected, 1 waiting for a restart: restarts are halted until another workload, which is not healthy since its restart, is mended; the control plane's log names it" {
				t.Errorf("condition of the other %+v", c)
			}
			// A change that does not touch the pods is none.
			cluster.Change(t, d, func() { d.Spec.Replicas = ptr.To[int32](2) })
			s.exceeded(d)
			s.follow(1)

			cluster.Delete(t, pod)
			mend(s, d)
			s.follow(0)
			elsewhere.run(rolloutWait)
			if restarted() != 1 {
				t.Error("the other was not restarted when this one was mended")
			}
			if c := s.tunnelsReady(); c.reason == "RolloutHalted" {
				t.Errorf("condition %+v", c)
			}
		})
	}
}

// TestProgressWithoutADeadline has workloads whose own controllers know no deadline.
func TestProgressWithoutADeadline(t *testing.T) {
	s := newRollout(t)
	set := &appsv1.StatefulSet{
		ObjectMeta: metav1.ObjectMeta{Namespace: s.ns, Name: "db"},
		Spec:       appsv1.StatefulSetSpec{Selector: selector(), Template: template(), ServiceName: "web"},
		Status:     appsv1.StatefulSetStatus{ObservedGeneration: 1, Replicas: 1, ReadyReplicas: 1, UpdatedReplicas: 1, CurrentRevision: "x", UpdateRevision: "x"},
	}
	cluster.Create(t, set)
	s.pod("db-0", ownedBy("StatefulSet", "apps/v1", set))
	start := time.Now().Truncate(time.Second).UTC()
	s.now = start
	s.run(rolloutWait)
	want := func(after time.Duration, p progress) {
		t.Helper()
		cluster.Get(t, set)
		if got, err := progressOf(t.Context(), cluster.Client, workloadFrom(set), start.Add(after)); err != nil || got != p {
			t.Errorf("after %s: %d, %v; want %d", after, got, err, p)
		}
	}
	want(restartDeadline-time.Second, moving)
	want(restartDeadline+time.Minute, failed) // its pod was made by a clock that is not the test's
	// A new pod is progress. (The API server sets the time at which it is made.)
	cluster.Change(t, set, func() {
		set.Spec.Template.Annotations[annotations.RestartedAt] = start.Add(-time.Hour).Format(time.RFC3339)
		set.Labels[annotations.Restarting] = templateHash(&set.Spec.Template)
	})
	want(restartDeadline-time.Minute, moving)
	want(restartDeadline+time.Minute, failed)
	// What was never ours can't hold up others for ever.
	cluster.Change(t, set, func() { set.Spec.Template.Annotations[annotations.RestartedAt] = "9999-01-01T00:00:00Z" })
	want(restartDeadline+time.Minute, over)

	d := &appsv1.Deployment{Spec: appsv1.DeploymentSpec{ProgressDeadlineSeconds: ptr.To[int32](3600)}}
	if w := workloadFrom(d); !w.hasDeadline {
		t.Error("a Deployment's own deadline is not known")
	}
	d.Spec.ProgressDeadlineSeconds = ptr.To[int32](2147483647)
	if w := workloadFrom(d); w.hasDeadline {
		t.Error("no deadline is taken for one")
	}
}

func TestOutdatedSidecars(t *testing.T) {
	s := newRollout(t)
	s.r.Outdated, s.r.SidecarHash = outdated, "new"
	d, pod := s.deployment("web", func(d *appsv1.Deployment) {
		// It was restarted for the former sidecar a while ago.
		d.Annotations = map[string]string{annotations.Restarts: "old 7"}
		d.Spec.Template.Annotations = map[string]string{annotations.RestartedAt: "2026-01-02T03:00:00Z"}
	})
	cluster.Delete(t, pod)
	s.podOf(d, "web-2", outdatedSidecar)
	s.podOf(d, "web-3", injected)
	s.run(rolloutWait)
	s.wantEvents("Normal Restarted: Deployment web was restarted so that its pods, which had an outdated tunnel sidecar, get the current one")
	if s.restartedAt(d, &d.Spec.Template) != s.now.Format(time.RFC3339) || d.Annotations[annotations.Restarts] != "new 1" {
		t.Errorf("annotations %v", d.Annotations)
	}
	s.rolledOut(d)
	s.run(rolloutAgain)
	s.now = s.now.Add(rolloutAgain)
	s.run(rolloutWait)
	s.wantEvents("Warning RestartedAgain: Deployment web was restarted again, since its pods came back with an outdated tunnel sidecar")

	alone := newRollout(t)
	alone.r.Outdated = outdated
	alone.pod("alone", outdatedSidecar)
	alone.run(0)
	alone.wantEvents("Warning RestartNeeded: pod alone has an outdated tunnel sidecar and no workload that could be restarted")
}

// TestBarePodsAreToldDuringAHalt: nothing of theirs waits for its turn.
func TestBarePodsAreToldDuringAHalt(t *testing.T) {
	s := newRollout(t)
	d, _ := s.deployment("web")
	s.run(rolloutWait)
	s.exceeded(d)
	s.events.take()
	other := newRollout(t)
	other.pod("alone")
	other.run(0)
	other.wantEvents("Warning RestartNeeded: pod alone has no tunnel sidecar")
}

// TestConflictingRestart has somebody change the workload between our look and our restart.
func TestConflictingRestart(t *testing.T) {
	s := newRollout(t)
	d, _ := s.deployment("web")
	s.r.Live = interceptor.NewClient(withWatch(t), interceptor.Funcs{
		Patch: func(ctx context.Context, c client.WithWatch, o client.Object, patch client.Patch, opts ...client.PatchOption) error {
			cluster.Change(t, d, func() { d.Spec.Template.Spec.Containers[0].Image = "example.com/app:2" })
			return c.Patch(ctx, o, patch, opts...)
		},
	})
	s.run(rolloutPoll)
	s.wantEvents()
	if s.restartedAt(d, &d.Spec.Template) != "" {
		t.Error("restarted")
	}
}

func TestBrokenSidecar(t *testing.T) {
	s := newRollout(t)
	d, pod := s.deployment("web")
	cluster.Delete(t, pod)
	s.podOf(d, "web-2", injected, func(pod *corev1.Pod) { pod.Spec.InitContainers[0].RestartPolicy = nil })
	want := "0 of 1 pods connected, 1 with a broken sidecar: pod web-2: another admission webhook took restartPolicy: Always from the init container mysocket-tunnel, so the pod never starts; mend that webhook (it may be too old to know the field), then make the pod anew"
	if c := s.tunnelsReady(); c.reason != "SidecarBroken" || c.message != want || !c.trouble {
		t.Errorf("condition %+v, want %s", c, want)
	}
}

func TestHaltedButAllConnected(t *testing.T) {
	svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "web", Annotations: enabled(annotations.SocketID, "1")}}
	pod := newPod("a", injected)
	r := &ServiceReconciler{Outdated: outdated}
	tunnel := *newTunnel(svc, pod, v1alpha1.TunnelStatus{State: "Connected"})
	c := r.summarize(svc, annotations.Spec{ServicePort: corev1.ServicePort{Port: 80}}, []corev1.Pod{*pod}, []v1alpha1.Tunnel{tunnel}, &corev1.Namespace{}, halt{of: "why"}, time.Now())
	if want := (condition{annotations.TunnelsReady, true, "RolloutHalted", "1 of 1 pods connected: why", true}); c != want {
		t.Errorf("got %+v, want %+v", c, want)
	}
}
