package api

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/bcrypt"

	"github.com/mysocketio/mysocket-injector/internal/edge/pki"
	"github.com/mysocketio/mysocket-injector/internal/edge/store"
)

// bench is an API without an edge, and its clock.
type bench struct {
	*API
	t     testing.TB
	store *store.Store
	keys  *pki.Keys
	clock time.Time
}

func newBench(t testing.TB) *bench {
	t.Helper()
	b := &bench{t: t, clock: time.Now()}
	now := func() time.Time { return b.clock }
	var err error
	if b.store, err = store.Open(filepath.Join(t.TempDir(), "x.db"), now); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.store.Close() })
	if b.keys, err = pki.Load(b.store, "test", now); err != nil {
		t.Fatal(err)
	}
	b.API = New(Config{Store: b.store, Keys: b.keys, Hooks: &noHooks{}, Log: slog.New(slog.DiscardHandler), Domain: "edge.test",
		WebPorts: []int{80, 443}, AllowRegistration: true, PasswordCost: bcrypt.MinCost, Now: now})
	return b
}

// account makes an account and returns it with a token of each dialect.
func (b *bench) account(email string) (user store.User, classic, access string) {
	b.t.Helper()
	user, err := AddUser(b.store, NewUser{Name: "N", Email: email, Password: "long enough"}, bcrypt.MinCost)
	if err != nil {
		b.t.Fatal(err)
	}
	answer, err := b.token(user)
	if err != nil {
		b.t.Fatal(err)
	}
	if access, _, err = AddAccessToken(b.store, b.keys.TokenKey, user.ID, "of the test", 0); err != nil {
		b.t.Fatal(err)
	}
	return user, answer.(tokenAnswer).Token, access
}

func (b *bench) send(method, path, body, token, remote string) *httptest.ResponseRecorder {
	b.t.Helper()
	req := httptest.NewRequest(method, path, strings.NewReader(body))
	req.Header.Set("X-Access-Token", token)
	if remote != "" {
		req.RemoteAddr = remote
	}
	rec := httptest.NewRecorder()
	b.ServeHTTP(rec, req)
	return rec
}

func (b *bench) login(email, password, remote string) int {
	b.t.Helper()
	body, err := json.Marshal(map[string]string{"email": email, "password": password})
	if err != nil {
		b.t.Fatal(err)
	}
	rec := b.send("POST", "/login", string(body), "", remote)
	if rec.Code == http.StatusTooManyRequests {
		if wait, err := strconv.Atoi(rec.Header().Get("Retry-After")); err != nil || wait < 1 {
			b.t.Errorf("429 with Retry-After %q", rec.Header().Get("Retry-After"))
		}
	}
	return rec.Code
}

// TestManyAddressesAgainstOneAccount: who has a network of addresses gets no more tries at an account, can't lock its owner
// out, and can't tell whether there is an account.
func TestManyAddressesAgainstOneAccount(t *testing.T) {
	b := newBench(t)
	b.account("owner@example.com")
	b.account("other@example.com")
	const home = "192.0.2.1:1"
	if status := b.login("owner@example.com", "long enough", home); status != 200 {
		t.Fatalf("the owner's login: %d", status)
	}
	addresses := 0
	guess := func(email string) int {
		addresses++
		return b.login(email, "wrong password", fmt.Sprintf("10.%d.%d.%d:1", addresses>>16, addresses>>8&255, addresses&255))
	}
	for _, email := range []string{"owner@example.com", "nobody@example.com"} {
		statuses := map[int]int{}
		for range maxAccountFailures + 20 {
			statuses[guess(email)]++
		}
		if statuses[401] != maxAccountFailures || statuses[429] != 20 {
			t.Errorf("guesses for %s were answered %v", email, statuses)
		}
	}
	if status := b.login("OWNER@example.com", "long enough", home); status != 200 {
		t.Errorf("the owner is locked out of an address that is familiar: %d", status)
	}
	if status := b.login("owner@example.com", "long enough", "192.0.2.2:1"); status != 429 {
		t.Errorf("a new address during the attack: %d", status)
	}
	if status := guess("other@example.com"); status != 401 {
		t.Errorf("another account suffers: %d", status)
	}
	b.clock = b.clock.Add(failureRefill + time.Second)
	if status := b.login("owner@example.com", "long enough", "192.0.2.2:1"); status != 200 {
		t.Errorf("a new address after the wait: %d", status)
	}
	// A refusal that is the account's costs the address nothing: it could have tried maxFailures times besides.
	for range 3 * maxFailures {
		b.login("nobody@example.com", "wrong password", "192.0.2.3:1")
	}
	if status := b.login("other@example.com", "long enough", "192.0.2.3:1"); status != 200 {
		t.Errorf("the address pays for what others did: %d", status)
	}
}

// TestLoginsForgets: neither addresses nor e-mail addresses that strangers make up are remembered without end.
func TestLoginsForgets(t *testing.T) {
	now := time.Unix(1000, 0)
	l := newLogins(func() time.Time { return now })
	for i := range maxAddresses + 1000 {
		if a, err := l.noAccount(fmt.Sprint(i)); err == nil {
			a.failed()
		}
		l.welcome("user", fmt.Sprintf("10.%d.%d.%d:1", i>>16, i>>8&255, i&255))
	}
	if n := len(l.unknown.buckets); n > maxAddresses {
		t.Errorf("%d e-mail addresses are remembered", n)
	}
	if n := len(l.familiar["user"]); n != maxFamiliar {
		t.Errorf("%d addresses of an account are remembered", n)
	}
}

func TestRequestsOfAnAccountAreBounded(t *testing.T) {
	b := newBench(t)
	_, token, access := b.account("owner@example.com")
	_, other, _ := b.account("other@example.com")
	for i := range requestBurst {
		if rec := b.send("GET", "/organization", "", token, ""); rec.Code != 200 {
			t.Fatalf("request %d: %d %s", i, rec.Code, rec.Body)
		}
	}
	for _, r := range []struct{ path, token string }{{"/organization", token}, {"/api/v1/sockets", access}} {
		rec := b.send("GET", r.path, "", r.token, "")
		if rec.Code != 429 || rec.Header().Get("Retry-After") != "1" || !strings.Contains(rec.Body.String(), "too many requests of this account") {
			t.Errorf("%s: one too many: %d, Retry-After %q, %s", r.path, rec.Code, rec.Header().Get("Retry-After"), rec.Body)
		}
	}
	if rec := b.send("GET", "/organization", "", other, ""); rec.Code != 200 {
		t.Errorf("another account: %d", rec.Code)
	}
	b.clock = b.clock.Add(time.Second)
	for i := range int(time.Second / requestRefill) {
		if rec := b.send("GET", "/organization", "", token, ""); rec.Code != 200 {
			t.Fatalf("a second later, request %d: %d", i, rec.Code)
		}
	}
	if rec := b.send("GET", "/organization", "", token, ""); rec.Code != 429 {
		t.Errorf("a second later, one too many: %d", rec.Code)
	}
	b.clock = b.clock.Add(-3 * time.Hour) // and the clock goes back
	b.send("GET", "/organization", "", token, "")
	b.clock = b.clock.Add(time.Second)
	if rec := b.send("GET", "/organization", "", token, ""); rec.Code != 200 {
		t.Errorf("after the clock went back: %d", rec.Code)
	}
}

func TestRatesForget(t *testing.T) {
	now := time.Unix(1000, 0)
	r := newRates(func() time.Time { return now })
	for i := range 10 * maxRates {
		if _, err := r.begin(fmt.Sprint(i)); err != nil {
			t.Fatal(err)
		}
		now = now.Add(time.Second)
	}
	if n := len(r.buckets); n > maxRates {
		t.Errorf("%d accounts are remembered", n)
	}
}

// TestAccountsSeeOnlyTheirOwn sends every path that names an object, in both dialects, with the ids of another account.
func TestAccountsSeeOnlyTheirOwn(t *testing.T) {
	b := newBench(t)
	owner, _, _ := b.account("owner@example.com")
	stranger, classic, access := b.account("stranger@example.com")
	theirs, tunnels, err := b.store.CreateSocket(store.Socket{UserID: owner.ID, Name: "theirs", Type: store.TypeHTTP}, "edge.test", 1)
	if err != nil {
		t.Fatal(err)
	}
	mine, _, err := b.store.CreateSocket(store.Socket{UserID: stranger.ID, Name: "mine", Type: store.TypeHTTP}, "edge.test", 1)
	if err != nil {
		t.Fatal(err)
	}
	key := `{"ssh_public_key": "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl"}`
	foreign := theirs.ID + "/tunnel/" + tunnels[0].ID
	crossed := mine.ID + "/tunnel/" + tunnels[0].ID // another's tunnel through one's own socket
	for _, c := range []struct{ method, path, body string }{
		{"GET", "/user/" + owner.ID, ""},
		{"GET", "/socket/" + theirs.ID, ""},
		{"PUT", "/socket/" + theirs.ID, `{"name": "stolen"}`},
		{"DELETE", "/socket/" + theirs.ID, ""},
		{"POST", "/socket/" + theirs.ID + "/signkey", key},
		{"GET", "/socket/" + theirs.ID + "/tunnel", ""},
		{"POST", "/socket/" + theirs.ID + "/tunnel", ""},
		{"GET", "/socket/" + foreign, ""},
		{"DELETE", "/socket/" + foreign, ""},
		{"POST", "/socket/" + foreign + "/signkey", key},
		{"GET", "/socket/" + crossed, ""},
		{"DELETE", "/socket/" + crossed, ""},
		{"POST", "/socket/" + crossed + "/signkey", key},
		{"GET", "/api/v1/socket/" + theirs.ID, ""},
		{"GET", "/api/v1/socket/theirs", ""},
		{"PUT", "/api/v1/socket/" + theirs.ID, `{"description": "stolen"}`},
		{"PUT", "/api/v1/socket/theirs", `{"description": "stolen"}`},
		{"DELETE", "/api/v1/socket/" + theirs.ID, ""},
		{"DELETE", "/api/v1/socket/theirs", ""},
		{"POST", "/api/v1/socket/" + theirs.ID + "/signkey", key},
		{"POST", "/api/v1/socket/theirs/signkey", key},
	} {
		token := classic
		if strings.HasPrefix(c.path, border0Prefix) {
			token = access
		}
		rec := b.send(c.method, c.path, c.body, token, "")
		missing := b.send(c.method, strings.NewReplacer(theirs.ID, stranger.ID, tunnels[0].ID, stranger.ID, "theirs", "nothing", owner.ID, mine.ID).Replace(c.path), c.body, token, "")
		if rec.Code != 404 || missing.Code != 404 || rec.Body.String() != missing.Body.String() {
			t.Errorf("%s %s: %d %s, and for what is not there %d %s", c.method, c.path, rec.Code, rec.Body, missing.Code, missing.Body)
		}
	}
	for _, path := range []string{"/socket", "/connect", "/api/v1/sockets", "/api/v1/sockets?name=theirs", "/organization"} {
		token := classic
		if strings.HasPrefix(path, border0Prefix) {
			token = access
		}
		if rec := b.send("GET", path, "", token, ""); rec.Code != 200 || strings.Contains(rec.Body.String(), "theirs") || strings.Contains(rec.Body.String(), owner.ID) {
			t.Errorf("GET %s: %d %s", path, rec.Code, rec.Body)
		}
	}
	if k, err := b.store.Socket(theirs.ID); err != nil || k.Name != "theirs" || k.Description != "" || len(b.store.Tunnels(theirs.ID)) != 1 {
		t.Errorf("the other's socket is %+v, %v", k, err)
	}
}
