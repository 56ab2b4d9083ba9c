// Package stats knows how the requests and connections of each socket fared over the last minute, for the status page. What it keeps is
// bounded: some 2.5 KiB for a socket that was asked within that minute, and nothing for others. It must not know what a request is.
//
// Metrics for longer than a minute are Prometheus's business; a socket's id in its labels would not be bounded.
package stats

import (
	"math"
	"sync"
	"time"
)

const (
	slotLength = 5 * time.Second
	// slots are a minute, the one that is being filled included.
	slots = 12

	// Times are counted in buckets that grow by 30 %, from half a millisecond to about two minutes.
	buckets = 48
	first   = 500 * time.Microsecond
	growth  = 1.3
)

// Stats is safe for concurrent use. Make it with New.
type Stats struct {
	now     func() time.Time
	started time.Time
	total   series

	mu      sync.RWMutex
	sockets map[string]*series
	swept   int64 // the slot in which idle sockets were last forgotten
}

// New begins to count. now may be nil.
func New(now func() time.Time) *Stats {
	if now == nil {
		now = time.Now
	}
	return &Stats{now: now, started: now(), sockets: map[string]*series{}}
}

// series is what was counted for one socket.
type series struct {
	mu    sync.Mutex
	slots [slots]slot
}

type slot struct {
	number   int64 // of the slot since 1970; another one's content is old
	requests uint32
	failures uint32
	times    [buckets]uint32
}

// Summary is how a socket fared over the last minute.
type Summary struct {
	// Rate is in requests per second.
	Rate     float64
	Requests uint64
	Failures uint64
	// Median and P99 are the times that half and 99 of 100 took at most; zero when no times are known.
	Median, P99 time.Duration
	// Counts are the requests of the slots of 5 seconds that are over, oldest first.
	Counts []uint32
}

// FailureShare is between 0 and 1.
func (s Summary) FailureShare() float64 {
	if s.Requests == 0 {
		return 0
	}
	return float64(s.Failures) / float64(s.Requests)
}

func slotOf(t time.Time) int64 { return t.UnixNano() / int64(slotLength) }

// Record counts a request or connection of a socket; without a Stats it does nothing. A negative time is not counted: not everything that takes long is slow.
func (s *Stats) Record(socketID string, failed bool, took time.Duration) {
	if s == nil {
		return
	}
	at := slotOf(s.now())
	s.mu.RLock()
	one := s.sockets[socketID]
	s.mu.RUnlock()
	if one == nil {
		one = s.add(socketID, at)
	}
	one.record(at, failed, took)
	s.total.record(at, failed, took)
}

// add makes a socket known, and forgets those that were not asked for a minute.
func (s *Stats) add(socketID string, at int64) *series {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.swept != at {
		s.swept = at
		for id, other := range s.sockets {
			if other.idle(at) {
				delete(s.sockets, id)
			}
		}
	}
	one := s.sockets[socketID]
	if one == nil {
		one = &series{}
		s.sockets[socketID] = one
	}
	return one
}

func (s *series) record(at int64, failed bool, took time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := &s.slots[at%slots]
	if now.number != at {
		*now = slot{number: at}
	}
	now.requests++
	if failed {
		now.failures++
	}
	if took >= 0 {
		now.times[bucketOf(took)]++
	}
}

func (s *series) idle(at int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range s.slots {
		if s.slots[i].number > at-slots {
			return false
		}
	}
	return true
}

// bucketOf returns the bucket whose upper bound is the first that is not below the time.
func bucketOf(took time.Duration) int {
	if took <= first {
		return 0
	}
	return min(buckets-1, int(math.Ceil(math.Log(float64(took)/float64(first))/math.Log(growth)-1e-9)))
}

func upperBound(bucket int) float64 { return float64(first) * math.Pow(growth, float64(bucket)) }

// Of is how a socket fared.
func (s *Stats) Of(socketID string) Summary {
	s.mu.RLock()
	one := s.sockets[socketID]
	s.mu.RUnlock()
	if one == nil {
		return Summary{Counts: make([]uint32, slots-1)}
	}
	return one.summary(s.now(), s.started)
}

// Total is how all sockets together fared.
func (s *Stats) Total() Summary { return s.total.summary(s.now(), s.started) }

func (s *series) summary(now, started time.Time) Summary {
	at := slotOf(now)
	out := Summary{Counts: make([]uint32, slots-1)}
	var times [buckets]uint64
	s.mu.Lock()
	for age := range int64(slots) {
		number := at - age
		one := &s.slots[number%slots]
		if one.number != number {
			continue
		}
		out.Requests += uint64(one.requests)
		out.Failures += uint64(one.failures)
		for i, n := range one.times {
			times[i] += uint64(n)
		}
		if age > 0 {
			out.Counts[slots-1-age] = one.requests
		}
	}
	s.mu.Unlock()
	begin := time.Unix(0, (at-slots+1)*int64(slotLength))
	if started.After(begin) {
		begin = started
	}
	out.Rate = float64(out.Requests) / max(1, now.Sub(begin).Seconds())
	out.Median, out.P99 = quantile(&times, 0.5), quantile(&times, 0.99)
	return out
}

// quantile finds the bucket of a share of all times, and the place in it as if they were spread evenly there.
func quantile(times *[buckets]uint64, share float64) time.Duration {
	total := uint64(0)
	for _, n := range times {
		total += n
	}
	if total == 0 {
		return 0
	}
	rank := share * float64(total)
	below := 0.0
	for i, n := range times {
		if n == 0 || below+float64(n) < rank {
			below += float64(n)
			continue
		}
		low := 0.0
		if i > 0 {
			low = upperBound(i - 1)
		}
		return time.Duration(low + (upperBound(i)-low)*(rank-below)/float64(n))
	}
	return time.Duration(upperBound(buckets - 1))
}
