package controller

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/mysocketio/mysocket-injector/api/v1alpha1"
	"github.com/mysocketio/mysocket-injector/internal/annotations"
	"github.com/mysocketio/mysocket-injector/internal/gatewayapi"
	"github.com/mysocketio/mysocket-injector/internal/inject"
)

// Reasons of the TunnelsReady condition.
const (
	reasonAllConnected   = "AllConnected"
	reasonNoPods         = "NoPods"
	reasonConnecting     = "Connecting"
	reasonWaitingForApp  = "WaitingForApp"
	reasonTunnelFailing  = "TunnelFailing"
	reasonWaitingRestart = "WaitingForRestart"
	reasonNotLabelled    = "NamespaceNotLabelled"
	reasonExcluded       = "NamespaceExcluded"
	reasonHalted         = "RolloutHalted"
	reasonBroken         = "SidecarBroken"
	reasonRestartOff     = "RestartIsOff"
	reasonNotGuarded     = "NotRestrictedYet"
)

// appGrace is how long an app may take to answer before the Service's condition calls it a failure. An app that is just
// starting is the rule at every rollout.
const appGrace = 15 * time.Second

// maxMessage is what an Event may hold. A condition may hold more, but nobody wants to read that.
const maxMessage = 1024

// condition is one condition to be set on a Service.
type condition struct {
	kind    string
	ok      bool
	reason  string
	message string
	// trouble makes the Event that tells of the change a warning.
	trouble bool
}

// setConditions writes conditions that changed, in one patch that leaves those of others alone, and records an Event for
// each whose status or reason is new, if it is good or bad news: being on the way is no Event, nor is a changed message
// alone, so that a rollout's counters don't fill the list.
func (r *ServiceReconciler) setConditions(ctx context.Context, svc *corev1.Service, want ...condition) error {
	before := svc.DeepCopy()
	var news []condition
	changed := false
	for _, c := range want {
		status := metav1.ConditionFalse
		if c.ok {
			status = metav1.ConditionTrue
		}
		if len(c.message) > maxMessage {
			c.message = strings.ToValidUTF8(c.message[:maxMessage-len("...")], "") + "..."
		}
		old := apimeta.FindStatusCondition(svc.Status.Conditions, c.kind)
		if (old == nil || old.Status != status || old.Reason != c.reason) && (c.ok || c.trouble) {
			news = append(news, c)
		}
		changed = apimeta.SetStatusCondition(&svc.Status.Conditions, metav1.Condition{
			Type: c.kind, Status: status, Reason: c.reason, Message: c.message, ObservedGeneration: svc.Generation,
		}) || changed
	}
	if !changed {
		return nil
	}
	if err := r.Client.Status().Patch(ctx, svc, client.StrategicMergeFrom(before)); client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("write the conditions of Service %s/%s: %w", svc.Namespace, svc.Name, err)
	}
	for _, c := range news {
		kind := corev1.EventTypeNormal
		if c.trouble {
			kind = corev1.EventTypeWarning
		}
		r.Events.Eventf(svc, nil, kind, c.reason, "Reconcile", "%s", c.message)
	}
	return nil
}

func hasConditions(svc *corev1.Service) bool {
	return slices.ContainsFunc(svc.Status.Conditions, isOwnCondition)
}

func isOwnCondition(c metav1.Condition) bool {
	return c.Type == annotations.SocketReady || c.Type == annotations.TunnelsReady
}

func (r *ServiceReconciler) clearConditions(ctx context.Context, svc *corev1.Service) error {
	if !hasConditions(svc) {
		return nil
	}
	before := svc.DeepCopy()
	svc.Status.Conditions = slices.DeleteFunc(svc.Status.Conditions, isOwnCondition)
	if err := r.Client.Status().Patch(ctx, svc, client.StrategicMergeFrom(before)); client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("clear the conditions of Service %s/%s: %w", svc.Namespace, svc.Name, err)
	}
	return nil
}

// tunnelsReady reads pods, Tunnels and the namespace and sums them up. The condition may turn by itself within appGrace
// when its reason is reasonWaitingForApp.
func (r *ServiceReconciler) tunnelsReady(ctx context.Context, svc *corev1.Service) (condition, error) {
	// Both are only read, so the cache need not copy them: a namespace may have thousands of each.
	var pods corev1.PodList
	if err := r.Client.List(ctx, &pods, client.InNamespace(svc.Namespace), client.MatchingLabels(svc.Spec.Selector), client.UnsafeDisableDeepCopy); err != nil {
		return condition{}, fmt.Errorf("list the pods of Service %s/%s: %w", svc.Namespace, svc.Name, err)
	}
	var tunnels v1alpha1.TunnelList
	if err := r.Client.List(ctx, &tunnels, client.InNamespace(svc.Namespace), client.UnsafeDisableDeepCopy); err != nil {
		return condition{}, fmt.Errorf("list the Tunnels of %s: %w", svc.Namespace, err)
	}
	var ns corev1.Namespace
	if err := r.Client.Get(ctx, client.ObjectKey{Name: svc.Namespace}, &ns); err != nil {
		return condition{}, fmt.Errorf("read namespace %s: %w", svc.Namespace, err)
	}
	spec, err := annotations.Parse(svc, r.Names)
	if err != nil {
		return condition{}, err
	}
	if !spec.Guarded(svc) {
		return condition{annotations.TunnelsReady, false, reasonNotGuarded, "the pods serve nothing until the edge keeps visitors out as the Service asks", false}, nil
	}
	now := time.Now()
	halted, err := haltOf(ctx, r.Client, svc, now)
	if err != nil {
		return condition{}, err
	}
	return r.summarize(svc, spec, pods.Items, tunnels.Items, &ns, halted, now), nil
}

// missingConnection returns a connection of a pod that is not up, if there is one: the first that says why, else the first.
func missingConnection(tunnels map[int]v1alpha1.TunnelStatus, want int) (n int, missing bool) {
	for i := want - 1; i >= 0; i-- {
		st := tunnels[i]
		if st.State == string(gatewayapi.StateConnected) {
			continue
		}
		if !missing || st.Message != "" || tunnels[n].Message == "" {
			n, missing = i, true
		}
	}
	return n, missing
}

// summarize makes the TunnelsReady condition of a Service out of what there is. It does no I/O.
func (r *ServiceReconciler) summarize(svc *corev1.Service, spec annotations.Spec, pods []corev1.Pod, tunnels []v1alpha1.Tunnel, ns *corev1.Namespace, halted halt, now time.Time) condition {
	// By UID, since a StatefulSet's new pod has the name of its predecessor, whose Tunnel may still be there.
	byPod := map[types.UID]map[int]v1alpha1.TunnelStatus{} // by connection
	for _, t := range tunnels {
		// By socket and not by Service: two of a namespace may share one.
		if t.Spec.SocketID != svc.Annotations[annotations.SocketID] || t.DeletionTimestamp != nil {
			continue
		}
		for _, owner := range t.OwnerReferences {
			if byPod[owner.UID] == nil {
				byPod[owner.UID] = map[int]v1alpha1.TunnelStatus{}
			}
			byPod[owner.UID][int(t.Spec.Connection)] = t.Status
		}
	}
	var total, connected, bare, outdated, skipped int
	var broken []string
	var why *inject.Skip
	var failing, waiting []string
	var badPort error
	for i := range pods {
		pod := &pods[i]
		if !running(pod) {
			continue
		}
		if skip := inject.Check(pod); skip != nil && !inject.HasSidecar(pod) {
			skipped, why = skipped+1, skip
			continue
		}
		total++
		if inject.HasSidecar(pod) && r.Outdated(pod) {
			outdated++
		}
		n, missing := missingConnection(byPod[pod.UID], max(1, spec.Connections))
		switch {
		case !missing:
			connected++
		case inject.IsBroken(pod):
			broken = append(broken, pod.Name)
		case !inject.HasSidecar(pod):
			bare++
		default:
			st := byPod[pod.UID][n]
			if st.State == string(gatewayapi.StateWaitingForApp) && st.LastTransitionTime != nil && now.Sub(st.LastTransitionTime.Time) < appGrace {
				waiting = append(waiting, pod.Name)
				break
			}
			if st.Message == "" {
				break
			}
			name := "pod " + pod.Name
			if spec.Connections > 1 {
				name += fmt.Sprintf(", connection %d", n)
			}
			failing = append(failing, name+": "+st.Message)
		}
		if _, err := annotations.TargetPort(spec.ServicePort, &pod.Spec); err != nil {
			badPort = err
		}
	}
	c := condition{kind: annotations.TunnelsReady, message: fmt.Sprintf("%d of %d pods connected", connected, total)}
	if bare > 0 {
		c.message += fmt.Sprintf(", %d waiting for a restart", bare)
	}
	if len(broken) > 0 {
		c.message += fmt.Sprintf(", %d with a broken sidecar", len(broken))
	}
	if outdated > 0 {
		c.message += fmt.Sprintf(", %d with an outdated sidecar", outdated)
	}
	if skipped > 0 {
		c.message += fmt.Sprintf(", %d can have no tunnel (%s)", skipped, why)
	}
	say := func(reason, more string, trouble bool) condition {
		c.reason, c.trouble = reason, trouble
		if more != "" {
			c.message += ": " + more
		}
		return c
	}
	slices.Sort(failing)
	slices.Sort(broken)
	switch {
	case total == 0 && skipped > 0:
		return say(string(why.Reason), "", true)
	case total == 0:
		c.message = "the Service selects no running pod"
		return say(reasonNoPods, "", false)
	case halted.of != "":
		c.ok = connected == total
		return say(reasonHalted, halted.of, true)
	case connected == total:
		c.ok = true
		return say(reasonAllConnected, "", false)
	case badPort != nil:
		return say(annotations.ReasonPortNotFound, badPort.Error(), true)
	case len(broken) > 0:
		return say(reasonBroken, fmt.Sprintf("pod %s: another admission webhook took restartPolicy: Always from the init container %s, so the pod never starts; mend that webhook (it may be too old to know the field), then make the pod anew", broken[0], inject.ContainerName), true)
	case len(failing) > 0:
		return say(reasonTunnelFailing, failing[0], true)
	case bare > 0 && neverInjected(ns.Name, r.Namespace):
		return say(reasonExcluded, fmt.Sprintf("pods of namespace %s are never injected; move the app to a namespace of its own", ns.Name), true)
	case bare > 0 && !injectionEnabled(ns, r.Namespace):
		return say(reasonNotLabelled, annotations.NotLabelled(ns.Name), true)
	case bare > 0 && spec.Rollout == annotations.RolloutNever:
		return say(reasonRestartOff, fmt.Sprintf("%s is %q, so restart their workloads yourself (kubectl rollout restart)", annotations.RolloutMode, annotations.RolloutNever), false)
	case bare > 0 && halted.elsewhere:
		return say(reasonWaitingRestart, "restarts are halted until another workload, which is not healthy since its restart, is mended; the control plane's log names it", false)
	case bare > 0:
		return say(reasonWaitingRestart, "", false)
	case len(waiting) > 0:
		return say(reasonWaitingForApp, "", false)
	default:
		return say(reasonConnecting, "", false)
	}
}
