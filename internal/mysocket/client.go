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
	"regexp"
	"strconv"
	"strings"
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

// Credentials returns the account's e-mail and password. It is called before every request, so that a change is picked up
// at once, and should be cheap. While it fails, a token that is still valid is used.
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

// account is what one logs in with.
type account struct {
	Email    string `json:"email"`
	Password string `json:"password"`
}

// sessionState is guarded by its lock.
type sessionState struct {
	lock    lock
	token   string
	account account // whose token it is
	user    string  // the SSH user name
	expires time.Time
	// the last refused login
	refused      error
	refusedUntil time.Time
	refusedFor   account
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
		session: sessionState{lock: newLock()},
		list:    listCache{fetching: newLock()},
	}, nil
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

// Login makes sure that there is a valid token, and returns the SSH user name that goes with it. The error wraps
// ErrCredentials when the account was refused.
func (c *Client) Login(ctx context.Context) (user string, err error) {
	_, user, err = c.login(ctx, "")
	return user, err
}

// login returns a valid token that is not stale, the one that the API has just refused.
func (c *Client) login(ctx context.Context, stale string) (token, user string, err error) {
	s := &c.session
	if err := s.lock.acquire(ctx); err != nil {
		return "", "", fmt.Errorf("log in: wait for the login that is under way: %w", err)
	}
	defer s.lock.release()
	if s.token == stale {
		s.token = ""
	}
	now := c.now()
	var with account
	with.Email, with.Password, err = c.cfg.Credentials()
	if s.token != "" && now.Before(s.expires) && (err != nil || with == s.account) {
		return s.token, s.user, nil
	}
	if err != nil {
		return "", "", fmt.Errorf("%w: %w", ErrCredentials, err)
	}
	if now.Before(s.refusedUntil) && s.refusedFor == with {
		return "", "", s.refused
	}
	token, err = c.askForToken(ctx, with)
	if err != nil {
		if pause := loginPause(err); pause > 0 {
			s.refused, s.refusedUntil, s.refusedFor = err, now.Add(pause), with
		}
		return "", "", err
	}
	user, expires, err := readToken(token)
	if err != nil {
		return "", "", err
	}
	if s.account != with && s.account != (account{}) {
		c.forgetList() // it is another account's
	}
	s.token, s.user, s.account, s.refused = token, user, with, nil
	s.expires = expires.Add(-refreshBefore)
	if s.expires.Before(now) {
		// A token that lives shorter than the margin is used for half of its life; one that seems to have expired is not
		// asked for again before every request, since it may be that the clocks differ.
		s.expires = now.Add(max(time.Minute, expires.Sub(now)/2))
	}
	return s.token, s.user, nil
}

func (c *Client) askForToken(ctx context.Context, with account) (string, error) {
	var answer struct {
		Token      string `json:"token"`
		RequireMFA bool   `json:"require_mfa"`
	}
	err := c.send(ctx, http.MethodPost, "/login", "/login", "", with, &answer)
	var refused *APIError
	switch {
	case errors.As(err, &refused) && (refused.Status == http.StatusUnauthorized || refused.Status == http.StatusForbidden):
		return "", fmt.Errorf("%w: check the e-mail and password in the account's Secret (%w)", ErrCredentials, err)
	case err != nil:
		return "", fmt.Errorf("log in: %w", err)
	case answer.RequireMFA:
		return "", fmt.Errorf("%w: it asks for a second factor, which only a person has; use an account without one", ErrCredentials)
	}
	return answer.Token, nil
}

// loginPause is how long the same account is not tried again after a login failed with err. An API that asked for more
// time is asked again no sooner either, by whoever gets the error; the pause is for those that come meanwhile.
func loginPause(err error) time.Duration {
	if errors.Is(err, ErrCredentials) {
		return refusedLoginPause
	}
	return min(RetryAfter(err), refusedLoginPause)
}

// readToken reads the SSH user name and the expiry out of a token. Its signature is the API's own business.
func readToken(token string) (user string, expires time.Time, err error) {
	claims := jwt.MapClaims{}
	if _, _, err := jwt.NewParser().ParseUnverified(token, claims); err != nil {
		// The parser's error may quote the token.
		return "", time.Time{}, errors.New("log in: the Mysocket API answered with a token that is no JWT")
	}
	id, _ := claims["user_id"].(string)
	user = strings.ReplaceAll(id, "-", "")
	exp, err := claims.GetExpirationTime()
	if !userPattern.MatchString(user) || err != nil || exp == nil {
		return "", time.Time{}, errors.New("log in: the Mysocket API answered with a token that lacks user_id or exp")
	}
	return user, exp.Time, nil
}

// userPattern is what an SSH user name may be: ids are UUIDs, but that is not promised.
var userPattern = regexp.MustCompile(`^[A-Za-z0-9_.]{1,128}$`)

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
	body := io.Reader(http.NoBody)
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return fmt.Errorf("%s %s: %w", method, endpoint, err)
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, c.base.String()+path, body)
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
		if a, ok := in.(account); ok {
			secrets = append(secrets, a.Password)
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
		Message string `json:"error_message"`
	}
	if json.Unmarshal(answer, &e) != nil {
		return ""
	}
	m := e.Message
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
