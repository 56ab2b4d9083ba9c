package retry

import "time"

const (
	// floor keeps full jitter, which may draw zero, from turning into a busy loop.
	floor = 50 * time.Millisecond
	// maxRetryAfter bounds what a server may ask for: one wrong header must not silence a pod for a day.
	maxRetryAfter = 5 * time.Minute
)

// Backoff spreads attempts with full jitter: a delay is drawn evenly from zero to twice what was waited so far, at least Min
// and at most Max. Thousands of sidecars that lose one edge at the same moment so come back spread over time, and after an
// outage that was short nobody waits long: by the number of attempts alone, who has drawn a few short delays would.
//
// A Backoff is not safe for concurrent use.
type Backoff struct {
	Min, Max time.Duration
	// Sustained is how long something must have worked before its end counts as a new failure, and not as one more of
	// the same. Without it, an edge that accepts and then fails at once is called every second for ever.
	Sustained time.Duration
	// Random draws from [0, 1).
	Random func() float64

	waited time.Duration
}

// Next returns how long to wait before the next attempt. When a server said how long to stay away, that goes in as
// atLeast, zero otherwise; the jitter comes on top of it. It is then at least half of that time wide: whoever was sent
// away together must not come back together.
func (b *Backoff) Next(atLeast time.Duration) time.Duration {
	atLeast = min(max(atLeast, 0), maxRetryAfter)
	ceiling := max(min(max(b.Min, 2*b.waited), b.Max), atLeast/2)
	delay := max(floor, time.Duration(b.Random()*float64(ceiling)))
	b.waited = min(b.waited+delay, b.Max)
	return delay + atLeast
}

// Worked records that what was attempted worked for the given time before it ended.
func (b *Backoff) Worked(lasted time.Duration) {
	if lasted >= b.Sustained {
		b.waited = 0
	}
}
