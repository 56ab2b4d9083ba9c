package mysocket

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	testEmail    = "owner@example.com"
	testPassword = "pass word/&\"secret"
	testUserID   = "01234567-89ab-cdef-0123-456789abcdef"
)

// clock is a clock that stands until it is moved.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) move(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

// api is an API whose answers are the test's. Without one, /login gives a token of five hours and the rest 200 and [].
type api struct {
	t     *testing.T
	clock *clock

	mu       sync.Mutex
	answers  map[string][]http.HandlerFunc // by "METHOD /path", in order
	requests []string
	tokens   []string
	password string
}

func newAPI(t *testing.T) (*api, *Client) {
	t.Helper()
	a := &api{t: t, clock: &clock{now: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)}, answers: map[string][]http.HandlerFunc{}, password: testPassword}
	server := httptest.NewTLSServer(a)
	t.Cleanup(server.Close)
	c, err := New(Config{
		BaseURL:     server.URL,
		Credentials: func() (Account, error) { return Account{Email: testEmail, Password: testPassword}, nil },
		Transport:   server.Client().Transport,
		Version:     "test",
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.http.CloseIdleConnections)
	c.now = a.clock.Now
	return a, c
}

func (a *api) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	key := r.Method + " " + r.URL.Path
	a.mu.Lock()
	a.requests = append(a.requests, key)
	var answer http.HandlerFunc
	if queue := a.answers[key]; len(queue) > 0 {
		answer, a.answers[key] = queue[0], queue[1:]
	}
	a.mu.Unlock()
	switch {
	case answer != nil:
		answer(w, r)
	case key == "POST /login":
		a.login(w, r)
	default:
		_, _ = io.WriteString(w, "[]")
	}
}

func (a *api) login(w http.ResponseWriter, r *http.Request) {
	var form struct{ Email, Password string }
	a.mu.Lock()
	defer a.mu.Unlock()
	if json.NewDecoder(r.Body).Decode(&form) != nil || form.Email != testEmail || form.Password != a.password {
		w.WriteHeader(http.StatusUnauthorized)
		_, _ = io.WriteString(w, `{"error_message":"wrong e-mail address or password"}`)
		return
	}
	token := a.token(len(a.tokens), 5*time.Hour)
	a.tokens = append(a.tokens, token)
	_ = json.NewEncoder(w).Encode(map[string]any{"token": token, "require_mfa": false})
}

func (a *api) token(number int, life time.Duration) string {
	return a.tokenOf(jwt.MapClaims{"user_id": testUserID, "user_email": testEmail, "jti": fmt.Sprint(number), "exp": a.clock.Now().Add(life).Unix()})
}

func (a *api) tokenOf(claims jwt.MapClaims) string {
	token, err := jwt.NewWithClaims(jwt.SigningMethodHS256, claims).SignedString([]byte("the API's own key"))
	if err != nil {
		a.t.Error(err)
	}
	return token
}

// on puts answers in line for an endpoint.
func (a *api) on(key string, answers ...http.HandlerFunc) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.answers[key] = append(a.answers[key], answers...)
}

func (a *api) count(key string) int {
	a.mu.Lock()
	defer a.mu.Unlock()
	n := 0
	for _, r := range a.requests {
		if r == key {
			n++
		}
	}
	return n
}

func (a *api) wantRequests(key string, want int) {
	a.t.Helper()
	if got := a.count(key); got != want {
		a.t.Errorf("%d requests %s, want %d", got, key, want)
	}
}

// noSecrets fails the test when an error shows the password or a token.
func (a *api) noSecrets(err error) {
	a.t.Helper()
	if err == nil {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, secret := range append(a.tokens, testPassword) {
		if strings.Contains(err.Error(), secret) {
			a.t.Errorf("the error shows a secret: %v", err)
		}
	}
}

func answer(status int, body string, header ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		for i := 0; i+1 < len(header); i += 2 {
			w.Header().Set(header[i], header[i+1])
		}
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	}
}

func breakOff(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Length", "1000")
	_, _ = io.WriteString(w, `[{"socket_id":"`)
	_ = http.NewResponseController(w).Flush()
	panic(http.ErrAbortHandler)
}
