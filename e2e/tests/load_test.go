//go:build cluster

package tests

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"
)

const (
	loadWorkers = 4
	// loadEvery is the pace of one worker: all together ask some 100 times a second.
	loadEvery = 40 * time.Millisecond
)

// visitor returns a client that reaches public names as somebody would whose DNS knows them and
// who trusts the edge's authority.
func visitor(change func(*http.Transport)) (*http.Client, error) {
	pem, err := os.ReadFile(env.Edge.CAFile)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, errors.New("the edge's CA file holds no certificate")
	}
	tr := &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12},
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			_, port, err := net.SplitHostPort(address)
			if err != nil {
				return nil, err
			}
			return (&net.Dialer{}).DialContext(ctx, network, net.JoinHostPort(env.Edge.Address, port))
		},
	}
	if change != nil {
		change(tr)
	}
	return &http.Client{Transport: tr, Timeout: 10 * time.Second}, nil
}

// ask fetches a page of the demo app and returns the name of the pod that answered.
func ask(ctx context.Context, client *http.Client, url string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	res, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer func() { _ = res.Body.Close() }()
	body, err := io.ReadAll(io.LimitReader(res.Body, 1<<16))
	if err != nil {
		return "", fmt.Errorf("%s, then %w", res.Status, err)
	}
	server, ok := strings.CutPrefix(strings.TrimSpace(string(body)), "Server: ")
	if res.StatusCode != http.StatusOK || !ok {
		return "", fmt.Errorf("%s: %q", res.Status, body)
	}
	return server, nil
}

// failure is one request that was not answered.
type failure struct {
	at  time.Time
	who string
	err error
}

func (f failure) String() string {
	return fmt.Sprintf("%s %s: %v", f.at.Format("15:04:05.000"), f.who, f.err)
}

// load asks a public URL in a steady pace from several workers, some of which keep their
// connections while others make a new one for every request.
type load struct {
	stop func()
	done sync.WaitGroup

	mu       sync.Mutex
	total    int
	servers  map[string]int
	failures []failure
}

// startLoad starts a load and returns when it is well under way. It ends with the test, or before
// by its stop.
func (s *stage) startLoad(url string) *load {
	s.t.Helper()
	ctx, cancel := context.WithCancel(s.ctx)
	l := &load{stop: cancel, servers: map[string]int{}}
	s.t.Cleanup(func() { cancel(); l.done.Wait() })
	for i := range loadWorkers {
		who, change := "new connection", func(tr *http.Transport) { tr.DisableKeepAlives = true }
		switch i {
		case 0:
			who, change = "kept connection", nil
		case 1:
			who, change = "HTTP/2 connection", func(tr *http.Transport) { tr.ForceAttemptHTTP2 = true }
		}
		client, err := visitor(change)
		if err != nil {
			s.t.Fatal(err)
		}
		l.done.Go(func() {
			defer client.CloseIdleConnections()
			tick := time.NewTicker(loadEvery)
			defer tick.Stop()
			for {
				select {
				case <-ctx.Done():
					return
				case <-tick.C:
				}
				at := time.Now()
				// Not ctx: the last request is to be answered as well.
				server, err := ask(context.WithoutCancel(ctx), client, url)
				l.count(server, failure{at, who, err})
			}
		})
	}
	s.await(patience, "the load", func() error {
		if n := l.answered(); n < 5*loadWorkers {
			return fmt.Errorf("%d requests were answered", n)
		}
		return nil
	})
	return l
}

func (l *load) count(server string, f failure) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.total++
	if f.err != nil {
		l.failures = append(l.failures, f)
		return
	}
	l.servers[server]++
}

func (l *load) answered() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.total - len(l.failures)
}

// from is how many answers came from each pod.
func (l *load) from() map[string]int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return maps.Clone(l.servers)
}

// awaitMore waits until n more requests are answered.
func (s *stage) awaitMore(l *load, n int) {
	s.t.Helper()
	want := l.answered() + n
	s.await(patience, "the load", func() error {
		if have := l.answered(); have < want {
			return fmt.Errorf("%d requests were answered, want %d", have, want)
		}
		return nil
	})
}

// endLoad ends a load and fails the test for each request since a time that was not answered.
func (s *stage) endLoad(l *load, since time.Time) {
	s.t.Helper()
	l.stop()
	l.done.Wait()
	failed := 0
	for _, f := range l.failures {
		if f.at.Before(since) {
			s.t.Logf("within what is allowed: %s", f)
			continue
		}
		if failed++; failed <= 20 {
			s.t.Errorf("request failed: %s", f)
		}
	}
	s.t.Logf("%d requests, %d failed, %d of them too many; from %v", l.total, len(l.failures), failed, l.servers)
}
