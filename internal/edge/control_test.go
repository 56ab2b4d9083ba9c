package edge_test

import (
	"net"
	"net/http"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/mysocketio/mysocket-injector/internal/edge"
	"github.com/mysocketio/mysocket-injector/internal/edge/control"
	"github.com/mysocketio/mysocket-injector/internal/edge/edgetest"
)

func startControlled(t *testing.T, options ...edgetest.Option) (*edgetest.Edge, *control.Client) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "c.sock")
	e := edgetest.Start(t, append(options, func(c *edge.Config) { c.ControlSocket = path })...)
	c, err := control.Dial(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return e, c
}

// TestDeletedAccountEndsAtOnce deletes an account beside another one: its tunnels, ports, logins and tokens end, the other's stay.
func TestDeletedAccountEndsAtOnce(t *testing.T) {
	e, c := startControlled(t)
	key := newKey(t)
	gone, err := c.Add(edge.NewUser{Email: "gone@example.com", Password: "a long password", SSHKey: string(ssh.MarshalAuthorizedKey(key.PublicKey()))})
	if err != nil {
		t.Fatal(err)
	}
	access, err := c.AddToken(edge.NewToken{Email: gone.Email})
	if err != nil {
		t.Fatal(err)
	}
	stays, goes := login(t, e), login(t, e)
	goes.login(gone.Email, "a long password")
	app := appAddress(newApp(t, "app"))
	mine, web, tcp := stays.newSocket("http"), goes.newSocket("http"), goes.newSocket("tcp")
	replicas := []*replica{goes.connect(web, app), goes.connect(tcp, app)}
	kept := stays.connect(mine, app)
	idle, err := goes.dial(web.UserName, key) // logged in, and forwards nothing
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = idle.Close() })
	visitors := e.VisitorClient(t)
	if status, _ := get(t, visitors, "http://"+web.DNSName+"/"); status != http.StatusOK {
		t.Fatalf("status %d", status)
	}

	if err := c.Delete("GONE@example.com"); err != nil {
		t.Fatal(err)
	}
	for _, k := range e.Tunnels() {
		if k.Socket != mine.ID {
			t.Errorf("there still is %+v", k)
		}
	}
	for _, client := range []*ssh.Client{replicas[0].client, replicas[1].client, idle} {
		ended := make(chan error, 1)
		go func() { ended <- client.Wait() }()
		select {
		case <-ended:
		case <-time.After(patience):
			t.Error("a login of the account goes on")
		}
	}
	if status, _ := get(t, visitors, "http://"+web.DNSName+"/"); status != http.StatusNotFound {
		t.Errorf("its name answers %d", status)
	}
	if conn, err := net.Dial("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(tcp.Ports[0]))); err == nil {
		_ = conn.Close()
		t.Error("its port is open")
	}
	if status := goes.call("GET", "/socket", nil, nil); status != http.StatusUnauthorized {
		t.Errorf("its token gives %d", status)
	}
	goes.token = access
	if status := goes.call("GET", "/api/v1/sockets", nil, nil); status != http.StatusUnauthorized {
		t.Errorf("its access token gives %d", status)
	}
	if !stays.connected(mine, kept.tunnel.ID) {
		t.Error("the tunnel of another account is gone")
	}
	if err := c.Delete(gone.Email); err == nil || !strings.Contains(err.Error(), "no account") {
		t.Errorf("deleted twice: %v", err)
	}
}

// TestPasswordIsChanged by the operator: logins and tokens of before are good no longer, the access token and the tunnel are.
func TestPasswordIsChanged(t *testing.T) {
	var later atomic.Int64
	e, c := startControlled(t, func(cfg *edge.Config) {
		cfg.Now = func() time.Time { return time.Now().Add(time.Duration(later.Load())) }
	})
	a := login(t, e)
	s := a.newSocket("http")
	r := a.connect(s, appAddress(newApp(t, "app")))
	later.Store(int64(2 * time.Second)) // Tokens know whole seconds only.
	if err := c.SetPassword(e.Email, "short"); err == nil || !strings.Contains(err.Error(), "5 bytes") {
		t.Errorf("a short password: %v", err)
	}
	if err := c.SetPassword("nobody@example.com", "another password"); err == nil {
		t.Error("changed the password of nobody")
	}
	if status := a.call("GET", "/socket", nil, nil); status != http.StatusOK {
		t.Fatalf("refused changes left %d", status)
	}
	if err := c.SetPassword(e.Email, "another password"); err != nil {
		t.Fatal(err)
	}
	for path, method := range map[string]string{"/socket": "GET", "/login/refresh": "POST"} {
		if status := a.call(method, path, nil, nil); status != http.StatusUnauthorized {
			t.Errorf("the old token gives %d at %s", status, path)
		}
	}
	if status := a.call("POST", "/login", map[string]string{"email": e.Email, "password": e.Password}, nil); status != http.StatusUnauthorized {
		t.Errorf("the old password gives %d", status)
	}
	a.login(e.Email, "another password")
	a.must("GET", "/socket", nil, nil)
	a.token = e.Token
	a.must("GET", "/api/v1/sockets", nil, nil)
	if !a.connected(s, r.tunnel.ID) {
		t.Error("the tunnel is gone")
	}
}
