package admission

import (
	"context"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/mysocketio/mysocket-injector/internal/index"
)

// indexOfServices is the index in the informer cache. With it, the Services that don't select a pod cost its admission nothing.
const indexOfServices index.Services = "mysocket.io/admission"

const (
	// lookupTimeout bounds each of the two looks for Services. Pods wait for them.
	lookupTimeout = 500 * time.Millisecond
	// livePage is the size of a page of the live list.
	livePage = 500
	// liveLookups bounds the live lists that run at once, so that a burst of pods without a Service can't crowd out
	// what else this program asks of the API server. Those that wait in vain are let through without a sidecar.
	liveLookups = 8
)

// RegisterIndex adds the index that [Options].Services needs to the manager's field indexer. Call it before the cache starts.
func RegisterIndex(ctx context.Context, indexer client.FieldIndexer) error {
	return indexOfServices.Register(ctx, indexer)
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
	return indexOfServices.Selecting(ctx, s.cached, namespace, podLabels)
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
		if names := index.Names(list.Items, podLabels); len(names) > 0 {
			return names, nil
		}
		if page = list.Continue; page == "" {
			return nil, nil
		}
	}
}
