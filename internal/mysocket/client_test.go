package mysocket

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
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
		Credentials: func() (string, string, error) { return testEmail, testPassword, nil },
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

func TestParseBaseURL(t *testing.T) {
	for raw, want := range map[string]string{
		"https://api.mysocket.io":            "https://api.mysocket.io",
		"https://api.mysocket.io/":           "https://api.mysocket.io",
		"https://api.border0.com/api/v1//":   "https://api.border0.com/api/v1",
		"https://172.31.255.2:8443":          "https://172.31.255.2:8443",
		"http://127.0.0.1:8080":              "http://127.0.0.1:8080",
		"http://[::1]:8080":                  "http://[::1]:8080",
		"http://localhost":                   "http://localhost",
		"http://api.mysocket.io":             "must start with https://",
		"http://127.0.0.1.example.com":       "must start with https://",
		"ftp://localhost":                    "must start with https://",
		"":                                   "is not a URL like",
		"api.mysocket.io":                    "is not a URL like",
		"https://":                           "is not a URL like",
		"https://:443":                       "is not a URL like",
		"https://api.mysocket.io?x":          "is not a URL like",
		"https://api.mysocket.io/?":          "is not a URL like",
		"https://api.mysocket.io#x":          "is not a URL like",
		"https://%zz":                        "is not a URL like",
		"https://me:hunter2@api.mysocket.io": "without a user",
		"https://me:hunter2@%zz":             "without a user",
	} {
		u, err := ParseBaseURL(raw)
		switch {
		case err == nil && u.String() != want:
			t.Errorf("%q: got %s, want %s", raw, u, want)
		case err != nil && (!strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "hunter2")):
			t.Errorf("%q: got %v, want %s", raw, err, want)
		}
	}
	if _, err := New(Config{BaseURL: "https://api.mysocket.io"}); err == nil || !strings.Contains(err.Error(), "Credentials") {
		t.Errorf("without credentials: %v", err)
	}
}

func TestWhatIsSent(t *testing.T) {
	a, c := newAPI(t)
	a.on("GET /socket", func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		if len(body) != 0 || r.Header.Get("x-access-token") != a.tokens[0] || r.Header.Get("x-client-version") != "test" || r.Header.Get("x-client-requested-with") == "" {
			t.Errorf("GET with body %q and header %v", body, r.Header)
		}
		_, _ = io.WriteString(w, "null")
	})
	a.on("POST /socket", func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		want := `{"name":"n","socket_type":"http","protected_socket":false,"protected_username":"","protected_password":"","private_socket":false}`
		if string(body) != want || r.Header.Get("Content-Type") != "application/json" {
			t.Errorf("POST with body %s\nwant %s", body, want)
		}
		_, _ = io.WriteString(w, `{"socket_id":"1","dnsname":"d"}`)
	})
	if sockets, err := c.Sockets(t.Context(), 0); err != nil || len(sockets) != 0 {
		t.Errorf("a list that is null: %v, %v", sockets, err)
	}
	if _, err := c.CreateSocket(t.Context(), Socket{Name: "n", Type: "http"}); err != nil {
		t.Error(err)
	}
	user, err := c.Login(t.Context())
	if want := strings.ReplaceAll(testUserID, "-", ""); err != nil || user != want {
		t.Errorf("user %q, %v; want %q", user, err, want)
	}
	a.wantRequests("POST /login", 1)
}

// TestAnswersThatAreNoSuccess covers what an API may answer instead of what was asked for: always an error, never a
// crash, a guess or a secret.
func TestAnswersThatAreNoSuccess(t *testing.T) {
	long := `{"error_message":"` + strings.Repeat("é", 1000) + `"}`
	for _, tc := range []struct {
		name   string
		answer http.HandlerFunc
		status int // 0: not an *APIError
		want   string
	}{
		{"500 without a body", answer(500, ""), 500, "the Mysocket API answered GET /socket with 500 Internal Server Error"},
		{"500 with HTML", answer(500, "<html>"), 500, "500 Internal Server Error"},
		{"a status without a name", answer(599, ""), 599, "with 599"},
		{"400 with a reason", answer(400, `{"error_message":" a\n b "}`), 400, "with 400 Bad Request: a b"},
		{"a reason that is long", answer(400, long), 400, strings.Repeat("é", 150) + "..."},
		{"a reason that is no text", answer(400, `{"error_message":{}}`), 400, "400 Bad Request"},
		{"a redirect is not followed", answer(302, "", "Location", "/elsewhere"), 302, "302 Found"},
		{"garbage", answer(200, "<html>"), 0, "not the expected JSON"},
		{"an object for a list", answer(200, "{}"), 0, "not the expected JSON"},
		{"wrong types", answer(200, `[{"socket_id":1}]`), 0, "not the expected JSON"},
		{"nothing", answer(200, ""), 0, "not the expected JSON"},
		{"204", answer(204, ""), 0, "answered 204"},
		{"a socket without an id", answer(200, `[{"socket_id":"1"},{"name":"k8s shop.web"}]`), 0, "lacks socket_id"},
		{"half an answer", breakOff, 0, "read the answer"},
		{"a broken connection", func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, 0, "EOF"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			a, c := newAPI(t)
			a.on("GET /socket", tc.answer, tc.answer) // net/http repeats a GET on a connection that it used before
			list, err := c.Sockets(t.Context(), time.Hour)
			if err == nil || list != nil || !strings.Contains(err.Error(), tc.want) || !strings.Contains(err.Error(), "GET /socket") {
				t.Errorf("got %v, %v; want %q", list, err, tc.want)
			}
			var e *APIError
			if errors.As(err, &e) != (tc.status != 0) || e != nil && e.Status != tc.status {
				t.Errorf("got %#v, want status %d", err, tc.status)
			}
			a.noSecrets(err)
			a.mu.Lock()
			a.answers["GET /socket"] = nil
			a.mu.Unlock()
			before := a.count("GET /socket")
			if _, err := c.Sockets(t.Context(), time.Hour); err != nil || a.count("GET /socket") != before+1 {
				t.Errorf("the failure was kept (%v)", err)
			}
		})
	}
}

func TestAnswerThatIsTooLarge(t *testing.T) {
	a, c := newAPI(t)
	a.on("GET /socket", func(w http.ResponseWriter, _ *http.Request) {
		chunk := []byte(strings.Repeat(" ", 1<<20))
		for range maxAnswerBytes/len(chunk) + 1 {
			if _, err := w.Write(chunk); err != nil {
				return
			}
		}
	})
	if _, err := c.Sockets(t.Context(), 0); err == nil || !strings.Contains(err.Error(), "larger than") {
		t.Errorf("got %v", err)
	}
}

func TestObjectsThatLackSomething(t *testing.T) {
	a, c := newAPI(t)
	ctx := t.Context()
	for _, tc := range []struct {
		endpoint, body string
		call           func() error
		want           string
	}{
		{"POST /socket", `{"socket_id":"1"}`, func() error { _, err := c.CreateSocket(ctx, Socket{}); return err }, "lacks socket_id or dnsname"},
		{"POST /socket", `null`, func() error { _, err := c.CreateSocket(ctx, Socket{}); return err }, "lacks socket_id or dnsname"},
		{"PUT /socket/1", `{}`, func() error { _, err := c.UpdateSocket(ctx, Socket{ID: "1"}); return err }, "another socket"},
		{"PUT /socket/1", `{"socket_id":"2","dnsname":"d"}`, func() error { _, err := c.UpdateSocket(ctx, Socket{ID: "1"}); return err }, "another socket"},
		{"POST /socket/1/tunnel", `{"local_port":1}`, func() error { _, err := c.CreateTunnel(ctx, "1"); return err }, "lacks tunnel_id"},
		{"POST /socket/1/tunnel", `{"tunnel_id":"2","local_port":65536}`, func() error { _, err := c.CreateTunnel(ctx, "1"); return err }, "local_port"},
		{"POST /socket/1/tunnel", `{"tunnel_id":"2","local_port":-1}`, func() error { _, err := c.CreateTunnel(ctx, "1"); return err }, "local_port"},
		{"POST /socket/1/tunnel/2/signkey", `{}`, func() error { _, err := c.SignKey(ctx, "1", "2", "key"); return err }, "without signed_ssh_cert"},
	} {
		a.on(tc.endpoint, answer(200, tc.body))
		if err := tc.call(); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s answered %s: got %v, want %q", tc.endpoint, tc.body, err, tc.want)
		}
	}
}

// TestIdsStayInTheirPlace shows that an id from elsewhere can't mean another path.
func TestIdsStayInTheirPlace(t *testing.T) {
	a, c := newAPI(t)
	a.on("GET /socket/a/b?c/tunnel", answer(200, "[]"))
	if _, err := c.Tunnels(t.Context(), "a/b?c"); err != nil {
		t.Error(err)
	}
	a.wantRequests("GET /socket/a/b?c/tunnel", 1) // net/http has decoded it: a%2Fb%3Fc was one segment
}

func TestRetryAfter(t *testing.T) {
	a, c := newAPI(t)
	now := a.clock.Now()
	for value, want := range map[string]time.Duration{
		"":                     0,
		"7":                    7 * time.Second,
		"0":                    0,
		"-5":                   0,
		"-9223372036854775808": 0,
		"86400":                time.Hour,
		"9223372036854775807":  time.Hour,
		"99999999999999999999": 0,
		"soon":                 0,
		now.Add(90 * time.Second).Format(http.TimeFormat): 90 * time.Second,
		now.Add(-time.Second).Format(http.TimeFormat):     0,
		now.Add(1000 * time.Hour).Format(http.TimeFormat): time.Hour,
	} {
		a.on("GET /socket", answer(429, "", "Retry-After", value))
		_, err := c.Sockets(t.Context(), 0)
		if got := RetryAfter(err); err == nil || got != want {
			t.Errorf("Retry-After: %q gives %s, want %s (%v)", value, got, want, err)
		}
	}
	if RetryAfter(errors.New("another")) != 0 || RetryAfter(nil) != 0 {
		t.Error("an error that is not the API's has a RetryAfter")
	}
}

func TestKindsOfErrors(t *testing.T) {
	for status, want := range map[int]struct{ notFound, refused bool }{
		400: {false, true}, 401: {}, 403: {false, true}, 404: {true, false}, 409: {false, true}, 422: {false, true}, 429: {}, 500: {}, 503: {},
	} {
		err := fmt.Errorf("wrapped: %w", &APIError{Op: "GET /socket", Status: status})
		if IsNotFound(err) != want.notFound || IsRefused(err) != want.refused {
			t.Errorf("%d: IsNotFound %v, IsRefused %v", status, IsNotFound(err), IsRefused(err))
		}
	}
}

// TestErrorsHideSecrets has an API that quotes what it was sent.
func TestErrorsHideSecrets(t *testing.T) {
	quote := func(status int) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			var form map[string]string
			_ = json.NewDecoder(r.Body).Decode(&form)
			w.WriteHeader(status)
			_ = json.NewEncoder(w).Encode(map[string]string{"error_message": "bad: " + form["password"] + r.Header.Get("x-access-token")})
		}
	}
	a, c := newAPI(t)
	a.on("POST /login", quote(400))
	_, err := c.Login(t.Context())
	if err == nil || !strings.Contains(err.Error(), "quotes a secret") {
		t.Errorf("got %v", err)
	}
	a.noSecrets(err)
	a.on("GET /socket", quote(500))
	_, err = c.Sockets(t.Context(), 0)
	if err == nil || !strings.Contains(err.Error(), "quotes a secret") {
		t.Errorf("got %v", err)
	}
	a.noSecrets(err)
}

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
	c.cfg.Credentials = func() (string, string, error) { return testEmail, password, missing }
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

// transport is an http.RoundTripper of one function.
type transport func(*http.Request) (*http.Response, error)

func (f transport) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func withTransport(t *testing.T, f transport) *Client {
	t.Helper()
	c, err := New(Config{BaseURL: "https://api.example.com", Credentials: func() (string, string, error) { return testEmail, testPassword, nil }, Transport: f})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestNetworkErrors(t *testing.T) {
	port := 40000
	c := withTransport(t, func(*http.Request) (*http.Response, error) {
		port++
		return nil, &net.OpError{Op: "read", Net: "tcp", Err: context.DeadlineExceeded,
			Source: &net.TCPAddr{IP: net.IPv4(10, 0, 0, 1), Port: port}, Addr: &net.TCPAddr{IP: net.IPv4(10, 0, 0, 2), Port: 443}}
	})
	_, first := c.Login(t.Context())
	_, second := c.Login(t.Context())
	want := "log in: POST /login at api.example.com: read tcp 10.0.0.2:443: context deadline exceeded"
	if !errors.Is(first, context.DeadlineExceeded) || first.Error() != want || second.Error() != want {
		t.Errorf("got  %v\nand  %v\nwant %s", first, second, want)
	}
	var u *url.Error
	if errors.As(first, &u) {
		t.Error("the error holds the URL")
	}
}

// TestNobodyWaitsLongerThanItsContext has an API that never answers.
func TestNobodyWaitsLongerThanItsContext(t *testing.T) {
	asked := make(chan struct{}, 1)
	c := withTransport(t, func(r *http.Request) (*http.Response, error) {
		asked <- struct{}{}
		<-r.Context().Done()
		return nil, r.Context().Err()
	})
	hanging, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := c.Sockets(hanging, 0); !errors.Is(err, context.Canceled) {
			t.Errorf("the first: %v", err)
		}
	})
	<-asked // in the login, with both locks held
	impatient, giveUp := context.WithCancel(t.Context())
	giveUp()
	if _, err := c.Sockets(impatient, time.Hour); !errors.Is(err, context.Canceled) {
		t.Errorf("a list: %v", err)
	}
	if _, err := c.Login(impatient); !errors.Is(err, context.Canceled) {
		t.Errorf("a login: %v", err)
	}
	if err := c.DeleteSocket(impatient, "1"); !errors.Is(err, context.Canceled) {
		t.Errorf("a deletion, which forgets the list: %v", err)
	}
	cancel()
	wg.Wait()
}

func TestListCache(t *testing.T) {
	a, c := newAPI(t)
	ctx := t.Context()
	ask := func(maxAge time.Duration, requests int) {
		t.Helper()
		if _, err := c.Sockets(ctx, maxAge); err != nil {
			t.Fatal(err)
		}
		a.wantRequests("GET /socket", requests)
	}
	ask(time.Hour, 1)
	ask(time.Hour, 1)
	ask(0, 2)
	a.clock.move(10 * time.Second)
	ask(10*time.Second, 2)
	ask(9*time.Second, 3)
	a.on("POST /socket", answer(500, "")) // who knows what it did
	if _, err := c.CreateSocket(ctx, Socket{}); err == nil {
		t.Fatal("no error")
	}
	ask(time.Hour, 4)
	if err := c.DeleteSocket(ctx, "1"); err != nil {
		t.Fatal(err)
	}
	ask(time.Hour, 5)

	// A list that was asked for before a change is not kept after it.
	a.on("GET /socket", func(w http.ResponseWriter, _ *http.Request) {
		if err := c.DeleteSocket(ctx, "2"); err != nil {
			t.Error(err)
		}
		_, _ = io.WriteString(w, `[{"socket_id":"2"}]`)
	})
	ask(0, 6)
	ask(time.Hour, 7)
}

func TestOneListForAllWhoAsk(t *testing.T) {
	a, c := newAPI(t)
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if _, err := c.Sockets(t.Context(), time.Hour); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	a.wantRequests("GET /socket", 1)
	a.wantRequests("POST /login", 1)
}

func TestDeletingWhatIsGone(t *testing.T) {
	a, c := newAPI(t)
	a.on("DELETE /socket/1", answer(404, ""), answer(500, ""))
	a.on("DELETE /socket/1/tunnel/2", answer(404, ""), answer(500, ""))
	for _, del := range []func() error{
		func() error { return c.DeleteSocket(t.Context(), "1") },
		func() error { return c.DeleteTunnel(t.Context(), "1", "2") },
	} {
		if err := del(); err != nil {
			t.Errorf("404: %v", err)
		}
		if err := del(); err == nil {
			t.Error("500 is a success")
		}
	}
}

func TestObserve(t *testing.T) {
	a, c := newAPI(t)
	var mu sync.Mutex
	var seen []string
	c.cfg.Observe = func(endpoint string, status int, took time.Duration) {
		mu.Lock()
		defer mu.Unlock()
		seen = append(seen, fmt.Sprintf("%s %d %s", endpoint, status, took))
	}
	a.on("DELETE /socket/some-id/tunnel/other-id", answer(503, ""))
	if err := c.DeleteTunnel(t.Context(), "some-id", "other-id"); err == nil {
		t.Error("no error")
	}
	if got, want := strings.Join(seen, "; "), "POST /login 200 0s; DELETE /socket/{id}/tunnel/{tid} 503 0s"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestSocketURL(t *testing.T) {
	for _, tc := range []struct {
		kind  string
		ports []int
		want  string
	}{
		{"http", []int{80, 443}, "https://a.example"},
		{"https", []int{443}, "https://a.example"},
		{"http", nil, "https://a.example"},
		{"http", []int{80}, "http://a.example"},
		{"http", []int{8080, 8443}, "https://a.example:8443"},
		{"http", []int{8080}, "http://a.example:8080"},
		{"tcp", []int{20001}, "tcp://a.example:20001"},
		{"tls", []int{20002}, "tls://a.example:20002"},
		{"tcp", nil, "tcp://a.example"},
	} {
		if got := (Socket{DNSName: "a.example", Type: tc.kind, Ports: tc.ports}).URL(); got != tc.want {
			t.Errorf("%s %v: %s, want %s", tc.kind, tc.ports, got, tc.want)
		}
	}
}

// FuzzAnswers lets an API answer anything to anything.
func FuzzAnswers(f *testing.F) {
	f.Add(200, []byte(`[{"socket_id":"1","socket_tcp_ports":[80]}]`), "")
	f.Add(200, []byte(`{"token":"eyJhbGciOiJIUzI1NiJ9.eyJ1c2VyX2lkIjoiYSIsImV4cCI6MWUzMDB9.x"}`), "")
	f.Add(429, []byte(`{"error_message":"\ud800"}`), "9223372036854775807")
	f.Add(204, []byte(nil), "Fri, 31 Dec 9999 23:59:59 GMT")
	f.Add(401, []byte("null"), "-1")
	good := ""
	f.Fuzz(func(t *testing.T, status int, body []byte, retry string) {
		if status < 200 || status > 599 {
			return
		}
		loggedIn := false
		c := withTransport(t, func(r *http.Request) (*http.Response, error) {
			w := httptest.NewRecorder()
			if r.URL.Path == "/login" && !loggedIn && good != "" {
				loggedIn = true
				_, _ = io.WriteString(w, good)
				return w.Result(), nil
			}
			w.Header().Set("Retry-After", retry)
			w.WriteHeader(status)
			_, _ = w.Write(body)
			return w.Result(), nil
		})
		for _, good = range []string{"", `{"token":"eyJhbGciOiJIUzI1NiJ9.eyJ1c2VyX2lkIjoiYSIsImV4cCI6OTk5OTk5OTk5OX0.x"}`} {
			ctx := t.Context()
			_, loginErr := c.Login(ctx)
			sockets, listErr := c.Sockets(ctx, 0)
			for _, s := range sockets {
				if s.ID == "" {
					t.Fatal("a socket without an id")
				}
				_ = s.URL()
			}
			made, createErr := c.CreateSocket(ctx, Socket{})
			if createErr == nil && (made.ID == "" || made.DNSName == "") {
				t.Fatalf("made %+v", made)
			}
			tunnel, tunnelErr := c.CreateTunnel(ctx, "1")
			if tunnelErr == nil && (tunnel.ID == "" || tunnel.LocalPort < 0 || tunnel.LocalPort > 65535) {
				t.Fatalf("made %+v", tunnel)
			}
			signed, signErr := c.SignKey(ctx, "1", "2", "key")
			if signErr == nil && signed.Certificate == "" {
				t.Fatal("signed nothing")
			}
			for _, err := range []error{loginErr, listErr, createErr, tunnelErr, signErr} {
				if err != nil && (len(err.Error()) > 1000 || strings.Contains(err.Error(), testPassword) || strings.ContainsAny(err.Error(), "\n\r")) {
					t.Fatalf("error %q", err)
				}
				if d := RetryAfter(err); d < 0 || d > time.Hour {
					t.Fatalf("RetryAfter %s", d)
				}
			}
		}
	})
}
