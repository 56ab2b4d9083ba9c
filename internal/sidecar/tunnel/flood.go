package tunnel

import (
	"fmt"
	"sync"
	"time"

	"github.com/mysocketio/mysocket-injector/internal/sidecar/retry"
)

// Answering what is of no use takes no memory, but it takes the pod's processor for as long as an edge cares to ask. An
// honest edge sends next to none of it: a keepalive every few seconds, a new key exchange after each GiB or so.
const (
	maxFlood    = 1000 // points
	floodWindow = 10 * time.Second

	// floodMessage is what a global request counts, a request in the session, and an opening that no edge should try.
	floodMessage = 1
	// floodKeyExchange is what a key exchange counts, which costs much more.
	floodKeyExchange = 5
)

// flood counts what an edge sends that is of no use.
type flood struct {
	clock retry.Clock

	mu     sync.Mutex
	began  time.Time
	points int
}

// add returns an error when it is too much.
func (f *flood) add(points int) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if now := f.clock.Now(); now.Sub(f.began) >= floodWindow {
		f.began, f.points = now, 0
	}
	f.points += points
	if f.points > maxFlood {
		return &LostError{LostFlood, fmt.Errorf("the edge floods the connection: more than %d requests and openings of no use in %s, where a key exchange counts as %d",
			maxFlood, floodWindow, floodKeyExchange)}
	}
	return nil
}

// useless counts a message of no use, and ends the connection when there have been too many.
func (t *Tunnel) useless() {
	if err := t.flood.add(floodMessage); err != nil {
		// On another goroutine: closing waits until all that came has been read, which is the caller's task.
		t.spawn(func() { t.fail(err) })
	}
}
