package store

import (
	"sync"
	"testing"
	"testing/synctest"
)

// TestTogether: a hundred who ask while a call is on its way share the next, which begins after they came.
func TestTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		calls := 0
		slow := make(chan struct{})
		all := newTogether(func() int {
			calls++
			n := calls
			<-slow
			return n
		})
		var wg sync.WaitGroup
		ask := func(want int) {
			wg.Go(func() {
				if got := all.do(); got != want {
					t.Errorf("got the result of call %d, want that of %d", got, want)
				}
			})
		}
		ask(1)
		synctest.Wait()
		for range 100 {
			ask(2)
		}
		synctest.Wait()
		slow <- struct{}{}
		synctest.Wait()
		ask(3)
		synctest.Wait()
		close(slow)
		wg.Wait()
		if calls != 3 {
			t.Errorf("%d calls", calls)
		}
	})
}
