package mysocket

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

// newTokenAPI is newAPI for an account with an access token. Waits are noted and take no time.
func newTokenAPI(t *testing.T) (*api, *Client, *[]time.Duration) {
	t.Helper()
	a, c := newAPI(t)
	token := a.tokenOf(jwt.MapClaims{"user_id": testUserID, "type": "token"}) // long-lived: no exp
	a.tokens = append(a.tokens, token)
	c.cfg.Credentials = func() (Account, error) { return Account{Token: token}, nil }
	waits := &[]time.Duration{}
	c.border0.wait = func(ctx context.Context, d time.Duration) error {
		*waits = append(*waits, d)
		return ctx.Err()
	}
	a.on("GET /api/v1/serverinfo", answer(200, `{"data_consistency":{"rx_after_tx_delay_ms":700}}`))
	return a, c, waits
}

func TestBorder0IsWhatATokenSpeaks(t *testing.T) {
	a, c, _ := newTokenAPI(t)
	a.on("GET /api/v1/sockets", func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "Bearer "+a.tokens[0] || r.Header.Get("x-access-token") != "" || r.URL.Query().Get("page") != "1" || r.URL.Query().Get("page_size") != "100" {
			t.Errorf("asked %s with %v", r.URL, r.Header)
		}
		_, _ = io.WriteString(w, `{}`) // what a live one answers for an empty list
	})
	user, err := c.Login(t.Context())
	if want := strings.ReplaceAll(testUserID, "-", ""); err != nil || user != want {
		t.Errorf("user %q, %v; want %q", user, err, want)
	}
	a.wantRequests("GET /api/v1/sockets", 0)
	if list, err := c.Sockets(t.Context(), 0); err != nil || len(list) != 0 {
		t.Errorf("an empty list is %v, %v", list, err)
	}
	a.wantRequests("POST /login", 0)
}

// TestTheAddressMayHoldThePath: a path in the API's address is where the dialect begins.
func TestTheAddressMayHoldThePath(t *testing.T) {
	a, c, _ := newTokenAPI(t)
	c.base.Path = "/elsewhere/v2"
	a.on("GET /elsewhere/v2/sockets", answer(200, `{"list":[]}`))
	if _, err := c.Sockets(t.Context(), 0); err != nil {
		t.Error(err)
	}
	a.wantRequests("GET /elsewhere/v2/sockets", 1)
}

func TestPages(t *testing.T) {
	a, c, _ := newTokenAPI(t)
	const one, two, three = `{"socket_id":"1","name":"k8s---shop--web"}`, `{"socket_id":"2","name":"theirs"}`, `{"socket_id":"3","name":"x----y","display_name":"k8s shop.web"}`
	a.on("GET /api/v1/sockets",
		answer(200, `{"list":[`+one+`,`+two+`],"pagination":{"next_page":2}}`),
		// Somebody made a socket while we read: the second is on this page, too.
		answer(200, `{"list":[`+two+`,`+three+`],"pagination":{"next_page":0}}`))
	list, err := c.Sockets(t.Context(), 0)
	var got []string
	for _, s := range list {
		got = append(got, s.ID+"="+s.Name)
	}
	if want := []string{"1=k8s shop.web", "2=theirs", "3="}; err != nil || !slices.Equal(got, want) {
		t.Errorf("got %q, %v; want %q", got, err, want)
	}
	for name, tc := range map[string]struct{ body, want string }{
		"the same page again":   {`{"pagination":{"next_page":1}}`, "answered page 1 of the list with next_page 1"},
		"an id that is missing": {`{"list":[{"name":"a"}]}`, "lacks socket_id"},
		"a list":                {`[]`, "not the expected JSON"},
	} {
		a.on("GET /api/v1/sockets", answer(200, tc.body))
		if list, err := c.Sockets(t.Context(), 0); err == nil || list != nil || !strings.Contains(err.Error(), tc.want) || !strings.Contains(err.Error(), "GET /sockets") {
			t.Errorf("%s: %v, %v; want %q", name, list, err, tc.want)
		}
	}
	for page := range maxPages {
		a.on("GET /api/v1/sockets", answer(200, fmt.Sprintf(`{"pagination":{"next_page":%d}}`, page+2)))
	}
	if _, err := c.Sockets(t.Context(), 0); err == nil || !strings.Contains(err.Error(), "more than 200 pages") {
		t.Errorf("a list without an end: %v", err)
	}
}

func TestABorder0SocketIsMadeAndChanged(t *testing.T) {
	a, c, _ := newTokenAPI(t)
	const there = `{"socket_id":"1","name":"k8s---shop--web","dnsname":"d","socket_type":"http","display_name":"renamed","description":"by hand","tags":{"team":"a"},` +
		`"recording_enabled":true,"connector_authentication_enabled":true,"upstream_type":"https","cloud_authentication_enabled":true,"cloud_authentication_email_allowed_addressses":["a@example.com"],"alive":true}`
	body := func(want string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			got, _ := io.ReadAll(r.Body)
			if string(got) != want {
				t.Errorf("%s %s with\n%s, want\n%s", r.Method, r.URL.Path, got, want)
			}
			_, _ = io.WriteString(w, there)
		}
	}
	a.on("POST /api/v1/socket", body(`{"name":"k8s---shop--web","description":"ours","socket_type":"http","protected_socket":false,"protected_username":"","protected_password":"","private_socket":false,`+
		`"display_name":"k8s shop.web","recording_enabled":false,"connector_authentication_enabled":false}`))
	made, err := c.CreateSocket(t.Context(), Socket{Name: "k8s shop.web", Type: "http", Description: "ours"})
	if err != nil || made.Name != "k8s shop.web" || made.ID != "1" || made.URL() != "https://d" {
		t.Errorf("made %+v, %v", made, err)
	}
	// What is not ours to set is sent back as it is.
	a.on("GET /api/v1/socket/1", answer(200, there))
	a.on("PUT /api/v1/socket/1", body(`{"socket_id":"1","name":"k8s---shop--web","description":"by hand","socket_type":"http","protected_socket":false,"protected_username":"","protected_password":"","private_socket":false,"tags":{"team":"a"},`+
		`"cloud_authentication_enabled":true,"cloud_authentication_email_allowed_addressses":["a@example.com"],"cloud_authentication_email_allowed_domains":null,`+
		`"upstream_type":"http","upstream_http_hostname":"app.internal","display_name":"k8s shop.web","recording_enabled":true,"connector_authentication_enabled":true}`))
	changed, err := c.UpdateSocket(t.Context(), Socket{ID: "1", Name: "k8s shop.web", Type: "http", Upstream: &Upstream{"http", "app.internal"}})
	if err != nil || changed.Name != "k8s shop.web" {
		t.Errorf("changed %+v, %v", changed, err)
	}
	for _, tc := range []struct {
		endpoint, body string
		call           func() error
		want           string
	}{
		{"POST /api/v1/socket", `{"socket_id":"1"}`, func() error { _, err := c.CreateSocket(t.Context(), Socket{}); return err }, "lacks socket_id or dnsname"},
		{"GET /api/v1/socket/1", `{}`, func() error { _, err := c.UpdateSocket(t.Context(), Socket{ID: "1"}); return err }, "another socket"},
		{"POST /api/v1/socket/1/signkey", `{"host_key":"x"}`, func() error { _, err := c.SignKey(t.Context(), "1", "", "key"); return err }, "without signed_ssh_cert"},
	} {
		a.on(tc.endpoint, answer(200, tc.body))
		if err := tc.call(); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s answered %s: %v, want %q", tc.endpoint, tc.body, err, tc.want)
		}
	}
}

// TestANameThatIsTaken: the list did not show the socket yet, or somebody renamed it in the portal.
func TestANameThatIsTaken(t *testing.T) {
	a, c, _ := newTokenAPI(t)
	const there = `{"socket_id":"1","name":"k8s---shop--web","dnsname":"d","socket_type":"http"}`
	a.on("POST /api/v1/socket", answer(409, `{"status_code":409,"error_message":"taken"}`))
	a.on("GET /api/v1/socket/k8s---shop--web", answer(200, there))
	a.on("PUT /api/v1/socket/1", func(w http.ResponseWriter, r *http.Request) {
		var sent border0Socket
		if err := json.NewDecoder(r.Body).Decode(&sent); err != nil || sent.DisplayName != "k8s shop.web" || sent.Name != "k8s---shop--web" {
			t.Errorf("sent %+v, %v", sent, err)
		}
		_, _ = io.WriteString(w, there)
	})
	if s, err := c.CreateSocket(t.Context(), Socket{Name: "k8s shop.web", Type: "http"}); err != nil || s.ID != "1" || s.Name != "k8s shop.web" {
		t.Errorf("%+v, %v", s, err)
	}
	// A refusal that has another cause is told as it is.
	a.on("POST /api/v1/socket", answer(400, `{"status_code":400,"error_message":"no such type"}`))
	for range 4 {
		a.on("GET /api/v1/socket/k8s---shop--web", answer(404, ""))
	}
	if _, err := c.CreateSocket(t.Context(), Socket{Name: "k8s shop.web", Type: "tcp"}); !IsRefused(err) || !strings.Contains(err.Error(), "no such type") {
		t.Errorf("got %v", err)
	}
	a.wantRequests("PUT /api/v1/socket/1", 1)
}

// TestReplicationLag has an API that does not know for a moment what was just made.
func TestReplicationLag(t *testing.T) {
	signed := answer(200, `{"signed_ssh_cert":"cert","host_key":"key"}`)
	unknown := answer(404, `{"status_code":404,"error_message":"not found","message":"Not Found"}`)
	const endpoint = "POST /api/v1/socket/1/signkey"

	a, c, waits := newTokenAPI(t)
	a.on(endpoint, unknown, unknown, signed)
	if k, err := c.SignKey(t.Context(), "1", "local", "key"); err != nil || k.HostKey != "key" {
		t.Errorf("signed %+v, %v", k, err)
	}
	a.on(endpoint, unknown, unknown, unknown, unknown)
	if _, err := c.SignKey(t.Context(), "1", "local", "key"); !IsNotFound(err) {
		t.Errorf("one that does not come: %v", err)
	}
	want := []time.Duration{100 * time.Millisecond, 200 * time.Millisecond, 100 * time.Millisecond, 200 * time.Millisecond, 400 * time.Millisecond}
	if !slices.Equal(*waits, want) {
		t.Errorf("waited %s, want %s", *waits, want)
	}
	a.wantRequests("GET /api/v1/serverinfo", 1)

	// A socket that is to be deleted may be as new; one that is gone is gone.
	a.on("DELETE /api/v1/socket/1", unknown, answer(204, ""))
	a.on("DELETE /api/v1/socket/2", unknown, unknown, unknown, unknown)
	for _, id := range []string{"1", "2"} {
		if err := c.DeleteSocket(t.Context(), id); err != nil {
			t.Errorf("delete %s: %v", id, err)
		}
	}
	a.wantRequests("DELETE /api/v1/socket/1", 2)

	for body, want := range map[string]time.Duration{
		`{"data_consistency":{"rx_after_tx_delay_ms":0}}`:                   minLag,
		`{"data_consistency":{"rx_after_tx_delay_ms":-5}}`:                  minLag,
		`{"data_consistency":{"rx_after_tx_delay_ms":9223372036854775807}}`: maxLag,
		`{}`:   minLag,
		`[3]`:  minLag,
		`null`: minLag,
	} {
		a, c, waits := newTokenAPI(t)
		a.mu.Lock()
		a.answers["GET /api/v1/serverinfo"] = nil
		a.mu.Unlock()
		a.on("GET /api/v1/serverinfo", answer(200, body))
		a.on(endpoint, unknown, signed)
		if _, err := c.SignKey(t.Context(), "1", "", "key"); err != nil || len(*waits) != 1 || (*waits)[0] != want/7 {
			t.Errorf("%s: waited %s, %v; want %s", body, *waits, err, want/7)
		}
	}
}

func TestNobodyWaitsForALagLongerThanItsContext(t *testing.T) {
	a, c, _ := newTokenAPI(t)
	ctx, cancel := context.WithCancel(t.Context())
	c.border0.wait = func(ctx context.Context, _ time.Duration) error {
		cancel()
		return wait(ctx, time.Hour)
	}
	a.on("POST /api/v1/socket/1/signkey", answer(404, ""))
	if _, err := c.SignKey(ctx, "1", "", "key"); !IsNotFound(err) {
		t.Errorf("got %v", err)
	}
}

func TestTunnelsOfBorder0AreIdsAlone(t *testing.T) {
	a, c, _ := newTokenAPI(t)
	x, err := c.CreateTunnel(t.Context(), "1")
	y, err2 := c.CreateTunnel(t.Context(), "1")
	if err != nil || err2 != nil || len(x.ID) != 36 || x.ID == y.ID || x.LocalPort != 0 {
		t.Errorf("%+v, %+v, %v, %v", x, y, err, err2)
	}
	if list, err := c.Tunnels(t.Context(), "1"); err != nil || len(list) != 0 {
		t.Errorf("%v, %v", list, err)
	}
	if err := c.DeleteTunnel(t.Context(), "1", x.ID); err != nil {
		t.Error(err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.requests) > 0 {
		t.Errorf("asked %q", a.requests)
	}
}

func TestAccessTokensThatCantBeUsed(t *testing.T) {
	for name, tc := range map[string]struct {
		token any
		want  string
	}{
		"no JWT":               {"eyJ.secret.x", "is no JWT"},
		"of no user":           {jwt.MapClaims{"service_account": "ci"}, "lacks user_id"},
		"of a strange user":    {jwt.MapClaims{"user_id": "root\n"}, "lacks user_id"},
		"expired":              {jwt.MapClaims{"user_id": testUserID, "exp": 1000}, "it expired at 1970-01-01T00:16:40Z"},
		"revoked":              {jwt.MapClaims{"user_id": testUserID}, "it is not known there, or was revoked"},
		"revoked, with an end": {jwt.MapClaims{"user_id": testUserID, "exp": 1e10}, "it is not known there, or was revoked"},
	} {
		a, c, _ := newTokenAPI(t)
		token, ok := tc.token.(string)
		if !ok {
			token = a.tokenOf(tc.token.(jwt.MapClaims))
		}
		a.tokens = []string{token}
		c.cfg.Credentials = func() (Account, error) { return Account{Token: token}, nil }
		refuse := func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(http.StatusUnauthorized)
			_, _ = fmt.Fprintf(w, `{"status_code":401,"error_message":"no good: %s"}`, r.Header.Get("Authorization"))
		}
		a.on("GET /api/v1/sockets", refuse)
		for range 3 {
			_, err := c.Sockets(t.Context(), 0)
			if !errors.Is(err, ErrCredentials) || !strings.Contains(err.Error(), "access token in the account's Secret") || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("%s: got %v, want %q", name, err, tc.want)
			}
			a.noSecrets(err)
		}
		if n := a.count("GET /api/v1/sockets"); n > 1 {
			t.Errorf("%s: shown to the API %d times within the pause", name, n)
		}
		if strings.HasPrefix(name, "revoked") { // and was granted again
			a.clock.move(refusedLoginPause + time.Second)
			a.on("GET /api/v1/sockets", answer(200, "{}"))
			if _, err := c.Sockets(t.Context(), 0); err != nil {
				t.Errorf("%s: after the pause: %v", name, err)
			}
		}
	}
}

// TestAnotherKindOfAccount changes the Secret from one kind to the other and back, while requests are made.
func TestAnotherKindOfAccount(t *testing.T) {
	a, c, _ := newTokenAPI(t)
	token := Account{Token: a.tokens[0]}
	account := Account{Email: testEmail, Password: testPassword}
	c.cfg.Credentials = func() (Account, error) { return account, nil }
	ask := func(endpoint string, requests int) {
		t.Helper()
		if _, err := c.Sockets(t.Context(), time.Hour); err != nil {
			t.Fatal(err)
		}
		a.wantRequests(endpoint, requests)
	}
	ask("GET /socket", 1)
	account = token
	a.on("GET /api/v1/sockets", answer(200, "{}"))
	ask("GET /api/v1/sockets", 1) // nor is the old account's list used
	ask("GET /api/v1/sockets", 1)
	account = Account{Email: testEmail, Password: testPassword}
	ask("GET /socket", 2)
	a.wantRequests("POST /login", 2)

	// In the middle of a request: what was asked in the one dialect is asked again in the other.
	a.on("GET /socket", func(w http.ResponseWriter, _ *http.Request) {
		account = token
		w.WriteHeader(http.StatusUnauthorized)
	})
	a.on("GET /api/v1/sockets", answer(200, `{"list":[{"socket_id":"1","name":"k8s---shop--web"}]}`))
	if list, err := c.Sockets(t.Context(), 0); err != nil || len(list) != 1 || list[0].Name != "k8s shop.web" {
		t.Errorf("%+v, %v", list, err)
	}
}

func TestErrorsOfBorder0(t *testing.T) {
	a, c, _ := newTokenAPI(t)
	for _, tc := range []struct {
		answer http.HandlerFunc
		check  func(error) bool
		want   string
	}{
		{answer(429, `{"status_code":429,"error_message":"slow down"}`, "Retry-After", "7"), func(err error) bool { return RetryAfter(err) == 7*time.Second }, "429 Too Many Requests: slow down"},
		{answer(403, `{"status_code":403,"error_message":"forbidden: read only"}`), IsRefused, "403 Forbidden: forbidden: read only"},
		{answer(400, `{"status_code":400,"message":"the fallback"}`), IsRefused, "400 Bad Request: the fallback"},
		{answer(500, ``), func(err error) bool { return !IsRefused(err) && !errors.Is(err, ErrCredentials) }, "500 Internal Server Error"},
		{breakOff, func(err error) bool { return !IsRefused(err) }, "read the answer"},
	} {
		a.on("GET /api/v1/sockets", tc.answer)
		if _, err := c.Sockets(t.Context(), 0); err == nil || !tc.check(err) || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("got %v, want %q", err, tc.want)
		}
	}
}

func TestParseAccount(t *testing.T) {
	const allowed = `; it must have either "email" and "password", or "token"`
	for _, tc := range []struct {
		secret map[string]string
		want   Account
		err    string
	}{
		{map[string]string{"email": "a", "password": "b"}, Account{Email: "a", Password: "b"}, ""},
		{map[string]string{"token": "c"}, Account{Token: "c"}, ""},
		{map[string]string{}, Account{}, "the account's Secret has none of the keys" + allowed},
		{map[string]string{"email": "a"}, Account{}, `the account's Secret has no key "password"` + allowed},
		{map[string]string{"password": "a"}, Account{}, `the account's Secret has no key "email"` + allowed},
		{map[string]string{"token": "c", "email": "a", "password": "b"}, Account{}, `the account's Secret has the key "token" and also "email"` + allowed},
		{map[string]string{"token": "c", "password": "b"}, Account{}, `the account's Secret has the key "token" and also "password"` + allowed},
		{map[string]string{"token": "", "email": "a", "password": "b"}, Account{}, `the key "token" of the account's Secret is empty`},
		{map[string]string{"email": "", "password": "b"}, Account{}, `the key "email" of the account's Secret is empty`},
	} {
		got, err := ParseAccount(func(key string) (string, bool) { v, ok := tc.secret[key]; return v, ok })
		if got != tc.want || (err == nil) != (tc.err == "") || err != nil && err.Error() != tc.err {
			t.Errorf("%q: %+v, %v; want %+v, %s", tc.secret, got, err, tc.want, tc.err)
		}
	}
}
