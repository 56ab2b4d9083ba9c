package controller

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/mysocketio/mysocket-injector/internal/annotations"
)

// workload is what owns pods, as far as restarting goes.
type workload struct {
	kind      string
	object    client.Object
	template  *corev1.PodTemplateSpec
	rolledOut bool
	// hasDeadline tells that its own controller decides when it has failed to progress, and exceeded that it has.
	hasDeadline, exceeded bool
	// held says why it is not ours to restart; empty when it is.
	held string
}

func (w *workload) UID() types.UID { return w.object.GetUID() }

func (w *workload) String() string { return w.kind + " " + w.object.GetName() }

// restartable tells whether a kind of owner can be restarted, as far as the kind alone says. A ReplicaSet may be a
// Deployment's.
func restartable(kind string) bool {
	switch kind {
	case "Deployment", "StatefulSet", "DaemonSet", "ReplicaSet":
		return true
	}
	return false
}

// workloadOf finds the workload of a pod. It is nil when it has just gone. lacks says what is wrong with the pod's sidecar.
func (r *RolloutReconciler) workloadOf(ctx context.Context, pod *corev1.Pod, lacks string) (*workload, error) {
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
		return &workload{kind: "Pod", object: pod, held: fmt.Sprintf("pod %s has %s tunnel sidecar and no workload that could be restarted; delete it and make it anew", pod.Name, lacks)}, nil
	}
	key := client.ObjectKey{Namespace: pod.Namespace, Name: owner.Name}
	var object client.Object
	switch owner.Kind {
	case "Deployment":
		object = &appsv1.Deployment{}
	case "StatefulSet":
		object = &appsv1.StatefulSet{}
	case "DaemonSet":
		object = &appsv1.DaemonSet{}
	default:
		return &workload{kind: owner.Kind, object: pod, held: fmt.Sprintf("pod %s has %s tunnel sidecar, and its %s %s can't be restarted from here; make the pod anew", pod.Name, lacks, owner.Kind, owner.Name)}, nil
	}
	if err := r.Live.Get(ctx, key, object); err != nil {
		return nil, client.IgnoreNotFound(err)
	}
	return workloadFrom(object), nil
}

// workloadFrom reads a Deployment, StatefulSet or DaemonSet; of others it is nil.
func workloadFrom(object client.Object) *workload {
	name := object.GetName()
	switch o := object.(type) {
	case *appsv1.Deployment:
		want := replicas(o.Spec.Replicas)
		w := &workload{kind: "Deployment", object: o, template: &o.Spec.Template}
		w.rolledOut = o.Status.ObservedGeneration >= o.Generation && o.Status.UpdatedReplicas >= want && o.Status.Replicas <= o.Status.UpdatedReplicas && o.Status.AvailableReplicas >= want
		w.hasDeadline = o.Spec.ProgressDeadlineSeconds != nil && *o.Spec.ProgressDeadlineSeconds < math.MaxInt32 // which means none
		for _, c := range o.Status.Conditions {
			w.exceeded = w.exceeded || c.Type == appsv1.DeploymentProgressing && c.Status == corev1.ConditionFalse && c.Reason == "ProgressDeadlineExceeded" &&
				o.Status.ObservedGeneration >= o.Generation
		}
		if o.Spec.Paused {
			w.held = fmt.Sprintf("Deployment %s is paused; resume and restart it to give its pods the tunnel sidecar", name)
		}
		return w
	case *appsv1.StatefulSet:
		want := replicas(o.Spec.Replicas)
		w := &workload{kind: "StatefulSet", object: o, template: &o.Spec.Template}
		w.rolledOut = o.Status.ObservedGeneration >= o.Generation && o.Status.UpdatedReplicas >= want && o.Status.ReadyReplicas >= want && o.Status.CurrentRevision == o.Status.UpdateRevision
		if o.Spec.UpdateStrategy.Type == appsv1.OnDeleteStatefulSetStrategyType {
			w.held = fmt.Sprintf("StatefulSet %s updates OnDelete; delete its pods one by one to give them the tunnel sidecar", name)
		}
		if u := o.Spec.UpdateStrategy.RollingUpdate; u != nil && u.Partition != nil && *u.Partition > 0 {
			w.held = fmt.Sprintf("StatefulSet %s updates only from its partition %d on; set the partition to 0 and restart it to give its pods the tunnel sidecar", name, *u.Partition)
		}
		return w
	case *appsv1.DaemonSet:
		w := &workload{kind: "DaemonSet", object: o, template: &o.Spec.Template}
		w.rolledOut = o.Status.ObservedGeneration >= o.Generation && o.Status.UpdatedNumberScheduled >= o.Status.DesiredNumberScheduled && o.Status.NumberUnavailable == 0
		if o.Spec.UpdateStrategy.Type == appsv1.OnDeleteDaemonSetStrategyType {
			w.held = fmt.Sprintf("DaemonSet %s updates OnDelete; delete its pods one by one to give them the tunnel sidecar", name)
		}
		return w
	}
	return nil
}

func replicas(n *int32) int32 {
	if n == nil {
		return 1
	}
	return *n
}

// restartedAt is when we restarted the workload last; the zero time if never, or if the time is no time of ours.
func (w *workload) restartedAt() time.Time {
	at, _ := time.Parse(time.RFC3339, w.template.Annotations[annotations.RestartedAt])
	return at
}

// restarts counts our restarts for a sidecar with this hash, the workload's last ones. A restart for another sidecar was
// not in vain.
func (w *workload) restarts(hash string) int {
	of, n, _ := strings.Cut(w.object.GetAnnotations()[annotations.Restarts], " ")
	count, err := strconv.Atoi(n)
	if err != nil || of != hash || count < 0 {
		return 0
	}
	return count
}

// templateHash is a short name for a pod template, by which a change of its owner's is noticed.
func templateHash(template *corev1.PodTemplateSpec) string {
	b, err := json.Marshal(template)
	if err != nil {
		// A plain API type, whose encoding has no way to fail.
		panic(fmt.Sprintf("encode a pod template: %v", err))
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:6])
}
