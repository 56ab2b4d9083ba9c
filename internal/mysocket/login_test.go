package mysocket

import (
	"encoding/json"
	"errors"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

func TestTokens(t *testing.T) {
	now := time.Now()
	for name, tc := range map[string]struct {
		token any
		want  string
	}{
		"no JWT":            {"eyJ.secret.x", "no JWT"},
		"empty":             {"", "no JWT"},
		"null":              {nil, "no JWT"},
		"no user":           {jwt.MapClaims{"exp": now.Unix()}, "lacks user_id or exp"},
		"no expiry":         {jwt.MapClaims{"user_id": testUserID}, "lacks user_id or exp"},
		"user is a number":  {jwt.MapClaims{"user_id": 7, "exp": now.Unix()}, "lacks user_id or exp"},
		"user is no name":   {jwt.MapClaims{"user_id": "root\n", "exp": now.Unix()}, "lacks user_id or exp"},
		"user is dashes":    {jwt.MapClaims{"user_id": "---", "exp": now.Unix()}, "lacks user_id or exp"},
		"user is long":      {jwt.MapClaims{"user_id": strings.Repeat("x", 200), "exp": now.Unix()}, "lacks user_id or exp"},
		"expiry is no time": {jwt.MapClaims{"user_id": testUserID, "exp": "tomorrow"}, "lacks user_id or exp"},
	} {
		a, c := newAPI(t)
		token := tc.token
		if claims, ok := token.(jwt.MapClaims); ok {
			token = a.tokenOf(claims)
		}
		body, err := json.Marshal(map[string]any{"token": token})
		if err != nil {
			t.Fatal(err)
		}
		a.on("POST /login", answer(200, string(body)))
		_, err = c.Login(t.Context())
		if err == nil || !strings.Contains(err.Error(), tc.want) || errors.Is(err, ErrCredentials) {
			t.Errorf("%s: got %v, want %q", name, err, tc.want)
		}
		if s, ok := token.(string); ok && s != "" && err != nil && strings.Contains(err.Error(), s) {
			t.Errorf("%s: the error shows the token: %v", name, err)
		}
	}
}

func TestTokenIsRenewedBeforeItExpires(t *testing.T) {
	a, c := newAPI(t)
	ask := func() {
		t.Helper()
		if _, err := c.Sockets(t.Context(), 0); err != nil {
			t.Fatal(err)
		}
	}
	ask()
	a.clock.move(5*time.Hour - refreshBefore - time.Second)
	ask()
	a.wantRequests("POST /login", 1)
	a.clock.move(2 * time.Second)
	ask()
	a.wantRequests("POST /login", 2)
}

func TestShortTokens(t *testing.T) {
	for _, tc := range []struct{ life, used time.Duration }{
		{6 * time.Minute, 3 * time.Minute}, // half of its life
		{time.Second, time.Minute},
		{-time.Hour, time.Minute}, // the clocks differ: no login before every request
		{-1e6 * time.Hour, time.Minute},
	} {
		a, c := newAPI(t)
		token := a.token(0, tc.life)
		a.on("POST /login", answer(200, `{"token":"`+token+`"}`))
		for _, step := range []struct {
			wait   time.Duration
			logins int
		}{{0, 1}, {tc.used - time.Second, 1}, {2 * time.Second, 2}} {
			a.clock.move(step.wait)
			if _, err := c.Login(t.Context()); err != nil {
				t.Fatal(err)
			}
			a.wantRequests("POST /login", step.logins)
		}
	}
}

func TestUnauthorizedInTheMiddle(t *testing.T) {
	a, c := newAPI(t)
	if _, err := c.Login(t.Context()); err != nil {
		t.Fatal(err)
	}
	a.on("GET /socket", answer(401, `{"error_message":"no valid token"}`))
	if _, err := c.Sockets(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	a.wantRequests("POST /login", 2)
	a.wantRequests("GET /socket", 2)

	// Refused again with a new token: it is said, and not tried a third time.
	a.on("GET /socket", answer(401, ""), answer(401, ""))
	_, err := c.Sockets(t.Context(), 0)
	var e *APIError
	if !errors.As(err, &e) || e.Status != 401 || errors.Is(err, ErrCredentials) {
		t.Errorf("got %v", err)
	}
	a.wantRequests("POST /login", 3)
	a.wantRequests("GET /socket", 4)
	a.noSecrets(err)
}

// TestManyRefusedAtOnce has many requests find out together that the token is refused: one login mends all.
func TestManyRefusedAtOnce(t *testing.T) {
	a, c := newAPI(t)
	if _, err := c.Login(t.Context()); err != nil {
		t.Fatal(err)
	}
	stale := a.tokens[0]
	const n = 10
	var together sync.WaitGroup
	together.Add(n)
	for range n {
		a.on("GET /socket/1/tunnel", func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("x-access-token") != stale {
				t.Error("the first round has another token")
			}
			together.Done()
			together.Wait()
			w.WriteHeader(http.StatusUnauthorized)
		})
	}
	var wg sync.WaitGroup
	for range n {
		wg.Go(func() {
			if _, err := c.Tunnels(t.Context(), "1"); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	a.wantRequests("POST /login", 2)
}

func TestWrongPassword(t *testing.T) {
	a, c := newAPI(t)
	a.password = "another"
	for range 3 {
		_, err := c.Sockets(t.Context(), 0)
		want := "the Mysocket account can't be used: check the e-mail and password in the account's Secret (the Mysocket API answered POST /login with 401 Unauthorized: wrong e-mail address or password)"
		if !errors.Is(err, ErrCredentials) || err.Error() != want {
			t.Fatalf("got  %v\nwant %s", err, want)
		}
		a.noSecrets(err)
	}
	a.wantRequests("POST /login", 1) // no account is locked
	a.wantRequests("GET /socket", 0)

	a.clock.move(refusedLoginPause + time.Second)
	if _, err := c.Login(t.Context()); !errors.Is(err, ErrCredentials) {
		t.Error(err)
	}
	a.wantRequests("POST /login", 2)

	// It is mended at the API's end: the next try after the pause works.
	a.mu.Lock()
	a.password = testPassword
	a.mu.Unlock()
	a.clock.move(refusedLoginPause + time.Second)
	if _, err := c.Login(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestChangedCredentials(t *testing.T) {
	a, c := newAPI(t)
	password, missing := "wrong", error(nil)
	c.cfg.Credentials = func() (Account, error) { return Account{Email: testEmail, Password: password}, missing }
	if _, err := c.Login(t.Context()); !errors.Is(err, ErrCredentials) {
		t.Fatal(err)
	}
	password = testPassword // within the pause
	if _, err := c.Sockets(t.Context(), time.Hour); err != nil {
		t.Fatal(err)
	}
	a.wantRequests("POST /login", 2)

	// Changed while a token is still valid: the old account is not used for hours on.
	a.mu.Lock()
	a.password = "rotated"
	a.mu.Unlock()
	password = "rotated"
	if _, err := c.Login(t.Context()); err != nil {
		t.Fatal(err)
	}
	a.wantRequests("POST /login", 3)
	if _, err := c.Sockets(t.Context(), time.Hour); err != nil {
		t.Fatal(err)
	}
	a.wantRequests("GET /socket", 2) // the old account's list is forgotten

	// Gone while a token is still valid: it is used while it lasts.
	missing = errors.New(`the account's Secret has no key "email"`)
	if _, err := c.Login(t.Context()); err != nil {
		t.Error(err)
	}
	a.clock.move(5 * time.Hour)
	_, err := c.Login(t.Context())
	if want := `the Mysocket account can't be used: the account's Secret has no key "email"`; !errors.Is(err, ErrCredentials) || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
	a.wantRequests("POST /login", 3)
}

func TestSecondFactor(t *testing.T) {
	a, c := newAPI(t)
	a.on("POST /login", answer(200, `{"token":"x","require_mfa":true}`))
	if _, err := c.Login(t.Context()); !errors.Is(err, ErrCredentials) || !strings.Contains(err.Error(), "second factor") {
		t.Errorf("got %v", err)
	}
}

func TestLoginThatFails(t *testing.T) {
	a, c := newAPI(t)
	a.on("POST /login", answer(500, ""), answer(429, `{"error_message":"too many"}`, "Retry-After", "7"))
	if _, err := c.Login(t.Context()); err == nil || errors.Is(err, ErrCredentials) || !strings.Contains(err.Error(), "log in: ") {
		t.Errorf("got %v", err)
	}
	for range 3 { // the API is left alone as long as it asked for
		_, err := c.Login(t.Context())
		if err == nil || errors.Is(err, ErrCredentials) || RetryAfter(err) != 7*time.Second {
			t.Errorf("got %v, RetryAfter %s", err, RetryAfter(err))
		}
	}
	a.wantRequests("POST /login", 2)
	a.clock.move(8 * time.Second)
	if _, err := c.Login(t.Context()); err != nil {
		t.Error(err)
	}
}
