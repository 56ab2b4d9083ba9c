package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/mysocketio/mysocket-injector/internal/edge"
	"github.com/mysocketio/mysocket-injector/internal/edge/etcdtest"
	"github.com/mysocketio/mysocket-injector/internal/gatewayapi"
	"github.com/mysocketio/mysocket-injector/internal/mysocket"
	"github.com/mysocketio/mysocket-injector/internal/sidecar"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/gatewaytest"
)

const (
	domain   = "edge.example.com"
	email    = "owner@example.com"
	password = "a long password"
	// pairPatience is how long a busy machine may take for anything.
	pairPatience = 90 * time.Second
)

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(pairPatience)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-deadline:
			t.Fatalf("waited %s in vain for %s", pairPatience, what)
		case <-tick.C:
		}
	}
}

// pair is two edges, as processes of the real program, on one etcd. Each has an address of loopback, and all its ports there, and so can be
// started again where it was.
type pair struct {
	t     *testing.T
	edges [2]*edgeProcess
	api   *mysocket.Client
	ca    *x509.CertPool
}

// edgeProcess is one of them.
type edgeProcess struct {
	t       *testing.T
	program string
	host    string
	args    []string
	cmd     *exec.Cmd
	stderr  *edgeLog
	exited  chan struct{}
	err     error // once exited
}

// newPair starts two edges and makes an account. args are further arguments of serve.
func newPair(t *testing.T, args ...string) *pair {
	t.Helper()
	server := etcdtest.Start(t)
	dir := t.TempDir()
	program := program(t)
	shared := []string{"--etcd-endpoints", server.URL, "--etcd-prefix", "/test/edges"}
	// The account is made before any edge has run: the commands need none.
	add := exec.CommandContext(t.Context(), program, append([]string{"user", "add", "--email", email}, shared...)...)
	add.Stdin = strings.NewReader(password)
	if out, err := add.CombinedOutput(); err != nil {
		t.Fatalf("user add: %v: %s", err, out)
	}
	p := &pair{t: t, ca: x509.NewCertPool()}
	subnet := fmt.Sprintf("127.%d.%d", 50+rand.IntN(50), rand.IntN(256))
	cas := map[string]bool{}
	for i := range p.edges {
		e := &edgeProcess{t: t, program: program, host: fmt.Sprintf("%s.%d", subnet, i+1)}
		ca := filepath.Join(dir, e.host)
		e.args = append([]string{"serve", "--domain", domain, "--api-address", e.at(8443), "--ssh-address", e.at(2222), "--http-address", e.at(8080),
			"--https-address", e.at(8444), "--admin-address", e.at(9090), "--ca-out", ca, "--api-hosts", subnet + ".1," + subnet + ".2"}, shared...)
		e.args = append(e.args, args...)
		p.edges[i] = e
	}
	// Both at once: their keys must become the same.
	for _, e := range p.edges {
		e.start()
	}
	for _, e := range p.edges {
		e.awaitListening()
		pem, err := os.ReadFile(filepath.Join(dir, e.host))
		if err != nil {
			t.Fatal(err)
		}
		cas[string(pem)] = true
		p.ca.AppendCertsFromPEM(pem)
	}
	if len(cas) != 1 {
		t.Error("two edges that were started at once have two authorities")
	}
	p.api = p.client(p.edges[1])
	return p
}

func (p *pair) client(e *edgeProcess) *mysocket.Client {
	p.t.Helper()
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: p.ca, MinVersion: tls.VersionTLS12}}
	p.t.Cleanup(transport.CloseIdleConnections)
	api, err := mysocket.New(mysocket.Config{
		BaseURL:     "https://" + e.at(8443),
		Credentials: func() (mysocket.Account, error) { return mysocket.Account{Email: email, Password: password}, nil },
		Transport:   transport,
	})
	if err != nil {
		p.t.Fatal(err)
	}
	return api
}

func (e *edgeProcess) at(port int) string { return net.JoinHostPort(e.host, strconv.Itoa(port)) }

func (e *edgeProcess) start() {
	e.t.Helper()
	e.stderr, e.exited = &edgeLog{}, make(chan struct{})
	e.cmd = exec.CommandContext(context.Background(), e.program, e.args...) // #nosec G204 -- a test's own
	e.cmd.Stderr = e.stderr
	if err := e.cmd.Start(); err != nil {
		e.t.Fatal(err)
	}
	cmd, exited := e.cmd, e.exited
	go func() {
		e.err = cmd.Wait()
		close(exited)
	}()
	e.t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-exited
	})
}

func (e *edgeProcess) awaitListening() {
	e.t.Helper()
	eventually(e.t, "an edge to listen", func() bool {
		select {
		case <-e.exited:
			e.t.Fatalf("ended with %v: %s", e.err, e.stderr)
		default:
		}
		return e.stderr.has("msg=listening part=ssh")
	})
}

func (e *edgeProcess) kill() {
	_ = e.cmd.Process.Kill()
	<-e.exited
}

// get asks the admin address.
func (e *edgeProcess) get(path string) (int, []byte) {
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 5 * time.Second}
	resp, err := client.Get("http://" + e.at(9090) + path)
	if err != nil {
		return 0, nil
	}
	defer func() { _ = resp.Body.Close() }()
	body, _ := io.ReadAll(resp.Body)
	return resp.StatusCode, body
}

func (e *edgeProcess) healthy() bool {
	status, _ := e.get("/healthz")
	return status == http.StatusOK
}

// tunnels counts those of a socket that are connected here; -1 when the edge does not answer.
func (e *edgeProcess) tunnels(socketID string) int {
	_, body := e.get("/debug/tunnels")
	var list []edge.DebugSocket
	if json.Unmarshal(body, &list) != nil {
		return -1
	}
	for _, s := range list {
		if s.Socket == socketID {
			return len(s.Tunnels)
		}
	}
	return 0
}

// backend is behind the gateway as the control plane is.
type backend struct{ api *mysocket.Client }

func (b *backend) Register(ctx context.Context, socketID, tunnelID, publicKey string) (gatewayapi.Registration, error) {
	user, err := b.api.Login(ctx)
	if err != nil {
		return gatewayapi.Registration{}, err
	}
	var t mysocket.Tunnel
	if tunnelID != "" {
		return gatewayapi.Registration{}, fmt.Errorf("certificate of %s renewed within minutes", tunnelID)
	}
	if t, err = b.api.CreateTunnel(ctx, socketID); err != nil {
		return gatewayapi.Registration{}, err
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
		TunnelID: t.ID, Certificate: signed.Certificate, User: user, EdgeAddress: "edges.test:2222",
		HostKeys: []string{string(ssh.MarshalAuthorizedKey(hostKey))}, ForwardHost: "localhost", ForwardPort: uint32(t.LocalPort),
	}, nil
}

func (b *backend) Delete(ctx context.Context, socketID, tunnelID string) error {
	return b.api.DeleteTunnel(ctx, socketID, tunnelID)
}

// LookupNetIP is the DNS of the edges: one name, two addresses.
func (p *pair) LookupNetIP(context.Context, string, string) ([]netip.Addr, error) {
	return []netip.Addr{netip.MustParseAddr(p.edges[0].host), netip.MustParseAddr(p.edges[1].host)}, nil
}

// startSidecar runs the sidecar of a replica whose app answers everything with "hello".
func (p *pair) startSidecar(socket mysocket.Socket, connections int) {
	p.t.Helper()
	app := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		_, _ = io.WriteString(w, "hello")
	}))
	p.t.Cleanup(app.Close)
	address, err := url.Parse(app.URL)
	if err != nil {
		p.t.Fatal(err)
	}
	port, err := strconv.Atoi(address.Port())
	if err != nil {
		p.t.Fatal(err)
	}
	gateway := gatewaytest.Start(p.t, &backend{api: p.api})
	gateway.Assign(gatewayapi.Assignment{SocketID: socket.ID, SocketName: socket.Name, Service: "web", URL: socket.URL(), Port: int32(port), Connections: connections}) // #nosec G115 -- a port
	token, ca := gateway.Files(p.t)
	agent, err := sidecar.New(sidecar.Config{
		GatewayURL: gateway.URL, TokenFile: token, CAFile: ca, PodIP: "127.0.0.1", AdminAddress: "127.0.0.1:0",
		DrainSocket: fmt.Sprintf("mysocket-edge-test-%d-%d", os.Getpid(), rand.Uint32()), DrainTimeout: time.Second,
		EdgeResolver: p, Version: "test", Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		p.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		if err := agent.Run(ctx); err != nil {
			p.t.Error(err)
		}
	})
	p.t.Cleanup(func() { cancel(); running.Wait() })
}

// load sends a request every 10 ms, whether or not those before have been answered, to whatever is at the address. Every other goes over a
// connection of its own, and can't be repeated.
type load struct {
	stop         context.CancelFunc
	running      sync.WaitGroup
	done, failed atomic.Int64
}

func startLoad(t *testing.T, address, dnsName string) *load {
	t.Helper()
	const most = 500 // open at once: then the machine is too busy for the pace, and the load waits
	ctx, cancel := context.WithCancel(context.Background())
	l := &load{stop: cancel}
	var dialer net.Dialer
	transport := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, "tcp", address)
		},
		MaxIdleConnsPerHost: most,
	}
	fresh := transport.Clone()
	fresh.DisableKeepAlives = true
	send := func(n int64) (*http.Response, error) {
		if n%2 == 0 {
			return (&http.Client{Transport: transport, Timeout: pairPatience}).Get("http://" + dnsName + "/")
		}
		return (&http.Client{Transport: fresh, Timeout: pairPatience}).Post("http://"+dnsName+"/", "text/plain", strings.NewReader("a body"))
	}
	slots := make(chan struct{}, most)
	l.running.Go(func() {
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for n := int64(0); ; n++ {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			slots <- struct{}{}
			l.running.Go(func() {
				defer func() { <-slots }()
				resp, err := send(n)
				what := ""
				if err != nil {
					what = err.Error()
				} else {
					body, err := io.ReadAll(resp.Body)
					_ = resp.Body.Close()
					if resp.StatusCode != http.StatusOK || err != nil || string(body) != "hello" {
						what = fmt.Sprint(resp.StatusCode, " ", string(body), " ", err)
					}
				}
				l.done.Add(1)
				if what != "" && l.failed.Add(1) <= 3 {
					t.Errorf("a request failed: %s", what)
				}
			})
		}
	})
	t.Cleanup(func() { l.end(); transport.CloseIdleConnections() })
	return l
}

func (l *load) end() {
	l.stop()
	l.running.Wait()
}

// flow waits until n more requests have been answered.
func (l *load) flow(t *testing.T, n int64) {
	t.Helper()
	before := l.done.Load()
	eventually(t, "requests to flow", func() bool { return l.done.Load() >= before+n })
}

func (p *pair) newSocket(e *edgeProcess, name string) mysocket.Socket {
	p.t.Helper()
	socket, err := p.client(e).CreateSocket(p.t.Context(), mysocket.Socket{Name: name, Type: "http"})
	if err != nil {
		p.t.Fatal(err)
	}
	return socket
}

// TestAKilledEdgeFailsNoRequestAtTheOther kills one of two edges without a word, under load at the other. The sidecar has a tunnel at each, and comes
// back to the one that was killed.
func TestAKilledEdgeFailsNoRequestAtTheOther(t *testing.T) {
	p := newPair(t)
	one, two := p.edges[0], p.edges[1]
	socket := p.newSocket(one, "web")
	p.startSidecar(socket, 2)
	each := func(n int) func() bool {
		return func() bool { return one.tunnels(socket.ID) == n && two.tunnels(socket.ID) == n }
	}
	eventually(t, "a tunnel at each edge", each(1))

	l := startLoad(t, two.at(8080), socket.DNSName)
	l.flow(t, 100)
	one.kill()
	// The other connection comes here, until its own edge is back.
	eventually(t, "both tunnels to be here", func() bool { return two.tunnels(socket.ID) == 2 })
	l.flow(t, 100)
	// Nothing is missing without it, not even the API.
	p.newSocket(two, "made meanwhile")
	one.start()
	one.awaitListening()
	eventually(t, "a tunnel at each edge again", each(1))
	l.flow(t, 100)
	l.end()
	t.Logf("%d requests, %d failed", l.done.Load(), l.failed.Load())

	if err := p.client(one).DeleteSocket(t.Context(), socket.ID); err != nil {
		t.Fatal(err)
	}
	eventually(t, "all tunnels to be gone", each(0))
}

// balancer hands connections to the edges that say they are healthy, as a TCP load balancer does.
type balancer struct {
	ln      net.Listener
	edges   []*edgeProcess
	up      [2]atomic.Bool
	running sync.WaitGroup
}

func newBalancer(t *testing.T, p *pair) *balancer {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b := &balancer{ln: ln, edges: p.edges[:]}
	ctx, cancel := context.WithCancel(context.Background())
	for i, e := range b.edges {
		b.running.Go(func() {
			tick := time.NewTicker(100 * time.Millisecond)
			defer tick.Stop()
			for ctx.Err() == nil {
				b.up[i].Store(e.healthy())
				select {
				case <-tick.C:
				case <-ctx.Done():
				}
			}
		})
	}
	b.running.Go(b.accept)
	t.Cleanup(func() { cancel(); _ = ln.Close(); b.running.Wait() })
	return b
}

func (b *balancer) accept() {
	for turn := 0; ; turn++ {
		in, err := b.ln.Accept()
		if err != nil {
			return
		}
		to := b.edges[turn%2]
		if !b.up[turn%2].Load() {
			to = b.edges[(turn+1)%2]
		}
		out, err := net.Dial("tcp", to.at(8080))
		if err != nil {
			_ = in.Close()
			continue
		}
		for _, way := range [][2]net.Conn{{in, out}, {out, in}} {
			b.running.Go(func() {
				_, err := io.Copy(way[0], way[1])
				if err != nil {
					_, _ = way[0].Close(), way[1].Close()
					return
				}
				_ = way[0].(*net.TCPConn).CloseWrite()
			})
		}
	}
}

// TestRestartingBothEdgesFailsNoRequest restarts one edge after the other, as an upgrade does, under load by way of a balancer that looks at
// /healthz.
func TestRestartingBothEdgesFailsNoRequest(t *testing.T) {
	p := newPair(t, "--shutdown-delay", "3s", "--startup-wait", "1m")
	socket := p.newSocket(p.edges[0], "web")
	p.startSidecar(socket, 2)
	b := newBalancer(t, p)
	both := func() bool { return b.up[0].Load() && b.up[1].Load() }
	eventually(t, "both edges to be healthy", both)
	l := startLoad(t, b.ln.Addr().String(), socket.DNSName)
	l.flow(t, 100)
	for _, e := range p.edges {
		if err := e.cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the edge to say that it goes", func() bool { return !e.healthy() })
		select {
		case <-e.exited:
		case <-time.After(pairPatience):
			t.Fatal("the edge does not stop")
		}
		if e.err != nil || !e.stderr.has("msg=stopped") || e.stderr.has("requests were cut off") {
			t.Errorf("ended with %v: %s", e.err, e.stderr)
		}
		e.start()
		e.awaitListening()
		eventually(t, "both edges to be healthy again", both)
		if n := e.tunnels(socket.ID); n < 1 {
			t.Errorf("the edge says that it is ready with %d tunnels", n)
		}
		l.flow(t, 100)
	}
	l.end()
	t.Logf("%d requests, %d failed", l.done.Load(), l.failed.Load())
}
