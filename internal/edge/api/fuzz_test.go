package api

import (
	"bufio"
	"encoding/json"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/crypto/bcrypt"

	"github.com/mysocketio/mysocket-injector/internal/edge/pki"
	"github.com/mysocketio/mysocket-injector/internal/edge/store"
)

// noHooks stands for an edge without connections.
type noHooks struct{ reserved atomic.Int64 }

func (h *noHooks) ReservePort() (int, error) { return 20000 + int(h.reserved.Add(1)), nil }
func (h *noHooks) PortReleased(int)          {}

// FuzzBodies sends any body to every route that reads one. Whatever it is, the answer is JSON, and no fault of ours.
func FuzzBodies(f *testing.F) {
	st, err := store.Open(filepath.Join(f.TempDir(), "x.db"), nil)
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = st.Close() })
	keys, err := pki.Load(st, "test", nil)
	if err != nil {
		f.Fatal(err)
	}
	a := New(Config{Store: st, Keys: keys, Hooks: &noHooks{}, Log: slog.New(slog.DiscardHandler), Domain: "edge.test",
		WebPorts: []int{80, 443}, AllowRegistration: true, PasswordCost: bcrypt.MinCost})
	user, err := AddUser(st, NewUser{Name: "N", Email: "n@example.com", Password: "long enough"}, bcrypt.MinCost)
	if err != nil {
		f.Fatal(err)
	}
	answer, err := a.token(user)
	if err != nil {
		f.Fatal(err)
	}
	token := answer.(tokenAnswer).Token
	k, tunnels, err := st.CreateSocket(store.Socket{UserID: user.ID, Name: "n", Type: store.TypeHTTP}, "edge.test", 1)
	if err != nil {
		f.Fatal(err)
	}
	access, _, err := AddAccessToken(st, keys.TokenKey, user.ID, "fuzz", 0)
	if err != nil {
		f.Fatal(err)
	}
	routes := []struct{ method, path string }{
		{"POST", "/api/v1/socket"}, {"PUT", "/api/v1/socket/" + k.ID}, {"POST", "/api/v1/socket/n/signkey"},
		{"POST", "/login"}, {"POST", "/login/refresh"}, {"POST", "/user"}, {"POST", "/socket"}, {"POST", "/connect"},
		{"PUT", "/socket/" + k.ID}, {"POST", "/socket/" + k.ID + "/tunnel"}, {"POST", "/socket/" + k.ID + "/signkey"},
		{"POST", "/socket/" + k.ID + "/tunnel/" + tunnels[0].ID + "/signkey"},
	}
	for _, seed := range []string{
		"null", "{}", "", "[]", "3", `{"name":"n"}`, `{"name":"n","socket_type":"tcp"}`, `{"name":"n","socket_type":"tls"}`,
		`{"name":"n","protected_socket":true,"protected_username":"u","protected_password":"p"}`, `{"name":"n","tags":{"a":"b"}}`,
		`{"name":"n","display_name":"N","recording_enabled":true}`, `{"name":"k8s---shop--web","display_name":"k8s shop.web"}`,
		`{"ssh_public_key":"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl"}`,
		`{"email":"n@example.com","password":"long enough"}`, `{"name":"\u0000"}`, `{"name":`,
	} {
		for i := range routes {
			f.Add(uint8(i), seed)
		}
	}
	f.Fuzz(func(t *testing.T, route uint8, body string) {
		r := routes[int(route)%len(routes)]
		req := httptest.NewRequest(r.method, r.path, strings.NewReader(body))
		req.Header.Set("X-Access-Token", token)
		if strings.HasPrefix(r.path, "/api/v1/") {
			req.Header.Set("X-Access-Token", access)
		}
		rec := httptest.NewRecorder()
		a.ServeHTTP(rec, req)
		if rec.Code >= http.StatusInternalServerError {
			t.Fatalf("%s %s %q: %d %s", r.method, r.path, body, rec.Code, rec.Body)
		}
		if !json.Valid(rec.Body.Bytes()) {
			t.Fatalf("%s %s %q: the answer is not JSON: %q", r.method, r.path, body, rec.Body)
		}
		var socket socketAnswer
		if rec.Code == http.StatusOK && json.Unmarshal(rec.Body.Bytes(), &socket) == nil && socket.ProtectedPassword != "" {
			t.Fatalf("the answer carries the socket's password: %s", rec.Body)
		}
	})
}

// FuzzTokens presents anything as a token, in both dialects and both headers. Only the right one is let in.
func FuzzTokens(f *testing.F) {
	b := newBench(f)
	_, classic, access := b.account("owner@example.com")
	_, other, _ := b.account("other@example.com")
	parts := strings.Split(classic, ".")
	for _, seed := range []string{
		"", ".", "..", "...", "x.y.z", classic, access, other, classic + " ", parts[0] + ".." + parts[2], parts[0] + "." + parts[1] + ".",
		"eyJhbGciOiJub25lIn0." + parts[1] + ".", strings.Repeat("x", 5000), strings.Repeat(".", 5000), "Bearer " + access, "\x00", "eyJhbGciOiJIUzI1NiJ9.e30.",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, token string) {
		for _, path := range []string{"/organization", "/api/v1/sockets"} {
			for header, value := range map[string]string{"X-Access-Token": token, "Authorization": "Bearer " + token} {
				req := httptest.NewRequest("GET", path, nil)
				req.Header.Set(header, value)
				rec := httptest.NewRecorder()
				b.ServeHTTP(rec, req)
				right := token == access
				if path == "/organization" {
					right = token == classic || token == other
				}
				if rec.Code != 401 && (rec.Code != 200 || !right) {
					t.Errorf("%s with %s %q: %d %s", path, header, value, rec.Code, rec.Body)
				}
			}
			b.clock = b.clock.Add(time.Second) // lest the account's requests run out
			if b.clock.Sub(began) > time.Hour {
				b.clock = began
			}
		}
	})
}

var began = time.Now()

// FuzzPaths asks for anything, with any method. What comes back is JSON and no fault of ours, and what is not there stays away.
func FuzzPaths(f *testing.F) {
	b := newBench(f)
	_, classic, access := b.account("owner@example.com")
	for _, path := range []string{
		"", "/", "//", "/socket/..", "/socket/%2e%2e/x", "/socket//tunnel", "/socket/\x00", "/socket/ü", "/api/v1/socket/", "/api/v1/socket/a/b/c",
		"/api/v1", "/api/v1/sockets", "/socket/00000000-0000-0000-0000-000000000000", "/socket/00000000-0000-0000-0000-00000000000-",
		"/user/" + strings.Repeat("x", 3000), "/connect?x", "*", "x",
	} {
		for _, method := range []string{"GET", "POST", "PUT", "DELETE", "CONNECT", "", "x\n"} {
			f.Add(method, path, "page=1&name=%00")
		}
	}
	f.Fuzz(func(t *testing.T, method, path, query string) {
		req := httptest.NewRequest("GET", "/", strings.NewReader("null"))
		req.Method, req.URL.Path, req.URL.RawQuery = method, path, query
		req.Header.Set("X-Access-Token", classic)
		if inBorder0(req) {
			req.Header.Set("X-Access-Token", access)
		}
		b.clock = began
		rec := httptest.NewRecorder()
		b.ServeHTTP(rec, req)
		if rec.Code >= http.StatusInternalServerError {
			t.Fatalf("%q %q: %d %s", method, path, rec.Code, rec.Body)
		}
		if rec.Code != http.StatusMovedPermanently && rec.Code != http.StatusTemporaryRedirect && rec.Code != http.StatusNoContent && !json.Valid(rec.Body.Bytes()) {
			t.Fatalf("%q %q: %d with %q", method, path, rec.Code, rec.Body)
		}
	})
}

// FuzzHostnames: a host name that the API takes can be sent as a Host header.
func FuzzHostnames(f *testing.F) {
	for _, seed := range []string{"", "a", "a.example", "a.example:80", "-a", "a-", "a b", "a\r\nX: y", "[::1]", "a/b", "ü.example", "A.B:99999", strings.Repeat("a", 300), "a..b", "a\x00"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, name string) {
		if checkHostname(name, store.TypeHTTP) != nil || name == "" {
			return
		}
		if strings.ContainsAny(name, " \t\r\n\x00/\\@?#[]") || len(name) > 260 {
			t.Errorf("%q was taken", name)
		}
		req, err := http.ReadRequest(bufio.NewReader(strings.NewReader("GET / HTTP/1.1\r\nHost: " + name + "\r\n\r\n")))
		if err != nil || req.Host != name {
			t.Errorf("%q is no Host header: %v", name, err)
		}
	})
}
