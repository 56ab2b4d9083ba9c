package store

import "sync"

// together makes one call at a time, and one for all who come while another is made: what they ask has to begin after they came, and no
// more. Make it with newTogether.
type together[T any] struct {
	call func() T
	turn chan struct{} // holds one, which whoever calls has

	mu   sync.Mutex
	next *shared[T] // not begun yet; nil if nobody waits for it
}

// shared is a call that several wait for. done is closed when it has its result.
type shared[T any] struct {
	done   chan struct{}
	result T
}

func newTogether[T any](call func() T) *together[T] {
	return &together[T]{call: call, turn: make(chan struct{}, 1)}
}

// do returns what a call returned that began after do.
func (t *together[T]) do() T {
	t.mu.Lock()
	mine := t.next
	first := mine == nil
	if first {
		mine = &shared[T]{done: make(chan struct{})}
		t.next = mine
	}
	t.mu.Unlock()
	if !first {
		<-mine.done
		return mine.result
	}
	t.turn <- struct{}{}
	t.mu.Lock()
	t.next = nil // it begins: who comes now is too late
	t.mu.Unlock()
	mine.result = t.call()
	<-t.turn
	close(mine.done)
	return mine.result
}
