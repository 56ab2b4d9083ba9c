package controller

import (
	"context"
	"fmt"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/mysocketio/mysocket-injector/internal/inject"
)

// tellings remember what was told of the pods of each Service, so that an Event comes once and not with every reconcile. The
// zero value is ready. A new leader tells again. Only one Reconcile runs at a time, and so it has no lock.
type tellings map[client.ObjectKey]map[telling]bool

// telling is one thing to be told: of whom, and what.
type telling struct {
	of   types.UID
	what string
}

// round are the tellings of one reconcile of a Service.
type round struct {
	all     tellings
	service client.ObjectKey
	now     map[telling]bool
}

func (t *tellings) round(service client.ObjectKey) *round {
	if *t == nil {
		*t = tellings{}
	}
	return &round{all: *t, service: service, now: map[telling]bool{}}
}

// first notes a telling and reports whether it is news, also with regard to other Services that select the same pods.
func (r *round) first(of types.UID, what string) bool {
	this := telling{of, what}
	r.now[this] = true
	for _, told := range r.all {
		if told[this] {
			return false
		}
	}
	if r.all[r.service] == nil {
		r.all[r.service] = map[telling]bool{}
	}
	r.all[r.service][this] = true
	return true
}

// done forgets what the Service has had told before and what was not seen in this round: should it come again, it is news.
func (r *round) done() {
	for this := range r.all[r.service] {
		if !r.now[this] {
			delete(r.all[r.service], this)
		}
	}
	if len(r.all[r.service]) == 0 {
		delete(r.all, r.service)
	}
}

// tellSkipped records an Event for each owner of pods that a Service selects and that can have no sidecar. The reason is the one
// of the admission warning and of the metric.
func (r *RolloutReconciler) tellSkipped(ctx context.Context, svc *corev1.Service, pods []corev1.Pod, told *round) error {
	asked := map[types.UID]client.Object{} // by the UID of the pods' direct owner
	for i := range pods {
		pod := &pods[i]
		if !running(pod) || inject.HasSidecar(pod) {
			continue
		}
		skip := inject.Check(pod)
		if skip == nil {
			continue
		}
		direct := pod.UID
		if of := metav1.GetControllerOf(pod); of != nil {
			direct = of.UID
		}
		owner, ok := asked[direct]
		if !ok {
			var err error
			if owner, err = r.ownerOf(ctx, pod); err != nil {
				return fmt.Errorf("find the owner of pod %s/%s: %w", pod.Namespace, pod.Name, err)
			}
			asked[direct] = owner
		}
		if !told.first(owner.GetUID(), string(skip.Reason)) {
			continue
		}
		kind := corev1.EventTypeWarning
		if skip.Reason == inject.ReasonOptedOut { // as its owner wants it
			kind = corev1.EventTypeNormal
		}
		r.Events.Eventf(owner, svc, kind, string(skip.Reason), "Inject", "pods that Service %s selects get no tunnel: %s", svc.Name, skip.Message)
	}
	return nil
}

// ownerOf is what a person would look at to find out about a pod: its Deployment, else its owner, else the pod. It is known by
// name only.
func (r *RolloutReconciler) ownerOf(ctx context.Context, pod *corev1.Pod) (client.Object, error) {
	of := metav1.GetControllerOf(pod)
	if of == nil {
		return pod, nil
	}
	if of.Kind == "ReplicaSet" {
		rs := &metav1.PartialObjectMetadata{}
		rs.SetGroupVersionKind(appsv1.SchemeGroupVersion.WithKind("ReplicaSet"))
		err := r.Live.Get(ctx, client.ObjectKey{Namespace: pod.Namespace, Name: of.Name}, rs)
		if client.IgnoreNotFound(err) != nil {
			return nil, err
		}
		if deployment := metav1.GetControllerOf(rs); err == nil && deployment != nil {
			of = deployment
		}
	}
	return &metav1.PartialObjectMetadata{
		TypeMeta:   metav1.TypeMeta{APIVersion: of.APIVersion, Kind: of.Kind},
		ObjectMeta: metav1.ObjectMeta{Namespace: pod.Namespace, Name: of.Name, UID: of.UID},
	}, nil
}
