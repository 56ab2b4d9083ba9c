//go:build cluster

package tests

import (
	"bufio"
	"cmp"
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
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	// loadRate is how many requests a load makes in a second, heavyRate a heavy one.
	loadRate  = 100
	heavyRate = 200
	// mostAtOnce bounds the requests that are open. On a machine too busy for the pace, more would only wait for each other.
	mostAtOnce = heavyRate
	// answerWithin is how long a request may take. What is answered late on a busy machine is not lost.
	answerWithin = time.Minute
	// A heavy load has that many slow downloads and WebSockets open at all times, each with a line every lineEvery milliseconds.
	longLived     = 3
	lineEvery     = 100
	downloadLines = 30
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

// failure is one request that was not answered. server is the pod that had begun to answer it, if that is known.
type failure struct {
	at     time.Time
	who    string
	server string
	err    error
}

func (f failure) String() string {
	return fmt.Sprintf("%s %s (%s): %v", f.at.Format("15:04:05.000"), f.who, cmp.Or(f.server, "nobody answered"), f.err)
}

// load asks a public URL in a steady pace, whether what it asked before is answered or not (up to mostAtOnce), over
// connections that are kept and over new ones.
type load struct {
	stop  func()
	done  sync.WaitGroup
	began time.Time

	heldBack int // not sent because of mostAtOnce; of the sender's until it is done

	mu        sync.Mutex
	total     int
	downloads int
	closed    int // WebSockets that the app has closed
	servers   map[string]int
	open      map[string]int // what is long-lived and open, by pod
	failures  []failure
}

// startLoad starts a load and returns when it is well under way. It ends with the test, or before
// by its stop.
func (s *stage) startLoad(url string) *load {
	s.t.Helper()
	l, _ := s.newLoad(url, loadRate)
	return l
}

// startHeavyLoad starts a load of more requests, with slow downloads and WebSockets beside them.
func (s *stage) startHeavyLoad(url string) *load {
	s.t.Helper()
	l, ctx := s.newLoad(url, heavyRate)
	client, err := visitor(func(tr *http.Transport) { tr.DisableKeepAlives = true })
	if err != nil {
		s.t.Fatal(err)
	}
	client.Timeout = 0 // of a WebSocket there is no end
	for range longLived {
		l.done.Go(func() {
			for ctx.Err() == nil {
				l.download(ctx, client, url)
			}
		})
		l.done.Go(func() {
			for ctx.Err() == nil {
				l.webSocket(ctx, client, url)
			}
		})
	}
	s.await(patience, "downloads and WebSockets", func() error {
		if n := l.longOpen(""); n < 2*longLived {
			return fmt.Errorf("%d of %d are open", n, 2*longLived)
		}
		return nil
	})
	return l
}

func (s *stage) newLoad(url string, rate int) (*load, context.Context) {
	s.t.Helper()
	ctx, cancel := context.WithCancel(s.ctx)
	l := &load{stop: cancel, began: time.Now(), servers: map[string]int{}, open: map[string]int{}}
	s.t.Cleanup(func() { cancel(); l.done.Wait() })
	keep := func(tr *http.Transport) { tr.MaxIdleConnsPerHost = rate }
	fresh := func(tr *http.Transport) { tr.DisableKeepAlives = true }
	kinds := []struct {
		who    string
		change func(*http.Transport)
		client *http.Client
	}{
		{who: "kept connection", change: keep},
		{who: "new connection", change: fresh},
		{who: "HTTP/2 connection", change: func(tr *http.Transport) { tr.ForceAttemptHTTP2 = true }},
		{who: "new connection", change: fresh},
	}
	for i := range kinds {
		client, err := visitor(kinds[i].change)
		if err != nil {
			s.t.Fatal(err)
		}
		s.t.Cleanup(client.CloseIdleConnections)
		client.Timeout = answerWithin
		kinds[i].client = client
	}
	open := make(chan struct{}, mostAtOnce)
	l.done.Go(func() {
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for sent := 0; ; {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			// What this program was too late for is made up for.
			for due := int(time.Since(l.began).Seconds() * float64(rate)); sent < due; sent++ {
				select {
				case open <- struct{}{}:
				default:
					l.heldBack++
					continue
				}
				kind := kinds[sent%len(kinds)]
				l.done.Go(func() {
					defer func() { <-open }()
					at := time.Now()
					// Not ctx: the last request is to be answered as well.
					server, err := ask(context.WithoutCancel(ctx), kind.client, url)
					l.count(server, failure{at, kind.who, "", err})
				})
			}
		}
	})
	s.await(patience, "the load", func() error {
		if n := l.answered(); n < 20 {
			return fmt.Errorf("%d requests were answered", n)
		}
		return nil
	})
	return l, ctx
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

// countOpen counts what is long-lived and begins or, with -1, ends.
func (l *load) countOpen(server string, n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.open[server] += n
}

// longOpen is how many downloads and WebSockets are open from a pod, or with no name from all.
func (l *load) longOpen(server string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := 0
	for name, open := range l.open {
		if server == "" || name == server {
			n += open
		}
	}
	return n
}

// closedByApp is how many WebSockets the app has closed.
func (l *load) closedByApp() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.closed
}

// fail counts what is long-lived and failed.
func (l *load) fail(ctx context.Context, f failure) {
	l.count(f.server, f)
	_ = wait(ctx, 100*time.Millisecond) // not at once again
}

// download reads a slow answer, which has to be whole.
func (l *load) download(ctx context.Context, client *http.Client, url string) {
	f := failure{at: time.Now(), who: "download"}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute) // the last one is to end as well
	defer cancel()
	f.server, f.err = l.lines(ctx, client, fmt.Sprintf("%s/stream?n=%d&ms=%d", url, downloadLines, lineEvery))
	if f.err != nil {
		l.fail(ctx, f)
		return
	}
	l.count(f.server, f)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.downloads++
}

func (l *load) lines(ctx context.Context, client *http.Client, url string) (server string, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	res, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer func() { _ = res.Body.Close() }()
	if res.StatusCode != http.StatusOK {
		return "", errors.New(res.Status)
	}
	n := 0
	for r := bufio.NewScanner(res.Body); ; n++ {
		if !r.Scan() {
			err = r.Err()
			break
		}
		number, name, _ := strings.Cut(r.Text(), " ")
		if number != strconv.Itoa(n) || name == "" || n > 0 && name != server {
			return server, fmt.Errorf("line %d is %q", n, r.Text())
		}
		if n == 0 {
			server = name
			l.countOpen(server, 1)
			defer l.countOpen(server, -1)
		}
	}
	if err == nil && n != downloadLines {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		err = fmt.Errorf("after %d of %d lines: %w", n, downloadLines, err)
	}
	return server, err
}

// webSocket reads from a WebSocket until the app closes it as one that ends, or the load does at its own end. Any other end of
// it is a failure.
func (l *load) webSocket(ctx context.Context, client *http.Client, url string) {
	f := failure{at: time.Now(), who: "WebSocket"}
	var status int
	f.server, status, f.err = l.messages(ctx, client, fmt.Sprintf("%s/ws?ms=%d", url, lineEvery))
	if f.err == nil && status != closedGoingAway && (status != closedNormally || ctx.Err() == nil) {
		f.err = fmt.Errorf("closed with status %d", status)
	}
	if f.err != nil {
		l.fail(ctx, f)
		return
	}
	l.count(f.server, f)
	if status == closedGoingAway {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.closed++
	}
}

// The statuses of a WebSocket's close that are expected (RFC 6455, 7.4.1).
const (
	closedNormally  = 1000
	closedGoingAway = 1001
)

// messages opens a WebSocket and returns the status with which it is closed. When ctx ends it asks for the close.
func (l *load) messages(ctx context.Context, client *http.Client, url string) (server string, status int, err error) {
	alive, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	silent := time.AfterFunc(30*time.Second, cancel) // one that is cut off without a word
	defer silent.Stop()
	req, err := http.NewRequestWithContext(alive, http.MethodGet, url, nil)
	if err != nil {
		return "", 0, err
	}
	for k, v := range map[string]string{"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="} {
		req.Header.Set(k, v)
	}
	res, err := client.Do(req)
	if err != nil {
		return "", 0, err
	}
	defer func() { _ = res.Body.Close() }()
	conn, ok := res.Body.(io.ReadWriter)
	if res.StatusCode != http.StatusSwitchingProtocols || !ok {
		return "", 0, errors.New(res.Status)
	}
	closing := func(status int) { // with a mask of zeroes
		_, _ = conn.Write([]byte{0x88, 0x82, 0, 0, 0, 0, byte(status >> 8), byte(status)})
	}
	asked := context.AfterFunc(ctx, func() { closing(closedNormally) })
	defer asked()
	for n := 0; ; n++ {
		var head [2]byte
		if _, err := io.ReadFull(conn, head[:]); err != nil {
			return server, 0, fmt.Errorf("after %d messages: %w", n, err)
		}
		message := make([]byte, head[1])
		if _, err := io.ReadFull(conn, message); err != nil {
			return server, 0, fmt.Errorf("in message %d: %w", n, err)
		}
		silent.Reset(30 * time.Second)
		if head[0] == 0x88 && len(message) == 2 {
			closing(int(message[0])<<8 | int(message[1]))
			return server, int(message[0])<<8 | int(message[1]), nil
		}
		number, name, _ := strings.Cut(string(message), " ")
		if head[0] != 0x81 || number != strconv.Itoa(n) || name == "" {
			return server, 0, fmt.Errorf("message %d is %#x %q", n, head[0], message)
		}
		if n == 0 {
			server = name
			l.countOpen(server, 1)
			defer l.countOpen(server, -1)
		}
	}
}

// wait waits and says whether ctx is still there.
func wait(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
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
	s.judgeLoad(l, func(f failure) bool { return f.at.Before(since) })
}

// judgeLoad ends a load and fails the test for each request that was not answered, unless that is allowed.
func (s *stage) judgeLoad(l *load, allowed func(failure) bool) {
	s.t.Helper()
	l.stop()
	took := time.Since(l.began)
	l.done.Wait()
	failed := 0
	for _, f := range l.failures {
		if allowed(f) {
			s.t.Logf("within what is allowed: %s", f)
			continue
		}
		if failed++; failed <= 20 {
			s.t.Errorf("request failed: %s", f)
		}
	}
	s.t.Logf("%d requests, %.0f a second (%d held back), with %d downloads and %d WebSockets that the app closed; %d failed, %d of them too many; from %v",
		l.total, float64(l.total)/took.Seconds(), l.heldBack, l.downloads, l.closed, len(l.failures), failed, l.servers)
}
