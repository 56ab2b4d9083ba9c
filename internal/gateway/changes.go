package gateway

import (
	"context"
	"fmt"
	"sync"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	toolscache "k8s.io/client-go/tools/cache"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// Changes wakes a pod's assignment streams when the pod or a Service of its namespace changes. The zero value is ready.
type Changes struct {
	mu sync.Mutex
	// by namespace; the value is the pod's name
	subscribers map[string]map[chan struct{}]string
}

// Watch makes c follow the informers of Services and pods. It needs to be called once, before the cache starts or after.
func (c *Changes) Watch(ctx context.Context, informers cache.Informers) error {
	for _, obj := range []client.Object{&corev1.Service{}, &corev1.Pod{}} {
		informer, err := informers.GetInformer(ctx, obj)
		if err != nil {
			return fmt.Errorf("gateway: watch %T: %w", obj, err)
		}
		if _, err := informer.AddEventHandler(toolscache.ResourceEventHandlerFuncs{
			AddFunc:    c.notify,
			UpdateFunc: func(_, now any) { c.notify(now) },
			DeleteFunc: c.notify,
		}); err != nil {
			return fmt.Errorf("gateway: watch %T: %w", obj, err)
		}
	}
	return nil
}

func (c *Changes) notify(obj any) {
	if gone, ok := obj.(toolscache.DeletedFinalStateUnknown); ok {
		obj = gone.Obj
	}
	meta, ok := obj.(metav1.Object)
	if !ok {
		return
	}
	_, isPod := obj.(*corev1.Pod)
	c.mu.Lock()
	defer c.mu.Unlock()
	for ch, pod := range c.subscribers[meta.GetNamespace()] {
		if isPod && pod != meta.GetName() {
			continue
		}
		select {
		case ch <- struct{}{}:
		default: // it has a wake-up waiting already
		}
	}
}

// maxStreams bounds the streams that one pod may have open at once. A sidecar has one, and for a moment perhaps some that
// it has given up and we have not noticed.
const maxStreams = 8

// subscribe returns a channel that gets a value after every change that may concern the pod, several perhaps as one, and
// a function that ends that; none if the pod has maxStreams already.
func (c *Changes) subscribe(pod identity) (<-chan struct{}, func()) {
	ch := make(chan struct{}, 1)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.subscribers == nil {
		c.subscribers = map[string]map[chan struct{}]string{}
	}
	if c.subscribers[pod.namespace] == nil {
		c.subscribers[pod.namespace] = map[chan struct{}]string{}
	}
	open := 0
	for _, name := range c.subscribers[pod.namespace] {
		if name == pod.pod {
			open++
		}
	}
	if open >= maxStreams {
		return nil, nil
	}
	c.subscribers[pod.namespace][ch] = pod.pod
	return ch, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.subscribers[pod.namespace], ch)
		if len(c.subscribers[pod.namespace]) == 0 {
			delete(c.subscribers, pod.namespace)
		}
	}
}
