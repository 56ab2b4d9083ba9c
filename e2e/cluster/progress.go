package cluster

import (
	"fmt"
	"io"
	"sync"
	"time"
)

// reportEvery is how often a long step says that it is still at work.
const reportEvery = 15 * time.Second

// Step runs fn and prints what is being done, how long it has taken in a long step, and how
// long it took in the end.
func Step(out io.Writer, what string, fn func() error) error {
	start := time.Now()
	p := &syncWriter{w: out}
	p.printf("%s ...", what)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(reportEvery)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
				p.printf("\n%s ... %s", what, elapsed(time.Since(start)))
			}
		}
	})
	err := fn()
	close(stop)
	wg.Wait()
	if err != nil {
		p.printf(" failed after %s\n", elapsed(time.Since(start)))
		return fmt.Errorf("%s: %w", what, err)
	}
	p.printf(" done in %s\n", elapsed(time.Since(start)))
	return nil
}

// elapsed prints a duration as people say it: 0.4s, 12s, 2m15s.
func elapsed(d time.Duration) string {
	if d < 10*time.Second {
		return fmt.Sprintf("%.1fs", d.Seconds())
	}
	return d.Round(time.Second).String()
}

type syncWriter struct {
	mu sync.Mutex
	w  io.Writer
}

// printf ignores write errors: progress that cannot be shown must not end the work.
func (s *syncWriter) printf(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, _ = fmt.Fprintf(s.w, format, args...)
}
