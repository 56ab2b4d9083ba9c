// Package feed carries the live request lines of a socket from the fronts to whoever watches it over SSH. Nobody waits for
// a watcher: a slow one misses lines. The package must not know HTTP or SSH.
package feed

import "sync"

// buffer is how many lines a watcher may be behind before it misses some.
const buffer = 64

// Hub connects publishers and watchers. The zero value is ready to use.
type Hub struct {
	mu       sync.RWMutex
	watchers map[string]map[*Subscription]struct{}
}

// Subscription is one watcher of some sockets.
type Subscription struct {
	// Lines gets the lines, without line ends. It is never closed.
	Lines   chan string
	hub     *Hub
	sockets []string
}

// Subscribe watches the sockets until Close.
func (h *Hub) Subscribe(socketIDs ...string) *Subscription {
	s := &Subscription{Lines: make(chan string, buffer), hub: h, sockets: socketIDs}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.watchers == nil {
		h.watchers = map[string]map[*Subscription]struct{}{}
	}
	for _, id := range socketIDs {
		if h.watchers[id] == nil {
			h.watchers[id] = map[*Subscription]struct{}{}
		}
		h.watchers[id][s] = struct{}{}
	}
	return s
}

// Close ends the watch.
func (s *Subscription) Close() {
	s.hub.mu.Lock()
	defer s.hub.mu.Unlock()
	for _, id := range s.sockets {
		delete(s.hub.watchers[id], s)
		if len(s.hub.watchers[id]) == 0 {
			delete(s.hub.watchers, id)
		}
	}
}

// Publish gives a line to the watchers of a socket. The line is only made when there are any.
func (h *Hub) Publish(socketID string, line func() string) {
	h.mu.RLock()
	defer h.mu.RUnlock()
	watchers := h.watchers[socketID]
	if len(watchers) == 0 {
		return
	}
	text := line()
	for s := range watchers {
		select {
		case s.Lines <- text:
		default:
		}
	}
}
