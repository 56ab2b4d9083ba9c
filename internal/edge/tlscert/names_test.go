package tlscert

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mysocketio/mysocket-injector/internal/edge/store"
	"github.com/mysocketio/mysocket-injector/internal/edge/tlscert/tlscerttest"
)

// orders is an ACME that orders from a directory which answers as told, with a clock of the test's.
type orders struct {
	*ACME
	asked   atomic.Int64
	failed  atomic.Int64
	refuse  chan struct{} // the directory answers when it is closed
	mu      sync.Mutex
	now     time.Time
	allowed func(name string) bool
	away    atomic.Bool // what the certificates are kept in does not answer
}

// Blob fails as that of an etcd that is away.
func (b blobs) Blob(ctx context.Context, key string) ([]byte, error) {
	if b.away.Load() {
		return nil, fmt.Errorf("blob %s: %w", key, store.ErrUnavailable)
	}
	return b.Blobs.Blob(ctx, key)
}

type blobs struct {
	store.Blobs
	away *atomic.Bool
}

func newOrders(t *testing.T) *orders {
	t.Helper()
	o := &orders{now: time.Now(), refuse: make(chan struct{}), allowed: func(string) bool { return true }}
	directory := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		o.asked.Add(1)
		select {
		case <-o.refuse:
		case <-r.Context().Done():
		}
		http.Error(w, "no", http.StatusForbidden)
	}))
	t.Cleanup(directory.Close)
	st, err := store.Open(filepath.Join(t.TempDir(), "x.db"), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = st.Close() })
	o.ACME = NewACME(ACMEConfig{
		Directory: directory.URL, Blobs: blobs{st, &o.away}, Log: slog.New(slog.DiscardHandler), Done: func(bool) { o.failed.Add(1) },
		Allowed: func(name string) bool { o.mu.Lock(); defer o.mu.Unlock(); return o.allowed(name) },
		Now:     func() time.Time { o.mu.Lock(); defer o.mu.Unlock(); return o.now },
	})
	t.Cleanup(o.Close)
	return o
}

func (o *orders) advance(d time.Duration) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.now = o.now.Add(d)
}

// wait waits for what begin started.
func wait(t *testing.T, state *nameState) {
	t.Helper()
	if state == nil || state.working == nil {
		t.Fatal("nothing was begun")
	}
	select {
	case <-state.working:
	case <-time.After(30 * time.Second):
		t.Fatal("an order does not end")
	}
}

// until waits for a condition.
func until(t *testing.T, what string, condition func() bool) {
	t.Helper()
	deadline := time.After(30 * time.Second)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !condition() {
		select {
		case <-deadline:
			t.Fatalf("waited for: %s", what)
		case <-tick.C:
		}
	}
}

func TestFailedNamesWait(t *testing.T) {
	o := newOrders(t)
	close(o.refuse)
	const name = "a.edge.test"
	// 5 minutes after the first failure, then twice as long each time, and never more than 6 hours.
	for _, pause := range []time.Duration{5, 10, 20, 40, 80, 160, 320, 360, 360} {
		pause *= time.Minute
		wait(t, o.begin(name))
		if o.begin(name) != nil {
			t.Fatal("ordered again at once")
		}
		o.advance(pause - time.Second)
		if o.begin(name) != nil {
			t.Fatalf("ordered again within %s", pause)
		}
		o.advance(time.Second)
	}
	if n := o.failed.Load(); n != 9 {
		t.Errorf("%d failures are counted, want 9", n)
	}
}

// TestNamesWaitForTheirStateOnly: a certificate that can't be loaded since the state is away is no failure of the authority's. It is there, and must
// be shown soon after the state is back.
func TestNamesWaitForTheirStateOnly(t *testing.T) {
	o := newOrders(t)
	close(o.refuse)
	const name = "a.edge.test"
	o.away.Store(true)
	for range 3 {
		wait(t, o.begin(name))
		if o.begin(name) != nil {
			t.Fatal("tried again at once")
		}
		o.advance(stateRetry)
	}
	if n := o.asked.Load(); n != 0 {
		t.Errorf("the authority was asked %d times", n)
	}
	o.away.Store(false)
	wait(t, o.begin(name))
	if o.asked.Load() == 0 {
		t.Error("nothing was ordered when the state was back")
	}
	o.advance(firstRetry - time.Second)
	if o.begin(name) != nil {
		t.Error("a failure of the authority's does not count as the first")
	}
	o.advance(time.Second)
	wait(t, o.begin(name))
}

func TestOrdersAreBounded(t *testing.T) {
	o := newOrders(t)
	begun := make([]*nameState, 0, maxOrders)
	for i := range maxOrders {
		begun = append(begun, o.begin(fmt.Sprintf("name-%d.edge.test", i)))
	}
	until(t, "the orders begin", func() bool { return len(o.orders) == maxOrders })
	wait(t, o.begin("one-more.edge.test"))
	if o.cached("one-more.edge.test") != nil {
		t.Error("a certificate from nowhere")
	}
	// It need not wait as a failed one does.
	close(o.refuse)
	for _, state := range begun {
		wait(t, state)
	}
	wait(t, o.begin("one-more.edge.test"))
}

func TestNamesThatAreGone(t *testing.T) {
	o := newOrders(t)
	close(o.refuse)
	wait(t, o.begin("a.edge.test"))
	wait(t, o.begin("b.edge.test"))
	o.mu.Lock()
	o.allowed = func(name string) bool { return name == "b.edge.test" }
	o.mu.Unlock()
	o.forgetGone()
	if len(o.names) != 1 || o.names["b.edge.test"] == nil {
		t.Errorf("%d names are known", len(o.names))
	}
	asked := o.asked.Load()
	if o.begin("a.edge.test") != nil || o.begin("stranger.test") != nil || o.asked.Load() != asked {
		t.Error("an order for a name that is not allowed")
	}
}

// An order that hangs does not hold the edge up when it stops.
func TestCloseEndsOrders(t *testing.T) {
	o := newOrders(t)
	state := o.begin("a.edge.test")
	until(t, "the authority is asked", func() bool { return o.asked.Load() > 0 })
	closed := make(chan struct{})
	go func() { o.stop(); o.wg.Wait(); close(closed) }()
	select {
	case <-closed:
	case <-time.After(30 * time.Second):
		t.Fatal("still waiting for an order")
	}
	wait(t, state)
	if o.failed.Load() != 0 {
		t.Error("the end of the edge counts as a failure")
	}
}

func TestChallengesOfStrangers(t *testing.T) {
	o := newOrders(t)
	close(o.refuse)
	o.allowed = func(name string) bool { return name == "a.edge.test" }
	own := tlscerttest.New(t)
	certPEM, keyPEM := own.Issue(time.Hour, "*.edge.test")
	cert, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		t.Fatal(err)
	}
	source := &Source{Own: fixed{&cert}, ACME: o.ACME}
	ln, err := tls.Listen("tcp", "127.0.0.1:0", source.Config())
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			_ = conn.(*tls.Conn).HandshakeContext(t.Context())
			_ = conn.Close()
		}
	})
	t.Cleanup(func() { _ = ln.Close(); serving.Wait() })
	for _, c := range []struct{ name, protocol, err string }{
		{"a.edge.test", "acme-tls/1", "remote error: tls: internal error"}, // no challenge is under way
		{"b.edge.test", "acme-tls/1", "remote error: tls: unrecognized name"},
		{"b.edge.test", "", "<nil>"},
	} {
		config := &tls.Config{ServerName: c.name, RootCAs: own.Pool, MinVersion: tls.VersionTLS12}
		if c.protocol != "" {
			config.NextProtos = []string{c.protocol}
		}
		conn, err := tls.Dial("tcp", ln.Addr().String(), config)
		if err == nil {
			_ = conn.Close()
		}
		if fmt.Sprint(err) != c.err {
			t.Errorf("%s with %q: %v, want %s", c.name, c.protocol, err, c.err)
		}
	}
}

// fixed is the edge's own certificate.
type fixed struct{ cert *tls.Certificate }

func (f fixed) GetCertificate(*tls.ClientHelloInfo) (*tls.Certificate, error) { return f.cert, nil }

func TestChallengePathsOfOthers(t *testing.T) {
	o := newOrders(t)
	close(o.refuse)
	o.allowed = func(name string) bool { return name == "a.edge.test" }
	handler := o.Handler(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusTeapot) }))
	// No order of ours is under way: an app's own may be.
	for _, host := range []string{"a.edge.test", "A.edge.test:80", "b.edge.test", "", "[::1]:80"} {
		r := httptest.NewRequestWithContext(t.Context(), "GET", "/.well-known/acme-challenge/x_-Y", nil)
		r.Host = host
		w := httptest.NewRecorder()
		handler.ServeHTTP(w, r)
		if w.Code != http.StatusTeapot {
			t.Errorf("%s: %d %s", host, w.Code, w.Body)
		}
	}
}
