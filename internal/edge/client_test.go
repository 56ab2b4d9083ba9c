package edge_test

import (
	"bytes"
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/mysocketio/mysocket-injector/internal/edge/edgetest"
)

const patience = 15 * time.Second

// eventually waits for a condition.
func eventually(t testing.TB, what string, condition func() bool) {
	t.Helper()
	deadline := time.NewTimer(patience)
	defer deadline.Stop()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !condition() {
		select {
		case <-deadline.C:
			t.Fatalf("waited %s for: %s", patience, what)
		case <-tick.C:
		}
	}
}

// account speaks to the REST API.
type account struct {
	t      testing.TB
	edge   *edgetest.Edge
	client *http.Client
	token  string
}

func login(t testing.TB, e *edgetest.Edge) *account {
	t.Helper()
	a := &account{t: t, edge: e, client: e.APIClient(t)}
	a.login(e.Email, e.Password)
	return a
}

func (a *account) login(email, password string) {
	a.t.Helper()
	var answer struct {
		Token string `json:"token"`
	}
	if status := a.call("POST", "/login", map[string]string{"email": email, "password": password}, &answer); status != 200 {
		a.t.Fatalf("login answered %d", status)
	}
	a.token = answer.Token
}

// call sends a JSON body and reads a JSON answer; a string is sent as it is.
func (a *account) call(method, path string, body, into any) int {
	a.t.Helper()
	var data []byte
	switch b := body.(type) {
	case nil:
	case string:
		data = []byte(b)
	default:
		var err error
		if data, err = json.Marshal(body); err != nil {
			a.t.Fatal(err)
		}
	}
	req, err := http.NewRequestWithContext(a.t.Context(), method, a.edge.APIURL+path, bytes.NewReader(data))
	if err != nil {
		a.t.Fatal(err)
	}
	req.Header.Set("X-Access-Token", a.token)
	resp, err := a.client.Do(req)
	if err != nil {
		a.t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		a.t.Fatal(err)
	}
	if into != nil && len(answer) > 0 {
		if err := json.Unmarshal(answer, into); err != nil {
			a.t.Fatalf("%s %s answered %d %s: %v", method, path, resp.StatusCode, answer, err)
		}
	}
	return resp.StatusCode
}

func (a *account) must(method, path string, body, into any) {
	a.t.Helper()
	if status := a.call(method, path, body, into); status < 200 || status > 204 {
		var refused struct {
			Message string `json:"error_message"`
		}
		a.call(method, path, body, &refused)
		a.t.Fatalf("%s %s answered %d %s", method, path, status, refused.Message)
	}
}

type socket struct {
	ID       string   `json:"socket_id"`
	DNSName  string   `json:"dnsname"`
	Type     string   `json:"socket_type"`
	Ports    []int    `json:"socket_tcp_ports"`
	UserName string   `json:"user_name"`
	Tunnels  []tunnel `json:"tunnels"`
}

type tunnel struct {
	ID        string `json:"tunnel_id"`
	LocalPort int    `json:"local_port"`
	Server    string `json:"tunnel_server"`
}

func (a *account) newSocket(kind string) socket {
	a.t.Helper()
	var s socket
	a.must("POST", "/socket", map[string]any{"name": "test " + kind, "socket_type": kind}, &s)
	return s
}

func (a *account) newTunnel(s socket) tunnel {
	a.t.Helper()
	var tun tunnel
	a.must("POST", "/socket/"+s.ID+"/tunnel", "null", &tun)
	return tun
}

func newKey(t testing.TB) ssh.Signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := ssh.NewSignerFromKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return signer
}

// certify has the key signed at a signkey path, and returns what logs in with it.
func (a *account) certify(path string, key ssh.Signer) ssh.Signer {
	a.t.Helper()
	var answer struct {
		Cert    string `json:"signed_ssh_cert"`
		HostKey string `json:"host_key"`
	}
	a.must("POST", path, map[string]string{"ssh_public_key": string(ssh.MarshalAuthorizedKey(key.PublicKey()))}, &answer)
	parsed, _, _, _, err := ssh.ParseAuthorizedKey([]byte(answer.Cert))
	if err != nil {
		a.t.Fatalf("certificate %q: %v", answer.Cert, err)
	}
	signer, err := ssh.NewCertSigner(parsed.(*ssh.Certificate), key)
	if err != nil {
		a.t.Fatal(err)
	}
	return signer
}

func hostKey(t testing.TB, e *edgetest.Edge) ssh.PublicKey {
	t.Helper()
	key, _, _, _, err := ssh.ParseAuthorizedKey([]byte(e.HostKey))
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func (a *account) dial(user string, signer ssh.Signer) (*ssh.Client, error) {
	return ssh.Dial("tcp", a.edge.SSHAddress, &ssh.ClientConfig{
		User: user, Auth: []ssh.AuthMethod{ssh.PublicKeys(signer)},
		HostKeyCallback: ssh.FixedHostKey(hostKey(a.t, a.edge)), Timeout: patience,
	})
}

// replica is one origin: an app, and a client that forwards to it as the sidecar does.
type replica struct {
	t        testing.TB
	tunnel   tunnel
	client   *ssh.Client
	host     string
	port     uint32
	app      string
	refuse   atomic.Bool
	reason   string // of refusals, instead of the usual one; set before the first visitor
	silent   atomic.Bool
	opened   atomic.Int64
	mu       sync.Mutex
	lastOpen forwarded
	wg       sync.WaitGroup
}

type forwarded struct {
	Host       string
	Port       uint32
	OriginHost string
	OriginPort uint32
}

// connect starts a replica of the socket with a tunnel of its own, for the app at the address.
func (a *account) connect(s socket, app string) *replica {
	a.t.Helper()
	tun := a.newTunnel(s)
	return a.connectTunnel(s, tun, app)
}

func (a *account) connectTunnel(s socket, tun tunnel, app string) *replica {
	a.t.Helper()
	signer := a.certify("/socket/"+s.ID+"/tunnel/"+tun.ID+"/signkey", newKey(a.t))
	client, err := a.dial(s.UserName, signer)
	if err != nil {
		a.t.Fatalf("log in: %v", err)
	}
	r := newReplica(a.t, client, app)
	r.tunnel = tun
	r.forward("localhost", uint32(tun.LocalPort))
	a.waitConnected(s, tun.ID)
	return r
}

func (a *account) waitConnected(s socket, tunnelID string) {
	a.t.Helper()
	eventually(a.t, "tunnel connected", func() bool { return a.connected(s, tunnelID) })
}

func (a *account) connected(s socket, tunnelID string) bool {
	for _, k := range a.edge.Tunnels() {
		for _, c := range k.Tunnels {
			if k.Socket == s.ID && c.Tunnel == tunnelID {
				return true
			}
		}
	}
	return false
}

func newReplica(t testing.TB, client *ssh.Client, app string) *replica {
	r := &replica{t: t, client: client, app: app}
	channels := client.HandleChannelOpen("forwarded-tcpip")
	r.wg.Add(1)
	go func() {
		defer r.wg.Done()
		for nc := range channels {
			r.opened.Add(1)
			if r.silent.Load() {
				continue
			}
			r.wg.Add(1)
			go func() {
				defer r.wg.Done()
				r.carry(nc)
			}()
		}
	}()
	t.Cleanup(r.close)
	return r
}

func (r *replica) close() {
	_ = r.client.Close()
	r.wg.Wait()
}

func (r *replica) forward(host string, port uint32) {
	r.t.Helper()
	bound, err := r.tryForward(host, port)
	if err != nil {
		r.t.Fatal(err)
	}
	r.host, r.port = host, bound
}

func (r *replica) tryForward(host string, port uint32) (uint32, error) {
	ok, reply, err := r.client.SendRequest("tcpip-forward", true, ssh.Marshal(struct {
		Host string
		Port uint32
	}{host, port}))
	if err != nil {
		return 0, err
	}
	if !ok {
		return 0, fmt.Errorf("forward of %q port %d was refused", host, port)
	}
	if port == 0 {
		var bound struct{ Port uint32 }
		if err := ssh.Unmarshal(reply, &bound); err != nil {
			return 0, err
		}
		port = bound.Port
	}
	return port, nil
}

func (r *replica) cancel() bool {
	ok, _, err := r.client.SendRequest("cancel-tcpip-forward", true, ssh.Marshal(struct {
		Host string
		Port uint32
	}{r.host, r.port}))
	return ok && err == nil
}

// carry dials the app first and accepts the channel only then, as the sidecar does.
func (r *replica) carry(nc ssh.NewChannel) {
	var open forwarded
	if err := ssh.Unmarshal(nc.ExtraData(), &open); err != nil {
		r.t.Errorf("payload of forwarded-tcpip: %v", err)
	}
	r.mu.Lock()
	r.lastOpen = open
	r.mu.Unlock()
	app, err := net.Dial("tcp", r.app)
	if err != nil || r.refuse.Load() {
		if err == nil {
			_ = app.Close()
		}
		_ = nc.Reject(ssh.ConnectionFailed, cmp.Or(r.reason, "the app does not answer"))
		return
	}
	ch, reqs, err := nc.Accept()
	if err != nil {
		_ = app.Close()
		return
	}
	go ssh.DiscardRequests(reqs)
	var both sync.WaitGroup
	both.Go(func() {
		_, _ = io.Copy(app, ch)
		_ = app.(*net.TCPConn).CloseWrite()
	})
	both.Go(func() {
		_, _ = io.Copy(ch, app)
		_ = ch.CloseWrite()
	})
	both.Wait()
	_ = ch.Close()
	_ = app.Close()
}

// newApp runs an HTTP app that says its name, and stops gracefully.
func newApp(t testing.TB, name string) *httptest.Server {
	app := httptest.NewServer(appHandler(name))
	t.Cleanup(app.Close)
	return app
}

func appHandler(name string) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		_, _ = fmt.Fprintf(w, "Server: %s\n", name)
	})
	mux.HandleFunc("/echo", func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		_ = json.NewEncoder(w).Encode(map[string]any{
			"method": r.Method, "uri": r.RequestURI, "host": r.Host, "header": r.Header, "body": string(body), "remote": r.RemoteAddr,
		})
	})
	return mux
}

func appAddress(app *httptest.Server) string { return strings.TrimPrefix(app.URL, "http://") }

// get asks the public front, and returns the status and the body.
func get(t testing.TB, client *http.Client, url string) (int, string) {
	t.Helper()
	status, body, err := tryGet(t.Context(), client, url)
	if err != nil {
		t.Fatal(err)
	}
	return status, body
}

func tryGet(ctx context.Context, client *http.Client, url string) (int, string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return 0, "", err
	}
	resp, err := client.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(body), err
}

func pemOf(block *pem.Block) []byte { return pem.EncodeToMemory(block) }
