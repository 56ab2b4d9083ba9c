package controller

import (
	"context"
	"fmt"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/selection"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/mysocketio/mysocket-injector/internal/annotations"
)

// A workload that we have restarted bears the label annotations.Restarting until it is healthy again. So whoever leads
// knows from the cluster alone which restarts are on their way, and since when, by annotations.RestartedAt of the template.

// restartDeadline is how long a workload may make no progress after its restart, if it has no deadline of its own: no new
// pod of it is made, and yet it is not healthy.
const restartDeadline = 10 * time.Minute

// progress is how a restart of ours is going.
type progress int

const (
	moving progress = iota
	// over: the workload is healthy, or its owner has taken it in hand.
	over
	// failed: it is not healthy after its deadline, and nobody has changed it since.
	failed
)

// RestartingOnly limits the informers of workloads to those that bear the label: there are few at any time, and the others
// need no memory.
func RestartingOnly() map[client.Object]cache.ByObject {
	marked, err := labels.NewRequirement(annotations.Restarting, selection.Exists, nil)
	if err != nil {
		panic(err) // the label's name is not valid
	}
	only := cache.ByObject{Label: labels.NewSelector().Add(*marked)}
	return map[client.Object]cache.ByObject{&appsv1.Deployment{}: only, &appsv1.StatefulSet{}: only, &appsv1.DaemonSet{}: only}
}

// restarting lists the workloads that bear the label.
func restarting(ctx context.Context, reader client.Reader) ([]*workload, error) {
	var deployments appsv1.DeploymentList
	var sets appsv1.StatefulSetList
	var daemons appsv1.DaemonSetList
	for _, list := range []client.ObjectList{&deployments, &sets, &daemons} {
		if err := reader.List(ctx, list, client.HasLabels{annotations.Restarting}); err != nil {
			return nil, fmt.Errorf("list the workloads that are being restarted: %w", err)
		}
	}
	var out []*workload
	for i := range deployments.Items {
		out = append(out, workloadFrom(&deployments.Items[i]))
	}
	for i := range sets.Items {
		out = append(out, workloadFrom(&sets.Items[i]))
	}
	for i := range daemons.Items {
		out = append(out, workloadFrom(&daemons.Items[i]))
	}
	return out, nil
}

// progressOf judges a workload that bears the label. pods reads the informers.
func progressOf(ctx context.Context, pods client.Reader, w *workload, now time.Time) (progress, error) {
	if w.rolledOut || w.held != "" {
		return over, nil
	}
	late := w.exceeded
	if !w.hasDeadline && !late {
		last := w.restartedAt()
		if last.After(now.Add(rolloutAgain)) {
			last = time.Time{} // not written by us: a former leader's clock is not that far ahead
		}
		var list corev1.PodList
		if err := pods.List(ctx, &list, client.InNamespace(w.object.GetNamespace()), client.MatchingLabels(w.template.Labels)); err != nil {
			return moving, fmt.Errorf("list the pods of %s: %w", w, err)
		}
		for i := range list.Items {
			if made := list.Items[i].CreationTimestamp.Time; made.After(last) {
				last = made
			}
		}
		late = now.Sub(last) > restartDeadline
	}
	switch {
	case !late:
		return moving, nil
	case w.object.GetLabels()[annotations.Restarting] != templateHash(w.template):
		return over, nil
	}
	return failed, nil
}

// paceOf sums up all restarts that are on their way: how many there are, and which has failed, if one has.
func paceOf(ctx context.Context, workloads, pods client.Reader, now time.Time) (count int, halting *workload, err error) {
	all, err := restarting(ctx, workloads)
	if err != nil {
		return 0, nil, err
	}
	for _, w := range all {
		p, err := progressOf(ctx, pods, w, now)
		if err != nil {
			return 0, nil, err
		}
		if p == failed && halting == nil {
			halting = w
		}
		if p != over {
			count++
		}
	}
	return count, halting, nil
}

// halt is what a failed restart means for one Service.
type halt struct {
	// of says which workload of the Service's pods has failed; empty if none.
	of string
	// elsewhere tells that another workload has.
	elsewhere bool
}

// haltOf reads from the informers whether restarts are halted, and whether by a workload of this Service.
func haltOf(ctx context.Context, reader client.Reader, svc *corev1.Service, now time.Time) (halt, error) {
	all, err := restarting(ctx, reader)
	if err != nil {
		return halt{}, err
	}
	var h halt
	for _, w := range all {
		p, err := progressOf(ctx, reader, w, now)
		if err != nil {
			return halt{}, err
		}
		switch {
		case p != failed:
		case w.object.GetNamespace() == svc.Namespace && annotations.Selects(svc, w.template.Labels):
			if h.of == "" {
				h.of = fmt.Sprintf("%s has not become healthy since it was restarted at %s for the tunnel sidecar; no workload is restarted until it is healthy or changed", w, w.restartedAt().UTC().Format(time.RFC3339))
			}
		default:
			h.elsewhere = true
		}
	}
	return h, nil
}
