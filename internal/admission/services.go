package admission

import (
	"context"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/mysocketio/mysocket-injector/internal/annotations"
)

// IndexEnabled is the field index of Services in the informer cache; its only value is "true". With it, Services that
// aren't ours cost an admission nothing.
const IndexEnabled = "mysocket.io/enabled"

const (
	// lookupTimeout bounds each of the two looks for Services. Pods wait for them.
	lookupTimeout = 500 * time.Millisecond
	// livePage is the size of a page of the live list.
	livePage = 500
	// liveLookups bounds the live lists that run at once, so that a burst of pods without a Service can't crowd out
	// what else this program asks of the API server. Those that wait in vain are let through without a sidecar.
	liveLookups = 8
)

// RegisterIndex adds IndexEnabled to the manager's field indexer. Call it before the cache starts.
func RegisterIndex(ctx context.Context, indexer client.FieldIndexer) error {
	if err := indexer.IndexField(ctx, &corev1.Service{}, IndexEnabled, EnabledIndex); err != nil {
		return fmt.Errorf("index Services by %s: %w", annotations.Enabled, err)
	}
	return nil
}

// EnabledIndex is the function behind IndexEnabled.
func EnabledIndex(obj client.Object) []string {
	if svc, ok := obj.(*corev1.Service); ok && annotations.IsEnabled(svc) {
		return []string{"true"}
	}
	return nil
}

// services finds the enabled Services that select a pod.
type services struct {
	cached client.Reader
	live   client.Reader
	slots  chan struct{}
}

func newServices(cached, live client.Reader) *services {
	return &services{cached: cached, live: live, slots: make(chan struct{}, liveLookups)}
}

// fromCache returns the names of the enabled Services in the informer cache that select a pod with these labels.
func (s *services) fromCache(ctx context.Context, namespace string, podLabels map[string]string) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
	defer cancel()
	var list corev1.ServiceList
	// The items are only read, so the cache need not copy them.
	if err := s.cached.List(ctx, &list, client.InNamespace(namespace), client.MatchingFields{IndexEnabled: "true"}, client.UnsafeDisableDeepCopy); err != nil {
		return nil, fmt.Errorf("list enabled Services of namespace %s in the cache: %w", namespace, err)
	}
	return selecting(list.Items, podLabels), nil
}

// fromServer asks the API server itself. It stops at the first page with a match.
func (s *services) fromServer(ctx context.Context, namespace string, podLabels map[string]string) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
	defer cancel()
	select {
	case s.slots <- struct{}{}:
		defer func() { <-s.slots }()
	case <-ctx.Done():
		return nil, fmt.Errorf("list Services of namespace %s: more than %d such requests at once", namespace, liveLookups)
	}
	for page := ""; ; {
		var list corev1.ServiceList
		if err := s.live.List(ctx, &list, client.InNamespace(namespace), client.Limit(livePage), client.Continue(page)); err != nil {
			return nil, fmt.Errorf("list Services of namespace %s: %w", namespace, err)
		}
		if names := selecting(list.Items, podLabels); len(names) > 0 {
			return names, nil
		}
		if page = list.Continue; page == "" {
			return nil, nil
		}
	}
}

func selecting(list []corev1.Service, podLabels map[string]string) []string {
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
