package main

import (
	"context"
	"fmt"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// settleTime is how long after a pod of ours became ready the API server may still not reach it: its address has to get
// into the Service's endpoints, and from there to every node.
const settleTime = 3 * time.Second

// admissionReady says why a pod that is made now would get no sidecar, if so. published is nil when our CA is in the
// webhook's configuration. The rest is asked of the API server: it calls the webhook through its Service, and so reaches
// only pods that are ready. A control plane that has just come back is the leader before it is that.
func admissionReady(reader client.Reader, published func() error, namespace, service string, now func() time.Time) func(context.Context) error {
	return func(ctx context.Context) error {
		if err := published(); err != nil {
			return err
		}
		svc := &corev1.Service{}
		if err := reader.Get(ctx, client.ObjectKey{Namespace: namespace, Name: service}, svc); err != nil {
			return fmt.Errorf("read the webhook's Service %s/%s: %w", namespace, service, err)
		}
		if len(svc.Spec.Selector) == 0 {
			return nil // somebody's own set-up, about which nothing is known
		}
		var pods corev1.PodList
		if err := reader.List(ctx, &pods, client.InNamespace(namespace), client.MatchingLabels(svc.Spec.Selector)); err != nil {
			return fmt.Errorf("list the pods of the webhook's Service %s/%s: %w", namespace, service, err)
		}
		// While the control plane itself is rolled out, the old replicas would inject the old sidecar.
		version := ""
		for i := range pods.Items {
			pod := &pods.Items[i]
			if pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed {
				continue
			}
			of := pod.Labels[appsv1.DefaultDeploymentUniqueLabelKey]
			if version != "" && of != version {
				return fmt.Errorf("the pods of the webhook's Service %s/%s are being replaced by a new version", namespace, service)
			}
			version = of
		}
		for i := range pods.Items {
			if at, ok := readySince(&pods.Items[i]); ok && now().Sub(at) >= settleTime {
				return nil
			}
		}
		return fmt.Errorf("no pod of the webhook's Service %s/%s has been ready for %s, of %d", namespace, service, settleTime, len(pods.Items))
	}
}

func readySince(pod *corev1.Pod) (time.Time, bool) {
	if pod.DeletionTimestamp != nil {
		return time.Time{}, false
	}
	for _, c := range pod.Status.Conditions {
		if c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue {
			return c.LastTransitionTime.Time, true
		}
	}
	return time.Time{}, false
}
