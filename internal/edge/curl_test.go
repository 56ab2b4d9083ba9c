package edge_test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/mysocketio/mysocket-injector/internal/edge"
	"github.com/mysocketio/mysocket-injector/internal/edge/edgetest"
)

// curl speaks to the API as a user with a shell does.
type curl struct {
	t        testing.TB
	path, ca string
	base     string
	token    string
	bearer   bool // instead of x-access-token
}

func newCurl(t testing.TB, e *edgetest.Edge) *curl {
	t.Helper()
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, e.CAPEM, 0o600); err != nil {
		t.Fatal(err)
	}
	return &curl{t: t, path: needed(t, "curl", "curl"), ca: ca, base: e.APIURL}
}

// reply is what curl got.
type reply struct {
	status      int
	body        string
	contentType string
	retryAfter  string
}

// missing is no body at all.
const missing = "(missing)"

// do sends one request. Its settings go through stdin, since a token has no place on a command line.
func (c *curl) do(method, path, body string, headers ...string) reply {
	c.t.Helper()
	quote := func(s string) string { return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(s) + `"` }
	settings := []string{"silent", "show-error", "max-time = 30", "cacert = " + quote(c.ca), "request = " + method, "url = " + quote(c.base+path),
		`write-out = "\n%{http_code} %{content_type} %header{retry-after}"`}
	if c.token != "" && c.bearer {
		headers = append(headers, "Authorization: Bearer "+c.token)
	} else if c.token != "" {
		headers = append(headers, "x-access-token: "+c.token)
	}
	if body != missing {
		headers = append(headers, "Content-Type: application/json")
		settings = append(settings, "data-raw = "+quote(body))
	}
	for _, header := range headers {
		settings = append(settings, "header = "+quote(header))
	}
	cmd := exec.CommandContext(c.t.Context(), c.path, "-q", "-K", "-")
	cmd.Stdin = strings.NewReader(strings.Join(settings, "\n"))
	out, err := cmd.CombinedOutput()
	if err != nil {
		c.t.Fatalf("curl %s %s: %v: %s", method, path, err, out)
	}
	i := strings.LastIndexByte(string(out), '\n')
	fields := strings.SplitN(string(out[i+1:]), " ", 3)
	status, err := strconv.Atoi(fields[0])
	if err != nil || len(fields) != 3 {
		c.t.Fatalf("curl wrote %q", out)
	}
	return reply{status: status, body: string(out[:i]), contentType: fields[1], retryAfter: fields[2]}
}

func (c *curl) field(r reply, name string) string {
	c.t.Helper()
	var fields map[string]any
	if err := json.Unmarshal([]byte(r.body), &fields); err != nil {
		c.t.Fatalf("the answer %d %s is no object: %v", r.status, r.body, err)
	}
	value, ok := fields[name]
	if !ok {
		c.t.Fatalf("the answer %d %s has no %s", r.status, r.body, name)
	}
	return fmt.Sprint(value)
}

// checkReply says what is wrong with an answer, besides its fields.
func checkReply(r reply, status int) error {
	if r.status != status {
		return fmt.Errorf("%d %.200s, want %d", r.status, r.body, status)
	}
	switch {
	case status == 204 && r.body != "":
		return fmt.Errorf("a 204 with the body %q", r.body)
	case status != 204 && r.contentType != "application/json":
		return fmt.Errorf("%d with the content type %q", r.status, r.contentType)
	case status != 204 && !json.Valid([]byte(r.body)):
		return fmt.Errorf("%d with a body that is not JSON: %q", r.status, r.body)
	}
	return nil
}

// row is one line of the protocol's table, with the bodies that a client may send and the fields that it reads.
type row struct {
	method, path string
	bodies       []string
	status       int
	fields       string // those of the answer's object, or of the first object of its list
	open         bool   // needs no token
}

// anyBody are what clients send on methods that take nothing.
var anyBody = []string{missing, "null", "{}"}

const userFields = "name email user_id user_name sshkey primary_organization"

const socketFields = "socket_id name description dnsname socket_type socket_tcp_ports user_name protected_socket protected_username protected_password " +
	"private_socket cloud_authentication_enabled cloud_authentication_email_allowed_addressses cloud_authentication_email_allowed_domains " +
	"upstream_type upstream_http_hostname upstream_username upstream_password custom_domains tags policy_names"

// TestCurl sends every row of the protocol's table with curl, in both dialects: all bodies that count as none, what is asked
// for without a token, and what does not exist.
func TestCurl(t *testing.T) {
	e := edgetest.Start(t, func(c *edge.Config) { c.AllowRegistration = true })
	key := fmt.Sprintf(`{"ssh_public_key": %q}`, publicLine())
	const none = "00000000-0000-0000-0000-000000000000"
	t.Run("classic", func(t *testing.T) {
		t.Parallel()
		c := newCurl(t, e)
		c.token = c.field(c.do("POST", "/login", fmt.Sprintf(`{"email": %q, "password": %q}`, e.Email, e.Password)), "token")
		made := c.do("POST", "/connect", `{"name": "k8s shop.web"}`)
		s := "/socket/" + c.field(made, "socket_id")
		var socket socket
		if err := json.Unmarshal([]byte(made.body), &socket); err != nil || len(socket.Tunnels) != 1 {
			t.Fatalf("POST /connect: %s", made.body)
		}
		tun := s + "/tunnel/" + socket.Tunnels[0].ID
		login := fmt.Sprintf(`{"email": %q, "password": %q}`, e.Email, e.Password)
		c.run([]row{
			{method: "POST", path: "/user", bodies: []string{`{"name": "N", "email": "new@example.com", "password": "long enough", "sshkey": ""}`}, status: 200, fields: userFields, open: true},
			{method: "POST", path: "/user", bodies: anyBody, status: 400, open: true},
			{method: "GET", path: "/user/" + e.UserID, bodies: anyBody, status: 200, fields: userFields},
			{method: "GET", path: "/user/" + none, bodies: anyBody, status: 404},
			{method: "POST", path: "/login", bodies: []string{login}, status: 200, fields: "token require_mfa", open: true},
			{method: "POST", path: "/login", bodies: anyBody, status: 401, open: true},
			{method: "POST", path: "/login/refresh", bodies: anyBody, status: 200, fields: "token"},
			{method: "GET", path: "/connect", bodies: anyBody, status: 200, fields: socketFields + " tunnels"},
			{method: "GET", path: "/socket", bodies: anyBody, status: 200, fields: socketFields + " tunnels"},
			{method: "POST", path: "/connect", bodies: anyBody, status: 400},
			{method: "POST", path: "/connect", bodies: []string{`{"name": "k8s shop.web"}`}, status: 200, fields: socketFields + " tunnels"},
			{method: "POST", path: "/socket", bodies: anyBody, status: 400},
			{method: "POST", path: "/socket", bodies: []string{`{"name": "k8s shop.web", "socket_type": "tcp"}`, `{"name": "n", "unknown": {"a": [1]}}`}, status: 200, fields: socketFields + " tunnels"},
			{method: "POST", path: "/socket", bodies: []string{"{", "[]", "3", `"text"`, `{"name": 3}`, `{"name": "n", "private_socket": true}`}, status: 400},
			{method: "GET", path: s, bodies: anyBody, status: 200, fields: socketFields + " tunnels"},
			{method: "PUT", path: s, bodies: append([]string{`{"name": "k8s shop.web", "description": "new"}`}, anyBody...), status: 200, fields: socketFields},
			{method: "GET", path: s + "/tunnel", bodies: anyBody, status: 200, fields: "tunnel_id local_port tunnel_server"},
			{method: "POST", path: s + "/tunnel", bodies: anyBody, status: 200, fields: "tunnel_id local_port tunnel_server"},
			{method: "GET", path: tun, bodies: anyBody, status: 200, fields: "tunnel_id local_port tunnel_server"},
			{method: "POST", path: tun + "/signkey", bodies: []string{key}, status: 200, fields: "signed_ssh_cert host_key"},
			{method: "POST", path: tun + "/signkey", bodies: append([]string{`{"ssh_public_key": "ssh-rsa nonsense"}`}, anyBody...), status: 400},
			{method: "POST", path: s + "/signkey", bodies: []string{key}, status: 200, fields: "signed_ssh_cert host_key"},
			{method: "POST", path: s + "/signkey", bodies: anyBody, status: 400},
			{method: "GET", path: "/organization", bodies: anyBody, status: 200, fields: "id name certificate"},
			{method: "DELETE", path: tun, bodies: []string{"null"}, status: 204},
			{method: "DELETE", path: tun, bodies: anyBody, status: 404},
			{method: "GET", path: tun, bodies: anyBody, status: 404},
			{method: "DELETE", path: s, bodies: []string{"null"}, status: 204},
			{method: "DELETE", path: s, bodies: anyBody, status: 404},
			{method: "PUT", path: s, bodies: anyBody, status: 404},
			{method: "POST", path: s + "/tunnel", bodies: anyBody, status: 404},
			{method: "POST", path: s + "/signkey", bodies: []string{key}, status: 404},
			{method: "GET", path: "/nothing", bodies: anyBody, status: 404, open: true},
			{method: "PATCH", path: "/socket", bodies: anyBody, status: 405, open: true},
		})
		// Wrong passwords come last: after them this address has to wait.
		for range 20 {
			if r := c.do("POST", "/login", `{"email": "owner@example.com", "password": "wrong"}`); r.status != 401 {
				if wait, err := strconv.Atoi(r.retryAfter); checkReply(r, 429) != nil || c.field(r, "error_message") == "" || err != nil || wait < 1 {
					t.Errorf("a throttled login: %+v", r)
				}
				return
			}
		}
		t.Error("wrong passwords were never throttled")
	})
	t.Run("border0", func(t *testing.T) {
		t.Parallel()
		c := newCurl(t, e)
		c.token = e.Token // the header of the classic dialect will do, too
		made := c.do("POST", v1+"/socket", `{"name": "k8s---shop--web"}`)
		s := v1 + "/socket/" + c.field(made, "socket_id")
		c.bearer = true
		fields := socketFields + " display_name recording_enabled connector_authentication_enabled"
		c.run([]row{
			{method: "GET", path: v1 + "/serverinfo", bodies: anyBody, status: 200, fields: "data_consistency", open: true},
			{method: "GET", path: v1 + "/sockets?page=1&page_size=100&name=k8s---shop--web", bodies: anyBody, status: 200, fields: "list pagination"},
			{method: "GET", path: v1 + "/sockets?page=0", bodies: anyBody, status: 400},
			{method: "POST", path: v1 + "/socket", bodies: anyBody, status: 400},
			{method: "POST", path: v1 + "/socket", bodies: []string{`{"name": "k8s---shop--web"}`}, status: 409},
			{method: "POST", path: v1 + "/socket", bodies: []string{`{"name": "UPPER"}`, `{"name": "x", "socket_type": "database"}`, `{"name": "x", "recording_enabled": true}`}, status: 400},
			{method: "GET", path: v1 + "/socket/k8s---shop--web?activeOnly=true", bodies: anyBody, status: 200, fields: fields},
			{method: "GET", path: s, bodies: anyBody, status: 200, fields: fields},
			{method: "PUT", path: s, bodies: append([]string{`{"display_name": "k8s shop.web"}`}, anyBody...), status: 200, fields: fields},
			{method: "POST", path: s + "/signkey", bodies: []string{key}, status: 200, fields: "signed_ssh_cert host_key"},
			{method: "POST", path: v1 + "/socket/k8s---shop--web/signkey", bodies: []string{key}, status: 200, fields: "signed_ssh_cert host_key"},
			{method: "POST", path: s + "/signkey", bodies: anyBody, status: 400},
			{method: "POST", path: s + "/tunnel", bodies: anyBody, status: 404, open: true},
			{method: "DELETE", path: s, bodies: []string{"null"}, status: 204},
			{method: "DELETE", path: s, bodies: anyBody, status: 404},
			{method: "GET", path: s, bodies: anyBody, status: 404},
			{method: "GET", path: v1 + "/socket/none", bodies: anyBody, status: 404},
			{method: "PATCH", path: v1 + "/socket", bodies: anyBody, status: 405, open: true},
		})
	})
}

// run sends the rows, each with each of its bodies, and each that needs a token also without.
func (c *curl) run(rows []row) {
	c.t.Helper()
	for i, row := range rows {
		for _, body := range row.bodies {
			// Later clients say who they are.
			r := c.do(row.method, row.path, body, "x-client-requested-with: mysocketctl", "x-client-version: 1.0", "User-Agent: mysocketctl")
			name := fmt.Sprintf("%s %s %.60s", row.method, row.path, body)
			if err := checkReply(r, row.status); err != nil {
				c.t.Errorf("%s: %v", name, err)
				continue
			}
			if err := checkFields(r, row); err != nil {
				c.t.Errorf("%s: %v", name, err)
			}
		}
		if row.open {
			continue
		}
		stranger := *c
		stranger.token = []string{"", "x.y.z"}[i%2]
		if r := stranger.do(row.method, row.path, row.bodies[0]); checkReply(r, 401) != nil || stranger.field(r, "error_message") == "" {
			c.t.Errorf("%s %s without a valid token: %+v", row.method, row.path, r)
		}
	}
}

// checkFields looks for the fields of the documented answer, or of the documented error.
func checkFields(r reply, row row) error {
	if row.status == 204 {
		return nil
	}
	fields := map[string]any{}
	if strings.HasPrefix(r.body, "[") {
		var list []map[string]any
		if err := json.Unmarshal([]byte(r.body), &list); err != nil || len(list) == 0 {
			return fmt.Errorf("not a list of objects: %.200s, %w", r.body, err)
		}
		fields = list[0]
	} else if err := json.Unmarshal([]byte(r.body), &fields); err != nil {
		return err
	}
	want := row.fields
	if row.status >= 400 {
		want = "error_message"
		if strings.HasPrefix(row.path, v1+"/") {
			want = "status_code error_message message"
		}
	}
	for name := range strings.FieldsSeq(want) {
		if _, ok := fields[name]; !ok {
			return fmt.Errorf("the answer has no %s: %.300s", name, r.body)
		}
	}
	if row.status >= 400 && fields["error_message"] == "" {
		return fmt.Errorf("the refusal says nothing")
	}
	return nil
}
