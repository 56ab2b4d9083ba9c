package tunnel_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/crypto/ssh"

	"github.com/mysocketio/mysocket-injector/internal/sidecar/retry"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/retry/clocktest"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/tunnel"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/tunnel/sshtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// counts is an Observer that remembers.
type counts struct {
	mu                   sync.Mutex
	opened, closed       int
	toApp, toEdge        int
	dialFailed, rejected map[string]int
	handshakes           int
	roundTrips           []time.Duration
}

func newCounts() *counts {
	return &counts{dialFailed: map[string]int{}, rejected: map[string]int{}}
}

func (c *counts) add(f func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f()
}
func (c *counts) ConnectionOpened()        { c.add(func() { c.opened++ }) }
func (c *counts) ConnectionClosed()        { c.add(func() { c.closed++ }) }
func (c *counts) BytesToApp(n int)         { c.add(func() { c.toApp += n }) }
func (c *counts) BytesToEdge(n int)        { c.add(func() { c.toEdge += n }) }
func (c *counts) DialFailed(reason string) { c.add(func() { c.dialFailed[reason]++ }) }
func (c *counts) Rejected(reason string)   { c.add(func() { c.rejected[reason]++ }) }
func (c *counts) HandshakeTook(time.Duration) {
	c.add(func() { c.handshakes++ })
}
func (c *counts) RoundTrip(d time.Duration) {
	c.add(func() { c.roundTrips = append(c.roundTrips, d) })
}

func (c *counts) get(f func() int) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return f()
}

// listenApp runs serve for every connection to a listener.
func listenApp(t *testing.T, serve func(*net.TCPConn)) *net.TCPAddr {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var running sync.WaitGroup
	running.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			running.Go(func() {
				defer func() { _ = conn.Close() }()
				serve(conn.(*net.TCPConn))
			})
		}
	})
	t.Cleanup(func() { _ = listener.Close(); running.Wait() })
	return listener.Addr().(*net.TCPAddr)
}

func echo(conn *net.TCPConn) { _, _ = io.Copy(conn, conn) }

func config(server *sshtest.Server, key ssh.Signer, app *net.TCPAddr) tunnel.Config {
	return tunnel.Config{
		Address: server.Address, User: "alice", Signer: key, HostKeys: []ssh.PublicKey{server.HostKey},
		ForwardHost: "localhost", ForwardPort: 4711, ClientVersion: "SSH-2.0-test",
		DialApp: func(ctx context.Context) (*net.TCPConn, error) {
			conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", app.String())
			if err != nil {
				return nil, err
			}
			return conn.(*net.TCPConn), nil
		},
		Clock: retry.System(), Logger: slog.New(slog.DiscardHandler), Observer: newCounts(),
	}
}

func connect(t *testing.T, cfg tunnel.Config) *tunnel.Tunnel {
	t.Helper()
	tun, err := tunnel.Connect(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(tun.Close)
	return tun
}

func awaitClosed(t *testing.T, c <-chan struct{}, what string) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(sshtest.Patience):
		t.Fatal(what)
	}
}

func TestConnectNamesTheStepThatFails(t *testing.T) {
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_ = closed.Close()
	tests := []struct {
		name   string
		change func(*testing.T, *sshtest.Server, *tunnel.Config)
		step   tunnel.Step
		says   string
	}{
		{"unknown name", func(_ *testing.T, _ *sshtest.Server, cfg *tunnel.Config) { cfg.Address = "edge.invalid:22" }, tunnel.StepDNS, "edge.invalid"},
		{"nobody listens", func(_ *testing.T, _ *sshtest.Server, cfg *tunnel.Config) { cfg.Address = closed.Addr().String() }, tunnel.StepTCP, "refused"},
		{"handshake hangs", func(_ *testing.T, s *sshtest.Server, cfg *tunnel.Config) {
			s.Hang.Store(true)
			cfg.HandshakeTimeout = 50 * time.Millisecond
		}, tunnel.StepHandshake, "is it an SSH server"},
		{"wrong host key", func(t *testing.T, _ *sshtest.Server, cfg *tunnel.Config) {
			cfg.HostKeys = []ssh.PublicKey{sshtest.NewKey(t).PublicKey()}
		}, tunnel.StepHostKey, "SHA256:"},
		{"login refused", func(_ *testing.T, s *sshtest.Server, _ *tunnel.Config) { s.RefuseAuth.Store(true) }, tunnel.StepAuth, "hello from the test"},
		{"forward refused", func(_ *testing.T, s *sshtest.Server, _ *tunnel.Config) { s.RefuseForward.Store(true) }, tunnel.StepForward, "localhost:4711"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			server := sshtest.Start(t)
			cfg := config(server, sshtest.NewKey(t), listenApp(t, echo))
			test.change(t, server, &cfg)
			tun, err := tunnel.Connect(t.Context(), cfg)
			if err == nil {
				tun.Close()
				t.Fatal("connected")
			}
			if got := tunnel.FailedStep(err); got != test.step {
				t.Errorf("the failed step is %q, want %q (%v)", got, test.step, err)
			}
			if !strings.Contains(err.Error(), test.says) {
				t.Errorf("the error %q does not say %q", err, test.says)
			}
		})
	}
}

func TestWrongHostKeyNamesBothFingerprints(t *testing.T) {
	server := sshtest.Start(t)
	pinned := sshtest.NewKey(t).PublicKey()
	cfg := config(server, sshtest.NewKey(t), listenApp(t, echo))
	cfg.HostKeys = []ssh.PublicKey{pinned}
	_, err := tunnel.Connect(t.Context(), cfg)
	if _, ok := errors.AsType[*tunnel.HostKeyError](err); !ok {
		t.Fatalf("got %v, want a HostKeyError", err)
	}
	for _, key := range []ssh.PublicKey{pinned, server.HostKey} {
		if !strings.Contains(err.Error(), ssh.FingerprintSHA256(key)) {
			t.Errorf("%q does not name %s", err, ssh.FingerprintSHA256(key))
		}
	}
}

func TestConnectEndsWithItsContext(t *testing.T) {
	server := sshtest.Start(t)
	server.Hang.Store(true)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		_, err := tunnel.Connect(ctx, config(server, sshtest.NewKey(t), listenApp(t, echo)))
		ended <- err
	}()
	cancel()
	select {
	case err := <-ended:
		if err == nil {
			t.Error("connected to a server that hangs")
		}
	case <-time.After(sshtest.Patience):
		t.Fatal("connecting went on after its context had ended")
	}
}

func TestVisitorsReachTheAppAndHalfCloseBothWays(t *testing.T) {
	server := sshtest.Start(t)
	// The app answers only when it has read everything: it needs the visitor's half-close.
	app := listenApp(t, func(conn *net.TCPConn) {
		all, _ := io.ReadAll(conn)
		_, _ = conn.Write(bytes.ToUpper(all))
	})
	cfg := config(server, sshtest.NewKey(t), app)
	tun := connect(t, cfg)
	edge := server.Await(t)
	forward := edge.AwaitForward(t)
	if forward != (sshtest.Forward{Host: "localhost", Port: 4711}) {
		t.Errorf("asked for %+v", forward)
	}
	channel, err := edge.Visit(forward)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(channel, "hello"); err != nil {
		t.Fatal(err)
	}
	if err := channel.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(channel)
	if err != nil || string(got) != "HELLO" {
		t.Errorf("got %q, %v", got, err)
	}
	_ = channel.Close()
	if err := tun.WaitIdle(t.Context()); err != nil {
		t.Error(err)
	}
	seen := cfg.Observer.(*counts)
	if seen.get(func() int { return seen.toApp }) != 5 || seen.get(func() int { return seen.toEdge }) != 5 {
		t.Errorf("counted %d bytes to the app and %d to the edge, want 5 and 5", seen.toApp, seen.toEdge)
	}
}

// The app closes its half first and still reads what the visitor sends after that.
func TestTheAppMayCloseItsHalfFirst(t *testing.T) {
	server := sshtest.Start(t)
	received := make(chan string, 1)
	app := listenApp(t, func(conn *net.TCPConn) {
		_, _ = io.WriteString(conn, "bye")
		_ = conn.CloseWrite()
		all, _ := io.ReadAll(conn)
		received <- string(all)
	})
	connect(t, config(server, sshtest.NewKey(t), app))
	edge := server.Await(t)
	channel, err := edge.Visit(edge.AwaitForward(t))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(channel); err != nil || string(got) != "bye" {
		t.Fatalf("got %q, %v", got, err)
	}
	if _, err := io.WriteString(channel, "late words"); err != nil {
		t.Fatal(err)
	}
	_ = channel.CloseWrite()
	select {
	case got := <-received:
		if got != "late words" {
			t.Errorf("the app received %q", got)
		}
	case <-time.After(sshtest.Patience):
		t.Fatal("the app did not get the end of the visitor's half")
	}
}

func TestMuchDataArrivesWhole(t *testing.T) {
	server := sshtest.Start(t)
	connect(t, config(server, sshtest.NewKey(t), listenApp(t, echo)))
	edge := server.Await(t)
	forward := edge.AwaitForward(t)
	var visitors sync.WaitGroup
	for range 8 {
		visitors.Go(func() {
			channel, err := edge.Visit(forward)
			if err != nil {
				t.Error(err)
				return
			}
			sent := make([]byte, 3<<20+17)
			_, _ = rand.Read(sent)
			go func() {
				_, _ = channel.Write(sent)
				_ = channel.CloseWrite()
			}()
			got, err := io.ReadAll(channel)
			if err != nil || !bytes.Equal(got, sent) {
				t.Errorf("%d of %d bytes came back unchanged: %t, %v", len(got), len(sent), bytes.Equal(got, sent), err)
			}
			_ = channel.Close()
		})
	}
	visitors.Wait()
}

func TestRefusalsAreHonest(t *testing.T) {
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	gone := closed.Addr().(*net.TCPAddr)
	_ = closed.Close()
	tests := []struct {
		name   string
		change func(*tunnel.Config)
		visit  sshtest.Forward
		reason ssh.RejectionReason
		dial   string
		reject string
	}{
		{name: "app refuses", visit: sshtest.Forward{Host: "localhost", Port: 4711}, reason: ssh.ConnectionFailed, dial: tunnel.DialRefused},
		{name: "app hangs", visit: sshtest.Forward{Host: "localhost", Port: 4711}, reason: ssh.ConnectionFailed, dial: tunnel.DialTimeout,
			change: func(cfg *tunnel.Config) {
				cfg.DialTimeout = 20 * time.Millisecond
				cfg.DialApp = func(ctx context.Context) (*net.TCPConn, error) { <-ctx.Done(); return nil, ctx.Err() }
			}},
		{name: "another port", visit: sshtest.Forward{Host: "localhost", Port: 4712}, reason: ssh.Prohibited, reject: tunnel.RejectNotForwarded},
		{name: "another host", visit: sshtest.Forward{Host: "127.0.0.1", Port: 4711}, reason: ssh.Prohibited, reject: tunnel.RejectNotForwarded},
		{name: "port 0", visit: sshtest.Forward{Host: "localhost"}, reason: ssh.ConnectionFailed, reject: tunnel.RejectMalformed},
		{name: "long host", visit: sshtest.Forward{Host: strings.Repeat("x", 256), Port: 4711}, reason: ssh.ConnectionFailed, reject: tunnel.RejectMalformed},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			server := sshtest.Start(t)
			cfg := config(server, sshtest.NewKey(t), gone)
			if test.change != nil {
				test.change(&cfg)
			}
			tun := connect(t, cfg)
			edge := server.Await(t)
			edge.AwaitForward(t)
			_, err := edge.Visit(test.visit)
			refused, ok := errors.AsType[*ssh.OpenChannelError](err)
			if !ok || refused.Reason != test.reason {
				t.Fatalf("got %v, want a refusal with %q", err, test.reason)
			}
			if err := tun.WaitIdle(t.Context()); err != nil {
				t.Error(err)
			}
			seen := cfg.Observer.(*counts)
			if test.dial != "" && seen.get(func() int { return seen.dialFailed[test.dial] }) != 1 {
				t.Errorf("counted dial failures %v, want one %q", seen.dialFailed, test.dial)
			}
			if test.reject != "" && seen.get(func() int { return seen.rejected[test.reject] }) != 1 {
				t.Errorf("counted rejections %v, want one %q", seen.rejected, test.reject)
			}
		})
	}
}

func TestOtherChannelTypesAreRefused(t *testing.T) {
	server := sshtest.Start(t)
	connect(t, config(server, sshtest.NewKey(t), listenApp(t, echo)))
	edge := server.Await(t)
	for _, kind := range []string{"session", "direct-tcpip", "x11"} {
		_, _, err := edge.OpenChannel(kind, nil)
		if refused, ok := errors.AsType[*ssh.OpenChannelError](err); !ok || refused.Reason != ssh.UnknownChannelType {
			t.Errorf("%s: got %v, want unknown channel type", kind, err)
		}
	}
}

func TestWithdrawKeepsWhoIsThereAndForwardBringsItBack(t *testing.T) {
	server := sshtest.Start(t)
	clock := clocktest.New(time.Unix(1_000_000, 0))
	cfg := config(server, sshtest.NewKey(t), listenApp(t, echo))
	cfg.ForwardPort, cfg.Clock = 0, clock
	tun := connect(t, cfg)
	edge := server.Await(t)
	forward := edge.AwaitForward(t)
	channel, err := edge.Visit(forward)
	if err != nil {
		t.Fatal(err)
	}
	if err := tun.Withdraw(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := edge.AwaitCancel(t); got != forward {
		t.Errorf("cancelled %+v, want the bound %+v", got, forward)
	}
	// Who was on the way when the acknowledgement came is still taken, who comes later is not.
	late, err := edge.Visit(forward)
	if err != nil {
		t.Errorf("a visitor who was on the way was refused: %v", err)
	} else {
		_ = late.Close()
	}
	clock.Advance(time.Second)
	if _, err := edge.Visit(forward); err == nil {
		t.Error("a visitor was taken long after the withdrawal")
	}
	if _, err := io.WriteString(channel, "still here"); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 10)
	if _, err := io.ReadFull(channel, got); err != nil || string(got) != "still here" {
		t.Errorf("the open connection was disturbed: %q, %v", got, err)
	}
	if err := tun.Forward(t.Context()); err != nil {
		t.Fatal(err)
	}
	again, err := edge.Visit(edge.AwaitForward(t))
	if err != nil {
		t.Fatalf("after forwarding again: %v", err)
	}
	_ = again.Close()
	_ = channel.Close()
	if err := tun.WaitIdle(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestWithdrawIsBounded(t *testing.T) {
	server := sshtest.Start(t)
	tun := connect(t, config(server, sshtest.NewKey(t), listenApp(t, echo)))
	server.Silent.Store(true)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := tun.Withdraw(ctx); err == nil {
		t.Error("a withdrawal that was never acknowledged succeeded")
	}
}

func TestASilentEdgeIsNoticedWithin30Seconds(t *testing.T) {
	server := sshtest.Start(t)
	clock := clocktest.New(time.Unix(1_000_000, 0))
	cfg := config(server, sshtest.NewKey(t), listenApp(t, echo))
	cfg.Clock = clock
	tun := connect(t, cfg)
	clock.AwaitTimer(t, 10*time.Second)
	server.Silent.Store(true)
	clock.Advance(10 * time.Second)
	clock.AwaitTimer(t, 20*time.Second)
	clock.Advance(20 * time.Second)
	awaitClosed(t, tun.Done(), "the silent edge was not noticed")
	lost, ok := errors.AsType[*tunnel.LostError](tun.Err())
	if !ok || lost.Reason != tunnel.LostKeepalive {
		t.Errorf("got %v, want a missed keepalive", tun.Err())
	}
}

func TestAnAnsweredKeepaliveKeepsTheTunnel(t *testing.T) {
	server := sshtest.Start(t)
	clock := clocktest.New(time.Unix(1_000_000, 0))
	cfg := config(server, sshtest.NewKey(t), listenApp(t, echo))
	cfg.Clock = clock
	tun := connect(t, cfg)
	for range 5 {
		clock.AwaitTimer(t, 10*time.Second)
		clock.Advance(10 * time.Second)
	}
	clock.AwaitTimer(t, 10*time.Second)
	if err := tun.Err(); err != nil {
		t.Error(err)
	}
	seen := cfg.Observer.(*counts)
	// The clock stands still between the question and its answer.
	if n := seen.get(func() int { return len(seen.roundTrips) }); n != 5 || seen.roundTrips[0] != 0 {
		t.Errorf("%d round trips were measured (%v), want 5 of no time", n, seen.roundTrips)
	}
	if n := seen.get(func() int { return seen.handshakes }); n != 1 {
		t.Errorf("%d handshakes were measured, want 1", n)
	}
}

func TestLosingTheEdgeEndsEverything(t *testing.T) {
	server := sshtest.Start(t)
	appClosed := make(chan struct{})
	app := listenApp(t, func(conn *net.TCPConn) { echo(conn); close(appClosed) })
	tun := connect(t, config(server, sshtest.NewKey(t), app))
	edge := server.Await(t)
	if _, err := edge.Visit(edge.AwaitForward(t)); err != nil {
		t.Fatal(err)
	}
	server.CloseConnections()
	awaitClosed(t, tun.Done(), "the lost connection was not noticed")
	awaitClosed(t, appClosed, "the app's connection stayed open")
	if lost, ok := errors.AsType[*tunnel.LostError](tun.Err()); !ok || lost.Reason != tunnel.LostClosed {
		t.Errorf("got %v, want a closed connection", tun.Err())
	}
}

func TestTheEndOfTheSessionAsksToReconnect(t *testing.T) {
	server := sshtest.Start(t)
	clock := clocktest.New(time.Unix(1_000_000, 0))
	cfg := config(server, sshtest.NewKey(t), listenApp(t, echo))
	cfg.Clock = clock
	tun := connect(t, cfg)
	session := server.Await(t).AwaitSession(t)
	if n := server.Quiet.Load(); n != 1 {
		t.Errorf("the edge was asked %d times to write nothing into the session", n)
	}
	clock.Advance(6 * time.Second)
	_ = session.Close()
	awaitClosed(t, tun.ReconnectAsked(), "the end of the session was not noticed")
}

// When to come back is heard whether the edge ends the session first or the connection at once, and however young the session is.
func TestTheEdgeSaysWhenToComeBack(t *testing.T) {
	for _, ends := range []string{"session", "connection"} {
		t.Run(ends, func(t *testing.T) {
			server := sshtest.Start(t)
			tun := connect(t, config(server, sshtest.NewKey(t), listenApp(t, echo)))
			session := server.Await(t).AwaitSession(t)
			for _, request := range []struct {
				name    string
				payload []byte
			}{{"come-back@mysocket.io", []byte{0, 0, 0, 7}}, {"come-back@mysocket.io", []byte("what?")}, {"exit-status", []byte{0, 0, 0, 0}}} {
				if _, err := session.SendRequest(request.name, false, request.payload); err != nil {
					t.Fatal(err)
				}
			}
			if ends == "session" {
				_ = session.Close()
				awaitClosed(t, tun.ReconnectAsked(), "the end of the session was not noticed")
			} else {
				server.CloseConnections()
				awaitClosed(t, tun.Done(), "the end of the connection was not noticed")
			}
			if got := tun.ComeBack(); got != 7*time.Second {
				t.Errorf("come back after %s, want 7s", got)
			}
		})
	}
}

func TestTheEndOfTheSessionsOutputAsksToReconnect(t *testing.T) {
	server := sshtest.Start(t)
	clock := clocktest.New(time.Unix(1_000_000, 0))
	cfg := config(server, sshtest.NewKey(t), listenApp(t, echo))
	cfg.Clock = clock
	tun := connect(t, cfg)
	session := server.Await(t).AwaitSession(t)
	clock.AwaitTimer(t, 10*time.Second) // which the keepalive may not have set yet
	clock.Advance(6 * time.Second)
	clock.AwaitTimer(t, 4*time.Second)
	_ = session.CloseWrite()
	awaitClosed(t, tun.ReconnectAsked(), "the end of the session was not noticed")
	if got := tun.ComeBack(); got != 0 {
		t.Errorf("come back after %s, want nothing", got)
	}
}

// OpenSSH ends the session of an account without a shell at once. The tunnel works without.
func TestASessionThatEndsAtOnceMeansNothing(t *testing.T) {
	for _, fault := range []string{"refused", "ended at once"} {
		t.Run(fault, func(t *testing.T) {
			server := sshtest.Start(t)
			server.RefuseSession.Store(fault == "refused")
			server.EndSession.Store(fault != "refused")
			tun := connect(t, config(server, sshtest.NewKey(t), listenApp(t, echo)))
			edge := server.Await(t)
			forward := edge.AwaitForward(t)
			if fault != "refused" {
				edge.AwaitSession(t)
			}
			channel, err := edge.Visit(forward)
			if err != nil {
				t.Fatal(err)
			}
			_ = channel.Close()
			select {
			case <-tun.ReconnectAsked():
				t.Error("a reconnect was asked for")
			case <-tun.Done():
				t.Error("the tunnel ended")
			default:
			}
		})
	}
}

// A visitor who leaves in the middle of a download must not leave the app's connection behind.
func TestAVisitorWhoLeavesEndsTheAppsConnection(t *testing.T) {
	server := sshtest.Start(t)
	ended := make(chan struct{})
	app := listenApp(t, func(conn *net.TCPConn) {
		defer close(ended)
		block := make([]byte, 64<<10)
		for {
			if _, err := conn.Write(block); err != nil {
				return
			}
		}
	})
	tun := connect(t, config(server, sshtest.NewKey(t), app))
	edge := server.Await(t)
	channel, err := edge.Visit(edge.AwaitForward(t))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(channel, make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	_ = channel.Close()
	awaitClosed(t, ended, "the app still sends")
	if err := tun.WaitIdle(t.Context()); err != nil {
		t.Error(err)
	}
}

// A half-open connection whose other direction rests is not kept for ever.
func TestAHalfOpenConnectionThatRestsIsClosed(t *testing.T) {
	server := sshtest.Start(t)
	clock := clocktest.New(time.Unix(1_000_000, 0))
	read := make(chan struct{})
	app := listenApp(t, func(conn *net.TCPConn) {
		_, _ = io.Copy(io.Discard, conn)
		<-read // never answers
	})
	cfg := config(server, sshtest.NewKey(t), app)
	cfg.Clock = clock
	tun := connect(t, cfg)
	defer close(read)
	edge := server.Await(t)
	channel, err := edge.Visit(edge.AwaitForward(t))
	if err != nil {
		t.Fatal(err)
	}
	_ = channel.CloseWrite()
	clock.AwaitTimer(t, 2*time.Minute)
	clock.Advance(2 * time.Minute)
	if _, err := io.ReadAll(channel); err != nil {
		t.Errorf("got %v, want a clean end", err)
	}
	if err := tun.WaitIdle(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestCloseTwiceAndUseAfterClose(t *testing.T) {
	server := sshtest.Start(t)
	tun := connect(t, config(server, sshtest.NewKey(t), listenApp(t, echo)))
	tun.Close()
	tun.Close()
	if err := tun.Forward(t.Context()); err == nil {
		t.Error("a closed tunnel forwarded")
	}
	if err := tun.WaitIdle(t.Context()); err != nil {
		t.Error(err)
	}
	if tun.Err() != nil {
		t.Errorf("closing is no error, but got %v", tun.Err())
	}
}

// Whoever cancels the connecting at the moment in which the edge forwards gets the tunnel all the same: there may be visitors
// in it already.
func TestAVisitorWhoCameWhileConnectingIsNotCutOff(t *testing.T) {
	server := sshtest.Start(t)
	server.HoldForward = make(chan struct{})
	ctx, cancel := context.WithCancel(t.Context())
	connected := make(chan *tunnel.Tunnel, 1)
	go func() {
		tun, err := tunnel.Connect(ctx, config(server, sshtest.NewKey(t), listenApp(t, echo)))
		if err != nil {
			t.Error(err)
		}
		connected <- tun
	}()
	edge := server.Await(t)
	forward := edge.AwaitForward(t) // asked, and not yet answered
	channel, err := edge.Visit(forward)
	if err != nil {
		t.Fatalf("a visitor who was faster than the answer was refused: %v", err)
	}
	cancel()
	close(server.HoldForward)
	tun := <-connected
	if tun == nil {
		t.FailNow()
	}
	defer tun.Close()
	if _, err := io.WriteString(channel, "hello"); err != nil {
		t.Error(err)
	}
	if _, err := io.ReadFull(channel, make([]byte, 5)); err != nil {
		t.Errorf("the visitor was cut off: %v", err)
	}
	if err := tun.Withdraw(t.Context()); err != nil {
		t.Error(err)
	}
	_ = channel.Close()
}
