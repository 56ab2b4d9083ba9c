package edge_test

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"

	"github.com/mysocketio/mysocket-injector/internal/edge/edgetest"
)

// TestClassicClient does what the public Go client of 2021 and 2022 does: Listen of x/crypto on localhost and the tunnel's
// port, then a session with a terminal and a shell, whose end is the word to reconnect.
func TestClassicClient(t *testing.T) {
	e := edgetest.Start(t)
	a := login(t, e)
	var s socket
	a.must("POST", "/connect", map[string]any{"name": "classic"}, &s)
	tun := s.Tunnels[0]
	key := newKey(t)
	client, err := ssh.Dial("tcp", e.SSHAddress, &ssh.ClientConfig{
		User: s.UserName, HostKeyCallback: ssh.FixedHostKey(hostKey(t, e)), ClientVersion: "SSH-2.0-Mysocketctl-1.0",
		Auth: []ssh.AuthMethod{ssh.PublicKeys(a.certify("/socket/"+s.ID+"/tunnel/"+tun.ID+"/signkey", key))},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = client.Close() }()
	listener, err := client.Listen("tcp", fmt.Sprintf("localhost:%d", tun.LocalPort))
	if err != nil {
		t.Fatal(err)
	}
	session, err := client.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	var screen lockedBuffer
	session.Stdout = &screen
	if err := session.RequestPty("xterm-256color", 80, 40, ssh.TerminalModes{}); err != nil {
		t.Fatal(err)
	}
	if err := session.Shell(); err != nil {
		t.Fatal(err)
	}
	var origin net.Addr
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "classic") })}
	server.ConnState = func(c net.Conn, state http.ConnState) {
		if state == http.StateNew {
			origin = c.RemoteAddr()
		}
	}
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = server.Serve(listener)
	}()
	if status, body := get(t, e.VisitorClient(t), "https://"+s.DNSName+"/a/path"); status != 200 || body != "classic" {
		t.Errorf("got %d %s", status, body)
	}
	eventually(t, "the request on the screen", func() bool { return strings.Contains(screen.String(), "GET /a/path -> 200") })
	e.Stop()
	_ = session.Wait()
	_ = server.Close()
	<-served
	if tcp, ok := origin.(*net.TCPAddr); !ok || !tcp.IP.IsLoopback() {
		t.Errorf("the originator is %v", origin)
	}
}
