package mysocket

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"strings"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

const (
	// The original controller logged in again 10 minutes before its 300-minute token expired.
	refreshBefore = 10 * time.Minute
	// A refused account is not tried again for this long, so that a wrong password locks no account.
	refusedLoginPause = 30 * time.Second
)

// session is an account that can be used now.
type session struct {
	dialect dialect
	account Account
	token   string
	user    string // the SSH user name
	expires time.Time
}

// sessionState is guarded by its lock.
type sessionState struct {
	lock    lock
	current session // without a token when there is none
	// the last account that was refused
	refused      error
	refusedUntil time.Time
	refusedFor   Account
}

// refusedToken is a token that the API has just refused, and how.
type refusedToken struct {
	token string
	err   error
}

// Login makes sure that there is a token, and returns the SSH user name that goes with it. The error wraps
// ErrCredentials when the account was refused. An access token is not shown to the API here.
func (c *Client) Login(ctx context.Context) (user string, err error) {
	s, err := c.login(ctx, refusedToken{})
	return s.user, err
}

// login returns a session whose token is not stale.
func (c *Client) login(ctx context.Context, stale refusedToken) (session, error) {
	s := &c.session
	if err := s.lock.acquire(ctx); err != nil {
		return session{}, fmt.Errorf("log in: wait for the login that is under way: %w", err)
	}
	defer s.lock.release()
	if s.current.token == stale.token {
		s.current.token = ""
	}
	now := c.now()
	with, err := c.cfg.Credentials()
	if s.current.token != "" && now.Before(s.current.expires) && (err != nil || with == s.current.account) {
		return s.current, nil
	}
	if err != nil {
		return session{}, fmt.Errorf("%w: %w", ErrCredentials, err)
	}
	if now.Before(s.refusedUntil) && s.refusedFor == with {
		return session{}, s.refused
	}
	fresh, err := c.dialectOf(with).login(ctx, c, with, stale)
	if err != nil {
		if pause := loginPause(err); pause > 0 {
			s.refused, s.refusedUntil, s.refusedFor = err, now.Add(pause), with
		}
		return session{}, err
	}
	s.current, s.refused = fresh, nil
	return fresh, nil
}

func (c *Client) dialectOf(a Account) dialect {
	if a.Token != "" {
		return &c.border0
	}
	return &c.classic
}

// loginPause is how long the same account is not tried again after a login failed with err. An API that asked for more
// time is asked again no sooner either, by whoever gets the error; the pause is for those that come meanwhile.
func loginPause(err error) time.Duration {
	if errors.Is(err, ErrCredentials) {
		return refusedLoginPause
	}
	return min(RetryAfter(err), refusedLoginPause)
}

// asker makes requests in one session.
type asker struct {
	client  *Client
	session session
}

func (a asker) ask(ctx context.Context, r call) error {
	return a.client.send(ctx, a.session.dialect, a.session.token, r)
}

// in does something in the account's dialect, logging in first. When the token is refused, it does it all once more with
// another: nothing was done by a request that was refused so.
func (c *Client) in(ctx context.Context, do func(dialect, asker) error) error {
	s, err := c.login(ctx, refusedToken{})
	if err != nil {
		return err
	}
	err = do(s.dialect, asker{c, s})
	var e *APIError
	if errors.As(err, &e) && e.Status == http.StatusUnauthorized {
		if s, err = c.login(ctx, refusedToken{s.token, err}); err != nil {
			return err
		}
		err = do(s.dialect, asker{c, s})
	}
	return err
}

// claims are what is read out of a token; its signature is the API's own business. user and expires are empty and zero
// when the token does not say.
type claims struct {
	user    string
	expires time.Time
}

// errNoJWT says nothing more: the parser's error may quote the token.
var errNoJWT = errors.New("no JWT")

func readToken(token string) (claims, error) {
	m := jwt.MapClaims{}
	if _, _, err := jwt.NewParser().ParseUnverified(token, m); err != nil {
		return claims{}, errNoJWT
	}
	id, _ := m["user_id"].(string)
	out := claims{user: strings.ReplaceAll(id, "-", "")}
	if !userPattern.MatchString(out.user) {
		out.user = ""
	}
	if exp, err := m.GetExpirationTime(); err == nil && exp != nil {
		out.expires = exp.Time
	}
	return out, nil
}

// userPattern is what an SSH user name may be: ids are UUIDs, but that is not promised.
var userPattern = regexp.MustCompile(`^[A-Za-z0-9_.]{1,128}$`)

// wait waits, unless ctx ends before.
func wait(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
