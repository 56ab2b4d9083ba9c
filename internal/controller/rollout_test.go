package controller

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"github.com/mysocketio/mysocket-injector/internal/annotations"
)

// rollout is a labelled namespace with a Service that has its socket, and the reconciler with a clock of its own.
type rollout struct {
	*stage
	r     *RolloutReconciler
	svc   *corev1.Service
	now   time.Time
	ready error // of admission
}

func newRollout(t *testing.T, more ...string) *rollout {
	t.Helper()
	cluster.Require(t)
	s := &rollout{
		stage: &stage{
			t: t, events: &recorder{},
			ns: cluster.Namespace(t, map[string]string{annotations.NamespaceInjection: annotations.NamespaceInjectionEnabled}),
		},
		now: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC),
	}
	s.svc = s.service(enabled(append(more, annotations.SocketID, "an id")...))
	s.r = s.leader()
	// The pace is the whole cluster's, and all tests have one cluster.
	t.Cleanup(func() {
		for _, o := range []client.Object{&appsv1.Deployment{}, &appsv1.StatefulSet{}, &appsv1.DaemonSet{}} {
			if err := cluster.Client.DeleteAllOf(context.Background(), o, client.InNamespace(s.ns)); err != nil {
				t.Error(err)
			}
		}
	})
	return s
}

// leader is a reconciler that knows nothing but what is in the cluster.
func (s *rollout) leader() *RolloutReconciler {
	return &RolloutReconciler{
		Client: cluster.Client, Live: cluster.Client, Events: s.events, SidecarHash: "abc",
		AdmissionReady: func(context.Context) error { return s.ready }, Now: func() time.Time { return s.now },
	}
}

// follow looks at the restarts that are on their way and wants so many workloads to bear the label afterwards.
func (s *rollout) follow(left int) {
	s.t.Helper()
	got, err := s.r.Reconcile(s.t.Context(), followUp)
	if err != nil {
		s.t.Fatal(err)
	}
	marked, err := restarting(s.t.Context(), cluster.Client)
	if err != nil {
		s.t.Fatal(err)
	}
	if len(marked) != left || (got.RequeueAfter > 0) != (left > 0) {
		s.t.Errorf("%d workloads are on their way, want %d; again after %s", len(marked), left, got.RequeueAfter)
	}
}

// run reconciles once and wants to be called again after this long.
func (s *rollout) run(again time.Duration) {
	s.t.Helper()
	got, err := s.r.Reconcile(s.t.Context(), request(s.svc))
	if err != nil {
		s.t.Fatal(err)
	}
	if got.RequeueAfter != again {
		s.t.Errorf("again after %s, want %s", got.RequeueAfter, again)
	}
}

func template() corev1.PodTemplateSpec {
	return corev1.PodTemplateSpec{
		ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"app": "web"}},
		Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "app", Image: "example.com/app"}}},
	}
}

func selector() *metav1.LabelSelector {
	return &metav1.LabelSelector{MatchLabels: map[string]string{"app": "web"}}
}

// deployment makes a Deployment that has rolled out, with one bare pod.
func (s *rollout) deployment(name string, changes ...func(*appsv1.Deployment)) (*appsv1.Deployment, *corev1.Pod) {
	s.t.Helper()
	d := &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Namespace: s.ns, Name: name},
		Spec:       appsv1.DeploymentSpec{Selector: selector(), Template: template(), Replicas: ptr.To[int32](1)},
	}
	for _, change := range changes {
		change(d)
	}
	cluster.Create(s.t, d)
	s.rolledOut(d)
	return d, s.podOf(d, name+"-1")
}

// exceeded gives a Deployment the status of one whose new pods don't get ready in time.
func (s *rollout) exceeded(d *appsv1.Deployment) {
	s.t.Helper()
	cluster.Get(s.t, d)
	d.Status = appsv1.DeploymentStatus{ObservedGeneration: d.Generation, Replicas: 2, UpdatedReplicas: 1, ReadyReplicas: 1, AvailableReplicas: 1, UnavailableReplicas: 1,
		Conditions: []appsv1.DeploymentCondition{{Type: appsv1.DeploymentProgressing, Status: corev1.ConditionFalse, Reason: "ProgressDeadlineExceeded"}}}
	if err := cluster.Client.Status().Update(s.t.Context(), d); err != nil {
		s.t.Fatal(err)
	}
}

// rolledOut gives a Deployment the status of one that is done.
func (s *rollout) rolledOut(d *appsv1.Deployment) {
	s.t.Helper()
	cluster.Get(s.t, d)
	n := *d.Spec.Replicas
	d.Status = appsv1.DeploymentStatus{ObservedGeneration: d.Generation, Replicas: n, UpdatedReplicas: n, ReadyReplicas: n, AvailableReplicas: n}
	if err := cluster.Client.Status().Update(s.t.Context(), d); err != nil {
		s.t.Fatal(err)
	}
}

// podOf makes a pod of a Deployment, bare unless changed, with the ReplicaSet between them.
func (s *rollout) podOf(d *appsv1.Deployment, name string, changes ...func(*corev1.Pod)) *corev1.Pod {
	s.t.Helper()
	rs := &appsv1.ReplicaSet{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: s.ns, Name: name,
			OwnerReferences: []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "Deployment", Name: d.Name, UID: d.UID, Controller: ptr.To(true)}},
		},
		Spec: appsv1.ReplicaSetSpec{Selector: selector(), Template: template()},
	}
	cluster.Create(s.t, rs)
	return s.pod(name, append(changes, ownedBy("ReplicaSet", "apps/v1", rs))...)
}

func outdatedSidecar(pod *corev1.Pod) {
	injected(pod)
	pod.Annotations = map[string]string{annotations.PodInjected: "old"}
}

func (s *rollout) restartedAt(obj client.Object, tmpl *corev1.PodTemplateSpec) string {
	s.t.Helper()
	cluster.Get(s.t, obj)
	return tmpl.Annotations[annotations.RestartedAt]
}

func TestDeploymentIsRestartedOnce(t *testing.T) {
	s := newRollout(t)
	d, pod := s.deployment("web")
	s.podOf(d, "web-2") // of another ReplicaSet: still one restart
	s.run(rolloutWait)
	first := s.restartedAt(d, &d.Spec.Template)
	if first != s.now.Format(time.RFC3339) {
		t.Fatalf("restarted at %q", first)
	}
	s.wantEvents("Normal Restarted: Deployment web was restarted so that its pods, which had no tunnel sidecar, get the current one")

	s.run(rolloutWait) // it has not rolled out
	s.follow(1)
	s.now = s.now.Add(30 * time.Second)
	s.rolledOut(d)
	s.follow(0)
	s.run(90 * time.Second) // rolled out, and a pod is bare still: not again within two minutes
	s.wantEvents("Normal RestartDone: all pods are new and healthy")
	if again := s.restartedAt(d, &d.Spec.Template); again != first {
		t.Errorf("restarted again at %s", again)
	}

	// In vain: again after two minutes, then after four, whoever leads.
	s.now = s.now.Add(90 * time.Second)
	s.run(rolloutWait)
	s.wantEvents("Warning RestartedAgain: Deployment web was restarted again, since its pods came back with no tunnel sidecar")
	s.rolledOut(d)
	s.now = s.now.Add(3 * time.Minute)
	s.r = s.leader()
	s.run(time.Minute)
	s.now = s.now.Add(time.Minute)
	s.run(rolloutWait)
	s.wantEvents("Warning RestartedAgain: ")
	s.rolledOut(d)
	for range 20 { // and so on, but never too rarely
		s.now = s.now.Add(rolloutAgainMost)
		s.run(rolloutWait)
		s.rolledOut(d)
	}
	s.events.take()

	// All pods have it: nothing to do. Long after, the first restart is a first one again.
	cluster.Delete(t, pod)
	cluster.Delete(t, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: s.ns, Name: "web-2"}})
	s.pod("web-3", injected)
	s.run(0)
	s.podOf(d, "web-4")
	s.now = s.now.Add(24 * time.Hour)
	s.run(rolloutWait)
	s.wantEvents("Normal Restarted: ")
}

func TestRestartOfTheFuture(t *testing.T) {
	for at, again := range map[string]time.Duration{
		"9999-01-01T00:00:00Z": rolloutWait,  // somebody wrote it by hand: restarted all the same
		"2026-01-02T03:04:35Z": rolloutAgain, // a former leader's clock was 30 s ahead of ours
	} {
		t.Run(at, func(t *testing.T) {
			s := newRollout(t)
			d, _ := s.deployment("web", func(d *appsv1.Deployment) {
				d.Spec.Template.Annotations = map[string]string{annotations.RestartedAt: at}
			})
			s.run(again)
			if restarted := s.restartedAt(d, &d.Spec.Template) != at; restarted != (again == rolloutWait) {
				t.Errorf("at %s: restarted %v", at, restarted)
			}
		})
	}
}

func TestStatefulSetAndDaemonSet(t *testing.T) {
	s := newRollout(t)
	set := &appsv1.StatefulSet{
		ObjectMeta: metav1.ObjectMeta{Namespace: s.ns, Name: "db"},
		Spec:       appsv1.StatefulSetSpec{Selector: selector(), Template: template(), ServiceName: "web"},
		Status:     appsv1.StatefulSetStatus{ObservedGeneration: 1, Replicas: 1, ReadyReplicas: 1, UpdatedReplicas: 1, CurrentRevision: "x", UpdateRevision: "x"},
	}
	cluster.Create(t, set)
	pod := s.pod("db-0", ownedBy("StatefulSet", "apps/v1", set))
	s.run(rolloutWait)
	if s.restartedAt(set, &set.Spec.Template) == "" {
		t.Error("the StatefulSet was not restarted")
	}
	cluster.Delete(t, pod)
	cluster.Delete(t, set)
	daemons := &appsv1.DaemonSet{
		ObjectMeta: metav1.ObjectMeta{Namespace: s.ns, Name: "node"},
		Spec:       appsv1.DaemonSetSpec{Selector: selector(), Template: template()},
		Status:     appsv1.DaemonSetStatus{ObservedGeneration: 1, DesiredNumberScheduled: 1, UpdatedNumberScheduled: 1},
	}
	cluster.Create(t, daemons)
	s.pod("node-1", ownedBy("DaemonSet", "apps/v1", daemons))
	s.run(rolloutWait)
	if s.restartedAt(daemons, &daemons.Spec.Template) == "" {
		t.Error("the DaemonSet was not restarted")
	}
	s.wantEvents("Normal Restarted: StatefulSet db", "Normal Restarted: DaemonSet node")
}

func TestItsOwnerDecides(t *testing.T) {
	for name, tc := range map[string]struct {
		make  func(s *rollout)
		event string
	}{
		"paused Deployment": {func(s *rollout) {
			s.deployment("web", func(d *appsv1.Deployment) { d.Spec.Paused = true })
		}, "Warning RestartNeeded: Deployment web is paused; resume and restart it"},
		"OnDelete StatefulSet": {func(s *rollout) {
			set := &appsv1.StatefulSet{
				ObjectMeta: metav1.ObjectMeta{Namespace: s.ns, Name: "db"},
				Spec: appsv1.StatefulSetSpec{Selector: selector(), Template: template(), ServiceName: "web",
					UpdateStrategy: appsv1.StatefulSetUpdateStrategy{Type: appsv1.OnDeleteStatefulSetStrategyType}},
			}
			cluster.Create(s.t, set)
			s.pod("db-0", ownedBy("StatefulSet", "apps/v1", set))
			s.pod("db-1", ownedBy("StatefulSet", "apps/v1", set))
		}, "Warning RestartNeeded: StatefulSet db updates OnDelete; delete its pods one by one"},
		"StatefulSet with a partition": {func(s *rollout) {
			set := &appsv1.StatefulSet{
				ObjectMeta: metav1.ObjectMeta{Namespace: s.ns, Name: "db"},
				Spec: appsv1.StatefulSetSpec{Selector: selector(), Template: template(), ServiceName: "web",
					UpdateStrategy: appsv1.StatefulSetUpdateStrategy{Type: appsv1.RollingUpdateStatefulSetStrategyType, RollingUpdate: &appsv1.RollingUpdateStatefulSetStrategy{Partition: ptr.To[int32](2)}}},
			}
			cluster.Create(s.t, set)
			s.pod("db-0", ownedBy("StatefulSet", "apps/v1", set))
		}, "Warning RestartNeeded: StatefulSet db updates only from its partition 2 on"},
		"OnDelete DaemonSet": {func(s *rollout) {
			daemons := &appsv1.DaemonSet{
				ObjectMeta: metav1.ObjectMeta{Namespace: s.ns, Name: "node"},
				Spec: appsv1.DaemonSetSpec{Selector: selector(), Template: template(),
					UpdateStrategy: appsv1.DaemonSetUpdateStrategy{Type: appsv1.OnDeleteDaemonSetStrategyType}},
			}
			cluster.Create(s.t, daemons)
			s.pod("node-1", ownedBy("DaemonSet", "apps/v1", daemons))
		}, "Warning RestartNeeded: DaemonSet node updates OnDelete; delete its pods one by one"},
		"bare pod": {func(s *rollout) { s.pod("alone") },
			"Warning RestartNeeded: pod alone has no tunnel sidecar and no workload that could be restarted; delete it and make it anew"},
		"Job": {func(s *rollout) {
			tmpl := template()
			tmpl.Spec.RestartPolicy = corev1.RestartPolicyNever
			tmpl.Labels = nil // the API server sets its own
			job := &batchv1.Job{ObjectMeta: metav1.ObjectMeta{Namespace: s.ns, Name: "once"}, Spec: batchv1.JobSpec{Template: tmpl}}
			cluster.Create(s.t, job)
			s.pod("once-1", ownedBy("Job", "batch/v1", job))
			s.pod("once-2", ownedBy("Job", "batch/v1", job))
		}, "Warning RestartNeeded: pod once-1 has no tunnel sidecar, and its Job once can't be restarted from here"},
		"ReplicaSet of nobody": {func(s *rollout) {
			rs := &appsv1.ReplicaSet{ObjectMeta: metav1.ObjectMeta{Namespace: s.ns, Name: "rs"}, Spec: appsv1.ReplicaSetSpec{Selector: selector(), Template: template()}}
			cluster.Create(s.t, rs)
			s.pod("rs-1", ownedBy("ReplicaSet", "apps/v1", rs))
		}, "Warning RestartNeeded: pod rs-1 has no tunnel sidecar, and its ReplicaSet rs can't be restarted from here"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newRollout(t)
			tc.make(s)
			for range 3 { // told once
				s.run(0)
			}
			s.wantEvents(tc.event)
		})
	}
}

func TestNotRestarted(t *testing.T) {
	for name, tc := range map[string]struct {
		annotation []string
		change     func(s *rollout, d *appsv1.Deployment, pod *corev1.Pod)
		again      time.Duration
	}{
		"rollout is never":    {[]string{annotations.RolloutMode, annotations.RolloutNever}, nil, 0},
		"invalid Service":     {[]string{annotations.Type, "x"}, nil, 0},
		"Service not enabled": {[]string{annotations.Enabled, "false"}, nil, 0},
		"no socket yet": {nil, func(s *rollout, _ *appsv1.Deployment, _ *corev1.Pod) {
			cluster.Change(s.t, s.svc, func() { delete(s.svc.Annotations, annotations.SocketID) })
		}, 0},
		"unlabelled namespace": {nil, func(s *rollout, _ *appsv1.Deployment, _ *corev1.Pod) {
			ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: s.ns}}
			cluster.Change(s.t, ns, func() { delete(ns.Labels, annotations.NamespaceInjection) })
		}, 0},
		"opted out": {nil, func(s *rollout, _ *appsv1.Deployment, pod *corev1.Pod) {
			cluster.Change(s.t, pod, func() { pod.Labels[annotations.PodInject] = "false" })
		}, 0},
		"outdated, and such are left alone": {nil, func(s *rollout, d *appsv1.Deployment, pod *corev1.Pod) {
			cluster.Delete(s.t, pod)
			s.podOf(d, "web-2", outdatedSidecar)
		}, 0},
		"broken by another webhook": {nil, func(s *rollout, d *appsv1.Deployment, pod *corev1.Pod) {
			cluster.Delete(s.t, pod)
			s.podOf(d, "web-2", injected, func(pod *corev1.Pod) { pod.Spec.InitContainers[0].RestartPolicy = nil })
		}, 0},
		"not selected": {nil, func(s *rollout, _ *appsv1.Deployment, pod *corev1.Pod) {
			cluster.Change(s.t, pod, func() { pod.Labels["app"] = "other" })
		}, 0},
		"pod has ended": {nil, func(s *rollout, _ *appsv1.Deployment, pod *corev1.Pod) {
			pod.Status.Phase = corev1.PodSucceeded
			if err := cluster.Client.Status().Update(s.t.Context(), pod); err != nil {
				s.t.Fatal(err)
			}
		}, 0},
		"workload is gone": {nil, func(s *rollout, d *appsv1.Deployment, _ *corev1.Pod) { cluster.Delete(s.t, d) }, 0},
		"rolling out already": {nil, func(s *rollout, d *appsv1.Deployment, _ *corev1.Pod) {
			cluster.Change(s.t, d, func() { d.Spec.Template.Annotations = map[string]string{"x": "y"} })
		}, rolloutPoll},
		"admission is not ready": {nil, func(s *rollout, _ *appsv1.Deployment, _ *corev1.Pod) { s.ready = errors.New("no CA yet") }, rolloutPoll},
	} {
		t.Run(name, func(t *testing.T) {
			s := newRollout(t, tc.annotation...)
			d, pod := s.deployment("web")
			if tc.change != nil {
				tc.change(s, d, pod)
			}
			s.run(tc.again)
			if name == "opted out" {
				s.wantEvents("Normal OptedOut: ")
			} else {
				s.wantEvents()
			}
			if cluster.Client.Get(t.Context(), client.ObjectKeyFromObject(d), d) == nil && d.Spec.Template.Annotations[annotations.RestartedAt] != "" {
				t.Error("restarted")
			}
		})
	}
}

// TestRefusedRestart has another admission webhook or a missing right refuse the patch.
func TestRefusedRestart(t *testing.T) {
	s := newRollout(t)
	s.deployment("web")
	s.r.Live = interceptor.NewClient(withWatch(t), interceptor.Funcs{
		Patch: func(_ context.Context, _ client.WithWatch, _ client.Object, _ client.Patch, _ ...client.PatchOption) error {
			return errors.New("admission webhook denied it: " + strings.Repeat("x", 2000))
		},
	})
	if _, err := s.r.Reconcile(t.Context(), request(s.svc)); err == nil {
		t.Error("no error")
	}
	events := s.events.take()
	if len(events) != 1 || !strings.HasPrefix(events[0], "Warning RestartFailed: Deployment web could not be restarted: admission webhook denied it") || len(events[0]) > maxMessage {
		t.Errorf("events %q", events)
	}
}

func TestRolloutController(t *testing.T) {
	s := newRollout(t)
	start(t, "", func(m managed) []setup {
		s.r.Client, s.r.Now = m.GetClient(), time.Now
		return []setup{s.r}
	})
	restarted := func(d *appsv1.Deployment) bool {
		return cluster.Client.Get(t.Context(), client.ObjectKeyFromObject(d), d) == nil && d.Spec.Template.Annotations[annotations.RestartedAt] != ""
	}
	a, _ := s.deployment("a") // the pod's event wakes it
	eventually(t, "the restart", func(context.Context) bool { return restarted(a) })
	b, _ := s.deployment("b")
	eventually(t, "the second to wait", func(context.Context) bool {
		s.r.mu.Lock()
		defer s.r.mu.Unlock()
		return s.r.waiting[request(s.svc)]
	})
	if restarted(b) || !isRestarting(a) {
		t.Error("both at once, or the first without the label")
	}
	s.rolledOut(a) // its event takes the label off, and that wakes the second
	eventually(t, "the second restart", func(context.Context) bool { return restarted(b) })
	cluster.Get(t, a)
	if isRestarting(a) {
		t.Error("the first still has the label")
	}
}

func withWatch(t *testing.T) client.WithWatch {
	t.Helper()
	c, err := client.NewWithWatch(cluster.Config, client.Options{Scheme: cluster.Scheme})
	if err != nil {
		t.Fatal(err)
	}
	return c
}
