package api

import (
	"encoding/json"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

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
