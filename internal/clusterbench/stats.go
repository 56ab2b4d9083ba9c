package main

import (
	"fmt"
	"slices"
	"time"
)

// quantile returns the value below which the share q of the values lies (nearest rank). It sorts them.
func quantile(values []time.Duration, q float64) time.Duration {
	if len(values) == 0 {
		return 0
	}
	slices.Sort(values)
	return values[min(len(values)-1, int(q*float64(len(values))))]
}

// spread is a median with what it is the median of.
type spread struct{ median, least, most float64 }

func spreadOf(values []float64) spread {
	if len(values) == 0 {
		return spread{}
	}
	slices.Sort(values)
	return spread{values[len(values)/2], values[0], values[len(values)-1]}
}

// text is "median (least - most)", each in the format.
func (s spread) text(format string) string {
	return fmt.Sprintf(format+" ("+format+" - "+format+")", s.median, s.least, s.most)
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
