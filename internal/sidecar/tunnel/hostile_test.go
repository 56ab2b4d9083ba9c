package tunnel_test

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/crypto/ssh"

	"github.com/mysocketio/mysocket-injector/internal/sidecar/retry/clocktest"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/tunnel"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/tunnel/sshtest"
)

const (
	// What a hostile edge may cost, the attacker's own part included, since it runs in the same process.
	hostileHeap       = 96 << 20
	hostileGoroutines = 150
)

// usage is what a process needs at most while something lasts.
type usage struct {
	heap       uint64
	goroutines int
}

// measure returns what is needed at most until ended is closed, beyond what is needed now.
func measure(t *testing.T, ended <-chan struct{}) usage {
	t.Helper()
	now := func() usage {
		var stats runtime.MemStats
		runtime.ReadMemStats(&stats)
		return usage{stats.HeapAlloc, runtime.NumGoroutine()}
	}
	runtime.GC()
	before := now()
	peak := before
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(3 * sshtest.Patience)
	for {
		select {
		case <-ended:
			return usage{peak.heap - before.heap, peak.goroutines - before.goroutines}
		case <-tick.C:
			current := now()
			peak = usage{max(peak.heap, current.heap), max(peak.goroutines, current.goroutines)}
		case <-deadline:
			t.Fatalf("it goes on after %s", 3*sshtest.Patience)
		}
	}
}

// holdable is the server's end of a connection, which reads no more when it is told so.
type holdable struct {
	net.Conn
	held   atomic.Bool
	once   sync.Once
	closed chan struct{}
}

func (c *holdable) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if c.held.Load() {
		<-c.closed
		return 0, net.ErrClosed
	}
	return n, err
}

func (c *holdable) Close() error {
	c.once.Do(func() { close(c.closed) })
	return c.Conn.Close()
}

// listenEdge runs serve for the one connection that comes.
func listenEdge(t *testing.T, serve func(*holdable)) (address string) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var running sync.WaitGroup
	var raw atomic.Pointer[holdable]
	running.Go(func() {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		held := &holdable{Conn: conn, closed: make(chan struct{})}
		raw.Store(held)
		serve(held)
	})
	t.Cleanup(func() {
		_ = listener.Close()
		if conn := raw.Load(); conn != nil {
			_ = conn.Close()
		}
		running.Wait()
	})
	return listener.Addr().String()
}

// attacker is an edge that has let the tunnel in.
type attacker struct {
	*ssh.ServerConn
	raw     *holdable
	session ssh.Channel
}

func (a *attacker) visit() (ssh.Channel, error) {
	payload := ssh.Marshal(struct {
		Host       string
		Port       uint32
		OriginHost string
		OriginPort uint32
	}{"localhost", 4711, "192.0.2.7", 50000})
	channel, requests, err := a.OpenChannel("forwarded-tcpip", payload)
	if err == nil {
		go ssh.DiscardRequests(requests)
	}
	return channel, err
}

// listenAttacker runs an edge that behaves until the tunnel has its forward and its session, and then attacks. The attack is
// over when it returns, but the connection stays.
func listenAttacker(t *testing.T, server ssh.Config, attack func(*attacker)) (string, ssh.PublicKey) {
	t.Helper()
	key := sshtest.NewKey(t)
	config := &ssh.ServerConfig{Config: server, PublicKeyCallback: func(ssh.ConnMetadata, ssh.PublicKey) (*ssh.Permissions, error) { return nil, nil }}
	config.AddHostKey(key)
	return listenEdge(t, func(raw *holdable) {
		conn, channels, requests, err := ssh.NewServerConn(raw, config)
		if err != nil {
			t.Error(err)
			return
		}
		var running sync.WaitGroup
		defer running.Wait()
		running.Go(func() {
			for request := range requests {
				_ = request.Reply(request.Type == "tcpip-forward", nil)
			}
		})
		running.Go(func() {
			for channel := range channels {
				session, sessionRequests, err := channel.Accept()
				if err != nil {
					return
				}
				running.Go(func() {
					for request := range sessionRequests {
						_ = request.Reply(true, nil)
						if request.Type == "shell" {
							running.Go(func() { attack(&attacker{conn, raw, session}) })
						}
					}
				})
			}
		})
		_ = conn.Wait()
	}), key.PublicKey()
}

// until repeats what an attacker does, n times at once, until it fails.
func until(n int, do func() error) {
	var running sync.WaitGroup
	for range n {
		running.Go(func() {
			for do() == nil {
				continue
			}
		})
	}
	running.Wait()
}

func refusedOnly(err error) error {
	if _, ok := errors.AsType[*ssh.OpenChannelError](err); ok {
		return nil
	}
	return err
}

// Whatever an edge does that has let the tunnel in: it costs bounded memory and goroutines, and the connection is dropped. What
// follows is a back-off, which TestAnEdgeThatFloodsIsLeftAlone of package sidecar shows.
func TestAHostileEdge(t *testing.T) {
	large := make([]byte, 30<<10)
	rekey := ssh.Config{RekeyThreshold: 1} // the library makes it 256 bytes
	tests := []struct {
		name   string
		server ssh.Config
		attack func(*attacker)
		silent bool // it is the keepalive that notices
		reason string
	}{
		{name: "openings of unknown types", reason: tunnel.LostFlood, attack: func(a *attacker) {
			until(32, func() error {
				_, _, err := a.OpenChannel("x11", large)
				return refusedOnly(err)
			})
		}},
		{name: "malformed openings", reason: tunnel.LostFlood, attack: func(a *attacker) {
			until(32, func() error {
				_, _, err := a.OpenChannel("forwarded-tcpip", large)
				return refusedOnly(err)
			})
		}},
		{name: "global requests", reason: tunnel.LostFlood, attack: func(a *attacker) {
			until(4, func() error {
				_, _, err := a.SendRequest("nonsense@example.com", true, large)
				return err
			})
		}},
		{name: "global requests without an answer", reason: tunnel.LostFlood, attack: func(a *attacker) {
			until(4, func() error {
				_, _, err := a.SendRequest("nonsense@example.com", false, large)
				return err
			})
		}},
		{name: "requests in the session", reason: tunnel.LostFlood, attack: func(a *attacker) {
			until(4, func() error {
				_, err := a.session.SendRequest("nonsense@example.com", true, large)
				return err
			})
		}},
		{name: "key exchanges without end", reason: tunnel.LostFlood, server: rekey, attack: func(a *attacker) {
			visitor, err := a.visit()
			if err != nil {
				return
			}
			go func() { _, _ = io.Copy(io.Discard, visitor) }()
			until(1, func() error {
				_, err := visitor.Write(large[:1<<10])
				return err
			})
		}},
		{name: "oversized packets", reason: tunnel.LostClosed, attack: func(a *attacker) {
			until(1, func() error {
				_, err := a.raw.Write(append([]byte{0x7f, 0xff, 0xff, 0xf0}, large...))
				return err
			})
		}},
		{name: "it never reads", silent: true, reason: tunnel.LostKeepalive, attack: func(a *attacker) {
			for range 16 {
				if _, err := a.visit(); err != nil {
					return
				}
			}
			a.raw.held.Store(true)
		}},
		{name: "it never ends a key exchange", silent: true, reason: tunnel.LostKeepalive, server: rekey, attack: func(a *attacker) {
			a.raw.held.Store(true)
			until(1, func() error {
				_, err := a.session.Write(large)
				return err
			})
		}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
			t.Run("", func(t *testing.T) {
				begin := make(chan struct{})
				address, hostKey := listenAttacker(t, test.server, func(a *attacker) {
					<-begin
					test.attack(a)
				})
				// An app that sends without end, so that there is always something that the edge should read.
				app := listenApp(t, func(conn *net.TCPConn) { go func() { _, _ = io.Copy(io.Discard, conn) }(); pour(conn) })
				clock := clocktest.New(time.Unix(1_000_000, 0))
				cfg := config(&sshtest.Server{Address: address, HostKey: hostKey}, sshtest.NewKey(t), app)
				cfg.Clock = clock
				tun := connect(t, cfg)
				clock.AwaitTimer(t, 10*time.Second)
				close(begin)
				if test.silent {
					clock.Advance(10 * time.Second)
					clock.AwaitTimer(t, 20*time.Second)
				}
				var most usage
				var watching sync.WaitGroup
				watching.Go(func() { most = measure(t, tun.Done()) })
				if test.silent {
					advanceUntil(t, clock, tun.Done())
				}
				watching.Wait()
				lost, ok := errors.AsType[*tunnel.LostError](tun.Err())
				if !ok || lost.Reason != test.reason {
					t.Errorf("the tunnel ended with %v, want the reason %q", tun.Err(), test.reason)
				}
				t.Logf("at most %d KiB and %d goroutines more; %v", most.heap>>10, most.goroutines, tun.Err())
				if most.heap > hostileHeap || most.goroutines > hostileGoroutines {
					t.Errorf("it cost %d MiB and %d goroutines, allowed are %d and %d", most.heap>>20, most.goroutines, hostileHeap>>20, hostileGoroutines)
				}
			})
		})
	}
}

// pour sends until nobody takes it.
func pour(conn net.Conn) {
	block := make([]byte, 64<<10)
	for {
		if _, err := conn.Write(block); err != nil {
			return
		}
	}
}

// advanceUntil lets keepalives go unanswered until the tunnel ends.
func advanceUntil(t *testing.T, clock *clocktest.Clock, ended <-chan struct{}) {
	t.Helper()
	deadline := time.After(sshtest.Patience)
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ended:
			return
		case <-tick.C:
			clock.Advance(10 * time.Second)
		case <-deadline:
			t.Error("the edge that does not answer was not noticed")
			return
		}
	}
}

// More visitors than the app takes are refused in time, and those who wait for it take no more than a goroutine each.
func TestAFloodOfVisitorsIsRefused(t *testing.T) {
	const visitors = 2000
	server := sshtest.Start(t)
	cfg := config(server, sshtest.NewKey(t), nil)
	cfg.DialTimeout = 200 * time.Millisecond
	cfg.DialApp = hungApp
	tun := connect(t, cfg)
	edge := server.Await(t)
	forward := edge.AwaitForward(t)
	var refused atomic.Int64
	ended := make(chan struct{})
	var running sync.WaitGroup
	running.Go(func() {
		defer close(ended)
		var visiting sync.WaitGroup
		for range visitors {
			visiting.Go(func() {
				if _, err := edge.Visit(forward); err != nil && refusedOnly(err) == nil {
					refused.Add(1)
				}
			})
		}
		visiting.Wait()
	})
	most := measure(t, ended)
	running.Wait()
	if refused.Load() != visitors {
		t.Errorf("%d of %d were refused", refused.Load(), visitors)
	}
	// One for the attacker and one for the tunnel.
	if most.goroutines > 2*visitors+hostileGoroutines || most.heap > hostileHeap {
		t.Errorf("it cost %d MiB and %d goroutines", most.heap>>20, most.goroutines)
	}
	if tun.Err() != nil {
		t.Errorf("visitors whom the app did not take ended the tunnel: %v", tun.Err())
	}
}

// plain frames a payload as SSH does before there are keys.
func plain(payload []byte) []byte {
	padding := 8 - (5+len(payload))%8
	if padding < 4 {
		padding += 8
	}
	packet := binary.BigEndian.AppendUint32(nil, uint32(1+len(payload)+padding))
	packet = append(packet, byte(padding))
	packet = append(packet, payload...)
	return append(packet, make([]byte, padding)...)
}

// An edge that never comes to an end before or in the login costs bounded memory and a bounded time, and leaves nothing behind.
func TestAHostileEdgeBeforeTheLogin(t *testing.T) {
	kexInit := plain(ssh.Marshal(struct {
		Type               byte
		Cookie             [16]byte
		Kex, HostKeys      []string
		CiphersUp, Ciphers []string
		MACsUp, MACs       []string
		CompUp, Comp       []string
		LangUp, Lang       []string
		Follows            bool
		Reserved           uint32
	}{
		Type: 20, Kex: []string{"curve25519-sha256"}, HostKeys: []string{"ssh-ed25519"},
		CiphersUp: []string{"aes128-gcm@openssh.com"}, Ciphers: []string{"aes128-gcm@openssh.com"},
		MACsUp: []string{"hmac-sha2-256"}, MACs: []string{"hmac-sha2-256"}, CompUp: []string{"none"}, Comp: []string{"none"},
	}))
	const version = "SSH-2.0-hostile\r\n"
	tests := []struct {
		name         string
		first, again []byte
		banner       bool
		says         string
	}{
		{name: "a version line without end", again: []byte(strings.Repeat("x", 4<<10))},
		{name: "lines without end", again: []byte(strings.Repeat("hello\r\n", 512))},
		{name: "an oversized packet", first: []byte(version), again: append([]byte{0x7f, 0xff, 0xff, 0xf8}, make([]byte, 32<<10)...)},
		{name: "kexinits without end", first: []byte(version), again: kexInit},
		{name: "ignored packets without end", says: "more than 256 KiB", first: []byte(version), again: plain(append([]byte{2, 0, 0, 1, 0}, make([]byte, 256)...))},
		{name: "banners without end", says: "more than 256 KiB", banner: true},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
			t.Run("", func(t *testing.T) {
				key := sshtest.NewKey(t)
				address := listenEdge(t, func(raw *holdable) {
					if test.banner {
						bannersWithoutEnd(raw, key)
						return
					}
					// What the other side says is read, lest it be held up, and not understood.
					go func() { _, _ = io.Copy(io.Discard, raw) }()
					_, err := raw.Write(test.first)
					for err == nil {
						_, err = raw.Write(test.again)
					}
				})
				cfg := config(&sshtest.Server{Address: address, HostKey: key.PublicKey()}, sshtest.NewKey(t), nil)
				cfg.DialApp = hungApp
				ended := make(chan struct{})
				var err error
				var connecting sync.WaitGroup
				connecting.Go(func() {
					defer close(ended)
					var tun *tunnel.Tunnel
					if tun, err = tunnel.Connect(t.Context(), cfg); err == nil {
						tun.Close()
					}
				})
				most := measure(t, ended)
				connecting.Wait()
				if tunnel.FailedStep(err) != tunnel.StepHandshake || !strings.Contains(err.Error(), test.says) {
					t.Errorf("connecting ended with %v, want a failed handshake that says %q", err, test.says)
				}
				t.Logf("at most %d KiB and %d goroutines more; %v", most.heap>>10, most.goroutines, err)
				if most.heap > hostileHeap || most.goroutines > hostileGoroutines {
					t.Errorf("it cost %d MiB and %d goroutines", most.heap>>20, most.goroutines)
				}
			})
		})
	}
}

// hungApp is an app that takes nobody.
func hungApp(ctx context.Context) (*net.TCPConn, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

func bannersWithoutEnd(raw net.Conn, key ssh.Signer) {
	var early ssh.ServerPreAuthConn
	config := &ssh.ServerConfig{
		PreAuthConnCallback: func(conn ssh.ServerPreAuthConn) { early = conn },
		PublicKeyCallback: func(ssh.ConnMetadata, ssh.PublicKey) (*ssh.Permissions, error) {
			for {
				if err := early.SendAuthBanner(strings.Repeat("hello ", 5000)); err != nil {
					return nil, err
				}
			}
		},
	}
	config.AddHostKey(key)
	if conn, _, _, err := ssh.NewServerConn(raw, config); err == nil {
		_ = conn.Close()
	}
}
