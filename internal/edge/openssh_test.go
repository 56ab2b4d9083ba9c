package edge_test

import (
	"crypto/ed25519"
	"crypto/rand"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"

	"github.com/mysocketio/mysocket-injector/internal/edge"
	"github.com/mysocketio/mysocket-injector/internal/edge/edgetest"
)

// needed finds an unmodified client. It is a Debian package that make need-test installs, so that its absence is a fault.
func needed(t testing.TB, command, debianPackage string) string {
	t.Helper()
	path, err := exec.LookPath(command)
	if err != nil {
		t.Fatalf("%s is missing: make need-test installs the Debian package %s", command, debianPackage)
	}
	return path
}

// openSSH is OpenSSH's client with a key, and with a certificate of it if there is one.
type openSSH struct {
	t                *testing.T
	path, host, port string
	key, cert, known string
	signer           ssh.Signer
	log, screen      lockedBuffer
	cmd              *exec.Cmd
	keyboard         io.WriteCloser
	exited           chan error
}

func newOpenSSH(t *testing.T, e *edgetest.Edge) *openSSH {
	t.Helper()
	o := &openSSH{t: t, path: needed(t, "ssh", "openssh-client"), exited: make(chan error, 1)}
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	block, err := ssh.MarshalPrivateKey(key, "")
	if err != nil {
		t.Fatal(err)
	}
	if o.signer, err = ssh.NewSignerFromKey(key); err != nil {
		t.Fatal(err)
	}
	if o.host, o.port, err = net.SplitHostPort(e.SSHAddress); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	o.key, o.known = filepath.Join(dir, "id"), filepath.Join(dir, "known_hosts")
	o.write(o.key, pemOf(block))
	o.write(o.known, fmt.Appendf(nil, "[%s]:%s %s\n", o.host, o.port, e.HostKey))
	return o
}

func (o *openSSH) write(path string, data []byte) {
	o.t.Helper()
	if err := os.WriteFile(path, data, 0o600); err != nil {
		o.t.Fatal(err)
	}
}

// certify has the client log in with a certificate.
func (o *openSSH) certify(a *account, signkey string) {
	o.t.Helper()
	o.cert = o.key + "-cert.pub"
	o.write(o.cert, ssh.MarshalAuthorizedKey(a.certify(signkey, o.signer).PublicKey()))
}

// start runs ssh -R until the test ends. With a session it has a terminal, and no -N.
func (o *openSSH) start(user, forward string, session bool) {
	o.t.Helper()
	args := []string{"-F", "none", "-v", "-R", forward, "-p", o.port, "-i", o.key, "-o", "IdentitiesOnly=yes", "-o", "UserKnownHostsFile=" + o.known,
		"-o", "StrictHostKeyChecking=yes", "-o", "BatchMode=yes", "-o", "ExitOnForwardFailure=yes"}
	if o.cert != "" {
		args = append(args, "-o", "CertificateFile="+o.cert)
	}
	if session {
		args = append(args, "-tt")
	} else {
		args = append(args, "-N")
	}
	o.cmd = exec.CommandContext(o.t.Context(), o.path, append(args, user+"@"+o.host)...)
	o.cmd.Stdout, o.cmd.Stderr = &o.screen, &o.log
	var err error
	if o.keyboard, err = o.cmd.StdinPipe(); err != nil {
		o.t.Fatal(err)
	}
	if err := o.cmd.Start(); err != nil {
		o.t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		o.exited <- o.cmd.Wait()
	}()
	o.t.Cleanup(func() {
		_ = o.cmd.Process.Kill()
		<-ended
		if o.t.Failed() {
			o.t.Logf("ssh said:\n%s\n%s", o.log.String(), o.screen.String())
		}
	})
}

// TestOpenSSHClient runs the unmodified OpenSSH client, as old users do with a registered key and newer ones with a
// certificate. It refuses channels whose bind host or port is not what it asked for, and says in its log what they were.
func TestOpenSSHClient(t *testing.T) {
	e := edgetest.Start(t)
	owner := newOpenSSH(t, e) // its key is the registered one
	if _, err := e.AddUser(edge.NewUser{Email: "key@example.com", Password: "long enough", SSHKey: string(ssh.MarshalAuthorizedKey(owner.signer.PublicKey()))}); err != nil {
		t.Fatal(err)
	}
	a := login(t, e)
	a.login("key@example.com", "long enough")
	s := a.newSocket("http")
	tun := a.newTunnel(s)
	visitor := e.VisitorClient(t)
	app := appAddress(newApp(t, "app"))
	connected := func() int { return len(e.Tunnels()[0].Tunnels) }
	const (
		key    = ""
		tunnel = "tunnel"
		socket = "socket"
	)
	port := fmt.Sprint(tun.LocalPort)
	for _, c := range []struct {
		with, bind string
		port       string
		session    bool
		listen     string // what the channels name; empty: what the client makes of no host
	}{
		{with: key, port: port, listen: "localhost"},
		{with: key, bind: "localhost:", port: port, listen: "localhost"},
		{with: key, bind: "127.0.0.1:", port: port, listen: "127.0.0.1"},
		{with: key, port: port, session: true, listen: "localhost"},
		{with: tunnel, port: port, listen: "localhost"},
		{with: tunnel, bind: "localhost:", port: port, listen: "localhost"},
		{with: tunnel, bind: "127.0.0.1:", port: port, listen: "127.0.0.1"},
		{with: tunnel, port: "0", listen: "localhost"},
		{with: tunnel, bind: "127.0.0.1:", port: "0", session: true, listen: "127.0.0.1"},
		{with: socket, port: "0", listen: "localhost"},
		{with: socket, bind: "127.0.0.1:", port: "0", listen: "127.0.0.1"},
		{with: socket, bind: "localhost:", port: port, session: true, listen: "localhost"},
	} {
		t.Run(fmt.Sprintf("%s %s%s session %t", c.with, c.bind, c.port, c.session), func(t *testing.T) {
			o := newOpenSSH(t, e)
			switch c.with {
			case key:
				o.key = owner.key
			case tunnel:
				o.certify(a, "/socket/"+s.ID+"/tunnel/"+tun.ID+"/signkey")
			case socket:
				o.certify(a, "/socket/"+s.ID+"/signkey")
			}
			o.start(s.UserName, c.bind+c.port+":"+app, c.session)
			eventually(t, "ssh -R to connect", func() bool { return connected() == 1 })
			for range 3 {
				if status, body := get(t, visitor, "http://"+s.DNSName+"/a/path"); status != 200 || body != "Server: app\n" {
					t.Errorf("got %d %s", status, body)
				}
			}
			eventually(t, "a channel for exactly what was asked for", func() bool {
				return strings.Contains(o.log.String(), "client_request_forwarded_tcpip: listen "+c.listen+" port ") &&
					strings.Contains(o.log.String(), "originator 127.0.0.1 port ")
			})
			if c.port != "0" && !strings.Contains(o.log.String(), "listen "+c.listen+" port "+port+",") {
				t.Errorf("the channels are not for port %s", port)
			}
			if !c.session {
				_ = o.cmd.Process.Kill()
				eventually(t, "the tunnel of the killed client to leave", func() bool { return connected() == 0 })
				return
			}
			eventually(t, "the welcome", func() bool {
				return strings.Contains(o.screen.String(), `Socket "test http" is online:`) && strings.Contains(o.screen.String(), "https://"+s.DNSName)
			})
			get(t, visitor, "http://"+s.DNSName+"/live")
			eventually(t, "a live line", func() bool { return strings.Contains(o.screen.String(), "GET /live -> 200") })
			if _, err := o.keyboard.Write([]byte{0x03}); err != nil {
				t.Fatal(err)
			}
			if err := <-o.exited; err != nil {
				t.Errorf("after Control-C ssh ended with %v", err)
			}
			eventually(t, "the tunnel to leave", func() bool { return connected() == 0 })
		})
	}
	t.Run("drain", func(t *testing.T) {
		o := newOpenSSH(t, e)
		o.certify(a, "/socket/"+s.ID+"/signkey")
		o.start(s.UserName, "0:"+app, true)
		eventually(t, "the welcome", func() bool { return strings.Contains(o.screen.String(), "is online") })
		e.Stop()
		if err := <-o.exited; err != nil {
			t.Errorf("when the edge drained ssh ended with %v", err)
		}
	})
}

// TestOpenSSHClientIsRefused: what must not work, says so and ends the client.
func TestOpenSSHClientIsRefused(t *testing.T) {
	e := edgetest.Start(t)
	a := login(t, e)
	s := a.newSocket("http")
	tun := a.newTunnel(s)
	for _, c := range []struct {
		name, forward, says string
		certified           bool
	}{
		{name: "a key that is not registered", forward: fmt.Sprintf("%d:localhost:1", tun.LocalPort), says: "Permission denied (publickey)"},
		{name: "a foreign port", forward: "1:localhost:1", says: "remote port forwarding failed for listen port 1", certified: true},
		{name: "a foreign host", forward: "example.com:0:localhost:1", says: "remote port forwarding failed", certified: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := newOpenSSH(t, e)
			if c.certified {
				o.certify(a, "/socket/"+s.ID+"/signkey")
			}
			o.start(s.UserName, c.forward, false)
			if err := <-o.exited; err == nil || !strings.Contains(o.log.String(), c.says) {
				t.Errorf("ssh ended with %v", err)
			}
		})
	}
}
