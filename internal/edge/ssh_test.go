package edge_test

import (
	"bufio"
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/mysocketio/mysocket-injector/internal/edge"
	"github.com/mysocketio/mysocket-injector/internal/edge/edgetest"
)

// resign makes a certificate of our own making, as an attacker or a late client would have it.
func resign(t *testing.T, from ssh.Signer, key ssh.Signer, ca ssh.Signer, change func(*ssh.Certificate)) ssh.Signer {
	t.Helper()
	cert := *from.PublicKey().(*ssh.Certificate)
	cert.Key = key.PublicKey()
	change(&cert)
	if ca != nil {
		if err := cert.SignCert(rand.Reader, ca); err != nil {
			t.Fatal(err)
		}
	}
	signer, err := ssh.NewCertSigner(&cert, key)
	if err != nil {
		t.Fatal(err)
	}
	return signer
}

func TestLoginIsRefused(t *testing.T) {
	var offset atomic.Int64
	e := edgetest.Start(t, func(c *edge.Config) {
		c.Now = func() time.Time { return time.Now().Add(time.Duration(offset.Load())) }
	})
	a := login(t, e)
	s := a.newSocket("http")
	tun := a.newTunnel(s)
	path := "/socket/" + s.ID + "/tunnel/" + tun.ID + "/signkey"
	key := newKey(t)
	good := a.certify(path, key)
	same := func(*ssh.Certificate) {}
	other, err := e.AddUser(edge.NewUser{Name: "Other", Email: "other@example.com", Password: "password of other"})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name   string
		user   string
		signer ssh.Signer
		clock  time.Duration
	}{
		{"signed by another authority", s.UserName, resign(t, good, key, newKey(t), same), 0},
		{"changed after signing", s.UserName, resign(t, good, key, nil, func(c *ssh.Certificate) { c.ValidBefore += 3600 }), 0},
		{"for another user", strings.ReplaceAll(other.ID, "-", ""), good, 0},
		{"an unknown user", strings.Repeat("0", 32), good, 0},
		{"no user id", "root", good, 0},
		{"a bare key that is not registered", s.UserName, key, 0},
		{"expired", s.UserName, good, 5*time.Minute + time.Second},
		{"not valid yet", s.UserName, good, -90 * time.Second},
	} {
		offset.Store(int64(c.clock))
		if client, err := a.dial(c.user, c.signer); err == nil {
			_ = client.Close()
			t.Errorf("%s: the login was taken", c.name)
		}
	}
	offset.Store(0)
	client, err := a.dial(s.UserName, good)
	if err != nil {
		t.Fatalf("the good certificate was refused: %v", err)
	}
	_ = client.Close()
	// A clock that is behind by less than a minute is no fault.
	offset.Store(int64(-50 * time.Second))
	if client, err = a.dial(s.UserName, good); err != nil {
		t.Fatalf("with a clock a little behind: %v", err)
	}
	_ = client.Close()
	offset.Store(0)
	a.must("DELETE", "/socket/"+s.ID+"/tunnel/"+tun.ID, nil, nil)
	if client, err := a.dial(s.UserName, good); err == nil {
		_ = client.Close()
		t.Error("a certificate for a deleted tunnel logged in")
	}
}

func TestForwardRequests(t *testing.T) {
	e := edgetest.Start(t)
	a := login(t, e)
	s, other := a.newSocket("http"), a.newSocket("http")
	tun, otherTun := a.newTunnel(s), a.newTunnel(other)
	app := appAddress(newApp(t, "app"))
	visitor := e.VisitorClient(t)
	port := uint32(tun.LocalPort)
	for _, c := range []struct {
		host string
		port uint32
		ok   bool
	}{
		{"localhost", port, true}, {"127.0.0.1", port, true}, {"", port, true}, {"0.0.0.0", port, true},
		{"localhost", 0, true}, {"127.0.0.1", 0, true},
		{"localhost", port + 1, false}, {"localhost", uint32(otherTun.LocalPort), false},
		{"example.com", port, false}, {"::", port, false}, {"localhost", 1 << 20, false},
	} {
		name := fmt.Sprintf("%q %d", c.host, c.port)
		signer := a.certify("/socket/"+s.ID+"/tunnel/"+tun.ID+"/signkey", newKey(t))
		client, err := a.dial(s.UserName, signer)
		if err != nil {
			t.Fatal(err)
		}
		r := newReplica(t, client, app)
		bound, err := r.tryForward(c.host, c.port)
		if (err == nil) != c.ok {
			t.Errorf("%s: err %v", name, err)
		}
		if c.ok {
			if bound != port {
				t.Errorf("%s: bound port %d, want the tunnel's %d", name, bound, port)
			}
			a.waitConnected(s, tun.ID)
			if status, _ := get(t, visitor, "http://"+s.DNSName+"/"); status != 200 {
				t.Errorf("%s: status %d", name, status)
			}
			r.mu.Lock()
			if r.lastOpen.Host != c.host || r.lastOpen.Port != port {
				t.Errorf("%s: channels said %q %d", name, r.lastOpen.Host, r.lastOpen.Port)
			}
			r.mu.Unlock()
			if _, err := r.tryForward("localhost", port); err == nil {
				t.Errorf("%s: a second forward of the tunnel was taken", name)
			}
		}
		r.close()
		eventually(t, "tunnel gone", func() bool { return !a.connected(s, tun.ID) })
	}
}

// TestSocketLogins shows the late-2022 way: a certificate for the socket, port 0, and each login is a tunnel.
func TestSocketLogins(t *testing.T) {
	e := edgetest.Start(t)
	a := login(t, e)
	s := a.newSocket("http")
	visitor := e.VisitorClient(t)
	counts := map[string]int{}
	for i := range 2 {
		client, err := a.dial(s.UserName, a.certify("/socket/"+s.ID+"/signkey", newKey(t)))
		if err != nil {
			t.Fatal(err)
		}
		r := newReplica(t, client, appAddress(newApp(t, fmt.Sprint(i))))
		r.forward("localhost", 0)
		if r.port == 0 {
			t.Error("the reply carried no port")
		}
	}
	eventually(t, "two tunnels", func() bool { return len(e.Tunnels()[0].Tunnels) == 2 })
	for range 10 {
		_, body := get(t, visitor, "http://"+s.DNSName+"/")
		counts[body]++
	}
	if len(counts) != 2 || counts["Server: 0\n"] != 5 {
		t.Errorf("requests went %v", counts)
	}
}

func TestRegisteredKey(t *testing.T) {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := ssh.NewSignerFromKey(key)
	if err != nil {
		t.Fatal(err)
	}
	e := edgetest.Start(t)
	if _, err := e.AddUser(edge.NewUser{Name: "K", Email: "key@example.com", Password: "long enough", SSHKey: string(ssh.MarshalAuthorizedKey(signer.PublicKey()))}); err != nil {
		t.Fatal(err)
	}
	a := login(t, e)
	a.login("key@example.com", "long enough")
	s := a.newSocket("http")
	tun := a.newTunnel(s)
	client, err := a.dial(s.UserName, signer)
	if err != nil {
		t.Fatal(err)
	}
	r := newReplica(t, client, appAddress(newApp(t, "app")))
	if _, err := r.tryForward("localhost", 0); err == nil {
		t.Error("port 0 was taken, and it says nothing of the socket")
	}
	r.forward("127.0.0.1", uint32(tun.LocalPort))
	a.waitConnected(s, tun.ID)
	if status, _ := get(t, e.VisitorClient(t), "http://"+s.DNSName+"/"); status != 200 {
		t.Errorf("status %d", status)
	}
}

func TestNewestLoginSupersedes(t *testing.T) {
	e := edgetest.Start(t)
	a := login(t, e)
	s := a.newSocket("http")
	old := a.connect(s, appAddress(newApp(t, "old")))
	newer := a.connectTunnel(s, old.tunnel, appAddress(newApp(t, "new")))
	_ = old.client.Wait() // Closed by the edge.
	visitor := e.VisitorClient(t)
	for range 3 {
		if _, body := get(t, visitor, "http://"+s.DNSName+"/"); body != "Server: new\n" {
			t.Errorf("got %q", body)
		}
	}
	if n := len(e.Tunnels()[0].Tunnels); n != 1 {
		t.Errorf("%d tunnels are connected", n)
	}
	_ = newer
}

func TestDeletionClosesConnections(t *testing.T) {
	e := edgetest.Start(t)
	a := login(t, e)
	s := a.newSocket("http")
	one, two := a.connect(s, appAddress(newApp(t, "1"))), a.connect(s, appAddress(newApp(t, "2")))
	a.must("DELETE", "/socket/"+s.ID+"/tunnel/"+one.tunnel.ID, nil, nil)
	if a.connected(s, one.tunnel.ID) || !a.connected(s, two.tunnel.ID) {
		t.Error("after the deletion of one tunnel the rotation is wrong")
	}
	_ = one.client.Wait()
	a.must("DELETE", "/socket/"+s.ID, nil, nil)
	_ = two.client.Wait()
	if status, _ := get(t, e.VisitorClient(t), "http://"+s.DNSName+"/"); status != 404 {
		t.Errorf("status %d after deletion", status)
	}
	if status := a.call("GET", "/socket/"+s.ID+"/tunnel/"+two.tunnel.ID, nil, nil); status != 404 {
		t.Errorf("the tunnel of a deleted socket answers %d", status)
	}
}

func TestSession(t *testing.T) {
	e := edgetest.Start(t)
	a := login(t, e)
	s := a.newSocket("http")
	r := a.connect(s, appAddress(newApp(t, "app")))
	if ch, _, err := r.client.OpenChannel("direct-tcpip", nil); err == nil {
		_ = ch.Close()
		t.Error("direct-tcpip was taken")
	}
	refused, err := r.client.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	if err := refused.Run("id"); err == nil {
		t.Error("exec was taken")
	}
	session, err := r.client.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	out, err := session.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := session.RequestPty("xterm-256color", 80, 40, ssh.TerminalModes{}); err != nil {
		t.Fatal(err)
	}
	if err := session.Shell(); err != nil {
		t.Fatal(err)
	}
	lines := make(chan string, 100)
	go func() {
		defer close(lines)
		scanner := bufio.NewScanner(out)
		for scanner.Scan() {
			lines <- scanner.Text()
		}
	}()
	expect := func(text string) {
		t.Helper()
		timeout := time.After(patience)
		for {
			select {
			case line, ok := <-lines:
				if !ok {
					t.Fatalf("the session ended before %q", text)
				}
				if strings.Contains(line, text) {
					return
				}
			case <-timeout:
				t.Fatalf("no line with %q", text)
			}
		}
	}
	expect("test http")
	expect("https://" + s.DNSName)
	expect("Control-C")
	// A path with control characters must not reach the terminal as such.
	conn, err := net.Dial("tcp", e.HTTPAddress)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = fmt.Fprintf(conn, "GET /a\x9b31m HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", s.DNSName)
	_, _ = io.Copy(io.Discard, conn)
	_ = conn.Close()
	expect("GET /a%9B31m -> 200")
	// The edge's stop closes the session: the word to reconnect.
	e.Stop()
	if err := session.Wait(); err != nil && !strings.Contains(err.Error(), "without exit status") {
		t.Errorf("the session ended with %v", err)
	}
	for range lines {
	}
}

// The edge's last word to a client is when to come back. Its end and a deletion of what the client serves say nothing of that.
func TestComeBack(t *testing.T) {
	for _, c := range []struct {
		name     string
		comeBack time.Duration
		want     []byte
	}{
		{"seconds", 7 * time.Second, []byte{0, 0, 0, 7}},
		{"rounded up", 1500 * time.Millisecond, []byte{0, 0, 0, 2}},
		{"nothing", 0, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			e := edgetest.Start(t, func(cfg *edge.Config) { cfg.ComeBack = c.comeBack })
			a := login(t, e)
			s := a.newSocket("http")
			staying, leaving := a.connect(s, appAddress(newApp(t, "app"))), a.connect(s, appAddress(newApp(t, "app")))
			said := func(r *replica) <-chan []byte {
				ch, requests, err := r.client.OpenChannel("session", nil)
				if err != nil {
					t.Fatal(err)
				}
				if ok, err := ch.SendRequest("shell", true, nil); err != nil || !ok {
					t.Fatal(ok, err)
				}
				last := make(chan []byte, 1)
				go func() {
					var payload []byte
					for request := range requests {
						if request.Type == "come-back@mysocket.io" {
							payload = request.Payload
						}
					}
					last <- payload
				}()
				return last
			}
			stayed, left := said(staying), said(leaving)
			a.must("DELETE", "/socket/"+s.ID+"/tunnel/"+leaving.tunnel.ID, nil, nil)
			if got := <-left; got != nil {
				t.Errorf("the client of a deleted tunnel was told %v", got)
			}
			e.Stop()
			if got := <-stayed; !bytes.Equal(got, c.want) {
				t.Errorf("the client was told %v, want %v", got, c.want)
			}
		})
	}
}

// lockedBuffer collects the log of a running edge.
type lockedBuffer struct {
	mu  sync.Mutex
	buf strings.Builder
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// freezer is a connection that can stop carrying anything, in either direction, without closing.
type freezer struct {
	net.Conn
	frozen chan struct{}
}

func (f *freezer) Read(p []byte) (int, error) {
	n, err := f.Conn.Read(p)
	select {
	case <-f.frozen:
		if err == nil {
			// Swallow it, and wait for the other side to give up.
			_, _ = io.Copy(io.Discard, f.Conn)
			return 0, io.EOF
		}
	default:
	}
	return n, err
}

func TestSilentClientIsEjected(t *testing.T) {
	log := &lockedBuffer{}
	e := edgetest.Start(t, func(c *edge.Config) {
		c.Timings.KeepaliveInterval = 30 * time.Millisecond
		c.Log = slog.New(slog.NewTextHandler(log, nil))
	})
	a := login(t, e)
	s := a.newSocket("http")
	tun := a.newTunnel(s)
	raw, err := net.Dial("tcp", e.SSHAddress)
	if err != nil {
		t.Fatal(err)
	}
	frozen := make(chan struct{})
	conn, chans, reqs, err := ssh.NewClientConn(&freezer{raw, frozen}, e.SSHAddress, &ssh.ClientConfig{
		User: s.UserName, HostKeyCallback: ssh.FixedHostKey(hostKey(t, e)),
		Auth: []ssh.AuthMethod{ssh.PublicKeys(a.certify("/socket/"+s.ID+"/tunnel/"+tun.ID+"/signkey", newKey(t)))},
	})
	if err != nil {
		t.Fatal(err)
	}
	r := newReplica(t, ssh.NewClient(conn, chans, reqs), appAddress(newApp(t, "app")))
	r.forward("localhost", 0)
	a.waitConnected(s, tun.ID)
	// While it answers keepalives it stays, for many intervals.
	since := time.Now()
	eventually(t, "some keepalives", func() bool { return time.Since(since) > 400*time.Millisecond })
	if !a.connected(s, tun.ID) {
		t.Fatal("a client that answers keepalives was ejected")
	}
	close(frozen)
	eventually(t, "the silent client to be ejected", func() bool { return !a.connected(s, tun.ID) })
	eventually(t, "the reason in the log", func() bool { return strings.Contains(log.String(), "does not answer") })
}

func TestHandshakeTimeout(t *testing.T) {
	e := edgetest.Start(t, func(c *edge.Config) { c.Timings.HandshakeTimeout = 50 * time.Millisecond })
	conn, err := net.Dial("tcp", e.SSHAddress)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	_ = conn.SetReadDeadline(time.Now().Add(patience))
	if _, err := io.ReadAll(conn); err != nil {
		t.Errorf("the edge did not hang up on a client that says nothing: %v", err)
	}
}

func TestUnauthenticatedConnectionsAreBounded(t *testing.T) {
	e := edgetest.Start(t)
	var conns []net.Conn
	defer func() {
		for _, conn := range conns {
			_ = conn.Close()
		}
	}()
	greets := func() bool {
		conn, err := net.Dial("tcp", e.SSHAddress)
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, conn)
		_ = conn.SetReadDeadline(time.Now().Add(patience))
		n, _ := conn.Read(make([]byte, 4))
		return n > 0
	}
	taken := 0
	for range 300 {
		if !greets() {
			break
		}
		taken++
	}
	if taken != 256 {
		t.Errorf("%d connections from one address may hang about without logging in", taken)
	}
	_ = conns[0].Close()
	eventually(t, "room for another", greets)
}

func TestKeysThatAreSigned(t *testing.T) {
	e := edgetest.Start(t)
	a := login(t, e)
	s := a.newSocket("http")
	path := "/socket/" + s.ID + "/tunnel/" + a.newTunnel(s).ID + "/signkey"
	line := func(key any) string {
		pub, err := ssh.NewPublicKey(key)
		if err != nil {
			t.Fatal(err)
		}
		return string(ssh.MarshalAuthorizedKey(pub))
	}
	small, err := rsa.GenerateKey(rand.Reader, 1024) // #nosec G403 -- to see it refused
	if err != nil {
		t.Fatal(err)
	}
	big, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	cert := a.certify(path, newKey(t))
	for _, c := range []struct {
		name, key string
		status    int
	}{
		{"RSA 1024", line(&small.PublicKey), 400},
		{"RSA 2048", line(&big.PublicKey), 200},
		{"a certificate", string(ssh.MarshalAuthorizedKey(cert.PublicKey())), 400},
		{"nonsense", "ssh-rsa nonsense", 400},
		{"nothing", "", 400},
		{"too long", "ssh-rsa " + strings.Repeat("A", 20000), 400},
	} {
		var refused struct {
			Message string `json:"error_message"`
		}
		if status := a.call("POST", path, map[string]string{"ssh_public_key": c.key}, &refused); status != c.status {
			t.Errorf("%s: %d %s", c.name, status, refused.Message)
		} else if status == 400 && !strings.HasPrefix(refused.Message, "ssh_public_key: ") {
			t.Errorf("%s: the refusal says %q", c.name, refused.Message)
		}
	}
}
