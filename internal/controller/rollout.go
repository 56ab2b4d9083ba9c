package controller

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/events"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/mysocketio/mysocket-injector/internal/annotations"
	"github.com/mysocketio/mysocket-injector/internal/inject"
)

const (
	// rolloutPoll is how often a workload that is being restarted is looked at.
	rolloutPoll = 2 * time.Second
	// rolloutAgain is how long a workload is left alone after a restart that did not give all its pods a sidecar: the
	// webhook was down, say. It doubles with every restart in vain, up to rolloutAgainMost, since restarting in a loop would
	// help nobody.
	rolloutAgain     = 2 * time.Minute
	rolloutAgainMost = 2 * time.Hour
	// A rollout of ours that has not ended after this (a broken image, say) no longer holds up other workloads.
	rolloutStuck = 20 * time.Minute
)

// RolloutReconciler restarts workloads whose pods an enabled Service selects and that lack the sidecar, because they were
// there before the annotation, or because the webhook was down when they were made. It restarts as kubectl rollout
// restart does, so the workload's own strategy keeps it available; and one workload at a time:
//
//	workload                                   what is done
//	Deployment, StatefulSet, DaemonSet         restarted, then waited for until it has rolled out
//	paused Deployment, OnDelete, partition     Event; its owner decides
//	bare pod, Job, anything else               Event; it must be made anew
//	restarted less than two minutes ago        left alone until then, and twice as long after every restart in vain
type RolloutReconciler struct {
	// Client reads Services, pods and namespaces from the informers. Live reads and patches workloads.
	Client client.Client
	Live   client.Client
	Events events.EventRecorder
	// Namespace is the control plane's own.
	Namespace string
	// Cluster is the cluster's name in socket names; may be empty.
	Cluster string
	// AdmissionReady says why admission can't inject yet, if so: until it can, a restart would be in vain.
	AdmissionReady func(context.Context) error
	Now            func() time.Time

	// Only Reconcile touches these, and only one runs at a time.
	// current is the workload that is being restarted.
	current *workload
	// restarts counts the restarts of a workload, until there was none for long.
	restarts map[types.UID]int
}

// SetupWithManager registers the reconciler.
func (r *RolloutReconciler) SetupWithManager(mgr ctrl.Manager) error {
	return ctrl.NewControllerManagedBy(mgr).
		Named("rollout").
		For(&corev1.Service{}, builder.WithPredicates(changedBeyondStatus())).
		Watches(&corev1.Pod{}, handler.EnqueueRequestsFromMapFunc(servicesOfPod(mgr.GetClient()))).
		Watches(&corev1.Namespace{}, handler.EnqueueRequestsFromMapFunc(servicesOfNamespace(mgr.GetClient()))).
		WithOptions(controller.Options{MaxConcurrentReconciles: 1, RateLimiter: rateLimiter()}).
		Complete(r)
}

// Reconcile implements reconcile.Reconciler.
func (r *RolloutReconciler) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	svc := &corev1.Service{}
	if err := r.Client.Get(ctx, req.NamespacedName, svc); err != nil {
		return reconcile.Result{}, client.IgnoreNotFound(err)
	}
	if svc.DeletionTimestamp != nil || !annotations.IsEnabled(svc) || svc.Annotations[annotations.SocketID] == "" {
		return reconcile.Result{}, nil
	}
	spec, err := annotations.Parse(svc, r.Cluster)
	if err != nil || spec.Rollout != annotations.RolloutAuto {
		return reconcile.Result{}, nil //nolint:nilerr // an edit is an event; the condition says the rest
	}
	ns := &corev1.Namespace{}
	if err := r.Client.Get(ctx, client.ObjectKey{Name: svc.Namespace}, ns); err != nil {
		return reconcile.Result{}, client.IgnoreNotFound(err)
	}
	if !injectionEnabled(ns, r.Namespace) {
		return reconcile.Result{}, nil
	}
	var pods corev1.PodList
	if err := r.Client.List(ctx, &pods, client.InNamespace(svc.Namespace), client.MatchingLabels(svc.Spec.Selector)); err != nil {
		return reconcile.Result{}, fmt.Errorf("list the pods of Service %s: %w", req, err)
	}
	again := time.Duration(0)
	owners, workloads := map[types.UID]bool{}, map[types.UID]bool{} // seen; the owners of a Deployment's pods are ReplicaSets
	for i := range pods.Items {
		pod := &pods.Items[i]
		if !running(pod) || inject.HasSidecar(pod) || inject.Check(pod) != nil {
			continue
		}
		if owner := metav1.GetControllerOf(pod); owner != nil {
			if owners[owner.UID] {
				continue
			}
			owners[owner.UID] = true
		}
		w, err := r.workloadOf(ctx, pod)
		if err != nil {
			return reconcile.Result{}, fmt.Errorf("find the workload of pod %s/%s: %w", pod.Namespace, pod.Name, err)
		}
		if w == nil || workloads[w.UID()] {
			continue
		}
		workloads[w.UID()] = true
		wait, err := r.restart(ctx, svc, w)
		if err != nil {
			return reconcile.Result{}, err
		}
		if wait > 0 && (again == 0 || wait < again) {
			again = wait
		}
	}
	return reconcile.Result{RequeueAfter: again}, nil
}

// restart restarts a workload unless another is on its way, and says when to look again.
func (r *RolloutReconciler) restart(ctx context.Context, svc *corev1.Service, w *workload) (time.Duration, error) {
	if w.held != "" {
		r.Events.Eventf(svc, w.object, corev1.EventTypeWarning, "RestartNeeded", "Rollout", "%s", w.held)
		return 0, nil
	}
	if busy, err := r.busyWith(ctx, w); err != nil || busy {
		return rolloutPoll, err
	}
	if err := r.AdmissionReady(ctx); err != nil {
		ctrl.LoggerFrom(ctx).Info("restart put off: admission is not ready", "workload", w.String(), "err", err.Error())
		return rolloutPoll, nil
	}
	if !w.rolledOut {
		return rolloutPoll, nil // by whomever; its new pods may well have the sidecar
	}
	now := r.Now()
	since := now.Sub(restartedAt(w))
	if since > 2*rolloutAgainMost {
		delete(r.restarts, w.UID())
	}
	// A time that is far in the future was not set by us; one a little ahead was, by a leader with another clock.
	if wait := r.pause(w) - max(0, since); wait > 0 && since > -rolloutAgain {
		return max(time.Second, wait), nil
	}
	patch, err := json.Marshal(map[string]any{"spec": map[string]any{"template": map[string]any{"metadata": map[string]any{
		"annotations": map[string]string{annotations.RestartedAt: now.UTC().Format(time.RFC3339)}}}}})
	if err != nil {
		return 0, err
	}
	if err := r.Live.Patch(ctx, w.object, client.RawPatch(types.MergePatchType, patch)); err != nil {
		if !apierrors.IsNotFound(err) {
			r.Events.Eventf(svc, w.object, corev1.EventTypeWarning, "RestartFailed", "Rollout", "%.900s", fmt.Sprintf("%s could not be restarted: %s", w, err))
		}
		return 0, fmt.Errorf("restart %s: %w", w, err)
	}
	r.current = w
	if len(r.restarts) >= 1000 { // of workloads that are long gone, most of them
		r.restarts = nil
	}
	if r.restarts == nil {
		r.restarts = map[types.UID]int{}
	}
	r.restarts[w.UID()]++
	ctrl.LoggerFrom(ctx).Info("workload restarted to get the tunnel sidecar", "service", svc.Namespace+"/"+svc.Name, "workload", w.String(), "restarts", r.restarts[w.UID()])
	if r.restarts[w.UID()] > 1 {
		r.Events.Eventf(svc, w.object, corev1.EventTypeWarning, "RestartedAgain", "Rollout", "%s was restarted again, since its pods came back without the tunnel sidecar; if that goes on, look at the log of mysocket-injector's webhook", w)
		return rolloutPoll, nil
	}
	r.Events.Eventf(svc, w.object, corev1.EventTypeNormal, "Restarted", "Rollout", "%s was restarted so that its pods get the tunnel sidecar", w)
	return rolloutPoll, nil
}

// pause is how long a workload is left alone after its last restart.
func (r *RolloutReconciler) pause(w *workload) time.Duration {
	pause := rolloutAgain
	for range r.restarts[w.UID()] - 1 {
		if pause *= 2; pause >= rolloutAgainMost {
			return rolloutAgainMost
		}
	}
	return pause
}

// busyWith tells whether a workload other than w is still rolling out after a restart of ours.
func (r *RolloutReconciler) busyWith(ctx context.Context, w *workload) (bool, error) {
	if r.current == nil || r.current.UID() == w.UID() {
		return false, nil
	}
	now, err := r.load(ctx, r.current.kind, client.ObjectKeyFromObject(r.current.object))
	if err != nil {
		return false, err
	}
	stuck := now != nil && r.Now().Sub(restartedAt(now)) > rolloutStuck
	if now == nil || now.rolledOut || stuck {
		r.current = nil
		return false, nil
	}
	return true, nil
}

// restartedAt is when we restarted the workload last; the zero time if never.
func restartedAt(w *workload) time.Time {
	at, _ := time.Parse(time.RFC3339, w.template.Annotations[annotations.RestartedAt])
	return at
}

// workload is what owns pods, as far as restarting goes.
type workload struct {
	kind      string
	object    client.Object
	template  *corev1.PodTemplateSpec
	rolledOut bool
	// held says why it is not ours to restart; empty when it is.
	held string
}

func (w *workload) UID() types.UID { return w.object.GetUID() }

func (w *workload) String() string { return w.kind + " " + w.object.GetName() }

// workloadOf finds the workload of a pod. It is nil when it has just gone.
func (r *RolloutReconciler) workloadOf(ctx context.Context, pod *corev1.Pod) (*workload, error) {
	owner := metav1.GetControllerOf(pod)
	if owner != nil && owner.Kind == "ReplicaSet" {
		rs := &metav1.PartialObjectMetadata{}
		rs.SetGroupVersionKind(appsv1.SchemeGroupVersion.WithKind("ReplicaSet"))
		if err := r.Live.Get(ctx, client.ObjectKey{Namespace: pod.Namespace, Name: owner.Name}, rs); err != nil {
			return nil, client.IgnoreNotFound(err)
		}
		if of := metav1.GetControllerOf(rs); of != nil {
			owner = of
		}
	}
	if owner == nil {
		return &workload{kind: "Pod", object: pod, held: fmt.Sprintf("pod %s has no tunnel sidecar and no workload that could be restarted; delete it and make it anew", pod.Name)}, nil
	}
	switch owner.Kind {
	case "Deployment", "StatefulSet", "DaemonSet":
		return r.load(ctx, owner.Kind, client.ObjectKey{Namespace: pod.Namespace, Name: owner.Name})
	}
	return &workload{kind: owner.Kind, object: pod, held: fmt.Sprintf("pod %s has no tunnel sidecar, and its %s %s can't be restarted from here; make the pod anew", pod.Name, owner.Kind, owner.Name)}, nil
}

// load reads a workload; nil if there is none.
func (r *RolloutReconciler) load(ctx context.Context, kind string, key client.ObjectKey) (*workload, error) {
	w := &workload{kind: kind}
	var err error
	switch kind {
	case "Deployment":
		d := &appsv1.Deployment{}
		err = r.Live.Get(ctx, key, d)
		want := replicas(d.Spec.Replicas)
		w.object, w.template = d, &d.Spec.Template
		w.rolledOut = d.Status.ObservedGeneration >= d.Generation && d.Status.UpdatedReplicas >= want && d.Status.Replicas <= d.Status.UpdatedReplicas && d.Status.AvailableReplicas >= want
		if d.Spec.Paused {
			w.held = fmt.Sprintf("Deployment %s is paused; resume and restart it to give its pods the tunnel sidecar", key.Name)
		}
	case "StatefulSet":
		s := &appsv1.StatefulSet{}
		err = r.Live.Get(ctx, key, s)
		want := replicas(s.Spec.Replicas)
		w.object, w.template = s, &s.Spec.Template
		w.rolledOut = s.Status.ObservedGeneration >= s.Generation && s.Status.UpdatedReplicas >= want && s.Status.ReadyReplicas >= want && s.Status.CurrentRevision == s.Status.UpdateRevision
		if s.Spec.UpdateStrategy.Type == appsv1.OnDeleteStatefulSetStrategyType {
			w.held = fmt.Sprintf("StatefulSet %s updates OnDelete; delete its pods one by one to give them the tunnel sidecar", key.Name)
		}
		if u := s.Spec.UpdateStrategy.RollingUpdate; u != nil && u.Partition != nil && *u.Partition > 0 {
			w.held = fmt.Sprintf("StatefulSet %s updates only from its partition %d on; set the partition to 0 and restart it to give its pods the tunnel sidecar", key.Name, *u.Partition)
		}
	case "DaemonSet":
		s := &appsv1.DaemonSet{}
		err = r.Live.Get(ctx, key, s)
		w.object, w.template = s, &s.Spec.Template
		w.rolledOut = s.Status.ObservedGeneration >= s.Generation && s.Status.UpdatedNumberScheduled >= s.Status.DesiredNumberScheduled && s.Status.NumberUnavailable == 0
		if s.Spec.UpdateStrategy.Type == appsv1.OnDeleteDaemonSetStrategyType {
			w.held = fmt.Sprintf("DaemonSet %s updates OnDelete; delete its pods one by one to give them the tunnel sidecar", key.Name)
		}
	}
	if err != nil {
		return nil, client.IgnoreNotFound(err)
	}
	return w, nil
}

func replicas(n *int32) int32 {
	if n == nil {
		return 1
	}
	return *n
}
