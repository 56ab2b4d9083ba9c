package edge_test

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"

	"github.com/mysocketio/mysocket-injector/internal/edge"
	"github.com/mysocketio/mysocket-injector/internal/edge/edgetest"
)

// TestContract walks through every row of the API's table, in the order in which a client uses them.
func TestContract(t *testing.T) {
	e := edgetest.Start(t)
	a := login(t, e)
	var made socket
	a.must("POST", "/connect", map[string]any{"name": "k8s shop.web", "unknown": []int{1}}, &made)
	if len(made.Tunnels) != 1 || made.UserName != strings.ReplaceAll(e.UserID, "-", "") {
		t.Fatalf("connect answered %+v", made)
	}
	s, tun := "/socket/"+made.ID, "/socket/"+made.ID+"/tunnel/"+made.Tunnels[0].ID
	for _, c := range []struct {
		method, path string
		body         any
		status       int
		has          []string
	}{
		{"POST", "/login", map[string]string{"email": strings.ToUpper(e.Email), "password": e.Password}, 200, []string{"token", "require_mfa"}},
		{"POST", "/login", map[string]string{"email": e.Email, "password": "wrong"}, 401, []string{"error_message"}},
		{"POST", "/login", "null", 401, []string{"error_message"}},
		{"POST", "/login/refresh", "{}", 200, []string{"token"}},
		{"POST", "/login/refresh", "null", 200, []string{"token"}},
		{"POST", "/user", map[string]string{"email": "x@example.com"}, 403, []string{"error_message"}},
		{"GET", "/user/" + e.UserID, "null", 200, []string{"name", "email", "user_id", "user_name", "sshkey", "primary_organization"}},
		{"GET", "/user/" + made.ID, "null", 404, []string{"error_message"}},
		{"GET", "/organization", "null", 200, []string{"id", "name", "certificate"}},
		{"GET", "/connect", "null", 200, nil},
		{"GET", "/socket", nil, 200, nil},
		{"POST", "/socket", map[string]any{"name": "k8s shop.web"}, 200, []string{"socket_id", "dnsname", "socket_type", "socket_tcp_ports", "user_name",
			"tunnels", "protected_socket", "protected_username", "protected_password", "private_socket", "cloud_authentication_enabled",
			"cloud_authentication_email_allowed_addressses", "cloud_authentication_email_allowed_domains", "upstream_type", "upstream_http_hostname", "custom_domains", "tags"}},
		{"POST", "/socket", "null", 400, []string{"error_message"}},
		{"GET", s, "null", 200, []string{"socket_id"}},
		{"PUT", s, map[string]any{"description": "new"}, 200, []string{"description"}},
		{"PUT", s, "null", 200, []string{"socket_id"}},
		{"GET", s + "/tunnel", "null", 200, nil},
		{"POST", s + "/tunnel", "{}", 200, []string{"tunnel_id", "local_port", "tunnel_server"}},
		{"POST", s + "/tunnel", "null", 200, []string{"tunnel_id"}},
		{"POST", s + "/tunnel", nil, 200, []string{"tunnel_id"}},
		{"GET", tun, "null", 200, []string{"tunnel_id", "local_port", "tunnel_server"}},
		{"POST", tun + "/signkey", "null", 400, []string{"error_message"}},
		{"POST", s + "/signkey", "null", 400, []string{"error_message"}},
		{"DELETE", tun, "null", 204, nil},
		{"GET", tun, "null", 404, []string{"error_message"}},
		{"DELETE", tun, "null", 404, []string{"error_message"}},
		{"DELETE", s, "null", 204, nil},
		{"GET", s, "null", 404, []string{"error_message"}},
		{"GET", "/socket/../../etc", nil, 404, []string{"error_message"}},
		{"GET", "/socket/" + strings.Repeat("x", 1000), nil, 404, []string{"error_message"}},
		{"GET", "/nothing", nil, 404, []string{"error_message"}},
		{"PATCH", "/socket", nil, 405, []string{"error_message"}},
		{"GET", "/login", nil, 405, []string{"error_message"}},
		{"DELETE", "/socket", nil, 405, []string{"error_message"}},
		{"POST", "/socket", "{", 400, []string{"error_message"}},
		{"POST", "/socket", "[]", 400, []string{"error_message"}},
		{"POST", "/socket", `{"name": 3}`, 400, []string{"error_message"}},
		{"POST", "/socket", `{"name": "` + strings.Repeat("x", 1<<20) + `"}`, 413, []string{"error_message"}},
	} {
		var answer json.RawMessage
		status := a.call(c.method, c.path, c.body, &answer)
		path := c.path[:min(len(c.path), 60)]
		if status != c.status {
			t.Errorf("%s %s: %d %.200s, want %d", c.method, path, status, answer, c.status)
		}
		var fields map[string]any
		if len(c.has) > 0 {
			if err := json.Unmarshal(answer, &fields); err != nil {
				t.Errorf("%s %s: %v", c.method, path, err)
			}
		}
		for _, field := range c.has {
			if _, ok := fields[field]; !ok {
				t.Errorf("%s %s: the answer has no %s: %.200s", c.method, path, field, answer)
			}
		}
	}
}

func TestNamesAreNotUnique(t *testing.T) {
	e := edgetest.Start(t)
	a := login(t, e)
	one, two := a.newSocket("http"), a.newSocket("https")
	if one.ID == two.ID || one.DNSName == two.DNSName {
		t.Errorf("two sockets are %+v and %+v", one, two)
	}
	for _, s := range []socket{one, two} {
		if !strings.HasSuffix(s.DNSName, "."+e.Domain) || len(s.Ports) != 2 {
			t.Errorf("%+v", s)
		}
	}
	var list []socket
	a.must("GET", "/socket", nil, &list)
	if len(list) != 2 || list[0].ID != one.ID || list[0].DNSName != one.DNSName {
		t.Errorf("the list is %+v", list)
	}
}

func TestUnsupportedIsRefused(t *testing.T) {
	e := edgetest.Start(t)
	a := login(t, e)
	existing := a.newSocket("http")
	for _, c := range []struct {
		body string
		says string
	}{
		{`"socket_type": "ssh"`, "http, https, tcp and tls"},
		{`"socket_type": "database"`, "http, https, tcp and tls"},
		{`"cloud_authentication_enabled": true`, "cloud authentication"},
		{`"cloud_authentication_email_allowed_addressses": ["a@b.c"]`, "cloud authentication"},
		{`"cloud_authentication_email_allowed_domains": ["b.c"]`, "cloud authentication"},
		{`"private_socket": true`, "private_socket"},
		{`"custom_domains": ["a.example"]`, "custom_domains"},
		{`"policy_names": ["p"]`, "policy_names"},
		{`"upstream_type": "mysql"`, "upstream_type"},
		{`"upstream_username": "x"`, "upstream_username"},
		{`"protected_socket": true`, "protected_username"},
		{`"protected_username": "u", "protected_password": "p"`, "protected_socket"},
		{`"protected_socket": true, "protected_username": "a:b", "protected_password": "p"`, "colon"},
		{`"protected_socket": true, "protected_username": "a", "protected_password": "p", "socket_type": "tcp"`, "protected_socket"},
		{`"protected_socket": true, "protected_username": "a", "protected_password": "p", "socket_type": "tls"`, "protected_socket"},
		{`"name": ""`, "name"},
		{`"name": "a\nb"`, "control"},
		{`"name": "` + strings.Repeat("x", 300) + `"`, "256"},
		{`"description": "` + strings.Repeat("x", 2000) + `"`, "1024"},
		{`"upstream_http_hostname": "a b"`, "upstream_http_hostname"},
		{`"tags": {"a": "` + strings.Repeat("x", 300) + `"}`, "tags"},
	} {
		for _, r := range []struct{ method, path string }{{"POST", "/socket"}, {"POST", "/connect"}, {"PUT", "/socket/" + existing.ID}} {
			body := `{"name": "n", ` + c.body + `}`
			var refused struct {
				Message string `json:"error_message"`
			}
			status := a.call(r.method, r.path, body, &refused)
			if status != 400 || !strings.Contains(refused.Message, c.says) && r.method == "POST" {
				t.Errorf("%s %s %.80s: %d %q", r.method, r.path, body, status, refused.Message)
			}
		}
	}
	// What clients send for "nothing" is no wish.
	a.must("POST", "/socket", `{"name": "n", "cloud_authentication_email_allowed_addressses": [""], "custom_domains": [], "private_socket": false,
		"protected_socket": false, "protected_username": "", "protected_password": "", "upstream_type": "http", "tags": null}`, nil)
	var list []socket
	a.must("GET", "/socket", nil, &list)
	if len(list) != 2 {
		t.Errorf("refused sockets were made: there are %d", len(list))
	}
}

func TestUpdateKeepsThePassword(t *testing.T) {
	e := edgetest.Start(t)
	a := login(t, e)
	var s map[string]any
	a.must("POST", "/socket", `{"name": "n", "protected_socket": true, "protected_username": "u", "protected_password": "secret"}`, &s)
	if s["protected_username"] != "u" || s["protected_password"] != "" {
		t.Errorf("the answer is %v", s)
	}
	// A client reads, changes and sends back.
	s["description"] = "changed"
	var updated map[string]any
	path := fmt.Sprint("/socket/", s["socket_id"])
	a.must("PUT", path, s, &updated)
	if updated["description"] != "changed" || updated["protected_socket"] != true || updated["dnsname"] != s["dnsname"] {
		t.Errorf("the update is %v", updated)
	}
	host := fmt.Sprint(s["dnsname"])
	a.connect(socket{ID: fmt.Sprint(s["socket_id"]), DNSName: host, UserName: fmt.Sprint(s["user_name"])}, appAddress(newApp(t, "app")))
	visitor := e.VisitorClient(t)
	ask := func(user, password string) int {
		req, err := http.NewRequestWithContext(t.Context(), "GET", "http://"+host+"/", nil)
		if err != nil {
			t.Fatal(err)
		}
		req.SetBasicAuth(user, password)
		resp, err := visitor.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		return resp.StatusCode
	}
	if status := ask("u", "secret"); status != 200 {
		t.Errorf("the password was lost by the update: %d", status)
	}
	a.must("PUT", path, `{"protected_socket": true, "protected_password": "other"}`, nil)
	if old, changed := ask("u", "secret"), ask("u", "other"); old != 401 || changed != 200 {
		t.Errorf("after a change of the password: %d and %d", old, changed)
	}
	a.must("PUT", path, `{"protected_socket": false}`, nil)
	if status := ask("nobody", "nothing"); status != 200 {
		t.Errorf("after protection was taken away: %d", status)
	}
}

func TestAccountsDoNotSeeEachOther(t *testing.T) {
	e := edgetest.Start(t)
	owner := login(t, e)
	if _, err := e.AddUser(edge.NewUser{Name: "Other", Email: "other@example.com", Password: "password of other"}); err != nil {
		t.Fatal(err)
	}
	other := login(t, e)
	other.login("other@example.com", "password of other")
	s := owner.newSocket("http")
	tun := owner.newTunnel(s)
	mine := other.newSocket("http")
	key := fmt.Sprintf(`{"ssh_public_key": %q}`, publicLine())
	for _, c := range []struct{ method, path, body string }{
		{"GET", "/user/" + e.UserID, ""},
		{"GET", "/socket/" + s.ID, ""},
		{"PUT", "/socket/" + s.ID, `{"name": "stolen"}`},
		{"DELETE", "/socket/" + s.ID, ""},
		{"POST", "/socket/" + s.ID + "/signkey", key},
		{"GET", "/socket/" + s.ID + "/tunnel", ""},
		{"POST", "/socket/" + s.ID + "/tunnel", ""},
		{"GET", "/socket/" + s.ID + "/tunnel/" + tun.ID, ""},
		{"DELETE", "/socket/" + s.ID + "/tunnel/" + tun.ID, ""},
		{"POST", "/socket/" + s.ID + "/tunnel/" + tun.ID + "/signkey", key},
		// The tunnel of another's socket through one's own.
		{"GET", "/socket/" + mine.ID + "/tunnel/" + tun.ID, ""},
		{"DELETE", "/socket/" + mine.ID + "/tunnel/" + tun.ID, ""},
		{"POST", "/socket/" + mine.ID + "/tunnel/" + tun.ID + "/signkey", key},
	} {
		if status := other.call(c.method, c.path, c.body, nil); status != 404 {
			t.Errorf("%s %s: %d, want 404", c.method, c.path, status)
		}
	}
	var list []socket
	other.must("GET", "/socket", nil, &list)
	if len(list) != 1 || list[0].ID != mine.ID {
		t.Errorf("the other account lists %+v", list)
	}
	owner.must("GET", "/socket/"+s.ID+"/tunnel/"+tun.ID, nil, nil)
}

func TestTokens(t *testing.T) {
	var offset atomic.Int64
	e := edgetest.Start(t, func(c *edge.Config) {
		c.Now = func() time.Time { return time.Now().Add(time.Duration(offset.Load())) }
	})
	a := login(t, e)
	var claims jwt.MapClaims
	if _, _, err := jwt.NewParser().ParseUnverified(a.token, &claims); err != nil {
		t.Fatal(err)
	}
	exp, err := claims.GetExpirationTime()
	if err != nil || claims["user_id"] != e.UserID || claims["user_email"] != e.Email {
		t.Fatalf("claims %v, %v", claims, err)
	}
	if left := time.Until(exp.Time); left < 299*time.Minute || left > 300*time.Minute {
		t.Errorf("the token lives %s", left)
	}
	good := a.token
	forged, err := jwt.NewWithClaims(jwt.SigningMethodHS256, claims).SignedString([]byte("another key"))
	if err != nil {
		t.Fatal(err)
	}
	none, err := jwt.NewWithClaims(jwt.SigningMethodNone, claims).SignedString(jwt.UnsafeAllowNoneSignatureType)
	if err != nil {
		t.Fatal(err)
	}
	for name, token := range map[string]string{"none": "", "nonsense": "x.y.z", "forged": forged, "unsigned": none, "huge": strings.Repeat("x", 10000)} {
		a.token = token
		if status := a.call("GET", "/socket", nil, nil); status != 401 {
			t.Errorf("%s token: %d", name, status)
		}
	}
	a.token = ""
	req, err := http.NewRequestWithContext(t.Context(), "GET", e.APIURL+"/socket", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+good)
	resp, err := a.client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = io.Copy(io.Discard, resp.Body)
	_ = resp.Body.Close()
	if resp.StatusCode != 200 {
		t.Errorf("a bearer token: %d", resp.StatusCode)
	}
	a.token = good
	offset.Store(int64(301 * time.Minute))
	if status := a.call("GET", "/socket", nil, nil); status != 401 {
		t.Errorf("an expired token: %d", status)
	}
}

func TestLoginIsThrottled(t *testing.T) {
	var offset atomic.Int64
	e := edgetest.Start(t, func(c *edge.Config) {
		c.Now = func() time.Time { return time.Now().Add(time.Duration(offset.Load())) }
	})
	a := login(t, e)
	wrong := map[string]string{"email": e.Email, "password": "wrong"}
	right := map[string]string{"email": e.Email, "password": e.Password}
	for range 30 {
		if status := a.call("POST", "/login", right, nil); status != 200 {
			t.Fatalf("a right password is throttled: %d", status)
		}
	}
	statuses := map[int]int{}
	for range 15 {
		statuses[a.call("POST", "/login", wrong, nil)]++
	}
	if statuses[401] != 10 || statuses[429] != 5 {
		t.Errorf("wrong passwords were answered %v", statuses)
	}
	req, err := http.NewRequestWithContext(t.Context(), "POST", e.APIURL+"/login", strings.NewReader("null"))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := a.client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	if resp.StatusCode != 429 || resp.Header.Get("Retry-After") == "" {
		t.Errorf("%d, Retry-After %q", resp.StatusCode, resp.Header.Get("Retry-After"))
	}
	offset.Store(int64(10 * time.Second))
	if status := a.call("POST", "/login", right, nil); status != 200 {
		t.Errorf("after the wait: %d", status)
	}
}

func TestRegistration(t *testing.T) {
	e := edgetest.Start(t, func(c *edge.Config) { c.AllowRegistration = true })
	a := login(t, e)
	for _, c := range []struct {
		body   string
		status int
	}{
		{`{"name": "N", "email": "new@example.com", "password": "long enough", "sshkey": ""}`, 200},
		{`{"name": "N", "email": "NEW@example.com", "password": "long enough"}`, 409},
		{`{"email": "short@example.com", "password": "short"}`, 400},
		{`{"email": "long@example.com", "password": "` + strings.Repeat("x", 73) + `"}`, 400},
		{`{"email": "not an address", "password": "long enough"}`, 400},
		{`{"email": "k@example.com", "password": "long enough", "sshkey": "nonsense"}`, 400},
	} {
		if status := a.call("POST", "/user", c.body, nil); status != c.status {
			t.Errorf("%.80s: %d, want %d", c.body, status, c.status)
		}
	}
	a.login("new@example.com", "long enough")
}

func publicLine() string {
	return "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl"
}

// TestHeadersAreBounded: a stranger's headers are read up to a bound.
func TestHeadersAreBounded(t *testing.T) {
	e := edgetest.Start(t)
	a := login(t, e)
	a.client.Transport.(*http.Transport).ForceAttemptHTTP2 = false
	for size, want := range map[int]int{100 << 10: 200, 300 << 10: 431} {
		req, err := http.NewRequestWithContext(t.Context(), "GET", e.APIURL+"/organization", nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("X-Access-Token", a.token)
		req.Header.Set("X-Client-Version", strings.Repeat("x", size))
		resp, err := a.client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("%d bytes of headers: %d, want %d", size, resp.StatusCode, want)
		}
	}
}
