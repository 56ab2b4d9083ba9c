// Package mysockettest puts a proxy between a test and the API of a real edge. It counts the requests and makes those fail
// that the test wants to fail: what an API does on a bad day, which an edge on loopback never does by itself.
package mysockettest

import (
	"crypto/tls"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"regexp"
	"sync"
	"testing"
	"time"

	"github.com/mysocketio/mysocket-injector/internal/edge/edgetest"
	"github.com/mysocketio/mysocket-injector/internal/mysocket"
)

// Proxy is a running proxy. Endpoints are written as in the errors of package mysocket, but with {} for every id:
// "POST /socket/{}/tunnel".
type Proxy struct {
	// URL is the base of the API through the proxy.
	URL string

	edge   *edgetest.Edge
	server *httptest.Server

	mu       sync.Mutex
	faults   map[string][]Fault // by endpoint, in order; a nil one lets a request pass
	always   map[string]Fault
	requests map[string]int
}

// Fault answers a request in the place of the API, which it may ask with forward.
type Fault func(w http.ResponseWriter, r *http.Request, forward http.Handler)

// Start runs a proxy in front of an edge's API until the test ends.
func Start(t testing.TB, e *edgetest.Edge) *Proxy {
	t.Helper()
	target, err := url.Parse(e.APIURL)
	if err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: e.CAPool(), MinVersion: tls.VersionTLS12}, MaxIdleConnsPerHost: 20}
	forward := &httputil.ReverseProxy{
		Rewrite:   func(r *httputil.ProxyRequest) { r.SetURL(target) },
		Transport: transport,
	}
	p := &Proxy{edge: e, faults: map[string][]Fault{}, always: map[string]Fault{}, requests: map[string]int{}}
	p.server = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if fault := p.next(r); fault != nil {
			fault(w, r, forward)
			return
		}
		forward.ServeHTTP(w, r)
	}))
	p.URL = p.server.URL
	t.Cleanup(func() {
		p.server.CloseClientConnections()
		p.server.Close()
		transport.CloseIdleConnections()
	})
	return p
}

var idPattern = regexp.MustCompile(`[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}`)

func (p *Proxy) next(r *http.Request) Fault {
	endpoint := r.Method + " " + idPattern.ReplaceAllString(r.URL.Path, "{}")
	p.mu.Lock()
	defer p.mu.Unlock()
	p.requests[endpoint]++
	if queue := p.faults[endpoint]; len(queue) > 0 {
		p.faults[endpoint] = queue[1:]
		return queue[0]
	}
	return p.always[endpoint]
}

// Fail makes the next requests to an endpoint meet these faults, one each; a nil one lets a request pass.
func (p *Proxy) Fail(endpoint string, faults ...Fault) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.faults[endpoint] = append(p.faults[endpoint], faults...)
}

// FailAlways makes every request to an endpoint meet a fault, until Heal.
func (p *Proxy) FailAlways(endpoint string, fault Fault) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.always[endpoint] = fault
}

// Heal ends all faults.
func (p *Proxy) Heal() {
	p.mu.Lock()
	defer p.mu.Unlock()
	clear(p.faults)
	clear(p.always)
}

// Requests tells how many requests there were to an endpoint.
func (p *Proxy) Requests(endpoint string) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.requests[endpoint]
}

// Client is a client that speaks to the edge through the proxy, with the edge's account.
func (p *Proxy) Client(t testing.TB) *mysocket.Client {
	t.Helper()
	return p.ClientOf(t, mysocket.Account{Email: p.edge.Email, Password: p.edge.Password})
}

// TokenClient is a client that speaks the border0 dialect, with the access token of the same account.
func (p *Proxy) TokenClient(t testing.TB) *mysocket.Client {
	t.Helper()
	return p.ClientOf(t, mysocket.Account{Token: p.edge.Token})
}

// ClientOf is a client of another account.
func (p *Proxy) ClientOf(t testing.TB, account mysocket.Account) *mysocket.Client {
	t.Helper()
	return p.ClientWith(t, func() (mysocket.Account, error) { return account, nil })
}

// ClientWith is a client whose account may change or be missing.
func (p *Proxy) ClientWith(t testing.TB, credentials mysocket.Credentials) *mysocket.Client {
	t.Helper()
	c, err := mysocket.New(mysocket.Config{BaseURL: p.URL, Credentials: credentials, Transport: p.server.Client().Transport, Version: "test"})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// HastyClient is a client with the edge's account that waits so long for an answer, and no longer.
func (p *Proxy) HastyClient(t testing.TB, patience time.Duration) *mysocket.Client {
	t.Helper()
	patient, ok := p.server.Client().Transport.(*http.Transport)
	if !ok {
		t.Fatalf("the transport is a %T", p.server.Client().Transport)
	}
	hasty := patient.Clone()
	hasty.ResponseHeaderTimeout = patience
	t.Cleanup(hasty.CloseIdleConnections)
	c, err := mysocket.New(mysocket.Config{
		BaseURL: p.URL, Transport: hasty, Version: "test",
		Credentials: func() (mysocket.Account, error) {
			return mysocket.Account{Email: p.edge.Email, Password: p.edge.Password}, nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// Answer answers with a status and a body, and does nothing of what was asked. header is name, value, name, value...
func Answer(status int, body string, header ...string) Fault {
	return func(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
		for i := 0; i+1 < len(header); i += 2 {
			w.Header().Set(header[i], header[i+1])
		}
		w.WriteHeader(status)
		_, _ = w.Write([]byte(body))
	}
}

// LostAnswer does what was asked, and then the connection breaks before the answer comes.
func LostAnswer(_ http.ResponseWriter, r *http.Request, forward http.Handler) {
	forward.ServeHTTP(httptest.NewRecorder(), r)
	panic(http.ErrAbortHandler)
}

// HalfAnswer breaks the connection in the middle of an answer, and does nothing of what was asked.
func HalfAnswer(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", "1000")
	w.WriteHeader(http.StatusOK)
	_, _ = w.Write([]byte(`[{"socket_id":"`))
	_ = http.NewResponseController(w).Flush()
	panic(http.ErrAbortHandler)
}

// Silence never answers, and does nothing of what was asked.
func Silence(_ http.ResponseWriter, r *http.Request, _ http.Handler) {
	_, _ = io.Copy(io.Discard, r.Body) // else the server does not see the client go
	<-r.Context().Done()
}

// After does what was asked, and then answers as another fault does.
func After(fault Fault) Fault {
	return func(w http.ResponseWriter, r *http.Request, forward http.Handler) {
		forward.ServeHTTP(httptest.NewRecorder(), r)
		fault(w, r, forward)
	}
}

// Refused breaks the connection, and does nothing of what was asked.
func Refused(http.ResponseWriter, *http.Request, http.Handler) { panic(http.ErrAbortHandler) }

// Eventually waits until condition holds, and fails the test when it doesn't within 20 s.
func Eventually(t testing.TB, what string, condition func() bool) {
	t.Helper()
	deadline := time.After(20 * time.Second)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !condition() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("not within 20 s: %s", what)
		}
	}
}
