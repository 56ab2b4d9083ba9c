// Package controller holds the reconcilers that the leader runs:
//
//   - service: the life of a Service's socket, and what we write back on the Service
//   - tunnel: deletes the tunnel at Mysocket when a Tunnel object goes
//   - sweep: deletes what a lost answer of the API or a removed finalizer has left over
//   - rollout: restarts workloads whose pods were there before their Service was annotated, or have an outdated sidecar
//   - gatewayca: publishes the gateway's CA in every namespace that is labelled for injection
//
// They talk to Kubernetes and to the Mysocket API. They never talk to sidecars; the gateway does. When the control plane is
// uninstalled, Cleanup does the rest of their work in their place.
package controller

import (
	"context"
	"maps"
	"math/rand/v2"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/mysocketio/mysocket-injector/internal/annotations"
	"github.com/mysocketio/mysocket-injector/internal/index"
	"github.com/mysocketio/mysocket-injector/internal/mysocket"
)

// MysocketAPI is what the controllers need of the Mysocket API; *mysocket.Client has it.
type MysocketAPI interface {
	Sockets(ctx context.Context, maxAge time.Duration) ([]mysocket.Socket, error)
	CreateSocket(ctx context.Context, s mysocket.Socket) (mysocket.Socket, error)
	UpdateSocket(ctx context.Context, s mysocket.Socket) (mysocket.Socket, error)
	DeleteSocket(ctx context.Context, id string) error
	DeleteTunnel(ctx context.Context, socketID, tunnelID string) error
}

const (
	// Failures are retried after 1 s, then twice as late each time, up to this.
	firstRetry = time.Second
	lastRetry  = 2 * time.Minute
	// What only a person can mend (a wrong password, a refused socket) is tried again this often.
	slowRetry = time.Minute
	// A socket that was deleted or changed at Mysocket by somebody else gives no event; it is noticed this late.
	recheck = 10 * time.Minute
	// That a socket still says whose it is, is made sure of this long after it was written on one that was there before.
	claimCheck = 30 * time.Second
	// What else gives no event is noticed this late while not all pods of a Service are connected.
	unsettled = time.Minute
)

// changedBeyondStatus leaves out the updates of a Service that change its status alone. Most are our own conditions, and
// each would bring the next reconcile at once, past every back-off.
func changedBeyondStatus() predicate.Predicate {
	return predicate.Funcs{UpdateFunc: func(e event.UpdateEvent) bool {
		old, ok := e.ObjectOld.(*corev1.Service)
		now, ok2 := e.ObjectNew.(*corev1.Service)
		if !ok || !ok2 || old.ResourceVersion == now.ResourceVersion { // the informer's resync
			return true
		}
		before, after := *old, *now
		for _, svc := range []*corev1.Service{&before, &after} {
			svc.ResourceVersion, svc.ManagedFields, svc.Status = "", nil, corev1.ServiceStatus{}
		}
		return !equality.Semantic.DeepEqual(&before, &after)
	}}
}

func rateLimiter() workqueue.TypedRateLimiter[reconcile.Request] {
	return workqueue.NewTypedItemExponentialFailureRateLimiter[reconcile.Request](firstRetry, lastRetry)
}

// jitter spreads d over its second half, so that many Services don't come back at the same moment.
func jitter(d time.Duration) time.Duration {
	return d/2 + rand.N(d/2+1) //nolint:gosec // no secret
}

// unlessConflict makes a conflict a reason to look again, and no error: somebody changed the object since it was read.
func unlessConflict(err error) (reconcile.Result, error) {
	if apierrors.IsConflict(err) {
		return reconcile.Result{RequeueAfter: jitter(firstRetry)}, nil
	}
	return reconcile.Result{}, err
}

// running tells whether a pod counts as a replica: not ended and not on its way out.
func running(pod *corev1.Pod) bool {
	return pod.DeletionTimestamp == nil && pod.Status.Phase != corev1.PodSucceeded && pod.Status.Phase != corev1.PodFailed
}

func neverInjected(namespace, own string) bool { return annotations.NeverInjected(namespace, own) }

func injectionEnabled(ns *corev1.Namespace, own string) bool {
	return annotations.InjectionEnabled(ns, own)
}

// podsSettle is how long after a pod's change its Services are looked at. Pods come and go many at a time, and each look reads
// all pods of the Service and perhaps writes its status; that need not be done for every one of them, nor at the moment when
// the API server makes the next.
const podsSettle = 250 * time.Millisecond

// onPod has the Services of ours that select a pod looked at a little later, many changes as one. by must be registered.
func onPod(reader client.Reader, by index.Services) handler.EventHandler {
	enqueue := func(ctx context.Context, pod client.Object, q workqueue.TypedRateLimitingInterface[reconcile.Request]) {
		names, err := by.Selecting(ctx, reader, pod.GetNamespace(), pod.GetLabels())
		if err != nil {
			return // the informers are not running, so this can't be an event of theirs
		}
		for _, name := range names {
			q.AddAfter(reconcile.Request{NamespacedName: types.NamespacedName{Namespace: pod.GetNamespace(), Name: name}}, podsSettle)
		}
	}
	return handler.Funcs{
		CreateFunc: func(ctx context.Context, e event.CreateEvent, q workqueue.TypedRateLimitingInterface[reconcile.Request]) {
			if !e.IsInInitialList { // its Services are in theirs
				enqueue(ctx, e.Object, q)
			}
		},
		UpdateFunc: func(ctx context.Context, e event.UpdateEvent, q workqueue.TypedRateLimitingInterface[reconcile.Request]) {
			if !maps.Equal(e.ObjectOld.GetLabels(), e.ObjectNew.GetLabels()) {
				enqueue(ctx, e.ObjectOld, q)
			} else if samePod(e.ObjectOld, e.ObjectNew) {
				return
			}
			enqueue(ctx, e.ObjectNew, q)
		},
		DeleteFunc: func(ctx context.Context, e event.DeleteEvent, q workqueue.TypedRateLimitingInterface[reconcile.Request]) {
			enqueue(ctx, e.Object, q)
		},
	}
}

// samePod tells whether nothing of a pod has changed that is kept of it: its health often does, and is not.
func samePod(was, is client.Object) bool {
	old, ok := was.(*corev1.Pod)
	now, ok2 := is.(*corev1.Pod)
	if !ok || !ok2 {
		return false
	}
	before, after := *old, *now
	before.ResourceVersion, after.ResourceVersion = "", ""
	return equality.Semantic.DeepEqual(&before, &after)
}

// servicesOfNamespace maps a namespace to the Services of ours in it.
func servicesOfNamespace(reader client.Reader) func(context.Context, client.Object) []reconcile.Request {
	return func(ctx context.Context, ns client.Object) []reconcile.Request {
		return enabledServices(ctx, reader, ns.GetName(), func(*corev1.Service) bool { return true })
	}
}

// servicesOfWorkload maps a workload that is being restarted to the Services of ours that select its pods. When it has
// failed, which halts all restarts, or is over, those that wait for a restart are told, too.
func servicesOfWorkload(reader client.Reader) func(context.Context, client.Object) []reconcile.Request {
	return func(ctx context.Context, object client.Object) []reconcile.Request {
		w := workloadFrom(object)
		if w == nil || !isRestarting(object) {
			return nil
		}
		return enabledServices(ctx, reader, "", func(svc *corev1.Service) bool {
			if svc.Namespace == object.GetNamespace() && annotations.Selects(svc, w.template.Labels) {
				return true
			}
			c := apimeta.FindStatusCondition(svc.Status.Conditions, annotations.TunnelsReady)
			return (w.exceeded || w.rolledOut) && c != nil && c.Reason == reasonWaitingRestart
		})
	}
}

func enabledServices(ctx context.Context, reader client.Reader, namespace string, want func(*corev1.Service) bool) []reconcile.Request {
	var services corev1.ServiceList
	if reader.List(ctx, &services, client.InNamespace(namespace), client.UnsafeDisableDeepCopy) != nil {
		return nil // the informers are not running, so this can't be an event of theirs
	}
	var out []reconcile.Request
	for i := range services.Items {
		if svc := &services.Items[i]; annotations.IsEnabled(svc) && want(svc) {
			out = append(out, reconcile.Request{NamespacedName: types.NamespacedName{Namespace: svc.Namespace, Name: svc.Name}})
		}
	}
	return out
}
