package edge_test

import (
	"crypto/ed25519"
	"crypto/rand"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"

	"github.com/mysocketio/mysocket-injector/internal/edge/edgetest"
)

// nameOf is what the edge knows of a tunnel's name.
func nameOf(e *edgetest.Edge, tunnelID string) string {
	for _, k := range e.Tunnels() {
		for _, t := range k.Tunnels {
			if t.Tunnel == tunnelID {
				return t.Name
			}
		}
	}
	return ""
}

// TestTunnelsHaveNames: a session's first valid MYSOCKET_NAME names the tunnels of its connection, those that come later too. Other variables and other
// values are refused, and change nothing.
func TestTunnelsHaveNames(t *testing.T) {
	e := edgetest.Start(t)
	a := login(t, e)
	s := a.newSocket("http")
	app := appAddress(newApp(t, "app"))
	r := a.connect(s, app)
	session, err := r.client.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		variable, value string
		taken           bool
	}{
		{"LANG", "C", false},
		{"MYSOCKET_NAME", "<b>", false},
		{"MYSOCKET_NAME", strings.Repeat("x", 400), false},
		{"MYSOCKET_NAME", "shop/web-1", true},
		{"MYSOCKET_NAME", "shop/web-2", false},
	} {
		if err := session.Setenv(c.variable, c.value); (err == nil) != c.taken {
			t.Errorf("%s=%.20s: %v", c.variable, c.value, err)
		}
	}
	if name := nameOf(e, r.tunnel.ID); name != "shop/web-1" {
		t.Errorf("the name is %q", name)
	}
	if err := session.Shell(); err != nil {
		t.Errorf("no shell after a variable: %v", err)
	}
	// The name is the connection's: a forward that it withdraws and asks for again has it.
	if !r.cancel() {
		t.Fatal("cancel")
	}
	r.forward("localhost", uint32(r.tunnel.LocalPort))
	a.waitConnected(s, r.tunnel.ID)
	if name := nameOf(e, r.tunnel.ID); name != "shop/web-1" {
		t.Errorf("after a new forward the name is %q", name)
	}
}

// TestOpenSSHSaysItsName has OpenSSH send the variable, which it does before it asks for a shell.
func TestOpenSSHSaysItsName(t *testing.T) {
	e := edgetest.Start(t)
	a := login(t, e)
	s := a.newSocket("http")
	tun := a.newTunnel(s)
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	block, err := ssh.MarshalPrivateKey(key, "")
	if err != nil {
		t.Fatal(err)
	}
	signer, err := ssh.NewSignerFromKey(key)
	if err != nil {
		t.Fatal(err)
	}
	host, port, err := net.SplitHostPort(e.SSHAddress)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	files := map[string][]byte{
		"id":          pemOf(block),
		"id-cert.pub": ssh.MarshalAuthorizedKey(a.certify("/socket/"+s.ID+"/tunnel/"+tun.ID+"/signkey", signer).PublicKey()),
		"known_hosts": fmt.Appendf(nil, "[%s]:%s %s\n", host, port, e.HostKey),
	}
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.CommandContext(t.Context(), "ssh", "-F", "none", "-p", port, "-i", filepath.Join(dir, "id"), "-R", fmt.Sprintf("%d:127.0.0.1:9", tun.LocalPort),
		"-o", "UserKnownHostsFile="+filepath.Join(dir, "known_hosts"), "-o", "BatchMode=yes", "-o", "SetEnv=MYSOCKET_NAME=shop/web-1", s.UserName+"@"+host)
	log := &lockedBuffer{}
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			t.Log(log.String())
		}
	}()
	eventually(t, "the name", func() bool { return nameOf(e, tun.ID) == "shop/web-1" })
	eventually(t, "the welcome", func() bool { return strings.Contains(log.String(), "is online") })
}

// TestStatusPage looks at the page of a real edge: who is connected, and how visitors fared.
func TestStatusPage(t *testing.T) {
	e := edgetest.Start(t)
	a := login(t, e)
	web, tcp := a.newSocket("http"), a.newSocket("tcp")
	app := newCountingApp(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/broken" {
			w.WriteHeader(http.StatusInternalServerError)
		}
		_, _ = io.WriteString(w, "hello")
	})
	r := a.connect(web, app.address)
	a.connect(tcp, app.address)
	session, err := r.client.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	if err := session.Setenv("MYSOCKET_NAME", "shop/web-1"); err != nil {
		t.Fatal(err)
	}
	visitors := e.VisitorClient(t)
	for i := range 20 {
		path := "/"
		if i%4 == 0 {
			path = "/broken"
		}
		get(t, visitors, "https://"+web.DNSName+path)
	}
	get(t, visitors, "http://"+"nothing."+e.Domain+"/") // no socket's
	conn, err := net.Dial("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(tcp.Ports[0])))
	if err != nil {
		t.Fatal(err)
	}
	_, _ = io.WriteString(conn, "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
	_, _ = io.Copy(io.Discard, conn)
	_ = conn.Close()

	admin := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	// What the visitor has seen the end of is counted a moment later.
	var body string
	eventually(t, "all 21 to be counted", func() bool {
		_, body = get(t, admin, e.AdminURL+"/")
		return strings.Contains(body, "5 of 21")
	})
	for _, want := range []string{
		"Mysocket edge test, up ", `<dd id="sockets">2</dd>`, `<dd id="tunnels">2</dd>`, "shop/web-1", r.client.LocalAddr().String(), "20 in all", "25.0 %",
		"https://" + web.DNSName, "tcp://" + tcp.DNSName, e.Email, "*." + e.Domain, "api." + e.Domain, "own authority",
	} {
		if !strings.Contains(body, want) {
			t.Errorf("the page has no %s", want)
		}
	}
	if _, found, _ := strings.Cut(body, "/debug/tunnels"); found == "" {
		t.Error("the page is cut off")
	}
	_, only := get(t, admin, e.AdminURL+"/?q=shop%2Fweb")
	if !strings.Contains(only, web.DNSName) || strings.Contains(only, tcp.DNSName) {
		t.Error("the filter finds other sockets than that of the pod")
	}
	if status, _ := get(t, admin, e.AdminURL+"/status.css"); status != http.StatusOK {
		t.Errorf("the style: %d", status)
	}
	if status, _ := get(t, admin, e.AdminURL+"/nothing"); status != http.StatusNotFound {
		t.Errorf("another path: %d", status)
	}
}
