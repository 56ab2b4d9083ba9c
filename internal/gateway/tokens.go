package gateway

import (
	"context"
	"crypto/sha256"
	"errors"
	"net/http"
	"sync"
	"time"
)

const (
	// knownFor and refusedFor are how long a review's result is used again. The API server's own cache of tokens lasts
	// as long. A pod that is deleted is refused at once all the same: that is asked of the informer on every call.
	knownFor   = 10 * time.Second
	refusedFor = 3 * time.Second
	// mostKnown and mostRefused bound what is remembered; strangers can't push out what is known of pods.
	mostKnown, mostRefused = 1 << 14, 1 << 11
	// reviewsAtOnce bounds the reviews that are asked for at the same time.
	reviewsAtOnce = 32
)

// tokenHash stands for a token, which is never kept.
type tokenHash [sha256.Size]byte

// reviews has tokens reviewed: one token once at a time, and not again for a moment.
type reviews struct {
	ask     func(ctx context.Context, token string) (identity, error)
	now     func() time.Time
	timeout time.Duration
	count   func(result string)
	slots   chan struct{}

	mu      sync.Mutex
	flights map[tokenHash]*flight
	known   memory
	refused memory
}

// flight is a review that is under way, for all who wait for it.
type flight struct {
	done chan struct{}
	reviewed
}

// reviewed is what a review said: an identity, or a refusal.
type reviewed struct {
	who identity
	err error
}

func newReviews(ask func(context.Context, string) (identity, error), now func() time.Time, timeout time.Duration, count func(string)) *reviews {
	return &reviews{
		ask: ask, now: now, timeout: timeout, count: count,
		slots:   make(chan struct{}, reviewsAtOnce),
		flights: map[tokenHash]*flight{},
		known:   memory{age: knownFor, most: mostKnown},
		refused: memory{age: refusedFor, most: mostRefused},
	}
}

// identify says whose a token is. Before a review is made, admit may refuse it.
func (r *reviews) identify(ctx context.Context, token string, admit func() error) (identity, error) {
	key := tokenHash(sha256.Sum256([]byte(token)))
	now := r.now()
	r.mu.Lock()
	for _, m := range []*memory{&r.known, &r.refused} {
		if got, ok := m.get(key, now); ok {
			r.mu.Unlock()
			r.count("cached")
			return got.who, got.err
		}
	}
	f, flying := r.flights[key]
	r.mu.Unlock()
	if !flying {
		if err := admit(); err != nil {
			r.count("limited")
			return identity{}, err
		}
		r.mu.Lock()
		if f, flying = r.flights[key]; !flying {
			f = &flight{done: make(chan struct{}), reviewed: reviewed{err: errors.New("the review was given up")}}
			r.flights[key] = f
		}
		r.mu.Unlock()
	}
	if flying {
		select {
		case <-f.done:
			r.count("shared")
		case <-ctx.Done():
			return identity{}, ctx.Err()
		}
		return f.who, f.err
	}
	defer close(f.done)
	defer func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.flights, key)
		if m, result := r.outcome(f.err); m != nil {
			m.put(key, f.reviewed, r.now())
			r.count(result)
		} else {
			r.count(result)
		}
	}()
	// Not ctx: others wait for this review, too.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), r.timeout)
	defer cancel()
	select {
	case r.slots <- struct{}{}:
		defer func() { <-r.slots }()
		f.who, f.err = r.ask(ctx, token)
	case <-ctx.Done():
		f.err = unavailable("too many tokens are being reviewed; try again")
	}
	return f.who, f.err
}

// outcome says where a result is remembered, if it is, and how it is counted.
func (r *reviews) outcome(err error) (*memory, string) {
	e, known := errors.AsType[*refusal](err)
	switch {
	case err == nil:
		return &r.known, "valid"
	case known && e.status == http.StatusUnauthorized:
		return &r.refused, "invalid"
	}
	return nil, "failed"
}

// memory remembers results for a while. Not safe for concurrent use.
type memory struct {
	age   time.Duration
	most  int
	by    map[tokenHash]remembered
	swept time.Time
}

type remembered struct {
	reviewed
	until time.Time
}

func (m *memory) get(key tokenHash, now time.Time) (reviewed, bool) {
	got, ok := m.by[key]
	return got.reviewed, ok && now.Before(got.until)
}

func (m *memory) put(key tokenHash, what reviewed, now time.Time) {
	if m.by == nil {
		m.by = map[tokenHash]remembered{}
	}
	if len(m.by) >= m.most || now.Sub(m.swept) >= m.age {
		m.swept = now
		for k, old := range m.by {
			if !now.Before(old.until) {
				delete(m.by, k)
			}
		}
	}
	for k := range m.by {
		if len(m.by) < m.most {
			break
		}
		delete(m.by, k)
	}
	m.by[key] = remembered{what, now.Add(m.age)}
}
