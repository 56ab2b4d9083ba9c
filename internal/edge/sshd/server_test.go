package sshd

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/mysocketio/mysocket-injector/internal/edge/feed"
	"github.com/mysocketio/mysocket-injector/internal/edge/metrics"
	"github.com/mysocketio/mysocket-injector/internal/edge/pki"
	"github.com/mysocketio/mysocket-injector/internal/edge/registry"
	"github.com/mysocketio/mysocket-injector/internal/edge/store"
)

// bench is a server without an edge, with one socket.
type bench struct {
	*Server
	t       testing.TB
	keys    *pki.Keys
	store   *store.Store
	address string
	user    store.User
	socket  store.Socket
	tunnel  store.Tunnel
	log     *logBuffer
}

// logBuffer collects what a running server logs.
type logBuffer struct {
	mu   sync.Mutex
	text strings.Builder
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

func newBench(t testing.TB, options ...func(*Config)) *bench {
	t.Helper()
	b := &bench{t: t, log: &logBuffer{}}
	var err error
	if b.store, err = store.Open(filepath.Join(t.TempDir(), "x.db"), nil); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.store.Close() })
	if b.keys, err = pki.Load(b.store, "test", nil); err != nil {
		t.Fatal(err)
	}
	if b.user, err = b.store.AddUser(store.User{Email: "owner@example.com"}); err != nil {
		t.Fatal(err)
	}
	var tunnels []store.Tunnel
	if b.socket, tunnels, err = b.store.CreateSocket(store.Socket{UserID: b.user.ID, Name: "n", Type: store.TypeHTTP}, "edge.test", 1); err != nil {
		t.Fatal(err)
	}
	b.tunnel = tunnels[0]
	reg := registry.New(registry.Config{})
	cfg := Config{
		Store: b.store, Keys: b.keys, Registry: reg, Feed: &feed.Hub{}, Metrics: metrics.New(reg.Count),
		Log: slog.New(slog.NewTextHandler(b.log, nil)), Version: "test", URL: func(store.Socket) string { return "https://n.edge.test" },
		HandshakeTimeout: time.Minute, KeepaliveInterval: 10 * time.Second, KeepaliveMisses: 4, SettleTimeout: time.Second,
	}
	for _, option := range options {
		option(&cfg)
	}
	b.Server = New(cfg)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b.address = ln.Addr().String()
	served := make(chan error, 1)
	go func() { served <- b.Serve(ln) }()
	t.Cleanup(func() {
		_ = ln.Close()
		if err := <-served; err != nil {
			t.Error(err)
		}
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := b.Shutdown(ctx); err != nil {
			t.Error(err)
		}
	})
	return b
}

// dial logs in with a certificate for the socket.
func (b *bench) dial() (*ssh.Client, error) {
	return b.dialWith(b.certificate())
}

func (b *bench) certificate() ssh.Signer {
	b.t.Helper()
	key := newKey(b.t)
	cert, err := b.keys.SignTunnel(key.PublicKey(), strings.ReplaceAll(b.user.ID, "-", ""), pki.Binding{SocketID: b.socket.ID})
	if err != nil {
		b.t.Fatal(err)
	}
	signer, err := ssh.NewCertSigner(cert, key)
	if err != nil {
		b.t.Fatal(err)
	}
	return signer
}

func newKey(t testing.TB) ssh.Signer {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := ssh.NewSignerFromKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return signer
}

func (b *bench) dialWith(signers ...ssh.Signer) (*ssh.Client, error) {
	return ssh.Dial("tcp", b.address, &ssh.ClientConfig{
		User: strings.ReplaceAll(b.user.ID, "-", ""), Auth: []ssh.AuthMethod{ssh.PublicKeys(signers...)},
		HostKeyCallback: ssh.FixedHostKey(b.keys.HostKey.PublicKey()), Timeout: 10 * time.Second,
	})
}

func (b *bench) mustDial() *ssh.Client {
	b.t.Helper()
	client, err := b.dial()
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { _ = client.Close() })
	return client
}

func eventually(t testing.TB, what string, condition func() bool) {
	t.Helper()
	deadline := time.NewTimer(15 * time.Second)
	defer deadline.Stop()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !condition() {
		select {
		case <-tick.C:
		case <-deadline.C:
			t.Fatalf("waited for: %s", what)
		}
	}
}

func TestDropChance(t *testing.T) {
	for n, want := range map[int]int{0: 0, 511: 0, 512: 30, 768: 65, 1023: 99, 1024: 100, 5000: 100} {
		if got := dropChance(n); got != want {
			t.Errorf("with %d that have not logged in the chance is %d, want %d", n, got, want)
		}
	}
	if crowded(0) || !crowded(maxUnauthenticated) {
		t.Error("it drops when it must not, or does not when it must")
	}
	dropped := 0
	for range 10_000 {
		if crowded(768) {
			dropped++
		}
	}
	if dropped < 6000 || dropped > 7000 { // 6 500, and a standard deviation of 48
		t.Errorf("%d of 10000 were dropped, at a chance of 65 %%", dropped)
	}
}

func TestAccountsAreBounded(t *testing.T) {
	a := accounts{}
	for i := range loginBurst {
		if _, err := a.enter("one"); err != nil {
			t.Fatalf("login %d: %v", i, err)
		}
		a.leave("one")
	}
	var refused error
	for range loginBurst { // some come back meanwhile
		if _, refused = a.enter("one"); refused != nil {
			break
		}
		a.leave("one")
	}
	if refused == nil || !strings.Contains(refused.Error(), "too often") {
		t.Errorf("logins in a loop: %v", refused)
	}
	acc, err := a.enter("two")
	if err != nil {
		t.Fatal(err)
	}
	acc.connections = maxConnectionsPerAccount
	if _, err := a.enter("two"); err == nil || !strings.Contains(err.Error(), "20000 connections") {
		t.Errorf("one connection too many: %v", err)
	}
	for range 1000 {
		name := fmt.Sprint("many ", len(a))
		if _, err := a.enter(name); err != nil {
			t.Fatal(err)
		}
		a[name].logins.SetBurst(loginBurst + 1)
		a.leave(name)
	}
}

// TestAccountsAreForgotten: an account that has left, with all its logins, is not remembered.
func TestAccountsAreForgotten(t *testing.T) {
	b := newBench(t)
	client := b.mustDial()
	known := func() int {
		b.mu.Lock()
		defer b.mu.Unlock()
		return len(b.accounts) + len(b.fromAddress)
	}
	eventually(t, "the login to be counted", func() bool { return known() == 2 })
	b.mu.Lock()
	b.accounts[b.user.ID].logins.SetLimit(1e9) // a login comes back at once
	b.mu.Unlock()
	_ = client.Close()
	eventually(t, "the account to be forgotten", func() bool { return known() == 0 })
}

func TestRefusedForTheAccount(t *testing.T) {
	b := newBench(t)
	b.mustDial()
	eventually(t, "the login to be counted", func() bool {
		b.mu.Lock()
		defer b.mu.Unlock()
		return len(b.accounts) == 1
	})
	b.mu.Lock()
	b.accounts[b.user.ID].connections += maxConnectionsPerAccount
	b.mu.Unlock()
	client, err := b.dial()
	if err == nil {
		_ = client.Wait() // The login itself was good; the connection is closed after it.
		_ = client.Close()
	}
	eventually(t, "the reason in the log", func() bool { return strings.Contains(b.log.String(), "connections, which is the most") })
	b.mu.Lock()
	b.accounts[b.user.ID].connections -= maxConnectionsPerAccount
	b.mu.Unlock()
}

// TestAuthTriesAreBounded: a client with many keys is hung up on.
func TestAuthTriesAreBounded(t *testing.T) {
	b := newBench(t)
	var keys []ssh.Signer
	for range 30 {
		keys = append(keys, newKey(t))
	}
	if client, err := b.dialWith(append(keys, b.certificate())...); err == nil {
		_ = client.Close()
		t.Error("the 31st key was still looked at")
	}
	client, err := b.dialWith(append(slices.Clone(keys[:maxAuthTries-1]), b.certificate())...)
	if err != nil {
		t.Fatalf("a client with %d keys and a certificate: %v", maxAuthTries-1, err)
	}
	_ = client.Close()
}

// TestVersionsAreBounded: a client that never comes to the end of its first line is hung up on well before the deadline.
func TestVersionsAreBounded(t *testing.T) {
	b := newBench(t)
	for name, sent := range map[string]string{
		"a line without end": strings.Repeat("x", 1<<20), "lines without end": strings.Repeat("x\r\n", 1<<16),
		"a huge packet": "SSH-2.0-x\r\n\x7f\xff\xff\xff" + strings.Repeat("\x00", 64),
	} {
		conn, err := net.Dial("tcp", b.address)
		if err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		_ = conn.SetDeadline(began.Add(15 * time.Second))
		_, _ = conn.Write([]byte(sent))
		buf := make([]byte, 4096)
		for err == nil {
			_, err = conn.Read(buf)
		}
		if took := time.Since(began); took >= 15*time.Second {
			t.Errorf("%s: hung up after %s", name, took)
		}
		_ = conn.Close()
	}
}

// TestFloodsEnd: a client that sends what is of no use without end is closed, and its neighbours stay.
func TestFloodsEnd(t *testing.T) {
	b := newBench(t)
	neighbour := b.mustDial()
	forward := func(client *ssh.Client) bool {
		ok, _, err := client.SendRequest("tcpip-forward", true, ssh.Marshal(forwardRequest{"localhost", 0}))
		return ok && err == nil
	}
	if !forward(neighbour) {
		t.Fatal("the neighbour's forward was refused")
	}
	for name, flood := range map[string]func(*ssh.Client) error{
		"global requests without an answer": func(c *ssh.Client) error {
			_, _, err := c.SendRequest("nonsense@example.com", false, nil)
			return err
		},
		"keepalives": func(c *ssh.Client) error {
			_, _, err := c.SendRequest(keepaliveRequest, true, nil)
			return err
		},
		"forwards": func(c *ssh.Client) error {
			_, _, err := c.SendRequest("tcpip-forward", true, ssh.Marshal(forwardRequest{"example.com", 1}))
			return err
		},
		"openings": func(c *ssh.Client) error {
			if _, _, err := c.OpenChannel("direct-tcpip", nil); err != nil && !strings.Contains(err.Error(), "ssh: rejected") {
				return err
			}
			return nil
		},
		"requests in a session": func(c *ssh.Client) error {
			session, reqs, err := c.OpenChannel("session", nil)
			if err != nil {
				return err
			}
			go ssh.DiscardRequests(reqs)
			for {
				if _, err := session.SendRequest("window-change", true, nil); err != nil {
					return err
				}
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			client := b.mustDial()
			forward(client)
			sent := 0
			for err := error(nil); err == nil && sent < 100*maxFlood; sent++ {
				err = flood(client)
			}
			if sent >= 100*maxFlood {
				t.Errorf("%d were taken", sent)
			}
			eventually(t, "its connection to end", func() bool {
				b.mu.Lock()
				defer b.mu.Unlock()
				return len(b.connections) == 1
			})
		})
	}
	eventually(t, "all floods to be in the log", func() bool { return strings.Count(b.log.String(), flooding) == 5 })
	if ok, _, err := neighbour.SendRequest(keepaliveRequest, true, nil); err != nil || !ok {
		t.Errorf("the neighbour's keepalive: %t, %v", ok, err)
	}
	if n := len(b.all()); n != 1 {
		t.Errorf("%d connections are left", n)
	}
}

// TestKeyExchangesAreBounded: each costs the server a signature.
func TestKeyExchangesAreBounded(t *testing.T) {
	f := &flood{}
	b := newBench(t)
	key := countedKey{b.keys.HostKey, f}
	for i := range maxFlood / floodKeys {
		if _, err := key.Sign(rand.Reader, []byte("x")); err != nil {
			t.Fatalf("key exchange %d: %v", i, err)
		}
	}
	if _, err := key.Sign(rand.Reader, []byte("x")); err == nil || !f.isOver() {
		t.Errorf("one too many: %v", err)
	}
}

func TestFlood(t *testing.T) {
	now := time.Unix(1000, 0)
	f := &flood{}
	for range 10 {
		if !f.add(maxFlood, now) {
			t.Fatal("what is allowed was too much")
		}
		now = now.Add(floodWindow)
	}
	if !f.add(maxFlood, now) || f.add(1, now) || f.add(1, now.Add(time.Hour)) || !f.isOver() {
		t.Error("one too many was fine, or was forgotten")
	}
}

// TestStrangersDoNotFillTheLog: many failed logins are a few lines, and the number of those that were left out.
func TestStrangersDoNotFillTheLog(t *testing.T) {
	out := &logBuffer{}
	l := newStrangerLog(slog.New(slog.NewTextHandler(out, nil)))
	for range 10_000 {
		l.line(slog.LevelInfo, "SSH login failed", "remote", "192.0.2.1:1")
	}
	written := strings.Count(out.String(), "\n")
	if written < 50 || written > 100 {
		t.Errorf("10000 failures are %d lines", written)
	}
	l.limiter.SetBurst(1000)
	l.limiter.SetLimit(1e9)
	eventually(t, "the count of what was left out", func() bool {
		l.line(slog.LevelInfo, "SSH login failed")
		return strings.Contains(out.String(), "left_out_before=")
	})
}

// TestShutdownSpreads: the ends of many connections come one after the other.
func TestShutdownSpreads(t *testing.T) {
	b := newBench(t)
	const n = 40
	ended := make(chan time.Time, n)
	signer := b.certificate()
	for range n {
		client, err := b.dialWith(signer)
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			_ = client.Wait()
			ended <- time.Now()
		}()
	}
	eventually(t, "all to be logged in", func() bool { return len(b.all()) == n })
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := b.Shutdown(ctx); err != nil {
		t.Fatal(err)
	}
	first, last := time.Time{}, time.Time{}
	for range n {
		at := <-ended
		if first.IsZero() || at.Before(first) {
			first = at
		}
		if at.After(last) {
			last = at
		}
	}
	// All within a quarter of the time would be a chance of 40 * 0.25^39.
	if spread := last.Sub(first); spread < n*spreadEach/4 {
		t.Errorf("all ended within %s", spread)
	}
}

// FuzzRequests sends any global request, any request of a session and any opening to a live connection. Each is answered, and the connection
// lives on.
func FuzzRequests(f *testing.F) {
	b := newBench(f)
	for _, name := range []string{"tcpip-forward", "cancel-tcpip-forward", keepaliveRequest, "pty-req", "shell", "env", "exec", "subsystem", "window-change", "signal",
		"session", "direct-tcpip", "forwarded-tcpip", "x11", "auth-agent@openssh.com", ""} {
		for _, payload := range [][]byte{
			nil, {0}, {0, 0, 0, 9, 'l'}, {0xff, 0xff, 0xff, 0xff}, ssh.Marshal(forwardRequest{"localhost", 0}), ssh.Marshal(forwardRequest{"localhost", uint32(b.tunnel.LocalPort)}),
			ssh.Marshal(struct{ Name, Value string }{"LANG", "C\x00\n"}),
			ssh.Marshal(struct {
				Term                         string
				Columns, Rows, Width, Height uint32
				Modes                        string
			}{"xterm-256color", 80, 40, 0, 0, "\x00"}),
		} {
			f.Add(name, payload)
		}
	}
	var client *ssh.Client
	f.Cleanup(func() {
		if client != nil {
			_ = client.Close()
		}
	})
	used := 0
	f.Fuzz(func(t *testing.T, name string, payload []byte) {
		// The connection is a new one well before it counts as a flood.
		stuck := time.AfterFunc(10*time.Second, func() { panic(fmt.Sprintf("%q %q is not answered", name, payload)) })
		defer stuck.Stop()
		if used++; client == nil || used > 50 {
			if client != nil {
				_ = client.Close()
			}
			b.mu.Lock()
			for _, acc := range b.accounts {
				acc.logins.SetLimit(1e9)
			}
			b.mu.Unlock()
			b.t = t
			var err error
			if client, err = b.dial(); err != nil {
				t.Fatal(err)
			}
			used = 0
		}
		if _, _, err := client.SendRequest(name, true, payload); err != nil {
			t.Fatalf("global request %q %q: %v", name, payload, err)
		}
		session, reqs, err := client.OpenChannel("session", nil)
		if err != nil {
			t.Fatal(err)
		}
		go ssh.DiscardRequests(reqs)
		if _, err := session.SendRequest(name, true, payload); err != nil {
			t.Fatalf("session request %q %q: %v", name, payload, err)
		}
		_ = session.Close()
		if name != "session" {
			if ch, _, err := client.OpenChannel(name, payload); err == nil {
				_ = ch.Close()
				t.Fatalf("an opening of %q was taken", name)
			}
		}
		if ok, _, err := client.SendRequest(keepaliveRequest, true, nil); err != nil || !ok {
			t.Fatalf("after %q %q: %t, %v", name, payload, ok, err)
		}
	})
}

// TestKeepalive: a client whose answer to a keepalive waits behind what it sends is alive; one from which nothing comes is not.
func TestKeepalive(t *testing.T) {
	b := newBench(t, func(c *Config) { c.KeepaliveInterval, c.KeepaliveMisses = 20*time.Millisecond, 50 })
	raw, err := net.Dial("tcp", b.address)
	if err != nil {
		t.Fatal(err)
	}
	conn, chans, reqs, err := ssh.NewClientConn(raw, b.address, &ssh.ClientConfig{
		User: strings.ReplaceAll(b.user.ID, "-", ""), Auth: []ssh.AuthMethod{ssh.PublicKeys(b.certificate())},
		HostKeyCallback: ssh.FixedHostKey(b.keys.HostKey.PublicKey()),
	})
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	for time.Since(began) < 1500*time.Millisecond {
		if _, _, err := conn.SendRequest(keepaliveRequest, true, nil); err != nil {
			t.Fatalf("dropped while it sent: %v", err)
		}
		<-time.After(5 * time.Millisecond)
	}
	if n := len(reqs); n != 1 {
		t.Errorf("%d keepalives wait for an answer, want 1", n)
	}
	eventually(t, "the silent client to be dropped", func() bool { return len(b.all()) == 0 })
	eventually(t, "the reason in the log", func() bool { return strings.Contains(b.log.String(), "the client does not answer") })
	ssh.DiscardRequests(reqs)
	for range chans {
	}
}

// TestChannelsAreBounded: those of one tunnel, and those of all tunnels of an account together.
func TestChannelsAreBounded(t *testing.T) {
	acc := &account{}
	tunnels := make([]*forward, maxChannelsPerAccount/maxChannels+1)
	for i := range tunnels {
		tunnels[i] = &forward{conn: &connection{account: acc}}
	}
	taken := 0
	for _, f := range tunnels {
		for range maxChannels {
			if f.takeChannel() == nil {
				taken++
			}
		}
	}
	if taken != maxChannelsPerAccount {
		t.Errorf("an account has %d channels", taken)
	}
	if err := tunnels[0].takeChannel(); !errors.Is(err, errSaturated) {
		t.Errorf("one too many of a tunnel: %v", err)
	}
	last := tunnels[len(tunnels)-1]
	if err := last.takeChannel(); !errors.Is(err, errAccountSaturated) {
		t.Errorf("one too many of the account: %v", err)
	}
	tunnels[0].giveChannel()
	if err := last.takeChannel(); err != nil {
		t.Errorf("after one has ended: %v", err)
	}
	if err := tunnels[0].takeChannel(); !errors.Is(err, errAccountSaturated) || tunnels[0].channels.Load() != maxChannels-1 {
		t.Errorf("a refused channel counts: %v", err)
	}
}
