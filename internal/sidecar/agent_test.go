package sidecar

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/crypto/ssh"

	"github.com/mysocketio/mysocket-injector/internal/gatewayapi"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/drain"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/gatewaytest"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/tunnel/sshtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// sshBackend lets the gateway send the sidecar to an sshtest server.
type sshBackend struct {
	t      testing.TB
	server *sshtest.Server
	ca     ssh.Signer
}

func (b *sshBackend) Register(_ context.Context, socketID, tunnelID, publicKey string) (gatewayapi.Registration, error) {
	return gatewayapi.Registration{
		TunnelID: "tunnel-of-" + socketID, User: "user", EdgeAddress: b.server.Address, HostKeys: []string{authorizedKey(b.server.HostKey)},
		Certificate: certify(b.t, b.ca, publicKey, time.Now(), 5*time.Minute), ForwardHost: "localhost", ForwardPort: 4711,
	}, nil
}

func (b *sshBackend) Delete(context.Context, string, string) error { return nil }

// lockedBuffer takes log lines from many goroutines.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
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

// world is an agent between a gateway, an edge and apps, all on loopback.
type world struct {
	t       *testing.T
	gateway *gatewaytest.Gateway
	edge    *sshtest.Server
	agent   *Agent
	cfg     Config
	logs    lockedBuffer
	stop    func()
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, edge: sshtest.Start(t)}
	w.gateway = gatewaytest.Start(t, &sshBackend{t, w.edge, newKey(t)})
	token, ca := w.gateway.Files(t)
	w.cfg = Config{
		GatewayURL: w.gateway.URL, TokenFile: token, CAFile: ca, PodIP: "127.0.0.1", AdminAddress: "127.0.0.1:0",
		DrainSocket: fmt.Sprintf("agent-test-%d-%s", os.Getpid(), strings.ReplaceAll(t.Name(), "/", "-")), DrainTimeout: 20 * time.Second, ReadyGrace: time.Minute,
		Version: "test", Logger: slog.New(slog.NewTextHandler(&w.logs, &slog.HandlerOptions{Level: slog.LevelDebug})),
		// As quick as back-off gets, so that tests need not wait.
		Random: func() float64 { return 0 },
	}
	return w
}

func (w *world) start() {
	w.t.Helper()
	agent, err := New(w.cfg)
	if err != nil {
		w.t.Fatal(err)
	}
	w.agent = agent
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		if err := agent.Run(ctx); err != nil {
			w.t.Error(err)
		}
	})
	w.stop = func() { cancel(); running.Wait() }
	w.t.Cleanup(func() {
		w.stop()
		if w.t.Failed() {
			w.t.Log(w.logs.String())
		}
		if strings.Contains(w.logs.String(), gatewaytest.Token) {
			w.t.Error("the token is in the log")
		}
	})
}

func (w *world) get(path string) (int, string) {
	recorder := httptest.NewRecorder()
	w.agent.adminHandler().ServeHTTP(recorder, httptest.NewRequest(http.MethodGet, path, nil))
	return recorder.Code, recorder.Body.String()
}

// listen runs an app that says its name and then echoes.
func (w *world) listen(name string) (port int32, stop func()) {
	w.t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		w.t.Fatal(err)
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
				_, _ = io.WriteString(conn, name+"\n")
				_, _ = io.Copy(conn, conn)
			})
		}
	})
	stop = sync.OnceFunc(func() { _ = listener.Close(); running.Wait() })
	w.t.Cleanup(stop)
	return int32(listener.Addr().(*net.TCPAddr).Port), stop
}

func visit(t *testing.T, edge *sshtest.Conn, forward sshtest.Forward, app string) ssh.Channel {
	t.Helper()
	channel, err := edge.Visit(forward)
	if err != nil {
		t.Fatalf("visit %s: %v", app, err)
	}
	got := make([]byte, len(app)+1)
	if _, err := io.ReadFull(channel, got); err != nil || string(got) != app+"\n" {
		t.Fatalf("got %q, %v, want app %s", got, err, app)
	}
	return channel
}

func assignment(id string, port int32) gatewayapi.Assignment {
	return gatewayapi.Assignment{SocketID: id, SocketName: "k8s shop." + id, Service: id, URL: "https://" + id + ".edge.test", Port: port}
}

func TestAgentFollowsItsAssignments(t *testing.T) {
	w := newWorld(t)
	one, _ := w.listen("one")
	two, _ := w.listen("two")
	w.start()
	w.gateway.Assign(assignment("web", one))
	edge := w.edge.Await(t)
	forward := edge.AwaitForward(t)
	_ = visit(t, edge, forward, "one").Close()

	// Another port: at once, on the same connection.
	w.gateway.Assign(assignment("web", two))
	gatewaytest.Eventually(t, "the changed port is used", func() bool { return strings.Contains(w.logs.String(), "port changed") })
	_ = visit(t, edge, forward, "two").Close()
	if n := w.edge.Logins(); n != 1 {
		t.Errorf("%d logins, want 1", n)
	}

	// A second socket beside it, and the first one taken away under a visitor.
	w.gateway.Assign(assignment("web", two), assignment("shop", one))
	second := w.edge.Await(t)
	visitor := visit(t, edge, forward, "two")
	w.gateway.Assign(assignment("shop", one))
	edge.AwaitCancel(t)
	if _, err := io.WriteString(visitor, "x"); err != nil {
		t.Errorf("the visitor was cut off at once: %v", err)
	}
	_ = visitor.Close()
	gatewaytest.Eventually(t, "the tunnel is deleted", func() bool { return slices.Contains(w.gateway.Calls(), "delete") })

	// And back again.
	w.gateway.Assign(assignment("web", two), assignment("shop", one))
	third := w.edge.Await(t)
	_ = visit(t, third, third.AwaitForward(t), "two").Close()
	_ = visit(t, second, second.AwaitForward(t), "one").Close()

	w.stop()
	if calls := w.gateway.Calls(); strings.Join(calls, " ") != "register register delete register delete delete" {
		t.Errorf("calls: %v", calls)
	}
}

// Several connections of one socket are several logins, and their number changes while the sidecar runs.
func TestSeveralConnectionsOfASocket(t *testing.T) {
	w := newWorld(t)
	port, _ := w.listen("app")
	several := func(n int) gatewayapi.Assignment {
		a := assignment("web", port)
		a.Connections = n
		return a
	}
	told := make(chan int, 10)
	w.cfg.Tunnels = func(n int) { told <- n }
	w.start()
	w.gateway.Assign(several(1))
	one := w.edge.Await(t)
	first := one.AwaitForward(t)
	w.gateway.Assign(several(3))
	two, three := w.edge.Await(t), w.edge.Await(t)
	for _, edge := range []*sshtest.Conn{two, three} {
		_ = visit(t, edge, edge.AwaitForward(t), "app").Close()
	}
	gatewaytest.Eventually(t, "three tunnels are connected", func() bool { return w.agent.metrics.value(t, "tunnels", "Connected") == 3 })

	// Fewer: the first stays, the others leave the rotation and are deleted.
	w.gateway.Assign(several(1))
	two.AwaitCancel(t)
	three.AwaitCancel(t)
	gatewaytest.Eventually(t, "two tunnels are deleted", func() bool {
		return slices.Contains(w.gateway.Calls(), "delete/1") && slices.Contains(w.gateway.Calls(), "delete/2")
	})
	_ = visit(t, one, first, "app").Close()

	// More again, and drained as a whole.
	w.gateway.Assign(several(2))
	again := w.edge.Await(t)
	again.AwaitForward(t)
	gatewaytest.Eventually(t, "two tunnels are connected", func() bool { return w.agent.metrics.value(t, "tunnels", "Connected") == 2 })
	var said lockedBuffer
	if err := drain.Ask(t.Context(), w.cfg.DrainSocket, &said); err != nil {
		t.Error(err)
	}
	one.AwaitCancel(t)
	again.AwaitCancel(t)
	if n := w.agent.metrics.value(t, "drain_seconds"); n != 1 {
		t.Errorf("%v drains were timed, want 1", n)
	}
	w.stop()
	close(told)
	var counts []int
	for n := range told {
		counts = append(counts, n)
	}
	if !slices.Equal(counts, []int{1, 3, 1, 2}) {
		t.Errorf("was told of %v tunnels, want 1, 3, 1 and 2", counts)
	}
	calls := w.gateway.Calls()
	slices.Sort(calls)
	if got := strings.Join(calls, " "); got != "delete delete/1 delete/1 delete/2 register register/1 register/1 register/2" {
		t.Errorf("calls: %s", got)
	}
}

// The app is told the visitor's address, from the moment on at which the Service asks for that, on the connection there is.
func TestProxyProtocol(t *testing.T) {
	w := newWorld(t)
	port, _ := w.listen("app")
	proxied := func(version string) gatewayapi.Assignment {
		a := assignment("web", port)
		a.ProxyProtocol = version
		return a
	}
	w.start()
	w.gateway.Assign(proxied(""))
	edge := w.edge.Await(t)
	forward := edge.AwaitForward(t)
	// The app echoes what it is sent, the header first.
	echoed := func(n int) string {
		t.Helper()
		channel := visit(t, edge, forward, "app")
		defer func() { _ = channel.Close() }()
		if _, err := io.WriteString(channel, "hello"); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, n+len("hello"))
		if _, err := io.ReadFull(channel, got); err != nil {
			t.Fatal(err)
		}
		return string(got)
	}
	if got := echoed(0); got != "hello" {
		t.Errorf("without the protocol the app got %q", got)
	}
	w.gateway.Assign(proxied("v1"))
	gatewaytest.Eventually(t, "v1 is used", func() bool { return strings.Contains(w.logs.String(), "to=v1") })
	want := fmt.Sprintf("PROXY TCP4 192.0.2.7 127.0.0.1 50000 %d\r\n", port)
	if got := echoed(len(want)); got != want+"hello" {
		t.Errorf("the app got %q, want %q", got, want+"hello")
	}
	w.gateway.Assign(proxied("v2"))
	gatewaytest.Eventually(t, "v2 is used", func() bool { return strings.Contains(w.logs.String(), "to=v2") })
	if got := echoed(28); !strings.HasPrefix(got, "\r\n\r\n\x00\r\nQUIT\n\x21\x11") || !strings.Contains(got, "\xc0\x00\x02\x07\x7f\x00\x00\x01") || !strings.HasSuffix(got, "hello") {
		t.Errorf("the app got %q", got)
	}
	if n := w.edge.Logins(); n != 1 {
		t.Errorf("%d logins, want 1", n)
	}
}

// A socket that comes back while its old tunnel still has a visitor waits for the old one's end: both are the same tunnel.
func TestASocketThatComesBackWaitsForItsOldTunnel(t *testing.T) {
	w := newWorld(t)
	port, _ := w.listen("app")
	w.start()
	w.gateway.Assign(assignment("web", port))
	edge := w.edge.Await(t)
	visitor := visit(t, edge, edge.AwaitForward(t), "app")
	w.gateway.Assign()
	edge.AwaitCancel(t)
	w.gateway.Assign(assignment("web", port))
	w.gateway.Assign(assignment("web", port), assignment("other", port))
	w.edge.Await(t) // the other's tunnel: the snapshot has been taken
	if calls := strings.Join(w.gateway.Calls(), " "); calls != "register register" {
		t.Errorf("calls while the old tunnel is there: %s", calls)
	}
	_ = visitor.Close()
	again := w.edge.Await(t)
	again.AwaitForward(t)
	if calls := strings.Join(w.gateway.Calls(), " "); calls != "register register delete register" {
		t.Errorf("calls: %s", calls)
	}
}

func TestTunnelsServeOnWhileTheGatewayIsAway(t *testing.T) {
	w := newWorld(t)
	port, _ := w.listen("app")
	w.start()
	w.gateway.Assign(assignment("web", port))
	edge := w.edge.Await(t)
	edge.AwaitForward(t)
	w.gateway.Down.Store(true)
	w.gateway.Disconnect()
	gatewaytest.Eventually(t, "the loss of the gateway is said", func() bool { return strings.Contains(w.logs.String(), "the last ones stay in force") })
	// The edge restarts meanwhile: the certificate is valid, so nobody has to be asked.
	w.edge.CloseConnections()
	edge = w.edge.Await(t)
	_ = visit(t, edge, edge.AwaitForward(t), "app").Close()
	if calls := strings.Join(w.gateway.Calls(), " "); calls != "register" {
		t.Errorf("calls: %s", calls)
	}
	if n := w.agent.metrics.value(t, "handshake_seconds"); n != 2 {
		t.Errorf("%g handshakes were measured, want 2", n)
	}
	w.gateway.Assign()
	w.gateway.Down.Store(false)
	edge.AwaitCancel(t)
}

func TestReadinessIsStickyAndLivenessIndependent(t *testing.T) {
	w := newWorld(t)
	port, stopApp := w.listen("app")
	stopApp()
	w.start()
	// The first snapshot the agent sees may be the empty one that the gateway starts with, which makes it ready.
	gatewaytest.Eventually(t, "ready with nothing assigned", func() bool { code, _ := w.get("/readyz"); return code == http.StatusOK })
	w.gateway.Assign(assignment("web", port))
	gatewaytest.Eventually(t, "the tunnel waits for its app", func() bool { return w.agent.metrics.value(t, "tunnels", "WaitingForApp") == 1 })
	for _, path := range []string{"/readyz", "/livez"} {
		if code, body := w.get(path); code != http.StatusOK {
			t.Errorf("%s: %d %s", path, code, body)
		}
	}
	if code, body := w.get("/metrics"); code != http.StatusOK || !strings.Contains(body, `mysocket_sidecar_tunnels{state="WaitingForApp"} 1`) {
		t.Errorf("metrics: %d\n%s", code, body)
	}
	if code, _ := w.get("/"); code != http.StatusNotFound {
		t.Errorf("/: %d", code)
	}
	gatewaytest.Eventually(t, "the state is reported", func() bool {
		reports := w.gateway.Reports()
		return len(reports) > 0 && reports[0].State == gatewayapi.StateWaitingForApp && reports[0].Message != ""
	})
}

func TestReadiness(t *testing.T) {
	for _, test := range []struct {
		haveSnapshot, graceOver bool
		connected, assigned     int
		want                    bool
	}{
		{false, false, 0, 0, false},
		{false, true, 0, 0, true},
		{true, false, 0, 0, true},
		{true, false, 1, 2, false},
		{true, false, 2, 2, true},
		{true, true, 0, 2, true},
	} {
		if got, why := readiness(test.haveSnapshot, test.graceOver, test.connected, test.assigned); got != test.want || why == "" {
			t.Errorf("%+v: got %t because %q", test, got, why)
		}
	}
}

func TestTheCABundleMayComeLate(t *testing.T) {
	w := newWorld(t)
	bundle, err := os.ReadFile(w.cfg.CAFile)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(w.cfg.CAFile); err != nil {
		t.Fatal(err)
	}
	port, _ := w.listen("app")
	w.gateway.Assign(assignment("web", port))
	w.start()
	gatewaytest.Eventually(t, "the missing bundle is said", func() bool { return strings.Contains(w.logs.String(), "waiting for the gateway's CA bundle") })
	if err := os.WriteFile(w.cfg.CAFile, bundle, 0o600); err != nil {
		t.Fatal(err)
	}
	w.edge.Await(t)
	if n := strings.Count(w.logs.String(), "waiting for the gateway's CA bundle"); n != 1 {
		t.Errorf("said %d times", n)
	}
}

func TestDrainCommandAgainstAnAgent(t *testing.T) {
	w := newWorld(t)
	port, _ := w.listen("app")
	w.gateway.Assign(assignment("web", port))
	w.start()
	edge := w.edge.Await(t)
	visitor := visit(t, edge, edge.AwaitForward(t), "app")
	var said lockedBuffer
	drained := make(chan error, 1)
	go func() { drained <- drain.Ask(t.Context(), w.cfg.DrainSocket, &said) }()
	edge.AwaitCancel(t)
	// The pod is being deleted, and its Service's assignment goes with it: that must not shorten the drain.
	w.gateway.Assign()
	gatewaytest.Eventually(t, "progress is said", func() bool { return strings.Contains(said.String(), "1 connections are open") })
	if _, err := io.WriteString(visitor, "hello"); err != nil {
		t.Error(err)
	}
	got := make([]byte, 5)
	if _, err := io.ReadFull(visitor, got); err != nil || string(got) != "hello" {
		t.Errorf("the visitor's connection was disturbed: %q, %v", got, err)
	}
	select {
	case err := <-drained:
		t.Fatalf("drained while a visitor was there: %v", err)
	default:
	}
	_ = visitor.Close()
	if err := <-drained; err != nil {
		t.Error(err)
	}
	if !strings.Contains(said.String(), "drained in") {
		t.Errorf("said %q", said.String())
	}
	// Nothing new is started, and asking again does no harm.
	w.gateway.Assign(assignment("web", port), assignment("other", port))
	if err := drain.Ask(t.Context(), w.cfg.DrainSocket, &said); err != nil {
		t.Error(err)
	}
	if n := w.edge.Logins(); n != 1 {
		t.Errorf("%d logins, want 1", n)
	}
	w.stop()
	if calls := strings.Join(w.gateway.Calls(), " "); calls != "register delete" {
		t.Errorf("calls: %s", calls)
	}
}

func TestDrainIsBounded(t *testing.T) {
	w := newWorld(t)
	w.cfg.DrainTimeout = 50 * time.Millisecond
	port, _ := w.listen("app")
	w.gateway.Assign(assignment("web", port))
	w.start()
	edge := w.edge.Await(t)
	visitor := visit(t, edge, edge.AwaitForward(t), "app")
	var said lockedBuffer
	if err := drain.Ask(t.Context(), w.cfg.DrainSocket, &said); err != nil {
		t.Error(err)
	}
	if !strings.Contains(said.String(), "1 connections are still open") {
		t.Errorf("said %q", said.String())
	}
	if _, err := io.WriteString(visitor, "x"); err != nil {
		t.Errorf("the end of the drain cut a visitor off: %v", err)
	}
	w.stop()
	if _, err := io.ReadAll(visitor); err != nil && !errors.Is(err, io.EOF) {
		t.Error(err)
	}
	if !strings.Contains(w.logs.String(), `msg="connections cut"`) {
		t.Error("what was cut is not said")
	}
}

func TestNewRefusesWhatCannotWork(t *testing.T) {
	good := Config{GatewayURL: "https://gateway:443", PodIP: "10.0.0.1", DrainTimeout: time.Second, Logger: slog.New(slog.DiscardHandler)}
	for name, change := range map[string]func(*Config){
		"pod IP":        func(c *Config) { c.PodIP = "pod" },
		"gateway":       func(c *Config) { c.GatewayURL = "http://gateway" },
		"drain timeout": func(c *Config) { c.DrainTimeout = 0 },
	} {
		cfg := good
		change(&cfg)
		if _, err := New(cfg); err == nil {
			t.Errorf("a wrong %s was let through", name)
		}
	}
	if _, err := New(good); err != nil {
		t.Error(err)
	}
}
