package controller

import (
	"context"
	"encoding/json"
	"fmt"
	"sync"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/events"
	"k8s.io/client-go/util/workqueue"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/mysocketio/mysocket-injector/internal/annotations"
	"github.com/mysocketio/mysocket-injector/internal/index"
	"github.com/mysocketio/mysocket-injector/internal/inject"
)

const (
	// rolloutPoll is how often a workload is looked at that could be restarted but for something that gives no event.
	rolloutPoll = 2 * time.Second
	// rolloutWait is how often the restarts that are on their way are looked at, and what waits for them: their events come
	// sooner, but the end of a deadline has none.
	rolloutWait = 15 * time.Second
	// rolloutAgain is how long a workload is left alone after a restart that did not give all its pods a sidecar: the
	// webhook was down, say. It doubles with every restart in vain, up to rolloutAgainMost, since restarting in a loop would
	// help nobody.
	rolloutAgain     = 2 * time.Minute
	rolloutAgainMost = 2 * time.Hour
)

// followUp is the request that is no Service: look how the restarts go that are on their way.
var followUp = reconcile.Request{}

// RolloutReconciler restarts workloads whose pods an enabled Service selects and that lack the sidecar, because they were
// there before the annotation, or because the webhook was down when they were made. It restarts as kubectl rollout
// restart does, so the workload's own strategy keeps it available; and a bounded number at a time over the whole cluster:
//
//	workload                                   what is done
//	Deployment, StatefulSet, DaemonSet         restarted, then waited for until it is healthy
//	restarted by us, not healthy in time       nothing more is restarted, until it is healthy or its owner changes it
//	paused Deployment, OnDelete, partition     Event; its owner decides
//	bare pod, Job, anything else               Event; it must be made anew
//	restarted less than two minutes ago        left alone until then, and twice as long after every restart in vain
//	its pods have an outdated sidecar          as if they had none, if Outdated is set; else left alone
//	its pods have one that was broken          left alone: the webhook that broke it would break the next one, too
//
// What is on its way, since when, and how often before is written on the workloads, so that the next leader goes on where
// this one ends.
type RolloutReconciler struct {
	// Client reads from the informers. Live reads and patches workloads.
	Client client.Client
	Live   client.Client
	Events events.EventRecorder
	// Namespace is the control plane's own.
	Namespace string
	// Names is what the sockets of Services are called.
	Names annotations.Names
	// MaxConcurrent is how many workloads may be on their way at once. Zero means one.
	MaxConcurrent int
	// Outdated tells whether a pod's sidecar is not the one that would be injected today. Nil: such pods are left alone.
	Outdated func(*corev1.Pod) bool
	// SidecarHash names what would be injected today.
	SidecarHash string
	// AdmissionReady says why admission can't inject yet, if so: until it can, a restart would be in vain.
	AdmissionReady func(context.Context) error
	Now            func() time.Time

	// told are the failed workloads that the log has, said what Events have been recorded of pods and workloads that are not
	// ours to restart. Only Reconcile touches them, and only one runs at a time.
	told map[types.UID]bool
	said tellings
	// waiting are the Services whose turn has not come, to be woken when a restart is over. Forgetting them costs a delay.
	mu      sync.Mutex
	waiting map[reconcile.Request]bool
}

// SetupWithManager registers the reconciler. The manager's cache should be limited by RestartingOnly.
func (r *RolloutReconciler) SetupWithManager(mgr ctrl.Manager) error {
	const byPod index.Services = "mysocket.io/rollout"
	if err := byPod.Register(context.Background(), mgr.GetFieldIndexer()); err != nil { // nothing is waited for
		return err
	}
	return ctrl.NewControllerManagedBy(mgr).
		Named("rollout").
		For(&corev1.Service{}, builder.WithPredicates(changedBeyondStatus())).
		Watches(&corev1.Pod{}, onPod(mgr.GetClient(), byPod)).
		Watches(&corev1.Namespace{}, handler.EnqueueRequestsFromMapFunc(servicesOfNamespace(mgr.GetClient()))).
		Watches(&appsv1.Deployment{}, r.onWorkload()).
		Watches(&appsv1.StatefulSet{}, r.onWorkload()).
		Watches(&appsv1.DaemonSet{}, r.onWorkload()).
		WithOptions(controller.Options{MaxConcurrentReconciles: 1, RateLimiter: rateLimiter()}).
		Complete(r)
}

// onWorkload follows the workloads that are being restarted, and wakes the Services that wait when one is over.
func (r *RolloutReconciler) onWorkload() handler.EventHandler {
	wake := func(q workqueue.TypedRateLimitingInterface[reconcile.Request]) {
		r.mu.Lock()
		defer r.mu.Unlock()
		for req := range r.waiting {
			q.Add(req)
		}
		r.waiting = nil
	}
	return handler.Funcs{
		CreateFunc: func(_ context.Context, e event.CreateEvent, q workqueue.TypedRateLimitingInterface[reconcile.Request]) {
			if isRestarting(e.Object) {
				q.Add(followUp)
			}
		},
		UpdateFunc: func(_ context.Context, e event.UpdateEvent, q workqueue.TypedRateLimitingInterface[reconcile.Request]) {
			switch {
			case isRestarting(e.ObjectNew):
				q.Add(followUp)
			case isRestarting(e.ObjectOld):
				wake(q)
			}
		},
		DeleteFunc: func(_ context.Context, e event.DeleteEvent, q workqueue.TypedRateLimitingInterface[reconcile.Request]) {
			if isRestarting(e.Object) {
				wake(q)
			}
		},
	}
}

func isRestarting(o client.Object) bool {
	_, ok := o.GetLabels()[annotations.Restarting]
	return ok
}

// Reconcile implements reconcile.Reconciler.
func (r *RolloutReconciler) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	if req == followUp {
		return r.follow(ctx)
	}
	svc := &corev1.Service{}
	if err := r.Client.Get(ctx, req.NamespacedName, svc); err != nil {
		delete(r.said, req.NamespacedName)
		return reconcile.Result{}, client.IgnoreNotFound(err)
	}
	if svc.DeletionTimestamp != nil || !annotations.IsEnabled(svc) || svc.Annotations[annotations.SocketID] == "" {
		delete(r.said, req.NamespacedName)
		return reconcile.Result{}, nil
	}
	spec, err := annotations.Parse(svc, r.Names)
	if err != nil {
		return reconcile.Result{}, nil //nolint:nilerr // an edit is an event; the condition says the rest
	}
	ns := &corev1.Namespace{}
	if err := r.Client.Get(ctx, client.ObjectKey{Name: svc.Namespace}, ns); err != nil {
		return reconcile.Result{}, client.IgnoreNotFound(err)
	}
	if !annotations.InjectionEnabled(ns, r.Namespace) {
		return reconcile.Result{}, nil
	}
	var pods corev1.PodList
	if err := r.Client.List(ctx, &pods, client.InNamespace(svc.Namespace), client.MatchingLabels(svc.Spec.Selector)); err != nil {
		return reconcile.Result{}, fmt.Errorf("list the pods of Service %s: %w", req, err)
	}
	told := r.said.round(req.NamespacedName)
	if err := r.tellSkipped(ctx, svc, pods.Items, told); err != nil {
		return reconcile.Result{}, err
	}
	if spec.Rollout != annotations.RolloutAuto {
		told.done()
		return reconcile.Result{}, nil
	}
	again := time.Duration(0)
	seen := map[types.UID]bool{} // workloads; the owners of a Deployment's pods are ReplicaSets
	full := false
	for _, pod := range r.lacking(pods.Items) {
		owner := metav1.GetControllerOf(pod)
		if owner != nil && restartable(owner.Kind) {
			// Asked before the API server is asked for the workload: many Services may be waiting.
			if full {
				continue
			}
			count, halting, err := paceOf(ctx, r.Client, r.Client, r.Now())
			if err != nil {
				return reconcile.Result{}, err
			}
			if full = halting != nil || count >= max(1, r.MaxConcurrent); full {
				again = sooner(again, r.wait(req))
				continue
			}
		}
		w, err := r.workloadOf(ctx, pod, r.lacks(pod))
		if err != nil {
			return reconcile.Result{}, fmt.Errorf("find the workload of pod %s/%s: %w", pod.Namespace, pod.Name, err)
		}
		if w == nil || seen[w.UID()] {
			continue
		}
		seen[w.UID()] = true
		wait, err := r.restart(ctx, svc, w, r.lacks(pod), told)
		if err != nil {
			return reconcile.Result{}, err
		}
		again = sooner(again, wait)
	}
	if !full { // else not all were looked at
		told.done()
	}
	return reconcile.Result{RequeueAfter: again}, nil
}

// lacking returns the pods that need another sidecar, one for each owner.
func (r *RolloutReconciler) lacking(pods []corev1.Pod) []*corev1.Pod {
	var out []*corev1.Pod
	owners := map[types.UID]bool{}
	for i := range pods {
		pod := &pods[i]
		if !running(pod) || inject.Check(pod) != nil || inject.IsBroken(pod) {
			continue
		}
		if inject.HasSidecar(pod) && (r.Outdated == nil || !r.Outdated(pod)) {
			continue
		}
		if owner := metav1.GetControllerOf(pod); owner != nil {
			if owners[owner.UID] {
				continue
			}
			owners[owner.UID] = true
		}
		out = append(out, pod)
	}
	return out
}

// lacks says what is wrong with the sidecar of a pod that is lacking.
func (r *RolloutReconciler) lacks(pod *corev1.Pod) string {
	if inject.HasSidecar(pod) {
		return "an outdated"
	}
	return "no"
}

// wait has a Service woken when a restart is over, and says when to look even so.
func (r *RolloutReconciler) wait(req reconcile.Request) time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.waiting == nil {
		r.waiting = map[reconcile.Request]bool{}
	}
	r.waiting[req] = true
	return rolloutWait
}

// sooner returns the shorter of two times to wait, of which zero is none.
func sooner(a, b time.Duration) time.Duration {
	if a == 0 || b != 0 && b < a {
		return b
	}
	return a
}

// restart restarts a workload if that is ours to do and it is time, and says when to look again.
func (r *RolloutReconciler) restart(ctx context.Context, svc *corev1.Service, w *workload, lacks string, told *round) (time.Duration, error) {
	if w.held != "" {
		if !told.first(w.UID(), w.held) {
			return 0, nil
		}
		r.Events.Eventf(svc, w.object, corev1.EventTypeWarning, "RestartNeeded", "Rollout", "%s", w.held)
		return 0, nil
	}
	if err := r.AdmissionReady(ctx); err != nil {
		ctrl.LoggerFrom(ctx).Info("restart put off: admission is not ready", "workload", w.String(), "err", err.Error())
		return rolloutPoll, nil
	}
	if isRestarting(w.object) && !w.rolledOut {
		return r.wait(reconcile.Request{NamespacedName: client.ObjectKeyFromObject(svc)}), nil
	}
	if !w.rolledOut {
		return rolloutPoll, nil // somebody else rolls it out; its new pods may well have the sidecar
	}
	now := r.Now()
	since := now.Sub(w.restartedAt())
	count := w.restarts(r.SidecarHash)
	if since > 2*rolloutAgainMost {
		count = 0
	}
	// A time that is far in the future was not set by us; one a little ahead was, by a leader with another clock.
	if wait := pause(count) - max(0, since); wait > 0 && since > -rolloutAgain {
		return max(time.Second, wait), nil
	}
	// The informers may not have seen the last restart yet, which may have been another leader's.
	onTheirWay, halting, err := paceOf(ctx, r.Live, r.Client, now)
	if err != nil {
		return 0, err
	}
	if halting != nil || onTheirWay >= max(1, r.MaxConcurrent) {
		return r.wait(reconcile.Request{NamespacedName: client.ObjectKeyFromObject(svc)}), nil
	}
	count++
	if err := r.patchTemplate(ctx, w, now, count); err != nil {
		if apierrors.IsConflict(err) {
			return rolloutPoll, nil // somebody changed it since it was read, and may have restarted it
		}
		if !apierrors.IsNotFound(err) {
			r.Events.Eventf(svc, w.object, corev1.EventTypeWarning, "RestartFailed", "Rollout", "%.900s", fmt.Sprintf("%s could not be restarted: %s", w, err))
		}
		return 0, fmt.Errorf("restart %s: %w", w, err)
	}
	ctrl.LoggerFrom(ctx).Info("workload restarted to get the tunnel sidecar", "service", svc.Namespace+"/"+svc.Name, "workload", w.String(), "restarts", count)
	if count > 1 {
		r.Events.Eventf(svc, w.object, corev1.EventTypeWarning, "RestartedAgain", "Rollout", "%s was restarted again, since its pods came back with %s tunnel sidecar; if that goes on, look at the log of mysocket-injector's webhook", w, lacks)
	} else {
		r.Events.Eventf(svc, w.object, corev1.EventTypeNormal, "Restarted", "Rollout", "%s was restarted so that its pods, which had %s tunnel sidecar, get the current one", w, lacks)
	}
	return rolloutWait, nil
}

// patchTemplate is the restart: all that it is known by later is written at once, and only on the workload that was read.
func (r *RolloutReconciler) patchTemplate(ctx context.Context, w *workload, now time.Time, count int) error {
	at := now.UTC().Format(time.RFC3339)
	template := w.template.DeepCopy()
	metav1.SetMetaDataAnnotation(&template.ObjectMeta, annotations.RestartedAt, at)
	patch, err := json.Marshal(map[string]any{
		"metadata": map[string]any{
			"resourceVersion": w.object.GetResourceVersion(),
			"labels":          map[string]string{annotations.Restarting: templateHash(template)},
			"annotations":     map[string]string{annotations.Restarts: fmt.Sprintf("%s %d", r.SidecarHash, count)},
		},
		"spec": map[string]any{"template": map[string]any{"metadata": map[string]any{"annotations": map[string]string{annotations.RestartedAt: at}}}},
	})
	if err != nil {
		return err
	}
	return r.Live.Patch(ctx, w.object, client.RawPatch(types.MergePatchType, patch))
}

// pause is how long a workload is left alone after so many restarts.
func pause(restarts int) time.Duration {
	pause := rolloutAgain
	for range restarts - 1 {
		if pause *= 2; pause >= rolloutAgainMost {
			return rolloutAgainMost
		}
	}
	return pause
}

// follow looks at the restarts that are on their way, and takes the label off those that are over.
func (r *RolloutReconciler) follow(ctx context.Context) (reconcile.Result, error) {
	all, err := restarting(ctx, r.Client)
	if err != nil {
		return reconcile.Result{}, err
	}
	log := ctrl.LoggerFrom(ctx)
	told := map[types.UID]bool{}
	again := time.Duration(0)
	for _, w := range all {
		p, err := progressOf(ctx, r.Client, w, r.Now())
		if err != nil {
			return reconcile.Result{}, err
		}
		name := w.kind + " " + client.ObjectKeyFromObject(w.object).String()
		switch p {
		case over:
			patch, err := json.Marshal(map[string]any{"metadata": map[string]any{
				"resourceVersion": w.object.GetResourceVersion(), "labels": map[string]any{annotations.Restarting: nil},
			}})
			if err != nil {
				return reconcile.Result{}, err
			}
			if err := r.Live.Patch(ctx, w.object, client.RawPatch(types.MergePatchType, patch)); client.IgnoreNotFound(err) != nil {
				return unlessConflict(fmt.Errorf("take the label %s off %s: %w", annotations.Restarting, name, err))
			}
			log.Info("restart is over", "workload", name, "healthy", w.rolledOut)
			if w.rolledOut {
				r.Events.Eventf(w.object, nil, corev1.EventTypeNormal, "RestartDone", "Rollout", "all pods are new and healthy after the restart for the tunnel sidecar")
			}
			continue
		case failed:
			if told[w.UID()] = true; !r.told[w.UID()] {
				log.Info("restarts are halted: a workload has not become healthy after its restart", "workload", name, "restarted", w.restartedAt())
				r.Events.Eventf(w.object, nil, corev1.EventTypeWarning, reasonHalted, "Rollout", "not healthy since it was restarted for the tunnel sidecar; no workload of the cluster is restarted for it until this one is healthy or changed")
			}
		case moving:
		}
		again = rolloutWait
	}
	r.told = told
	return reconcile.Result{RequeueAfter: again}, nil
}
