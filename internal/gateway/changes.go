package gateway

import (
	"context"
	"fmt"
	"maps"
	"sync"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	toolscache "k8s.io/client-go/tools/cache"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// Changes wakes a pod's assignment streams when the pod or a Service of its namespace changes in a way that matters to
// them, and keeps what each namespace's Services offer until one of them changes. The zero value is ready.
type Changes struct {
	mu sync.Mutex
	// by namespace and pod's name
	subscribers map[string]map[string]map[chan struct{}]struct{}
	// by namespace, as far as pods have asked
	offers map[string]*sharedOffers
}

type sharedOffers struct {
	once sync.Once
	got  offers
	err  error
}

// Watch makes c follow the informers of Services and pods. It needs to be called once, before the cache starts or after.
func (c *Changes) Watch(ctx context.Context, informers cache.Informers) error {
	for _, obj := range []client.Object{&corev1.Service{}, &corev1.Pod{}} {
		informer, err := informers.GetInformer(ctx, obj)
		if err != nil {
			return fmt.Errorf("gateway: watch %T: %w", obj, err)
		}
		if _, err := informer.AddEventHandler(toolscache.ResourceEventHandlerFuncs{
			AddFunc: c.notify,
			UpdateFunc: func(was, now any) {
				if matters(was, now) {
					c.notify(now)
				}
			},
			DeleteFunc: c.notify,
		}); err != nil {
			return fmt.Errorf("gateway: watch %T: %w", obj, err)
		}
	}
	return nil
}

// matters tells whether an update may change an assignment. Most don't: the control plane itself writes how many tunnels
// are ready into a Service's status whenever one is, and pods report their health.
func matters(was, now any) bool {
	old, ok := was.(metav1.Object)
	fresh, ok2 := now.(metav1.Object)
	if !ok || !ok2 || old.GetUID() != fresh.GetUID() || (old.GetDeletionTimestamp() == nil) != (fresh.GetDeletionTimestamp() == nil) {
		return true
	}
	switch now := now.(type) {
	case *corev1.Service:
		before, ok := was.(*corev1.Service)
		return !ok || !maps.Equal(before.Annotations, now.Annotations) || !equality.Semantic.DeepEqual(before.Spec, now.Spec)
	case *corev1.Pod:
		return !maps.Equal(old.GetLabels(), fresh.GetLabels()) // its ports can't change
	}
	return true
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
	pods := c.subscribers[meta.GetNamespace()]
	if isPod {
		if len(pods) == 0 {
			delete(c.offers, meta.GetNamespace()) // perhaps the namespace goes
		}
		wake(pods[meta.GetName()])
		return
	}
	delete(c.offers, meta.GetNamespace())
	for _, streams := range pods {
		wake(streams)
	}
}

func wake(streams map[chan struct{}]struct{}) {
	for ch := range streams {
		select {
		case ch <- struct{}{}:
		default: // it has a wake-up waiting already
		}
	}
}

// offersOf returns what a namespace's Services offer, from read if it is not known or they have changed since. The
// informer has a change before it tells of it, so what was read before the change is never kept beyond it.
func (c *Changes) offersOf(namespace string, read func() (offers, error)) (offers, error) {
	c.mu.Lock()
	if c.offers == nil {
		c.offers = map[string]*sharedOffers{}
	}
	shared := c.offers[namespace]
	if shared == nil {
		shared = &sharedOffers{}
		c.offers[namespace] = shared
	}
	c.mu.Unlock()
	shared.once.Do(func() { shared.got, shared.err = read() })
	if shared.err != nil {
		c.mu.Lock()
		if c.offers[namespace] == shared {
			delete(c.offers, namespace)
		}
		c.mu.Unlock()
	}
	return shared.got, shared.err
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
		c.subscribers = map[string]map[string]map[chan struct{}]struct{}{}
	}
	pods := c.subscribers[pod.namespace]
	if len(pods[pod.pod]) >= maxStreams {
		return nil, nil
	}
	if pods == nil {
		pods = map[string]map[chan struct{}]struct{}{}
		c.subscribers[pod.namespace] = pods
	}
	if pods[pod.pod] == nil {
		pods[pod.pod] = map[chan struct{}]struct{}{}
	}
	pods[pod.pod][ch] = struct{}{}
	return ch, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(pods[pod.pod], ch)
		if len(pods[pod.pod]) == 0 {
			delete(pods, pod.pod)
		}
		if len(pods) == 0 {
			delete(c.subscribers, pod.namespace)
		}
	}
}
