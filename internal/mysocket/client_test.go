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

	"golang.org/x/time/rate"
)

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

// transport is an http.RoundTripper of one function.
type transport func(*http.Request) (*http.Response, error)

func (f transport) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func withTransport(t *testing.T, f transport) *Client {
	t.Helper()
	c, err := New(Config{BaseURL: "https://api.example.com", Credentials: func() (Account, error) { return Account{Email: testEmail, Password: testPassword}, nil }, Transport: f})
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
	answers := []http.HandlerFunc{answer(404, ""), answer(200, " {} \n"), answer(500, ""), answer(200, "<html>")}
	a.on("DELETE /socket/1", answers...)
	a.on("DELETE /socket/1/tunnel/2", answers...)
	for _, del := range []func() error{
		func() error { return c.DeleteSocket(t.Context(), "1") },
		func() error { return c.DeleteTunnel(t.Context(), "1", "2") },
	} {
		for _, good := range []string{"404", "200 with JSON"} {
			if err := del(); err != nil {
				t.Errorf("%s: %v", good, err)
			}
		}
		for _, bad := range []string{"500", "200 with a page"} {
			if err := del(); err == nil {
				t.Errorf("%s is a success", bad)
			}
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
	f.Add(200, []byte(`{"list":[{"socket_id":"1","name":"k8s---shop--web"}],"pagination":{"next_page":9223372036854775807}}`), "")
	f.Add(404, []byte(`{"status_code":404,"message":"x"}`), "")
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
		// The same answers in the other dialect.
		token := withTransport(t, func(r *http.Request) (*http.Response, error) {
			w := httptest.NewRecorder()
			w.Header().Set("Retry-After", retry)
			w.WriteHeader(status)
			_, _ = w.Write(body)
			return w.Result(), nil
		})
		const access = "eyJhbGciOiJIUzI1NiJ9.eyJ1c2VyX2lkIjoiYSJ9.x"
		token.cfg.Credentials = func() (Account, error) { return Account{Token: access}, nil }
		token.border0.wait = func(context.Context, time.Duration) error { return nil }
		// Its own limit would make the long list of a strange API last.
		token.limiter = rate.NewLimiter(rate.Inf, 1)
		sockets, listErr := token.Sockets(t.Context(), 0)
		for _, s := range sockets {
			if s.ID == "" {
				t.Fatal("a socket without an id")
			}
		}
		made, createErr := token.CreateSocket(t.Context(), Socket{Name: "k8s shop.web"})
		if createErr == nil && (made.ID == "" || made.DNSName == "") {
			t.Fatalf("made %+v", made)
		}
		_, updateErr := token.UpdateSocket(t.Context(), Socket{ID: "1"})
		signed, signErr := token.SignKey(t.Context(), "1", "2", "key")
		if signErr == nil && signed.Certificate == "" {
			t.Fatal("signed nothing")
		}
		for _, err := range []error{listErr, createErr, updateErr, signErr} {
			if err != nil && (len(err.Error()) > 1000 || strings.Contains(err.Error(), access) || strings.ContainsAny(err.Error(), "\n\r")) {
				t.Fatalf("error %q", err)
			}
		}
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
