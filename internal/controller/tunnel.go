package controller

import (
	"context"
	"errors"
	"fmt"

	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/mysocketio/mysocket-injector/api/v1alpha1"
	"github.com/mysocketio/mysocket-injector/internal/annotations"
	"github.com/mysocketio/mysocket-injector/internal/mysocket"
)

// TunnelReconciler deletes the tunnel at Mysocket when its Tunnel object is being deleted, then lets the object go.
// The object goes with its pod (garbage collection) or when a sidecar withdraws (the gateway deletes it).
type TunnelReconciler struct {
	Client client.Client
	API    MysocketAPI
}

// SetupWithManager registers the reconciler.
func (r *TunnelReconciler) SetupWithManager(mgr ctrl.Manager) error {
	return ctrl.NewControllerManagedBy(mgr).
		Named("tunnel").
		For(&v1alpha1.Tunnel{}).
		WithEventFilter(predicate.NewPredicateFuncs(func(o client.Object) bool { return o.GetDeletionTimestamp() != nil })).
		WithOptions(controller.Options{MaxConcurrentReconciles: 4, RateLimiter: rateLimiter()}).
		Complete(r)
}

// Reconcile implements reconcile.Reconciler.
func (r *TunnelReconciler) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	t := &v1alpha1.Tunnel{}
	if err := r.Client.Get(ctx, req.NamespacedName, t); err != nil {
		return reconcile.Result{}, client.IgnoreNotFound(err)
	}
	if t.DeletionTimestamp == nil || !controllerutil.ContainsFinalizer(t, annotations.Finalizer) {
		return reconcile.Result{}, nil
	}
	if t.Status.TunnelID != "" {
		if err := r.API.DeleteTunnel(ctx, t.Spec.SocketID, t.Status.TunnelID); err != nil {
			ctrl.LoggerFrom(ctx).Info("the tunnel could not be deleted at Mysocket yet", "tunnel", t.Status.TunnelID, "err", err.Error())
			if wait := mysocket.RetryAfter(err); wait > 0 {
				return reconcile.Result{RequeueAfter: jitter(wait)}, nil
			}
			if errors.Is(err, mysocket.ErrCredentials) {
				return reconcile.Result{RequeueAfter: jitter(slowRetry)}, nil
			}
			return reconcile.Result{}, fmt.Errorf("delete tunnel %s at Mysocket: %w", t.Status.TunnelID, err)
		}
	}
	before := t.DeepCopy()
	controllerutil.RemoveFinalizer(t, annotations.Finalizer)
	if err := r.Client.Patch(ctx, t, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{})); client.IgnoreNotFound(err) != nil {
		return unlessConflict(fmt.Errorf("release Tunnel %s: %w", req, err))
	}
	return reconcile.Result{}, nil
}
