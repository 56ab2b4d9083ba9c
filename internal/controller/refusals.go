package controller

import (
	"sync"
	"time"

	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/mysocketio/mysocket-injector/internal/annotations"
)

// refusals remembers what Mysocket refused, so that the events of a Service's pods and Tunnels, hundreds in a rollout,
// don't ask for the same again before it is time. The zero value is ready.
type refusals struct {
	mu sync.Mutex
	by map[client.ObjectKey]refusal
}

type refusal struct {
	name, kind string // of the socket that was asked for
	err        error
	until      time.Time
}

// of returns the refusal of what the Service asks for, if it is too early to ask again.
func (r *refusals) of(service client.ObjectKey, spec annotations.Spec, now time.Time) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	known := r.by[service]
	if known.name != spec.SocketName || known.kind != spec.SocketType || !now.Before(known.until) {
		delete(r.by, service)
		return nil
	}
	return known.err
}

func (r *refusals) remember(service client.ObjectKey, spec annotations.Spec, err error, until time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.by == nil {
		r.by = map[client.ObjectKey]refusal{}
	}
	r.by[service] = refusal{name: spec.SocketName, kind: spec.SocketType, err: err, until: until}
}

func (r *refusals) forget(service client.ObjectKey) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.by, service)
}
