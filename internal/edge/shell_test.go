package edge_test

import (
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"

	"github.com/mysocketio/mysocket-injector/internal/edge"
	"github.com/mysocketio/mysocket-injector/internal/edge/edgetest"
)

// TestShellBeforeForward: a client with a registered key asks for its shell first and says which tunnel it serves after. The welcome names the socket, and
// its requests are shown.
func TestShellBeforeForward(t *testing.T) {
	e := edgetest.Start(t)
	key := newKey(t)
	if _, err := e.AddUser(edge.NewUser{Email: "key@example.com", Password: "long enough", SSHKey: string(ssh.MarshalAuthorizedKey(key.PublicKey()))}); err != nil {
		t.Fatal(err)
	}
	a := login(t, e)
	a.login("key@example.com", "long enough")
	s := a.newSocket("http")
	tun := a.newTunnel(s)
	client, err := a.dial(s.UserName, key)
	if err != nil {
		t.Fatal(err)
	}
	r := newReplica(t, client, appAddress(newApp(t, "app")))
	session, err := client.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	var screen lockedBuffer
	session.Stdout = &screen
	if err := session.Shell(); err != nil {
		t.Fatal(err)
	}
	r.forward("localhost", uint32(tun.LocalPort))
	eventually(t, "the welcome", func() bool { return strings.Contains(screen.String(), "https://"+s.DNSName) })
	get(t, e.VisitorClient(t), "http://"+s.DNSName+"/seen")
	eventually(t, "the request", func() bool { return strings.Contains(screen.String(), "GET /seen -> 200") })
}
