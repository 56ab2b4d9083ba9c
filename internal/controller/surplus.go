package controller

import (
	"context"
	"fmt"
	"sync"
	"time"

	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/mysocketio/mysocket-injector/api/v1alpha1"
	"github.com/mysocketio/mysocket-injector/internal/annotations"
)

// surplusGrace is how long sidecars have to withdraw connections that a Service no longer asks for. They let visitors
// finish first, which deleting the tunnel would not.
const surplusGrace = 30 * time.Second

// surplus remembers since when a Service has had Tunnels beyond what it asks for, or of another socket. The zero value is ready. That it forgets
// when the leader changes only gives the sidecars more time.
type surplus struct {
	mu    sync.Mutex
	since map[client.ObjectKey]time.Time
}

// seen notes whether a Service has such Tunnels, and returns since when; the zero time if it has none.
func (s *surplus) seen(service client.ObjectKey, any bool, now time.Time) time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !any {
		delete(s.since, service)
		return time.Time{}
	}
	if s.since == nil {
		s.since = map[client.ObjectKey]time.Time{}
	}
	if s.since[service].IsZero() {
		s.since[service] = now
	}
	return s.since[service]
}

// dropSurplus deletes the Tunnels of connections that the Service no longer asks for, and of a socket that it has used
// before, which their sidecars have not withdrawn: a sidecar that was restarted meanwhile knows nothing of them. It returns
// when to look again, zero for never.
func (r *ServiceReconciler) dropSurplus(ctx context.Context, key client.ObjectKey, spec annotations.Spec, socketID string, now time.Time) (time.Duration, error) {
	var tunnels v1alpha1.TunnelList
	// They are only read, so the cache need not copy them.
	if err := r.Client.List(ctx, &tunnels, client.InNamespace(key.Namespace), client.UnsafeDisableDeepCopy); err != nil {
		return 0, fmt.Errorf("list the Tunnels of %s: %w", key.Namespace, err)
	}
	var beyond []*v1alpha1.Tunnel
	for i := range tunnels.Items {
		t := &tunnels.Items[i]
		if t.Spec.ServiceName != key.Name || t.DeletionTimestamp != nil {
			continue
		}
		if int(t.Spec.Connection) >= spec.Connections || t.Spec.SocketID != socketID {
			beyond = append(beyond, t)
		}
	}
	since := r.surplus.seen(key, len(beyond) > 0, now)
	if len(beyond) == 0 {
		return 0, nil
	}
	if wait := surplusGrace - now.Sub(since); wait > 0 {
		return wait, nil
	}
	for _, t := range beyond {
		if err := r.Client.Delete(ctx, t, client.Preconditions{UID: &t.UID}); client.IgnoreNotFound(err) != nil {
			return 0, fmt.Errorf("delete Tunnel %s/%s: %w", t.Namespace, t.Name, err)
		}
	}
	return 0, nil
}
