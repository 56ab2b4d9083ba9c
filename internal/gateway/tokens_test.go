package gateway

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/mysocketio/mysocket-injector/internal/gatewayapi"
)

// reviewer is a review that a test controls.
type reviewer struct {
	*reviews
	clock   *clock
	asked   []string
	counted map[string]int
	mu      sync.Mutex
}

// newReviewer knows every token but those that begin with "no" (refused) and "down" (the API server does not answer).
func newReviewer(wait func(context.Context)) *reviewer {
	r := &reviewer{clock: &clock{at: time.Unix(1000, 0)}, counted: map[string]int{}}
	r.reviews = newReviews(func(ctx context.Context, token string) (identity, error) {
		r.mu.Lock()
		r.asked = append(r.asked, token)
		r.mu.Unlock()
		if wait != nil {
			wait(ctx)
		}
		switch token[:2] {
		case "no":
			return identity{}, refuse(http.StatusUnauthorized, gatewayapi.ReasonUnauthenticated, "no")
		case "do":
			return identity{}, unavailable("down")
		}
		return identity{pod: token}, nil
	}, r.clock.now, time.Minute, func(result string) {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.counted[result]++
	})
	return r
}

func anyone() error { return nil }

func TestReviewsAreRememberedBriefly(t *testing.T) {
	r := newReviewer(nil)
	for _, step := range []struct {
		after time.Duration
		token string
		asked int // in all
	}{
		{0, "web", 1}, {0, "web", 1}, {knownFor - 1, "web", 1}, {1, "web", 2},
		{0, "nobody", 3}, {refusedFor - 1, "nobody", 3}, {1, "nobody", 4},
		{0, "down", 5}, {0, "down", 6}, // an API server that does not answer says nothing about the token
	} {
		r.clock.advance(step.after)
		who, err := r.identify(t.Context(), step.token, anyone)
		if (err == nil) != (step.token == "web") || (err == nil) != (who.pod == "web") {
			t.Errorf("%s: %v, %v", step.token, who, err)
		}
		if len(r.asked) != step.asked {
			t.Errorf("%+v: asked %d times", step, len(r.asked))
		}
	}
	if got := fmt.Sprint(r.counted); got != "map[cached:3 failed:2 invalid:2 valid:2]" {
		t.Error(got)
	}
	// A limit holds for what is not known, and only for that.
	no := errors.New("limited")
	if _, err := r.identify(t.Context(), "new", func() error { return no }); !errors.Is(err, no) {
		t.Error(err)
	}
	_, _ = r.identify(t.Context(), "web", anyone)
	if _, err := r.identify(t.Context(), "web", func() error { return no }); err != nil {
		t.Error(err)
	}
}

func TestReviewsRememberedAreBounded(t *testing.T) {
	r := newReviewer(nil)
	_, _ = r.identify(t.Context(), "web", anyone)
	for n := range mostRefused + 100 {
		_, _ = r.identify(t.Context(), fmt.Sprint("no", n), anyone)
	}
	if len(r.refused.by) != mostRefused {
		t.Errorf("%d refusals are remembered", len(r.refused.by))
	}
	before := len(r.asked)
	_, _ = r.identify(t.Context(), "web", anyone)
	if len(r.asked) != before {
		t.Error("strangers pushed out what is known of a pod")
	}
	for n := range mostKnown + 100 {
		_, _ = r.identify(t.Context(), fmt.Sprint("web", n), anyone)
	}
	if len(r.known.by) != mostKnown {
		t.Errorf("%d pods are remembered", len(r.known.by))
	}
	r.clock.advance(knownFor)
	_, _ = r.identify(t.Context(), "web", anyone)
	if len(r.known.by) != 1 {
		t.Errorf("%d are remembered after their time", len(r.known.by))
	}
	if len(r.flights) != 0 {
		t.Errorf("%d reviews are under way", len(r.flights))
	}
}

// TestOneReviewForAll has many ask about one token at once; the first of them hangs up.
func TestOneReviewForAll(t *testing.T) {
	started, answer := make(chan struct{}), make(chan struct{})
	r := newReviewer(func(ctx context.Context) {
		close(started)
		select {
		case <-answer:
		case <-ctx.Done():
			t.Error("the review ended with its first caller")
		}
	})
	ctx, cancel := context.WithCancel(t.Context())
	results := make(chan error, 11)
	ask := func(ctx context.Context) {
		who, err := r.identify(ctx, "web", anyone)
		if err == nil && who.pod != "web" {
			err = fmt.Errorf("got %v", who)
		}
		results <- err
	}
	go ask(ctx)
	<-started
	for range 10 {
		go ask(t.Context())
	}
	impatient, give := context.WithCancel(t.Context())
	give()
	if _, err := r.identify(impatient, "web", anyone); !errors.Is(err, context.Canceled) {
		t.Errorf("who has no time waits: %v", err)
	}
	cancel()
	close(answer)
	for range 11 {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
	if len(r.asked) != 1 {
		t.Errorf("asked %q", r.asked)
	}
}

// TestReviewsAtOnceAreBounded has more tokens come than are reviewed at the same time.
func TestReviewsAtOnceAreBounded(t *testing.T) {
	const all = 3 * reviewsAtOnce
	arrived, answer := make(chan struct{}, all), make(chan struct{})
	r := newReviewer(func(context.Context) {
		arrived <- struct{}{}
		<-answer
	})
	results := make(chan error, all)
	for n := range all {
		go func() {
			_, err := r.identify(t.Context(), fmt.Sprint("web", n), anyone)
			results <- err
		}()
	}
	for range reviewsAtOnce {
		<-arrived
	}
	waitFor(t, "all to ask", func() bool {
		r.reviews.mu.Lock()
		defer r.reviews.mu.Unlock()
		return len(r.flights) == all
	})
	if len(arrived) != 0 || len(r.slots) != reviewsAtOnce {
		t.Errorf("%d too many, %d slots taken", len(arrived), len(r.slots))
	}
	close(answer)
	for range all {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
}

// FuzzReviews: no token is ever taken for another, whatever is remembered.
func FuzzReviews(f *testing.F) {
	f.Add("web", "nobody", uint16(1))
	f.Add("web", "web ", uint16(20000))
	f.Fuzz(func(t *testing.T, one, two string, after uint16) {
		if len(one) < 2 || len(two) < 2 {
			return
		}
		r := newReviewer(nil)
		for _, token := range []string{one, two, one, two} {
			who, err := r.identify(t.Context(), token, anyone)
			if err == nil && who.pod != token || (err == nil) == (token[:2] == "no" || token[:2] == "do") {
				t.Fatalf("%q is %v, %v", token, who, err)
			}
			r.clock.advance(time.Duration(after) * time.Millisecond)
		}
	})
}

// TestReviewsHaveAClientOfTheirOwn, if there is one.
func TestReviewsHaveAClientOfTheirOwn(t *testing.T) {
	c, reviewing := newMemoryCluster(), newMemoryCluster()
	token := c.pod("web-1")
	s := c.serve(t, nil)
	s.dial(t).stream(token)
	s.Reviews = reviewing
	s.dial(t).stream(c.pod("web-2"))
	if c.reviews.Load() != 1 || reviewing.reviews.Load() != 1 {
		t.Errorf("%d and %d reviews", c.reviews.Load(), reviewing.reviews.Load())
	}
}
