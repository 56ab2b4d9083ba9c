package gateway

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/mysocketio/mysocket-injector/internal/annotations"
	"github.com/mysocketio/mysocket-injector/internal/gatewayapi"
	"github.com/mysocketio/mysocket-injector/internal/kubetest"
)

// waitFor waits until a condition holds.
func waitFor(t testing.TB, what string, holds func() bool) {
	t.Helper()
	deadline := time.After(kubetest.Patience)
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !holds() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

// value reads a counter or a gauge.
func value(t testing.TB, c prometheus.Collector) float64 {
	t.Helper()
	registry := prometheus.NewRegistry()
	registry.MustRegister(c)
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	m := families[0].GetMetric()[0]
	return m.GetCounter().GetValue() + m.GetGauge().GetValue()
}

// TestSlowClients: nobody can hold a connection by being slow, neither before nor after showing a token.
func TestSlowClients(t *testing.T) {
	const short = 150 * time.Millisecond
	for name, tc := range map[string]struct {
		limit func(*limits)
		act   func(t *testing.T, s *memoryServer, token string)
	}{
		"no TLS handshake": {func(l *limits) { l.header = short }, func(t *testing.T, s *memoryServer, _ string) {
			s.dialTCP(t).closed()
		}},
		"half a TLS handshake": {func(l *limits) { l.header = short }, func(t *testing.T, s *memoryServer, _ string) {
			p := s.dialTCP(t)
			p.send("\x16\x03\x01\x02\x00\x01")
			p.closed()
		}},
		"no header": {func(l *limits) { l.greeting = short }, func(t *testing.T, s *memoryServer, _ string) {
			s.dial(t).closed()
		}},
		"half a header": {func(l *limits) { l.header = short }, func(t *testing.T, s *memoryServer, token string) {
			p := s.dial(t)
			p.send("GET " + gatewayapi.AssignmentsPath + " HTTP/1.1\r\nHost: gateway\r\nAuthorization: Bearer " + token + "\r\nX-Slow: ")
			p.closed()
		}},
		"half a header of a second request": {func(l *limits) { l.header = short }, func(t *testing.T, s *memoryServer, token string) {
			p := s.dial(t)
			p.request("PUT", memorySocket+"/status", token, "{}")
			p.answer()
			p.send("GET ")
			p.closed()
		}},
		"half a body": {func(l *limits) { l.request = short }, func(t *testing.T, s *memoryServer, token string) {
			p := s.dial(t)
			p.send("PUT " + memorySocket + "/status HTTP/1.1\r\nHost: gateway\r\nAuthorization: Bearer " + token + "\r\nContent-Length: 100\r\n\r\n{")
			if r := p.answer(); r.StatusCode != http.StatusBadRequest {
				t.Errorf("answer %s", r.Status)
			}
			p.closed()
		}},
		"half a body that nobody reads": {func(l *limits) { l.request = short }, func(t *testing.T, s *memoryServer, token string) {
			p := s.dial(t)
			p.send("DELETE " + memorySocket + "/tunnels/" + worldUID + " HTTP/1.1\r\nHost: gateway\r\nAuthorization: Bearer " + token + "\r\nContent-Length: 100\r\n\r\n{")
			p.answer()
			p.closed()
		}},
		"a body of a stranger": {func(l *limits) { l.greeting = short }, func(t *testing.T, s *memoryServer, _ string) {
			p := s.dial(t)
			p.send("PUT " + memorySocket + "/status HTTP/1.1\r\nHost: gateway\r\nContent-Length: 100\r\n\r\n{")
			p.closed()
		}},
		"a second request of a stranger": {nil, func(t *testing.T, s *memoryServer, _ string) {
			p := s.dial(t)
			p.request("PUT", memorySocket+"/status", "x", "{}")
			if r := p.answer(); r.StatusCode != http.StatusUnauthorized || !r.Close {
				t.Errorf("answer %s, close %v", r.Status, r.Close)
			}
			p.closed()
		}},
		"paths that are none, again and again": {func(l *limits) { l.greeting = short }, func(t *testing.T, s *memoryServer, _ string) {
			p := s.dial(t)
			p.send("GET / HTTP/1.1\r\nHost: gateway\r\n\r\n")
			if r := p.answer(); r.StatusCode != http.StatusNotFound {
				t.Errorf("answer %s", r.Status)
			}
			p.closed()
		}},
		"no second request": {func(l *limits) { l.idle = short }, func(t *testing.T, s *memoryServer, token string) {
			p := s.dial(t)
			p.request("PUT", memorySocket+"/status", token, "{}")
			p.answer()
			p.closed()
		}},
		"a header too long": {nil, func(t *testing.T, s *memoryServer, token string) {
			p := s.dial(t)
			p.send("GET / HTTP/1.1\r\nHost: gateway\r\nX-Long: " + strings.Repeat("x", 32<<10))
			p.closed()
		}},
		"answers that nobody reads": {func(l *limits) { l.write, l.review, l.request = short, short, short }, func(t *testing.T, s *memoryServer, token string) {
			p := s.dial(t)
			request := fmt.Sprintf("PUT %s/status HTTP/1.1\r\nHost: gateway\r\nAuthorization: Bearer %s\r\nContent-Length: 2\r\n\r\n{}", memorySocket, token)
			for {
				if _, err := p.Write([]byte(strings.Repeat(request, 100))); err != nil {
					return // it was closed
				}
			}
		}},
		"a stream that nobody reads": {func(l *limits) { l.write = short }, func(t *testing.T, s *memoryServer, token string) {
			for n := range gatewayapi.MaxAssignments {
				s.cluster.service(n, "web", 80)
				s.cluster.mu.Lock()
				s.cluster.services["shop"][n].Annotations[annotations.URL] = strings.Repeat("u", maxURL)
				s.cluster.mu.Unlock()
			}
			s.dial(t).stream(token)
			port := int32(1)
			waitFor(t, "the stream to be let go", func() bool {
				s.cluster.service(0, "web", port)
				port = port%60000 + 1
				return value(t, s.metrics.streamsEnded.WithLabelValues("write")) == 1
			})
		}},
	} {
		t.Run(name, func(t *testing.T) {
			c := newMemoryCluster()
			token := c.pod("web-1")
			s := c.serve(t, tc.limit)
			tc.act(t, s, token)
			waitFor(t, "its connection to be forgotten", func() bool { return value(t, s.metrics.connections) == 0 })
		})
	}
}

// TestStrangers: who shows no valid token gets few connections, and pods theirs all the same.
func TestStrangers(t *testing.T) {
	c := newMemoryCluster()
	token := c.pod("web-1")
	s := c.serve(t, func(l *limits) { l.strangersOfSource, l.connections = 3, 8 })
	opened := s.dial(t)
	opened.stream(token)
	var strangers []*peer
	for range 3 {
		strangers = append(strangers, s.dial(t))
	}
	s.dialTCP(t).closed()
	if n := value(t, s.metrics.connectionsRefused.WithLabelValues("source_unauthenticated")); n != 1 {
		t.Errorf("%v refused", n)
	}
	c.service(0, "web", 80)
	opened.line()
	_ = strangers[0].Close()
	waitFor(t, "the stranger to be forgotten", func() bool { return value(t, s.metrics.connections) == 3 })
	// Having shown a token they are none any more, and others may come; but there is a limit for all.
	for n := 3; n < 8; n++ {
		s.dial(t).stream(c.pod(fmt.Sprint("web-", n)))
	}
	s.dialTCP(t).closed()
	if n := value(t, s.metrics.connectionsRefused.WithLabelValues("open")); n != 1 {
		t.Errorf("%v refused", n)
	}
}

// TestStrangersWaitInLine: when there are too many, the next is let in when one has gone.
func TestStrangersWaitInLine(t *testing.T) {
	c := newMemoryCluster()
	token := c.pod("web-1")
	s := c.serve(t, func(l *limits) { l.strangers = 1; l.greeting = 200 * time.Millisecond })
	s.dial(t) // says nothing
	s.dial(t).stream(token)
	if n := value(t, s.metrics.connectionsRefused.WithLabelValues("source_unauthenticated")); n != 0 {
		t.Errorf("%v refused", n)
	}
}

// TestFailingSource: an address that shows many wrong tokens gets no more reviews for a while; tokens that are known stay good.
func TestFailingSource(t *testing.T) {
	c := newMemoryCluster()
	token := c.pod("web-1")
	at := &clock{at: time.Now()}
	c.now = at.now
	s := c.serve(t, nil)
	known := s.dial(t)
	report := func() *http.Response {
		known.request("PUT", memorySocket+"/status", token, "{}")
		return known.answer()
	}
	if r := report(); r.StatusCode != http.StatusBadRequest {
		t.Fatal(r.Status)
	}
	c.reviews.Store(0)
	for n := range 64 {
		p := s.dial(t)
		p.request("PUT", memorySocket+"/status", fmt.Sprint("wrong", n), "{}")
		if r := p.answer(); r.StatusCode != http.StatusUnauthorized {
			t.Fatalf("%d: %s", n, r.Status)
		}
		p.closed()
		waitFor(t, "the connection to be forgotten", func() bool { return value(t, s.metrics.connections) == 1 })
	}
	s.dialTCP(t).closed()
	if n := value(t, s.metrics.connectionsRefused.WithLabelValues("source_failed")); n != 1 {
		t.Errorf("%v connections refused", n)
	}
	if r := report(); r.StatusCode != http.StatusBadRequest {
		t.Errorf("a pod that is known gets %s", r.Status)
	}
	known.request("PUT", memorySocket+"/status", "another", "{}")
	if r := known.answer(); r.StatusCode != http.StatusTooManyRequests || r.Header.Get("Retry-After") != "1" || c.reviews.Load() != 64 {
		t.Errorf("answer %s, Retry-After %q, %d reviews", r.Status, r.Header.Get("Retry-After"), c.reviews.Load())
	}
	at.advance(time.Second)
	s.dial(t).stream(token)
}

// TestConnectionsOfAPod: a pod may open more, but they are closed after their request.
func TestConnectionsOfAPod(t *testing.T) {
	c := newMemoryCluster()
	token, other := c.pod("web-1"), c.pod("web-2")
	s := c.serve(t, func(l *limits) { l.connectionsOfPod = 2 })
	ask := func(token string) (*peer, bool) {
		p := s.dial(t)
		p.request("PUT", memorySocket+"/status", token, "{}")
		r := p.answer()
		if r.StatusCode != http.StatusBadRequest {
			t.Errorf("answer %s", r.Status)
		}
		return p, r.Close
	}
	first, closes := ask(token)
	if _, second := ask(token); closes || second {
		t.Error("closed though there are few")
	}
	third, closes := ask(token)
	if !closes {
		t.Error("stays open though there are many")
	}
	third.closed()
	if _, closes := ask(other); closes {
		t.Error("one pod pays for another")
	}
	_ = first.Close()
	waitFor(t, "the first to be forgotten", func() bool { return value(t, s.metrics.connections) == 2 })
	if _, closes := ask(token); closes {
		t.Error("one that is gone still counts")
	}
}
