// Package mysocket is the client of the Mysocket REST API, in both of its dialects: classic (e-mail and password, tunnel
// objects) and border0 (access token, no tunnel objects). The kind of account decides, and callers see no difference.
// It logs in when it must, keeps the token fresh, limits its own rate and gives typed errors. It must not know
// Kubernetes, and no error or log line of it holds a secret.
package mysocket

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"golang.org/x/time/rate"
)

const (
	// The API documents no limit of its own; this one is far above what a cluster needs and far below a nuisance.
	requestsPerSecond = 20
	requestBurst      = 40
	requestTimeout    = 15 * time.Second
	// maxAnswerBytes holds a list of about 10,000 sockets.
	maxAnswerBytes = 16 << 20
)

// Config is what a Client needs.
type Config struct {
	// BaseURL is the API's full prefix without a trailing slash. It must be https, but for loopback addresses. When it has
	// no path, the border0 dialect is spoken below /api/v1.
	BaseURL     string
	Credentials Credentials
	// Transport carries the requests; nil means http.DefaultTransport.
	Transport http.RoundTripper
	// Version is sent as x-client-version.
	Version string
	// Observe, if set, is told of every answer: the endpoint with ids left out, and the status (0: no answer).
	Observe func(endpoint string, status int, took time.Duration)
}

// Client is safe for concurrent use.
type Client struct {
	base    *url.URL
	cfg     Config
	http    *http.Client
	limiter *rate.Limiter
	now     func() time.Time
	session sessionState
	list    listCache

	classic classic
	border0 border0
}

// New returns a client; it makes no request. The error names the part of cfg that is wrong.
func New(cfg Config) (*Client, error) {
	base, err := ParseBaseURL(cfg.BaseURL)
	if err != nil {
		return nil, err
	}
	if cfg.Credentials == nil {
		return nil, errors.New("mysocket: Config.Credentials is missing")
	}
	c := &Client{
		base:    base,
		cfg:     cfg,
		http:    &http.Client{Transport: cfg.Transport, Timeout: requestTimeout, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }},
		limiter: rate.NewLimiter(requestsPerSecond, requestBurst),
		now:     time.Now,
		session: sessionState{lock: newLock()},
		list:    listCache{fetching: newLock()},
		border0: border0{wait: wait},
	}
	return c, nil
}

// ParseBaseURL validates the address of an API. Plain http is allowed for loopback only: the account's password goes there.
func ParseBaseURL(raw string) (*url.URL, error) {
	if strings.Contains(raw, "@") {
		// Not quoted: what stands before the @ may be a password.
		return nil, errors.New("the API address holds an @; it must be a URL like https://api.mysocket.io, without a user")
	}
	u, err := url.Parse(strings.TrimRight(raw, "/"))
	if err != nil || u.Hostname() == "" || u.RawQuery != "" || u.ForceQuery || u.Fragment != "" {
		return nil, fmt.Errorf("the API address %q is not a URL like https://api.mysocket.io", raw)
	}
	ip := net.ParseIP(u.Hostname())
	loopback := u.Hostname() == "localhost" || ip != nil && ip.IsLoopback()
	if u.Scheme != "https" && (u.Scheme != "http" || !loopback) {
		return nil, fmt.Errorf("the API address %q must start with https://, because the account's password is sent there", raw)
	}
	return u, nil
}

// call is one request. endpoint is its path with the ids replaced, for errors and metrics; in and out may be nil.
type call struct {
	method, endpoint, path string
	in, out                any
}

// send makes one request in a dialect; token is empty for one that needs none.
func (c *Client) send(ctx context.Context, d dialect, token string, r call) error {
	method, endpoint, in, out := r.method, r.endpoint, r.in, r.out
	if err := c.limiter.Wait(ctx); err != nil {
		return fmt.Errorf("%s %s: wait for the client's own rate limit: %w", method, endpoint, err)
	}
	body := io.Reader(http.NoBody)
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return fmt.Errorf("%s %s: %w", method, endpoint, err)
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, d.base(c.base)+r.path, body)
	if err != nil {
		return fmt.Errorf("%s %s: %w", method, endpoint, err)
	}
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	req.Header.Set("Accept", "application/json")
	req.Header.Set("x-client-requested-with", "mysocket-injector")
	req.Header.Set("x-client-version", c.cfg.Version)
	if token != "" {
		d.authorize(req.Header, token)
	}
	start := c.now()
	status := 0
	defer func() {
		if c.cfg.Observe != nil {
			c.cfg.Observe(method+" "+endpoint, status, c.now().Sub(start))
		}
	}()
	resp, err := c.http.Do(req)
	if err != nil {
		var u *url.Error
		if errors.As(err, &u) {
			err = u.Err // the URL is said below, without ids
		}
		return fmt.Errorf("%s %s at %s: %w", method, endpoint, c.base.Host, withoutSource(err))
	}
	defer func() { _ = resp.Body.Close() }()
	status = resp.StatusCode
	answer, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswerBytes+1))
	if err != nil {
		return fmt.Errorf("%s %s: read the answer: %w", method, endpoint, withoutSource(err))
	}
	if len(answer) > maxAnswerBytes {
		return fmt.Errorf("%s %s: the answer is larger than %d bytes", method, endpoint, maxAnswerBytes)
	}
	if status < 200 || status > 204 {
		secrets := []string{token}
		if form, ok := in.(loginForm); ok {
			secrets = append(secrets, form.Password)
		}
		return &APIError{Op: method + " " + endpoint, Status: status, Message: errorMessage(answer, secrets), RetryAfter: retryAfter(resp.Header, c.now())}
	}
	garbage := fmt.Errorf("%s %s: the Mysocket API answered %d with something that is not the expected JSON", method, endpoint, status)
	if out == nil {
		// Some proxy's page is no success: what was to be deleted would be left behind.
		if len(bytes.TrimSpace(answer)) > 0 && !json.Valid(answer) {
			return garbage
		}
		return nil
	}
	if status == http.StatusNoContent {
		return fmt.Errorf("%s %s: %w", method, endpoint, errNoContent)
	}
	if err := json.Unmarshal(answer, out); err != nil {
		return garbage
	}
	return nil
}

// errNoContent is an answer of 204 where an object was expected.
var errNoContent = errors.New("the Mysocket API answered 204, without what was asked for")

// withoutSource takes the local address out of a network error. Its port is another one every time, and a condition or an
// Event that shows the error is to stay the same while the trouble does.
func withoutSource(err error) error {
	if op, ok := errors.AsType[*net.OpError](err); ok && op.Source != nil {
		same := *op
		same.Source = nil
		return &same
	}
	return err
}

// errorMessage takes the API's sentence out of an error answer, bounded, on one line, and without the secrets of the
// request, should the API quote them.
func errorMessage(answer []byte, secrets []string) string {
	const most = 300
	var e struct {
		Message  string `json:"error_message"`
		Fallback string `json:"message"`
	}
	if json.Unmarshal(answer, &e) != nil {
		return ""
	}
	m := cmp.Or(e.Message, e.Fallback)
	for _, secret := range secrets {
		if secret != "" && strings.Contains(m, secret) {
			// Not just the secret is left out: around a hole anybody could read what fits into it.
			return "(its message is not shown because it quotes a secret)"
		}
	}
	m = strings.Join(strings.Fields(m), " ")
	if len(m) > most {
		m = strings.ToValidUTF8(m[:most], "") + "..."
	}
	return m
}

// retryAfter reads a Retry-After header in either of its forms, at most an hour.
func retryAfter(h http.Header, now time.Time) time.Duration {
	v := h.Get("Retry-After")
	if v == "" {
		return 0
	}
	var d time.Duration
	if n, err := strconv.Atoi(v); err == nil {
		d = time.Duration(max(0, min(n, 3600))) * time.Second
	} else if t, err := http.ParseTime(v); err == nil {
		d = t.Sub(now)
	}
	return max(0, min(d, time.Hour))
}
