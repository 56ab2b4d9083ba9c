package edge_test

import (
	"fmt"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mysocketio/mysocket-injector/internal/edge"
	"github.com/mysocketio/mysocket-injector/internal/edge/edgetest"
)

// v1 is where the border0 dialect is.
const v1 = "/api/v1"

// loginWithToken is login, in the border0 dialect.
func loginWithToken(t testing.TB, e *edgetest.Edge) *account {
	t.Helper()
	return &account{t: t, edge: e, client: e.APIClient(t), token: e.Token}
}

type refusal struct {
	Status       int    `json:"status_code"`
	ErrorMessage string `json:"error_message"`
	Message      string `json:"message"`
}

func (a *account) refused(status int, message, method, path string, body any) {
	a.t.Helper()
	var r refusal
	if got := a.call(method, v1+path, body, &r); got != status || r.Status != status || !strings.Contains(r.ErrorMessage, message) || r.Message != http.StatusText(status) {
		a.t.Errorf("%s %s %v: %d %+v, want %d with %q", method, path, body, got, r, status, message)
	}
}

func TestBorder0Refusals(t *testing.T) {
	e := edgetest.Start(t)
	a := loginWithToken(t, e)
	var s socket
	a.must("POST", v1+"/socket", map[string]any{"name": "one"}, &s)
	a.must("POST", v1+"/socket", map[string]any{"name": "two"}, nil)
	named := func(name string) map[string]any { return map[string]any{"name": name} }
	for _, name := range []string{"A", "a b", "a.b", "a_b", "-a", "a-", strings.Repeat("a", 64), "ü"} {
		a.refused(400, "allowed are up to 63 lower-case letters, digits and dashes", "POST", "/socket", named(name))
		a.refused(400, "allowed are up to 63", "PUT", "/socket/one", named(name))
	}
	a.refused(400, "name is missing", "POST", "/socket", "null")
	a.refused(409, `a socket named "one" already; names are unique`, "POST", "/socket", named("one"))
	a.refused(409, `a socket named "two" already`, "PUT", "/socket/one", named("two"))
	with := func(field string, value any) map[string]any { return map[string]any{"name": "x", field: value} }
	a.refused(400, `socket_type "ssh" is not supported`, "POST", "/socket", with("socket_type", "ssh"))
	a.refused(400, `socket_type "database"`, "POST", "/socket", with("socket_type", "database"))
	a.refused(400, "recording_enabled is not supported", "POST", "/socket", with("recording_enabled", true))
	a.refused(400, "connector_authentication_enabled is not supported", "POST", "/socket", with("connector_authentication_enabled", true))
	a.refused(400, "cloud authentication", "POST", "/socket", with("cloud_authentication_enabled", true))
	a.refused(400, "display_name must not hold control characters", "POST", "/socket", with("display_name", "a\nb"))
	a.refused(400, "socket_type cannot change", "PUT", "/socket/"+s.ID, with("socket_type", "tcp"))
	a.refused(400, "the body is not JSON", "POST", "/socket", "[")
	a.refused(400, "ssh_public_key", "POST", "/socket/one/signkey", "null")
	a.refused(404, "not found", "GET", "/socket/none", nil)
	a.refused(404, "not found", "DELETE", "/socket/00000000-0000-0000-0000-000000000000", nil)
	a.refused(404, "nothing at /api/v1/nothing", "GET", "/nothing", nil)
	a.refused(404, "nothing at", "POST", "/socket/one/tunnel", nil) // there are no tunnel objects
	a.refused(405, "use GET", "DELETE", "/sockets", nil)
	for _, query := range []string{"page=0", "page=x", "page_size=0", "page_size=1001", "page=-1", "page=99999999999999999999"} {
		a.refused(400, "is not a number from 1 to", "GET", "/sockets?"+query, nil)
	}
	if list := e.Tunnels(); len(list) != 2 {
		t.Errorf("there are %+v", list)
	}
	// Names are one account's.
	if _, err := e.AddUser(edge.NewUser{Email: "other@example.com", Password: "long enough"}); err != nil {
		t.Fatal(err)
	}
	other := *a
	var err error
	if other.token, err = e.AddToken(edge.NewToken{Email: "other@example.com"}); err != nil {
		t.Fatal(err)
	}
	other.refused(404, "not found", "GET", "/socket/one", nil)
	other.refused(404, "not found", "GET", "/socket/"+s.ID, nil)
	other.must("POST", v1+"/socket", named("one"), nil)
	// A name that became free can be had.
	a.must("PUT", v1+"/socket/one", named("three"), nil)
	a.must("POST", v1+"/socket", named("one"), nil)
	a.must("DELETE", v1+"/socket/one", nil, nil)
	a.refused(404, "not found", "GET", "/socket/one", nil)
}

func TestPagesOfSockets(t *testing.T) {
	e := edgetest.Start(t)
	a := loginWithToken(t, e)
	for i := range 5 {
		a.must("POST", v1+"/socket", map[string]any{"name": fmt.Sprintf("s%d", i), "display_name": fmt.Sprintf("S %d", i)}, nil)
	}
	for query, want := range map[string]string{
		"":                       "s0 s1 s2 s3 s4 next 0 of 5, 1 pages",
		"page=1&page_size=2":     "s0 s1 next 2 of 5, 3 pages",
		"page=2&page_size=2":     "s2 s3 next 3 of 5, 3 pages",
		"page=3&page_size=2":     "s4 next 0 of 5, 3 pages",
		"page=4&page_size=2":     "next 0 of 5, 3 pages",
		"page=1048576":           "next 0 of 5, 1 pages",
		"name=s3":                "s3 next 0 of 1, 1 pages",
		"name=none&page_size=10": "next 0 of 0, 0 pages",
	} {
		var page struct {
			List []struct {
				Name        string `json:"name"`
				DisplayName string `json:"display_name"`
			} `json:"list"`
			Pagination struct {
				Next  int `json:"next_page"`
				Total int `json:"total_records"`
				Pages int `json:"total_pages"`
			} `json:"pagination"`
		}
		a.must("GET", v1+"/sockets?"+query, nil, &page)
		got := ""
		for _, s := range page.List {
			got += s.Name + " "
			if s.DisplayName != "S "+s.Name[1:] {
				t.Errorf("%s is shown as %q", s.Name, s.DisplayName)
			}
		}
		got += fmt.Sprintf("next %d of %d, %d pages", page.Pagination.Next, page.Pagination.Total, page.Pagination.Pages)
		if got != want {
			t.Errorf("%s: %s, want %s", query, got, want)
		}
	}
}

// TestAccessTokens: they are good until they are revoked or expire or their account goes, for their own dialect only.
func TestAccessTokens(t *testing.T) {
	var offset atomic.Int64
	e := edgetest.Start(t, func(cfg *edge.Config) {
		cfg.Now = func() time.Time { return time.Now().Add(time.Duration(offset.Load())) }
	})
	a := loginWithToken(t, e)
	classic := login(t, e)
	sockets := func(token string) int {
		b := *a
		b.token = token
		return b.call("GET", v1+"/sockets", nil, nil)
	}
	short, err := e.AddToken(edge.NewToken{Email: e.Email, Name: "short", Lifetime: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		token string
		want  int
	}{
		"good": {e.Token, 200}, "short-lived": {short, 200}, "none": {"", 401}, "garbage": {"x.y.z", 401},
		"of a login": {classic.token, 401}, "changed": {e.Token[:len(e.Token)-4] + "AAAA", 401}, "long": {strings.Repeat("x", 10000), 401},
	} {
		if got := sockets(tc.token); got != tc.want {
			t.Errorf("%s: %d, want %d", name, got, tc.want)
		}
	}
	// Nor can it be exchanged for one that outlives it.
	classic.token = e.Token
	for method, path := range map[string]string{"POST": "/login/refresh", "GET": "/socket"} {
		if got := classic.call(method, path, nil, nil); got != 401 {
			t.Errorf("%s %s with an access token: %d", method, path, got)
		}
	}
	offset.Store(int64(time.Hour + time.Second))
	if got := sockets(short); got != 401 {
		t.Errorf("expired: %d", got)
	}
	if got := sockets(e.Token); got != 200 {
		t.Errorf("one without an end, later: %d", got)
	}
	for _, token := range e.Tokens() {
		if token.Name == "of the test" {
			if err := e.RevokeToken(token.ID); err != nil {
				t.Fatal(err)
			}
		}
	}
	if got := sockets(e.Token); got != 401 {
		t.Errorf("revoked: %d", got)
	}
	for i := len(e.Tokens()); i < 100; i++ {
		if _, err := e.AddToken(edge.NewToken{Email: e.Email}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := e.AddToken(edge.NewToken{Email: e.Email}); err == nil || !strings.Contains(err.Error(), "may have 100 access tokens") {
		t.Errorf("one too many: %v", err)
	}
}

// TestABorder0ClientsLogins does what that client does: a certificate for the socket, by its name, and each login that asks for
// port 0 is a tunnel, until its connection ends.
func TestABorder0ClientsLogins(t *testing.T) {
	e := edgetest.Start(t)
	a := loginWithToken(t, e)
	var s socket
	a.must("POST", v1+"/socket", map[string]any{"name": "k8s---shop--web", "socket_type": "http"}, &s)
	visitor := e.VisitorClient(t)
	connected := func() int { return len(e.Tunnels()[0].Tunnels) }
	var replicas []*replica
	for i := range 3 {
		client, err := a.dial(s.UserName, a.certify(v1+"/socket/k8s---shop--web/signkey", newKey(t)))
		if err != nil {
			t.Fatal(err)
		}
		r := newReplica(t, client, appAddress(newApp(t, fmt.Sprint(i))))
		r.forward("localhost", 0)
		replicas = append(replicas, r)
	}
	eventually(t, "three tunnels", func() bool { return connected() == 3 })
	if n := e.Tunnels()[0].Registered; n != 0 {
		t.Errorf("%d tunnel objects were made", n)
	}
	counts := map[string]int{}
	for range 12 {
		_, body := get(t, visitor, "http://"+s.DNSName+"/")
		counts[body]++
	}
	if len(counts) != 3 || counts["Server: 0\n"] != 4 {
		t.Errorf("requests went %v", counts)
	}
	// Withdrawn by the port that the edge chose, and by the end of the connection.
	if !replicas[0].cancel() {
		t.Error("the withdrawal was refused")
	}
	if n := connected(); n != 2 {
		t.Errorf("%d tunnels after a withdrawal", n)
	}
	replicas[1].close()
	eventually(t, "one tunnel", func() bool { return connected() == 1 })
	a.must("DELETE", v1+"/socket/"+s.ID, nil, nil)
	eventually(t, "connections end with the socket", func() bool { return replicas[2].client.Wait() != nil })
}

// TestDialectsShareTheSockets: one account, whichever way it is used.
func TestDialectsShareTheSockets(t *testing.T) {
	e := edgetest.Start(t)
	classic, token := login(t, e), loginWithToken(t, e)
	old := classic.newSocket("http") // with a name that the other dialect would not take
	var k struct {
		Name string `json:"name"`
	}
	token.must("GET", v1+"/socket/"+old.ID, nil, &k)
	token.must("PUT", v1+"/socket/"+old.ID, map[string]any{"name": k.Name, "description": "the name may stay"}, &k)
	if k.Name != "test http" {
		t.Errorf("the name is %q", k.Name)
	}
	var s socket
	token.must("POST", v1+"/socket", map[string]any{"name": "new"}, &s)
	classic.must("GET", "/socket/"+s.ID, nil, nil)
	classic.must("DELETE", "/socket/"+s.ID, nil, nil)
	token.refused(404, "not found", "GET", "/socket/new", nil)
}

func TestAccessTokensOutliveARestart(t *testing.T) {
	first := edgetest.Start(t)
	var s socket
	loginWithToken(t, first).must("POST", v1+"/socket", map[string]any{"name": "kept", "display_name": "Kept"}, &s)
	first.Stop()
	second := edgetest.Start(t, edgetest.SameState(first))
	second.Token = first.Token
	var k struct {
		ID          string `json:"socket_id"`
		DisplayName string `json:"display_name"`
	}
	loginWithToken(t, second).must("GET", v1+"/socket/kept", nil, &k)
	if k.ID != s.ID || k.DisplayName != "Kept" {
		t.Errorf("after the restart: %+v", k)
	}
}
