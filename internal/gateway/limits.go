package gateway

import (
	"math"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/mysocketio/mysocket-injector/internal/gatewayapi"
)

// limits are the numbers that keep strangers and sidecars that run wild in bounds. Tests make some of them smaller.
type limits struct {
	// header bounds a TLS handshake, and the header of a request.
	header time.Duration
	// greeting bounds the time from a connection's first byte to its first valid token.
	greeting time.Duration
	// review bounds one token review.
	review time.Duration
	// request bounds everything but the assignment stream. A registration makes up to four calls to the Mysocket API.
	request time.Duration
	// idle is how long a connection may wait for its next request.
	idle time.Duration
	// write bounds one write on an assignment stream, so that a peer that reads nothing is let go.
	write time.Duration
	// heartbeat is how often an empty line is written on an assignment stream.
	heartbeat time.Duration
	// streamAge ends a stream so that its token is reviewed again; the projected token lives an hour.
	streamAge time.Duration

	// connections are those that may be open at once, streams included.
	connections int
	// strangers are the connections that may be open without having shown a valid token yet, all together and from
	// one address.
	strangers, strangersOfSource int
	// connectionsOfPod are kept open for one pod between its requests. A pod with many sockets may use more at once.
	connectionsOfPod int
}

func defaultLimits() limits {
	return limits{
		header:            10 * time.Second,
		greeting:          30 * time.Second,
		review:            10 * time.Second,
		request:           30 * time.Second,
		idle:              2 * time.Minute,
		write:             10 * time.Second,
		heartbeat:         gatewayapi.Heartbeat,
		streamAge:         30 * time.Minute,
		connections:       16384,
		strangers:         1024,
		strangersOfSource: 128,
		connectionsOfPod:  16,
	}
}

// answer bounds the time from a request's header to the end of its answer: a review, the work, and writing it.
func (l *limits) answer() time.Duration { return l.review + l.request + l.write }

// kind is what a pod's requests are counted as.
type kind string

const (
	kindStream   kind = "pod_streams"
	kindRegister kind = "pod_registrations" // and renewals: they ask the Mysocket API
	kindReport   kind = "pod_reports"       // and withdrawals: they ask the API server
)

// allowances are what one pod may do: at once, and every second after that. A pod starts with up to
// gatewayapi.MaxAssignments sockets, each with a registration for each connection and a few reports. One that has them all,
// with all connections, takes a minute longer.
func allowances(now func() time.Time) map[kind]*buckets[string] {
	const pods = 1 << 16
	return map[kind]*buckets[string]{
		kindStream:   newBuckets[string](0.5, 16, pods, now),
		kindRegister: newBuckets[string](2, 2*gatewayapi.MaxAssignments, pods, now),
		kindReport:   newBuckets[string](10, 8*gatewayapi.MaxAssignments, pods, now),
	}
}

// strangerAllowance is how often one address may fail to show a valid token.
func strangerAllowance(now func() time.Time) *buckets[source] {
	return newBuckets[source](2, 64, 4096, now)
}

// buckets are token buckets by key. A bucket that has filled up again is the same as none and is forgotten, so a pod or
// an address that is gone leaves nothing behind.
type buckets[K comparable] struct {
	rate  rate.Limit // tokens a second
	burst int
	most  int // buckets; beyond it any one is forgotten
	now   func() time.Time

	mu    sync.Mutex
	by    map[K]*rate.Limiter
	swept time.Time
}

func newBuckets[K comparable](perSecond rate.Limit, burst, most int, now func() time.Time) *buckets[K] {
	return &buckets[K]{rate: perSecond, burst: burst, most: most, now: now, by: map[K]*rate.Limiter{}, swept: now()}
}

// take takes a token and returns zero, or says how long it is until there is one.
func (b *buckets[K]) take(key K) time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := b.now()
	l := b.by[key]
	if l == nil {
		b.makeRoom(now)
		l = rate.NewLimiter(b.rate, b.burst)
		b.by[key] = l
	}
	if l.AllowN(now, 1) {
		return 0
	}
	return b.missing(l, now)
}

// wait is take without taking.
func (b *buckets[K]) wait(key K) time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	l := b.by[key]
	if l == nil {
		return 0
	}
	return b.missing(l, b.now())
}

func (b *buckets[K]) missing(l *rate.Limiter, now time.Time) time.Duration {
	missing := 1 - l.TokensAt(now)
	if missing <= 0 {
		return 0
	}
	return time.Duration(math.Ceil(missing / float64(b.rate) * float64(time.Second)))
}

func (b *buckets[K]) makeRoom(now time.Time) {
	full := time.Duration(float64(b.burst) / float64(b.rate) * float64(time.Second))
	if len(b.by) >= b.most || now.Sub(b.swept) >= full {
		b.swept = now
		for key, l := range b.by {
			if l.TokensAt(now) >= float64(b.burst) {
				delete(b.by, key)
			}
		}
	}
	for key := range b.by {
		if len(b.by) < b.most {
			break
		}
		delete(b.by, key)
	}
}
