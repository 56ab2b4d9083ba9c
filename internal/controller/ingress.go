package controller

import (
	"context"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/mysocketio/mysocket-injector/internal/annotations"
)

// publishIngress writes the public name into the status of a Service that is a load balancer of our class. The status of
// others is not ours: another load balancer writes it.
func (r *ServiceReconciler) publishIngress(ctx context.Context, svc *corev1.Service, dnsName string) error {
	if !annotations.HasClass(svc) {
		return r.clearIngress(ctx, svc) // of a Service that was one
	}
	return r.setIngress(ctx, svc, []corev1.LoadBalancerIngress{{Hostname: dnsName}})
}

// clearIngress takes from the status what publishIngress wrote: all of it where the class is ours, and where it is not any
// more, what still has our name.
func (r *ServiceReconciler) clearIngress(ctx context.Context, svc *corev1.Service) error {
	list := svc.Status.LoadBalancer.Ingress
	name := svc.Annotations[annotations.DNSName]
	if !annotations.HasClass(svc) && (len(list) != 1 || name == "" || list[0].Hostname != name) {
		return nil
	}
	return r.setIngress(ctx, svc, nil)
}

func (r *ServiceReconciler) setIngress(ctx context.Context, svc *corev1.Service, want []corev1.LoadBalancerIngress) error {
	if equality.Semantic.DeepEqual(svc.Status.LoadBalancer.Ingress, want) {
		return nil
	}
	before := svc.DeepCopy()
	svc.Status.LoadBalancer.Ingress = want
	if err := r.Client.Status().Patch(ctx, svc, client.MergeFrom(before)); client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("write the public name into the status of Service %s/%s: %w", svc.Namespace, svc.Name, err)
	}
	return nil
}
