package retry_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/mysocketio/mysocket-injector/internal/sidecar/retry"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/retry/clocktest"
)

func TestBackoffGrowsToItsMaximum(t *testing.T) {
	b := retry.Backoff{Min: time.Second, Max: 32 * time.Second, Random: func() float64 { return 0.5 }}
	for i, want := range []time.Duration{500 * time.Millisecond, 500 * time.Millisecond, time.Second, 2 * time.Second, 4 * time.Second, 8 * time.Second, 16 * time.Second, 16 * time.Second} {
		if got := b.Next(0); got != want {
			t.Errorf("delay %d: got %s, want %s", i, got, want)
		}
	}
}

// TestBackoffAfterAShortOutage: many quick attempts within it are no reason to wait long after it.
func TestBackoffAfterAShortOutage(t *testing.T) {
	draw := 0.1
	b := retry.Backoff{Min: time.Second, Max: 32 * time.Second, Random: func() float64 { return draw }}
	waited := time.Duration(0)
	for range 6 {
		waited += b.Next(0)
	}
	draw = 1
	if got := b.Next(0); got > max(time.Second, 2*waited) {
		t.Errorf("waits %s after %s", got, waited)
	}
}

func TestBackoffNeverReturnsNothing(t *testing.T) {
	b := retry.Backoff{Min: time.Second, Max: 32 * time.Second, Random: func() float64 { return 0 }}
	for range 100 {
		if got := b.Next(0); got < 50*time.Millisecond {
			t.Fatalf("got %s, which is a busy loop", got)
		}
	}
}

func TestBackoffHonoursRetryAfterWithinReason(t *testing.T) {
	tests := []struct {
		name          string
		atLeast, want time.Duration
	}{
		{"a second", time.Second, time.Second + 500*time.Millisecond},
		{"seconds, spread over half as many", 10 * time.Second, 12500 * time.Millisecond},
		{"a day", 24 * time.Hour, 5*time.Minute + 75*time.Second},
		{"negative", -time.Hour, 500 * time.Millisecond},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			b := retry.Backoff{Min: time.Second, Max: 32 * time.Second, Random: func() float64 { return 0.5 }}
			if got := b.Next(test.atLeast); got != test.want {
				t.Errorf("got %s, want %s", got, test.want)
			}
		})
	}
}

func TestBackoffStartsAnewOnlyAfterSustainedSuccess(t *testing.T) {
	b := retry.Backoff{Min: time.Second, Max: 32 * time.Second, Sustained: 30 * time.Second, Random: func() float64 { return 0.5 }}
	b.Next(0)
	b.Next(0)
	b.Worked(29 * time.Second)
	if got := b.Next(0); got != time.Second {
		t.Errorf("after a short success: got %s, want 1s", got)
	}
	b.Worked(30 * time.Second)
	if got := b.Next(0); got != 500*time.Millisecond {
		t.Errorf("after a sustained success: got %s, want 500ms", got)
	}
}

func TestSleepEndsWithItsContext(t *testing.T) {
	clock := clocktest.New(time.Unix(0, 0))
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- retry.Sleep(ctx, clock, time.Hour) }()
	clock.AwaitTimer(t, time.Hour)
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want context.Canceled", err)
	}
	go func() { ended <- retry.Sleep(t.Context(), clock, time.Minute) }()
	clock.AwaitTimer(t, time.Minute)
	clock.Advance(time.Minute)
	if err := <-ended; err != nil {
		t.Errorf("got %v after the time had passed", err)
	}
}
