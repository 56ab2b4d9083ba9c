// Package mysocket is the client of the Mysocket REST API, in its classic dialect (e-mail and password, tunnel objects).
// It logs in when it must, keeps the token fresh, limits its own rate and gives typed errors. It must not know
// Kubernetes, and no error or log line of it holds a secret.
package mysocket

import (
	"bytes"
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
	"sync"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"golang.org/x/time/rate"
)

const (
	// The API documents no limit of its own; this one is far above what a cluster needs and far below a nuisance.
	requestsPerSecond = 20
	requestBurst      = 40
	requestTimeout    = 15 * time.Second
	// maxAnswerBytes holds a list of about 10,000 sockets.
	maxAnswerBytes = 16 << 20
	// The original controller logged in again 10 minutes before its 300-minute token expired.
	refreshBefore = 10 * time.Minute
	// A refused login is not tried again with the same credentials for this long, so that a wrong password locks no account.
	refusedLoginPause = 30 * time.Second
)

// Credentials returns the account's e-mail and password. It is called at every login, so that a change is picked up.
type Credentials func() (email, password string, err error)

// Config is what a Client needs.
type Config struct {
	// BaseURL is the API's full prefix without a trailing slash. It must be https, but for loopback addresses.
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
}

type sessionState struct {
	mu      sync.Mutex
	token   string
	user    string // the SSH user name
	expires time.Time
	// the last refused login
	refused      error
	refusedUntil time.Time
	refusedFor   [2]string
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
	return &Client{
		base:    base,
		cfg:     cfg,
		http:    &http.Client{Transport: cfg.Transport, Timeout: requestTimeout, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }},
		limiter: rate.NewLimiter(requestsPerSecond, requestBurst),
		now:     time.Now,
	}, nil
}

// ParseBaseURL validates the address of an API. Plain http is allowed for loopback only: the account's password goes there.
func ParseBaseURL(raw string) (*url.URL, error) {
	u, err := url.Parse(strings.TrimSuffix(raw, "/"))
	if err != nil || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return nil, fmt.Errorf("the API address %q is not a URL like https://api.mysocket.io", raw)
	}
	ip := net.ParseIP(u.Hostname())
	loopback := u.Hostname() == "localhost" || ip != nil && ip.IsLoopback()
	if u.Scheme != "https" && (u.Scheme != "http" || !loopback) {
		return nil, fmt.Errorf("the API address %q must start with https://, because the account's password is sent there", raw)
	}
	return u, nil
}

// Login makes sure that there is a valid token, and returns the SSH user name that goes with it. The error wraps
// ErrCredentials when the account was refused.
func (c *Client) Login(ctx context.Context) (user string, err error) {
	_, user, err = c.login(ctx, "")
	return user, err
}

// login returns a valid token that is not stale, the one that the API has just refused.
func (c *Client) login(ctx context.Context, stale string) (token, user string, err error) {
	s := &c.session
	s.mu.Lock()
	defer s.mu.Unlock()
	now := c.now()
	if s.token != "" && s.token != stale && now.Before(s.expires) {
		return s.token, s.user, nil
	}
	email, password, err := c.cfg.Credentials()
	if err != nil {
		return "", "", fmt.Errorf("%w: %w", ErrCredentials, err)
	}
	if now.Before(s.refusedUntil) && s.refusedFor == [2]string{email, password} {
		return "", "", s.refused
	}
	var answer struct {
		Token string `json:"token"`
	}
	err = c.send(ctx, http.MethodPost, "/login", "/login", "", map[string]string{"email": email, "password": password}, &answer)
	var refused *APIError
	if errors.As(err, &refused) && (refused.Status == http.StatusUnauthorized || refused.Status == http.StatusForbidden) {
		s.token = ""
		s.refused = fmt.Errorf("%w: check the e-mail and password in the account's Secret (%w)", ErrCredentials, err)
		s.refusedUntil, s.refusedFor = now.Add(refusedLoginPause), [2]string{email, password}
		return "", "", s.refused
	}
	if err != nil {
		return "", "", fmt.Errorf("log in: %w", err)
	}
	claims := jwt.MapClaims{}
	if _, _, err := jwt.NewParser().ParseUnverified(answer.Token, claims); err != nil {
		// The parser's error may quote the token.
		return "", "", errors.New("log in: the Mysocket API answered with a token that is no JWT")
	}
	id, _ := claims["user_id"].(string)
	expires, err := claims.GetExpirationTime()
	if id == "" || err != nil || expires == nil {
		return "", "", errors.New("log in: the Mysocket API answered with a token that lacks user_id or exp")
	}
	s.token, s.user = answer.Token, strings.ReplaceAll(id, "-", "")
	s.expires = expires.Add(-refreshBefore)
	if s.expires.Before(now) { // a token that lives shorter than the margin is used for half of its life
		s.expires = now.Add(expires.Sub(now) / 2)
	}
	return s.token, s.user, nil
}

// do sends an authenticated request, logging in first, and once more when the token is refused.
func (c *Client) do(ctx context.Context, method, endpoint, path string, in, out any) error {
	token, _, err := c.login(ctx, "")
	if err != nil {
		return err
	}
	err = c.send(ctx, method, endpoint, path, token, in, out)
	var e *APIError
	if errors.As(err, &e) && e.Status == http.StatusUnauthorized {
		if token, _, err = c.login(ctx, token); err != nil {
			return err
		}
		err = c.send(ctx, method, endpoint, path, token, in, out)
	}
	return err
}

// send makes one request. endpoint is the path with its ids replaced, for errors and metrics.
func (c *Client) send(ctx context.Context, method, endpoint, path, token string, in, out any) error {
	if err := c.limiter.Wait(ctx); err != nil {
		return fmt.Errorf("%s %s: wait for the client's own rate limit: %w", method, endpoint, err)
	}
	body, err := json.Marshal(in)
	if err != nil {
		return fmt.Errorf("%s %s: %w", method, endpoint, err)
	}
	req, err := http.NewRequestWithContext(ctx, method, c.base.String()+path, bytes.NewReader(body))
	if err != nil {
		return fmt.Errorf("%s %s: %w", method, endpoint, err)
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Accept", "application/json")
	req.Header.Set("x-client-requested-with", "mysocket-injector")
	req.Header.Set("x-client-version", c.cfg.Version)
	if token != "" {
		req.Header.Set("x-access-token", token)
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
		return fmt.Errorf("%s %s at %s: %w", method, endpoint, c.base.Host, err)
	}
	defer func() { _ = resp.Body.Close() }()
	status = resp.StatusCode
	answer, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswerBytes+1))
	if err != nil {
		return fmt.Errorf("%s %s: read the answer: %w", method, endpoint, err)
	}
	if len(answer) > maxAnswerBytes {
		return fmt.Errorf("%s %s: the answer is larger than %d bytes", method, endpoint, maxAnswerBytes)
	}
	if status < 200 || status > 204 {
		return &APIError{Op: method + " " + endpoint, Status: status, Message: errorMessage(answer), RetryAfter: retryAfter(resp.Header, c.now())}
	}
	if out == nil || status == http.StatusNoContent {
		return nil
	}
	if err := json.Unmarshal(answer, out); err != nil {
		return fmt.Errorf("%s %s: the Mysocket API answered %d with something that is not the expected JSON", method, endpoint, status)
	}
	return nil
}

// errorMessage takes the API's sentence out of an error answer, bounded and on one line.
func errorMessage(answer []byte) string {
	const most = 300
	var e struct {
		Message string `json:"error_message"`
	}
	if json.Unmarshal(answer, &e) != nil {
		return ""
	}
	m := strings.Join(strings.Fields(e.Message), " ")
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
		d = time.Duration(min(n, 3600)) * time.Second
	} else if t, err := http.ParseTime(v); err == nil {
		d = t.Sub(now)
	}
	return max(0, min(d, time.Hour))
}
