package controller

import (
	"context"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	corev1ac "k8s.io/client-go/applyconfigurations/core/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
	"sigs.k8s.io/controller-runtime/pkg/source"
)

// CAKey is the key of the ConfigMap that holds the PEM certificates.
const CAKey = "ca.crt"

// GatewayCAReconciler keeps the ConfigMap with the gateway's CA in every namespace that is labelled for injection. It
// does not remove it when the label goes: pods that were injected before still need it. It goes with the namespace.
type GatewayCAReconciler struct {
	Client client.Client
	// Namespace is the control plane's own.
	Namespace string
	// ConfigMap is the ConfigMap's name, the same in every namespace.
	ConfigMap string
	// Bundle returns the CA certificates, PEM; empty while there are none yet.
	Bundle func() []byte
	// Changed gets a value whenever Bundle's value has changed.
	Changed <-chan struct{}
}

// SetupWithManager registers the reconciler.
func (r *GatewayCAReconciler) SetupWithManager(mgr ctrl.Manager) error {
	everywhere := func(ctx context.Context, _ client.Object) []reconcile.Request {
		var all corev1.NamespaceList
		if mgr.GetClient().List(ctx, &all) != nil {
			return nil
		}
		var out []reconcile.Request
		for i := range all.Items {
			if injectionEnabled(&all.Items[i], r.Namespace) {
				out = append(out, reconcile.Request{NamespacedName: client.ObjectKey{Name: all.Items[i].Name}})
			}
		}
		return out
	}
	changed := make(chan event.GenericEvent)
	if err := mgr.Add(manager.RunnableFunc(func(ctx context.Context) error {
		for {
			select {
			case <-ctx.Done():
				return nil
			case <-r.Changed:
			}
			select {
			case <-ctx.Done():
				return nil
			case changed <- event.GenericEvent{Object: &corev1.Namespace{}}:
			}
		}
	})); err != nil {
		return err
	}
	itsNamespace := func(_ context.Context, o client.Object) []reconcile.Request {
		if o.GetName() != r.ConfigMap {
			return nil
		}
		return []reconcile.Request{{NamespacedName: client.ObjectKey{Name: o.GetNamespace()}}}
	}
	return ctrl.NewControllerManagedBy(mgr).
		Named("gatewayca").
		For(&corev1.Namespace{}).
		Watches(&corev1.ConfigMap{}, handler.EnqueueRequestsFromMapFunc(itsNamespace)).
		WatchesRawSource(source.Channel(changed, handler.EnqueueRequestsFromMapFunc(everywhere))).
		WithOptions(controller.Options{MaxConcurrentReconciles: 2, RateLimiter: rateLimiter()}).
		Complete(r)
}

// Reconcile implements reconcile.Reconciler.
func (r *GatewayCAReconciler) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	ns := &corev1.Namespace{}
	if err := r.Client.Get(ctx, req.NamespacedName, ns); err != nil {
		return reconcile.Result{}, client.IgnoreNotFound(err)
	}
	bundle := string(r.Bundle())
	if ns.DeletionTimestamp != nil || !injectionEnabled(ns, r.Namespace) || bundle == "" {
		return reconcile.Result{}, nil
	}
	cm := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: ns.Name, Name: r.ConfigMap}}
	if err := r.Client.Get(ctx, client.ObjectKeyFromObject(cm), cm); client.IgnoreNotFound(err) != nil {
		return reconcile.Result{}, fmt.Errorf("read ConfigMap %s/%s: %w", ns.Name, r.ConfigMap, err)
	} else if err == nil && cm.Data[CAKey] == bundle {
		return reconcile.Result{}, nil
	}
	want := corev1ac.ConfigMap(r.ConfigMap, ns.Name).WithData(map[string]string{CAKey: bundle}).
		WithLabels(map[string]string{"app.kubernetes.io/managed-by": "mysocket-injector"})
	if err := r.Client.Apply(ctx, want, client.FieldOwner("mysocket-injector"), client.ForceOwnership); err != nil {
		return reconcile.Result{}, fmt.Errorf("publish the gateway's CA in namespace %s: %w", ns.Name, err)
	}
	return reconcile.Result{}, nil
}
