package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/mysocketio/mysocket-injector/internal/edge/edgetest"
	"github.com/mysocketio/mysocket-injector/internal/gatewayapi"
	"github.com/mysocketio/mysocket-injector/internal/mysocket"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/gatewaytest"
)

// build builds the program as its image has it, and returns its name.
func build(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "tunnel-sidecar-test")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(dir, "tunnel-sidecar")
	command := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w -X main.version=1.2.3", "-o", program, ".")
	command.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := command.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	return program
}

// edgeBackend is behind the gateway as the control plane is: it has the edge's account.
type edgeBackend struct {
	api  *mysocket.Client
	edge *edgetest.Edge

	mu      sync.Mutex
	tunnels map[string]mysocket.Tunnel
}

func (b *edgeBackend) Register(ctx context.Context, socketID, tunnelID, publicKey string) (gatewayapi.Registration, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	user, err := b.api.Login(ctx)
	if err != nil {
		return gatewayapi.Registration{}, err
	}
	t, ok := b.tunnels[socketID]
	if !ok {
		if t, err = b.api.CreateTunnel(ctx, socketID); err != nil {
			return gatewayapi.Registration{}, err
		}
		b.tunnels[socketID] = t
	}
	signed, err := b.api.SignKey(ctx, socketID, t.ID, publicKey)
	if err != nil {
		return gatewayapi.Registration{}, err
	}
	wire, err := base64.StdEncoding.DecodeString(signed.HostKey)
	if err != nil {
		return gatewayapi.Registration{}, err
	}
	hostKey, err := ssh.ParsePublicKey(wire)
	if err != nil {
		return gatewayapi.Registration{}, err
	}
	return gatewayapi.Registration{
		TunnelID: t.ID, Certificate: signed.Certificate, User: user, EdgeAddress: b.edge.SSHAddress,
		HostKeys: []string{string(ssh.MarshalAuthorizedKey(hostKey))}, ForwardHost: "localhost", ForwardPort: uint32(t.LocalPort),
	}, nil
}

func (b *edgeBackend) Delete(ctx context.Context, socketID, tunnelID string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.tunnels, socketID)
	return b.api.DeleteTunnel(ctx, socketID, tunnelID)
}

// startEdge runs an edge with one socket. With border0 it is used with an access token, else with e-mail and password.
func startEdge(t *testing.T, border0 bool) (*edgetest.Edge, *mysocket.Client, mysocket.Socket) {
	t.Helper()
	edge := edgetest.Start(t)
	account := mysocket.Account{Email: edge.Email, Password: edge.Password}
	if border0 {
		account = mysocket.Account{Token: edge.Token}
	}
	api, err := mysocket.New(mysocket.Config{
		BaseURL:     edge.APIURL,
		Credentials: func() (mysocket.Account, error) { return account, nil },
		Transport:   edge.APIClient(t).Transport,
	})
	if err != nil {
		t.Fatal(err)
	}
	socket, err := api.CreateSocket(t.Context(), mysocket.Socket{Name: "k8s shop.web", Type: "http"})
	if err != nil {
		t.Fatal(err)
	}
	return edge, api, socket
}

// serveApp runs an HTTP app on loopback.
func serveApp(t *testing.T, handler http.Handler) (*http.Server, int32) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: handler, ReadHeaderTimeout: time.Minute}
	go func() { _ = server.Serve(listener) }()
	t.Cleanup(func() { _ = server.Close() })
	return server, int32(listener.Addr().(*net.TCPAddr).Port)
}

func assign(socket mysocket.Socket, port int32) gatewayapi.Assignment {
	return gatewayapi.Assignment{SocketID: socket.ID, SocketName: socket.Name, Service: "web", URL: socket.URL(), Port: port}
}

// process is a running sidecar.
type process struct {
	command *exec.Cmd
	out     *syncBuffer
	admin   string
	socket  string
	done    chan error
	began   time.Time
}

type syncBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

func freePort(t testing.TB) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = listener.Close() }()
	return strconv.Itoa(listener.Addr().(*net.TCPAddr).Port)
}

func startProcess(t *testing.T, program string, gateway *gatewaytest.Gateway) *process {
	t.Helper()
	token, ca := gateway.Files(t)
	p := &process{
		out: &syncBuffer{}, admin: "127.0.0.1:" + freePort(t), done: make(chan error, 1),
		socket: "process-test-" + freePort(t),
	}
	p.command = exec.Command(program, "run", "--gateway="+gateway.URL, "--token-file="+token, "--ca-file="+ca,
		"--admin-address="+p.admin, "--drain-socket="+p.socket, "--drain-timeout=20s")
	p.command.Env = append(os.Environ(), "POD_IP=127.0.0.1", "POD_NAME=web-1", "POD_NAMESPACE=shop")
	p.command.Stdout, p.command.Stderr = p.out, p.out
	p.began = time.Now()
	if err := p.command.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { p.done <- p.command.Wait() }()
	t.Cleanup(func() {
		_ = p.command.Process.Kill()
		if t.Failed() {
			t.Log(p.out.String())
		}
		if strings.Contains(p.out.String(), gatewaytest.Token) {
			t.Error("the token is in the log")
		}
	})
	return p
}

// end waits for the process's end, which must be a good one.
func (p *process) end(t *testing.T) {
	t.Helper()
	select {
	case err := <-p.done:
		if err != nil {
			t.Errorf("the sidecar ended with %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("the sidecar did not end")
	}
}

func (p *process) status(path string) int {
	response, err := http.Get("http://" + p.admin + path)
	if err != nil {
		return 0
	}
	_ = response.Body.Close()
	return response.StatusCode
}

// resident returns the process's resident memory in KiB, as the kernel counts it.
func (p *process) resident(t *testing.T) int {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.command.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			kib, err := strconv.Atoi(strings.Fields(rest)[0])
			if err != nil {
				t.Fatal(err)
			}
			return kib
		}
	}
	t.Fatal("no VmRSS")
	return 0
}

// TestLifeOfASidecar takes the real program through its life, with the real edge: connect, serve, drain under an open
// request, end.
func TestLifeOfASidecar(t *testing.T) {
	program := build(t)
	edge, api, socket := startEdge(t, false)
	backend := &edgeBackend{api: api, edge: edge, tunnels: map[string]mysocket.Tunnel{}}
	gateway := gatewaytest.Start(t, backend)

	inRequest, finish := make(chan struct{}), make(chan struct{})
	app := http.NewServeMux()
	app.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "hello") })
	app.HandleFunc("/slow", func(w http.ResponseWriter, _ *http.Request) {
		close(inRequest)
		<-finish
		_, _ = io.WriteString(w, "at last")
	})
	_, port := serveApp(t, app)
	gateway.Assign(assign(socket, port))

	p := startProcess(t, program, gateway)
	gatewaytest.Eventually(t, "the sidecar registers", func() bool { return len(gateway.Calls()) > 0 })
	t.Logf("start to registration: %s", time.Since(p.began).Round(time.Millisecond))
	gatewaytest.Eventually(t, "the sidecar is ready", func() bool {
		return p.status("/readyz") == http.StatusOK && strings.Contains(p.out.String(), "tunnel connected")
	})
	t.Logf("start to connected: %s", time.Since(p.began).Round(time.Millisecond))

	gatewaytest.Eventually(t, "the edge knows the pod's name", func() bool {
		tunnels := edge.Tunnels()[0].Tunnels
		return len(tunnels) == 1 && tunnels[0].Name == "shop/web-1"
	})
	visitor := edge.VisitorClient(t)
	fetch := func(path string) (int, string) {
		response, err := visitor.Get("http://" + socket.DNSName + path)
		if err != nil {
			return 0, err.Error()
		}
		defer func() { _ = response.Body.Close() }()
		body, _ := io.ReadAll(response.Body)
		return response.StatusCode, string(body)
	}
	for range 20 {
		if code, body := fetch("/"); code != http.StatusOK || body != "hello" {
			t.Fatalf("through the edge: %d %q", code, body)
		}
	}
	for _, path := range []string{"/livez", "/metrics"} {
		if code := p.status(path); code != http.StatusOK {
			t.Errorf("%s: %d", path, code)
		}
	}
	t.Logf("resident memory with one tunnel: %d KiB", p.resident(t))

	// Drain while a visitor waits for a slow answer.
	slow := make(chan string, 1)
	go func() {
		code, body := fetch("/slow")
		slow <- fmt.Sprint(code, " ", body)
	}()
	<-inRequest
	var said syncBuffer
	hook := exec.Command(program, "drain", "--drain-socket="+p.socket)
	hook.Stdout, hook.Stderr = &said, &said
	if err := hook.Start(); err != nil {
		t.Fatal(err)
	}
	hooked := make(chan error, 1)
	go func() { hooked <- hook.Wait() }()
	gatewaytest.Eventually(t, "the tunnel has left the rotation", func() bool { return strings.Contains(p.out.String(), "left the edge's rotation") })
	if code, _ := fetch("/"); code != http.StatusBadGateway {
		t.Errorf("a request after the withdrawal got %d", code)
	}
	select {
	case err := <-hooked:
		t.Fatalf("the hook ended before the visitor was served: %v\n%s", err, said.String())
	default:
	}
	close(finish)
	if got := <-slow; got != "200 at last" {
		t.Errorf("the slow request got %q", got)
	}
	if err := <-hooked; err != nil || !strings.Contains(said.String(), "drained in") {
		t.Errorf("the hook: %v\n%s", err, said.String())
	}
	if code := p.status("/livez"); code != http.StatusOK {
		t.Errorf("the drain ended the sidecar: %d", code)
	}

	if err := p.command.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	p.end(t)
	tunnels, err := api.Tunnels(t.Context(), socket.ID)
	if err != nil || len(tunnels) != 0 {
		t.Errorf("tunnels at the edge after the end: %v, %v", tunnels, err)
	}
	// The hook of a sidecar that has gone must not fail.
	out, err := exec.Command(program, "drain", "--drain-socket="+p.socket).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "no sidecar is running") {
		t.Errorf("drain without a sidecar: %v\n%s", err, out)
	}
}

// The socket is in the pod's network namespace, where the app's containers are too.
func TestAnotherUserMustNotDrain(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can run a program as another user")
	}
	program := build(t)
	gateway := gatewaytest.Start(t, nil)
	p := startProcess(t, program, gateway)
	gatewaytest.Eventually(t, "the sidecar is ready", func() bool { return p.status("/readyz") == http.StatusOK })
	other := exec.Command(program, "drain", "--drain-socket="+p.socket)
	other.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := other.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "user 0 is at the other end; only 65534 may be") {
		t.Errorf("%v\n%s", err, out)
	}
	own, err := exec.Command(program, "drain", "--drain-socket="+p.socket).CombinedOutput()
	if err != nil || !strings.Contains(string(own), "nothing to drain") {
		t.Errorf("%v\n%s", err, own)
	}
	_ = p.command.Process.Signal(syscall.SIGTERM)
	p.end(t)
}

func TestASecondSignalEndsAtOnce(t *testing.T) {
	program := build(t)
	backend := &hangingBackend{asked: make(chan struct{}), release: make(chan struct{})}
	gateway := gatewaytest.Start(t, backend)
	defer close(backend.release)
	gateway.Assign(gatewayapi.Assignment{SocketID: "s1", SocketName: "s1", Port: 1, PublishNotReady: true})
	p := startProcess(t, program, gateway)
	<-backend.asked
	_ = p.command.Process.Signal(syscall.SIGTERM)
	gatewaytest.Eventually(t, "the first signal is taken", func() bool { return strings.Contains(p.out.String(), "msg=ending ") })
	_ = p.command.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done: // whether the second signal was faster than the orderly end does not matter
	case <-time.After(5 * time.Second):
		t.Fatal("the sidecar did not end")
	}
}

type hangingBackend struct{ asked, release chan struct{} }

func (b *hangingBackend) Register(context.Context, string, string, string) (gatewayapi.Registration, error) {
	close(b.asked)
	<-b.release
	return gatewayapi.Registration{}, errors.New("too late")
}

func (b *hangingBackend) Delete(context.Context, string, string) error { return nil }
