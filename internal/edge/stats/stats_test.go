package stats

import (
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"
)

// clock is moved by the test.
type clock struct{ at time.Time }

func (c *clock) now() time.Time { return c.at }

func within(got, want, tolerance float64) bool {
	return got >= want*(1-tolerance) && got <= want*(1+tolerance)
}

func TestTheLastMinute(t *testing.T) {
	c := &clock{time.Unix(1_000_000_000, 0)}
	s := New(c.now)
	c.at = c.at.Add(time.Hour)
	for second := range 120 {
		for i := range 10 {
			s.Record("a", i == 0 && second >= 60, 20*time.Millisecond)
		}
		s.Record("b", false, -1)
		c.at = c.at.Add(time.Second)
	}
	a := s.Of("a")
	if !within(a.Rate, 10, 0.01) || !within(a.FailureShare(), 0.1, 0.01) || a.Requests < 550 || a.Requests > 600 {
		t.Errorf("a: %+v", a)
	}
	if !slices.Equal(a.Counts, slices.Repeat([]uint32{50}, slots-1)) {
		t.Errorf("a: %v", a.Counts)
	}
	if !within(float64(a.Median), float64(20*time.Millisecond), 0.3) || !within(float64(a.P99), float64(20*time.Millisecond), 0.3) {
		t.Errorf("a: median %s, p99 %s", a.Median, a.P99)
	}
	if b := s.Of("b"); !within(b.Rate, 1, 0.01) || b.Failures != 0 || b.Median != 0 || b.P99 != 0 {
		t.Errorf("b: %+v", b)
	}
	if all := s.Total(); !within(all.Rate, 11, 0.01) {
		t.Errorf("all: %+v", all)
	}
	c.at = c.at.Add(time.Minute)
	if a := s.Of("a"); a.Requests != 0 || a.Rate != 0 || a.FailureShare() != 0 || a.P99 != 0 {
		t.Errorf("a minute later: %+v", a)
	}
	if none := s.Of("none"); none.Requests != 0 || len(none.Counts) != slots-1 {
		t.Errorf("of none: %+v", none)
	}
}

func TestRateOfAnEdgeThatHasJustStarted(t *testing.T) {
	c := &clock{time.Unix(1_000_000_003, 0)}
	s := New(c.now)
	for range 100 {
		s.Record("a", false, 0)
	}
	if a := s.Of("a"); a.Rate != 100 {
		t.Errorf("at once: %v", a.Rate)
	}
	c.at = c.at.Add(10 * time.Second)
	if a := s.Of("a"); a.Rate != 10 {
		t.Errorf("after 10 s: %v", a.Rate)
	}
}

func TestQuantiles(t *testing.T) {
	for _, c := range []struct {
		name        string
		times       []time.Duration
		median, p99 time.Duration
	}{
		{"one", []time.Duration{time.Second}, time.Second, time.Second},
		{"a slow one of a hundred", append(slices.Repeat([]time.Duration{10 * time.Millisecond}, 98), time.Second, time.Second), 10 * time.Millisecond, time.Second},
		{"longer than can be told", []time.Duration{time.Hour}, 113 * time.Second, 113 * time.Second},
		{"even", func() (all []time.Duration) {
			for i := range 1000 {
				all = append(all, time.Duration(i)*time.Millisecond)
			}
			return all
		}(), 500 * time.Millisecond, 990 * time.Millisecond},
	} {
		s := New(nil)
		for _, took := range c.times {
			s.Record("a", false, took)
		}
		a := s.Of("a")
		if !within(float64(a.Median), float64(c.median), 0.3) || !within(float64(a.P99), float64(c.p99), 0.3) {
			t.Errorf("%s: median %s, p99 %s; want about %s, %s", c.name, a.Median, a.P99, c.median, c.p99)
		}
	}
	for i := range buckets {
		if got := bucketOf(time.Duration(upperBound(i))); got != i {
			t.Errorf("the bound of bucket %d is in %d", i, got)
		}
	}
	if bucketOf(0) != 0 {
		t.Error("no time is not in the first bucket")
	}
}

func TestIdleSocketsAreForgotten(t *testing.T) {
	c := &clock{time.Unix(1_000_000_000, 0)}
	s := New(c.now)
	for i := range 1000 {
		s.Record(fmt.Sprint(i), false, 0)
	}
	c.at = c.at.Add(30 * time.Second)
	s.Record("busy", false, 0)
	c.at = c.at.Add(40 * time.Second)
	s.Record("new", false, 0)
	if len(s.sockets) != 2 {
		t.Errorf("%d sockets are known", len(s.sockets))
	}
}

func TestConcurrency(t *testing.T) {
	s := New(nil)
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for i := range 1000 {
				s.Record(fmt.Sprint(i%10), false, time.Millisecond)
				s.Of("1")
			}
		})
	}
	all.Wait()
	if n := s.Total().Requests; n != 8000 {
		t.Errorf("%d requests", n)
	}
}

func BenchmarkRecord(b *testing.B) {
	s := New(nil)
	for b.Loop() {
		s.Record("a", false, 20*time.Millisecond)
	}
}
