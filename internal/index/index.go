// Package index finds the enabled Services that select a pod, in the informer cache, without a look at all the others: a
// namespace may have thousands. It must not know what is done with them.
package index

import (
	"context"
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/mysocketio/mysocket-injector/internal/annotations"
)

// Services is an index of the enabled Services, by one of the labels that they select. Its value is the name of the index in
// the informer. Each user of it has one of its own, so that none depends on what another has registered; it holds a pointer for
// each enabled Service.
type Services string

// Register adds the index to the manager's field indexer. Call it once, before the cache starts.
func (s Services) Register(ctx context.Context, indexer client.FieldIndexer) error {
	if err := indexer.IndexField(ctx, &corev1.Service{}, string(s), Keys); err != nil {
		return fmt.Errorf("index Services by what they select: %w", err)
	}
	return nil
}

// Keys is the function behind the index. Of a Service that selects several labels it gives the first key's: a pod that it
// selects has all of them, and so that one.
func Keys(obj client.Object) []string {
	svc, ok := obj.(*corev1.Service)
	if !ok || !annotations.IsEnabled(svc) || len(svc.Spec.Selector) == 0 {
		return nil
	}
	first := ""
	for key := range svc.Spec.Selector {
		if first == "" || key < first {
			first = key
		}
	}
	return []string{label(first, svc.Spec.Selector[first])}
}

// label can't be mistaken for another: neither part holds a "=".
func label(key, value string) string { return key + "=" + value }

// Selecting returns the names of the enabled Services of a namespace that select a pod with these labels, in order.
func (s Services) Selecting(ctx context.Context, cached client.Reader, namespace string, podLabels map[string]string) ([]string, error) {
	var names []string
	for key, value := range podLabels {
		var list corev1.ServiceList
		// The items are only read, so the cache need not copy them.
		if err := cached.List(ctx, &list, client.InNamespace(namespace), client.MatchingFields{string(s): label(key, value)}, client.UnsafeDisableDeepCopy); err != nil {
			return nil, fmt.Errorf("look for the enabled Services of namespace %s in the cache: %w", namespace, err)
		}
		names = append(names, Names(list.Items, podLabels)...)
	}
	slices.Sort(names)
	return names, nil
}

// Names returns the names of those Services of a list that are enabled and select a pod with these labels.
func Names(list []corev1.Service, podLabels map[string]string) []string {
	var names []string
	for i := range list {
		// Of an enabled Service nothing else matters here: what is wrong with its other annotations can be mended
		// later, and then takes effect without a new pod.
		if svc := &list[i]; annotations.IsEnabled(svc) && annotations.Selects(svc, podLabels) {
			names = append(names, svc.Name)
		}
	}
	return names
}
