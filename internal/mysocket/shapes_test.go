package mysocket

import (
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

// recorded is an answer of testdata. They are what the documents of the two dialects say, field by field; ids, names and keys
// are made up.
func recorded(t *testing.T, file string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", file))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

const (
	recordedSocket  = "6f9b2c1e-1f0a-4f55-9a53-0c1f6a6f2d11"
	recordedTunnel  = "b3a1c9d2-8e7f-4a6b-9c5d-0e1f2a3b4c5d"
	recordedCert    = "ecdsa-sha2-nistp256-cert-v01@openssh.com AAAAKGVjZHNhLXNoYTItbmlzdHAyNTYtY2VydC12MDFAb3BlbnNzaC5jb20="
	recordedHostKey = "AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl"
)

// TestRecordedShapes has the client read every recorded answer that it may get.
func TestRecordedShapes(t *testing.T) {
	user := strings.ReplaceAll(testUserID, "-", "")
	tunnels := []Tunnel{{recordedTunnel, 27331, "ssh.mysocket.io"}, {"c4b2dae3-9f80-4b7c-8d6e-1f203b4c5d6e", 41877, "ssh.mysocket.io"}}
	web := Socket{
		ID: recordedSocket, Name: "k8s shop.web", Description: "made by hand", DNSName: "lucky-planet-4422.edge.mysocket.io", Type: "http", Ports: []int{80, 443}, UserName: user, Tunnels: tunnels,
		Tags:     map[string]string{},
		Access:   &Access{true, []string{"a@example.com"}, []string{"example.org"}},
		Upstream: &Upstream{"http", "app.internal"},
	}
	connected := web
	connected.Tunnels = tunnels[:1]
	db := Socket{
		ID: "7a1d3e5f-2b4c-4d6e-8f90-112233445566", Name: "db", Description: "made by hand", DNSName: "bold-fox-0042.edge.mysocket.io", Type: "tcp", Ports: []int{24117}, UserName: user,
		Protected: true, ProtectedUsername: "me", Tags: map[string]string{}, Access: &Access{false, []string{}, []string{}}, Upstream: &Upstream{},
	}
	theirs := func(id, name, dns, kind string) Socket {
		return Socket{ID: id, Name: name, DNSName: dns, Type: kind, Ports: []int{}, Tags: map[string]string{"team": "shop"}, Access: &Access{true, []string{}, []string{}}, Upstream: &Upstream{"http", ""}}
	}
	border0Web := theirs(recordedSocket, "k8s shop.web", "k8s---shop--web-acme.border0.io", "http")
	border0List := []Socket{
		border0Web,
		theirs(db.ID, "k8s Prod shop.web", "k8s-prod-acme.border0.io", "http"),
		theirs("8b2e4f60-3c5d-4e7f-9a01-223344556677", "bastion", "bastion-acme.border0.io", "ssh"),
	}
	type answers map[string][]string // the files that an endpoint answers with, in order
	ctx := t.Context()
	list := func(c *Client) (any, error) { return c.Sockets(ctx, 0) }
	create := func(c *Client) (any, error) {
		return c.CreateSocket(ctx, Socket{Name: "k8s shop.web", Type: "http"})
	}
	update := func(c *Client) (any, error) {
		return c.UpdateSocket(ctx, Socket{ID: recordedSocket, Name: "k8s shop.web", Type: "http"})
	}
	sign := func(c *Client) (any, error) { return c.SignKey(ctx, recordedSocket, recordedTunnel, "key") }

	for _, tc := range []struct {
		dialect, name string
		answers       answers
		call          func(*Client) (any, error)
		want          any
	}{
		{"classic", "login", answers{"POST /login": {"login.json"}}, func(c *Client) (any, error) { return c.Login(ctx) }, user},
		{"classic", "login, as a refresh answers", answers{"POST /login": {"login_refresh.json"}}, func(c *Client) (any, error) { return c.Login(ctx) }, user},
		{"classic", "list", answers{"GET /socket": {"sockets.json"}}, list, []Socket{web, db}},
		{"classic", "create", answers{"POST /socket": {"socket.json"}}, create, web},
		{"classic", "create, as connect answers", answers{"POST /socket": {"connect.json"}}, create, connected},
		{"classic", "update", answers{"PUT /socket/" + recordedSocket: {"socket.json"}}, update, web},
		{"classic", "tunnels", answers{"GET /socket/" + recordedSocket + "/tunnel": {"tunnels.json"}}, func(c *Client) (any, error) { return c.Tunnels(ctx, recordedSocket) }, tunnels},
		{"classic", "tunnel", answers{"POST /socket/" + recordedSocket + "/tunnel": {"tunnel.json"}}, func(c *Client) (any, error) { return c.CreateTunnel(ctx, recordedSocket) }, tunnels[0]},
		{"classic", "signkey of 2021", answers{"POST /socket/" + recordedSocket + "/tunnel/" + recordedTunnel + "/signkey": {"signkey_2021.json"}}, sign, SignedKey{recordedCert, ""}},
		{"classic", "signkey", answers{"POST /socket/" + recordedSocket + "/tunnel/" + recordedTunnel + "/signkey": {"signkey.json"}}, sign, SignedKey{recordedCert, recordedHostKey}},
		{"border0", "list", answers{"GET /api/v1/sockets": {"sockets_page1.json", "sockets_page2.json"}}, list, border0List},
		{"border0", "an empty list", answers{"GET /api/v1/sockets": {"sockets_none.json"}}, list, []Socket(nil)},
		{"border0", "create", answers{"POST /api/v1/socket": {"socket.json"}}, create, border0Web},
		{"border0", "update", answers{"GET /api/v1/socket/" + recordedSocket: {"socket.json"}, "PUT /api/v1/socket/" + recordedSocket: {"socket.json"}}, update, border0Web},
		{"border0", "signkey", answers{"POST /api/v1/socket/" + recordedSocket + "/signkey": {"signkey.json"}}, sign, SignedKey{recordedCert, recordedHostKey}},
		{"border0", "server info", answers{"GET /api/v1/serverinfo": {"serverinfo.json"}}, func(c *Client) (any, error) {
			return c.border0.lagOf(ctx, asker{c, session{dialect: &c.border0}}), nil
		}, 700 * time.Millisecond},
	} {
		t.Run(tc.dialect+"/"+tc.name, func(t *testing.T) {
			a, c := newAPI(t)
			if tc.dialect == "border0" {
				a, c, _ = newTokenAPI(t)
				a.answers = map[string][]http.HandlerFunc{}
			}
			for endpoint, files := range tc.answers {
				for _, file := range files {
					a.on(endpoint, answer(200, recorded(t, filepath.Join(tc.dialect, file))))
				}
			}
			got, err := tc.call(c)
			if err != nil || !reflect.DeepEqual(got, tc.want) {
				t.Errorf("got  %+v, %v\nwant %+v", got, err, tc.want)
			}
		})
	}
	for _, tc := range []struct {
		file   string
		status int
		want   string
	}{
		{"classic/error.json", 400, "400 Bad Request: socket_type is not known"},
		{"border0/error.json", 400, "400 Bad Request: socket_type is not known"},
		{"border0/error_fallback.json", 429, "429 Too Many Requests: Too many requests"},
	} {
		a, c := newAPI(t)
		endpoint := "GET /socket"
		if strings.HasPrefix(tc.file, "border0") {
			a, c, _ = newTokenAPI(t)
			endpoint = "GET /api/v1/sockets"
		}
		a.on(endpoint, answer(tc.status, recorded(t, tc.file), "Retry-After", "2"))
		_, err := list(c)
		if err == nil || !strings.HasSuffix(err.Error(), tc.want) || RetryAfter(err) != 2*time.Second || IsRefused(err) != (tc.status == 400) {
			t.Errorf("%s: %v, want %s", tc.file, err, tc.want)
		}
	}
}
