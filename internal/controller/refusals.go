package controller

import (
	"sync"
	"time"

	"sigs.k8s.io/controller-runtime/pkg/client"
)

// refusals remembers what Mysocket refused, so that the events of a Service's pods and Tunnels, hundreds in a rollout,
// don't ask for the same again before it is time. The zero value is ready.
type refusals struct {
	mu sync.Mutex
	by map[client.ObjectKey]refusal
}

type refusal struct {
	what  string // was asked for
	err   error
	until time.Time
}

// of returns the refusal of what the Service asks for, if it is too early to ask again.
func (r *refusals) of(service client.ObjectKey, what string, now time.Time) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	known := r.by[service]
	if known.what != what || !now.Before(known.until) {
		delete(r.by, service)
		return nil
	}
	return known.err
}

func (r *refusals) remember(service client.ObjectKey, what string, err error, until time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.by == nil {
		r.by = map[client.ObjectKey]refusal{}
	}
	r.by[service] = refusal{what: what, err: err, until: until}
}

func (r *refusals) forget(service client.ObjectKey) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.by, service)
}
