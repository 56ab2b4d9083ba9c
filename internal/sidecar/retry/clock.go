// Package retry decides when something is tried again. The clock and the randomness of the sidecar come in here, so
// that tests own both. It must not know what is being retried.
package retry

import (
	"context"
	"time"
)

// Clock tells the time and wakes its callers.
type Clock interface {
	Now() time.Time
	// NewTimer returns a timer that fires once, d from now.
	NewTimer(d time.Duration) Timer
}

// Timer is what [time.Timer] is, behind an interface.
type Timer interface {
	C() <-chan time.Time
	// Reset makes the timer fire d from now, whether or not it has fired before.
	Reset(d time.Duration)
	Stop()
}

// System returns the clock of the machine.
func System() Clock { return systemClock{} }

type systemClock struct{}

func (systemClock) Now() time.Time { return time.Now() }

func (systemClock) NewTimer(d time.Duration) Timer { return systemTimer{time.NewTimer(d)} }

type systemTimer struct{ timer *time.Timer }

func (t systemTimer) C() <-chan time.Time   { return t.timer.C }
func (t systemTimer) Reset(d time.Duration) { t.timer.Reset(d) }
func (t systemTimer) Stop()                 { t.timer.Stop() }

// Sleep waits for d, or for the end of ctx, whose error it then returns.
func Sleep(ctx context.Context, clock Clock, d time.Duration) error {
	if err := ctx.Err(); err != nil || d <= 0 {
		return err
	}
	timer := clock.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C():
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
