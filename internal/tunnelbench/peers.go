package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"
)

const patience = 20 * time.Second

// process is a child whose end is waited for.
type process struct {
	cmd *exec.Cmd
	log *bytes.Buffer // what it said on stderr
	out *bufio.Reader
}

// start starts a child, which ends with ctx.
func start(ctx context.Context, name string, args ...string) (*process, error) {
	p := &process{cmd: exec.CommandContext(ctx, name, args...), log: &bytes.Buffer{}} //nolint:gosec // our own programs and OpenSSH's
	p.cmd.Stderr = p.log
	p.cmd.Cancel = func() error { return p.cmd.Process.Signal(syscall.SIGTERM) }
	p.cmd.WaitDelay = 5 * time.Second
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	p.out = bufio.NewReader(out)
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	return p, nil
}

// line reads the line with which a child of ours says that it is ready.
func (p *process) line() (string, error) {
	line, err := p.out.ReadString('\n')
	if err != nil {
		p.stop()
		return "", fmt.Errorf("%s ended at once: %s", p.cmd.Path, p.log)
	}
	return strings.TrimSpace(line), nil
}

func (p *process) pid() int { return p.cmd.Process.Pid }

func (p *process) stop() {
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	_ = p.cmd.Wait()
}

// self starts this program in a role.
func self(ctx context.Context, args ...string) (*process, string, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, "", err
	}
	p, err := start(ctx, exe, args...)
	if err != nil {
		return nil, "", err
	}
	line, err := p.line()
	return p, line, err
}

// await repeats an attempt until it succeeds.
func await(ctx context.Context, what string, attempt func() error) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		err := attempt()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s: %w", what, err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// place is where the parts of one run keep their files, and the login key that both servers know.
type place struct {
	dir     string
	keyFile string
	key     ssh.Signer
	backend string
}

func (p place) file(name string) string { return filepath.Join(p.dir, name) }

func newPlace(dir, backend string) (place, error) {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return place{}, err
	}
	p := place{dir: dir, backend: backend, keyFile: filepath.Join(dir, "key")}
	var err error
	p.key, err = newKey(p.keyFile)
	return p, err
}

// newKey makes a key and writes it to file and file.pub.
func newKey(file string) (ssh.Signer, error) {
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	block, err := ssh.MarshalPrivateKey(private, "")
	if err != nil {
		return nil, err
	}
	signer, err := ssh.NewSignerFromKey(private)
	if err != nil {
		return nil, err
	}
	return signer, errors.Join(os.WriteFile(file, pem.EncodeToMemory(block), 0o600), os.WriteFile(file+".pub", ssh.MarshalAuthorizedKey(signer.PublicKey()), 0o600))
}

// server is an SSH server that forwards to a replica's tunnel. entries are the addresses at which visitors reach the ports:
// one address may stand for all ports.
type server struct {
	name    string
	login   login
	entries []string
	process *process
}

// freePort returns a port of loopback that nobody listens on.
func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	addr, ok := l.Addr().(*net.TCPAddr)
	if !ok {
		return 0, errors.New("no TCP address")
	}
	return addr.Port, l.Close()
}

// startSSHD starts OpenSSH's server, for this user only, with connections of which each has a port of its own.
func startSSHD(ctx context.Context, p place, connections int) (*server, error) {
	sshd, err := exec.LookPath("sshd")
	if err != nil {
		return nil, errors.New("sshd is missing: install the Debian package openssh-server")
	}
	me, err := user.Current()
	if err != nil {
		return nil, err
	}
	if me.Uid == "0" {
		if err := os.MkdirAll("/run/sshd", 0o755); err != nil { //nolint:gosec // as its package makes it
			return nil, err
		}
	}
	if _, err := newKey(p.file("sshd-host")); err != nil {
		return nil, err
	}
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	config := fmt.Sprintf(`ListenAddress 127.0.0.1:%d
HostKey %s
AuthorizedKeysFile %s
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
AllowTcpForwarding yes
Ciphers aes128-gcm@openssh.com
`, port, p.file("sshd-host"), p.keyFile+".pub")
	if err := os.WriteFile(p.file("sshd_config"), []byte(config), 0o600); err != nil {
		return nil, err
	}
	s := &server{name: "OpenSSH sshd", login: login{Address: fmt.Sprintf("127.0.0.1:%d", port), User: me.Username, KeyFile: p.keyFile, HostKeyFile: p.file("sshd-host.pub"), Backend: p.backend}}
	for range connections {
		forwarded, err := freePort()
		if err != nil {
			return nil, err
		}
		s.login.Ports = append(s.login.Ports, uint32(forwarded)) //nolint:gosec // a port
		s.entries = append(s.entries, fmt.Sprintf("127.0.0.1:%d", forwarded))
	}
	if s.process, err = start(ctx, sshd, "-D", "-e", "-f", p.file("sshd_config")); err != nil {
		return nil, err
	}
	return s, await(ctx, "sshd", func() error { return knock(ctx, s.login.Address) })
}

// edge is an edge of ours that runs, with one account. addrs are those of the API, SSH, HTTP, HTTPS and the admin server.
type edge struct {
	process *process
	args    []string
	place   place
	addrs   [5]string
	api     *api
}

const (
	edgeAPI = iota
	edgeSSH
	edgeHTTP
	edgeHTTPS
	edgeAdmin
)

// runEdge starts our edge, whose program may have arguments of its own before those of "serve".
func runEdge(ctx context.Context, program []string, p place) (*edge, error) {
	password := rand.Text()
	if err := os.WriteFile(p.file("password"), []byte(password), 0o600); err != nil {
		return nil, err
	}
	e := &edge{place: p}
	for i := range e.addrs {
		port, err := freePort()
		if err != nil {
			return nil, err
		}
		e.addrs[i] = fmt.Sprintf("127.0.0.1:%d", port)
	}
	e.args = append(slices.Clone(program), "serve", "--state", p.file("edge.db"), "--domain", "edge.example", "--log-level", "warn",
		"--api-address", e.addrs[edgeAPI], "--ssh-address", e.addrs[edgeSSH], "--http-address", e.addrs[edgeHTTP],
		"--https-address", e.addrs[edgeHTTPS], "--admin-address", e.addrs[edgeAdmin],
		"--ca-out", p.file("ca.pem"), "--ssh-host-key-out", p.file("edge-host.pub"))
	add := exec.CommandContext(ctx, program[0], append(slices.Clone(program[1:]), "user", "add", "--state", p.file("edge.db"), "--email", benchEmail, "--name", "bench", //nolint:gosec // our own program
		"--password-file", p.file("password"), "--ssh-key-file", p.keyFile+".pub")...)
	if out, err := add.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("%w: %s", err, out)
	}
	if err := e.start(ctx); err != nil {
		return nil, err
	}
	var err error
	if e.api, err = newAPI("https://"+e.addrs[edgeAPI], p.file("ca.pem")); err != nil {
		return nil, err
	}
	var session struct{ Token string }
	if err := e.api.call(ctx, "/login", map[string]string{"email": benchEmail, "password": password}, &session); err != nil {
		return nil, err
	}
	e.api.token = session.Token
	return e, nil
}

const benchEmail = "bench@example.com"

// start starts the edge's process, for the first time or again.
func (e *edge) start(ctx context.Context) error {
	var err error
	if e.process, err = start(ctx, e.args[0], e.args[1:]...); err != nil {
		return err
	}
	if err := await(ctx, "the edge", func() error { return knock(ctx, e.addrs[edgeAPI]) }); err != nil {
		return fmt.Errorf("%w: %s", err, e.process.log)
	}
	return nil
}

// edgeSocket is a socket as the edge's API has it.
type edgeSocket struct {
	ID       string `json:"socket_id"`
	DNSName  string `json:"dnsname"`
	Ports    []int  `json:"socket_tcp_ports"`
	UserName string `json:"user_name"`
	Tunnels  []edgeTunnel
}

type edgeTunnel struct {
	ID   string `json:"tunnel_id"`
	Port uint32 `json:"local_port"`
}

// socket makes a socket with so many tunnels.
func (e *edge) socket(ctx context.Context, kind string, tunnels int) (edgeSocket, error) {
	var k edgeSocket
	if err := e.api.call(ctx, "/connect", map[string]any{"name": "bench", "socket_type": kind}, &k); err != nil {
		return k, err
	}
	if len(k.Tunnels) != 1 {
		return k, fmt.Errorf("the edge made a socket of another shape: %+v", k)
	}
	for len(k.Tunnels) < tunnels {
		var more edgeTunnel
		if err := e.api.call(ctx, "/socket/"+k.ID+"/tunnel", struct{}{}, &more); err != nil {
			return k, err
		}
		k.Tunnels = append(k.Tunnels, more)
	}
	return k, nil
}

// login is how a replica logs in to all tunnels of a socket.
func (e *edge) login(k edgeSocket) login {
	l := login{Address: e.addrs[edgeSSH], User: k.UserName, KeyFile: e.place.keyFile, HostKeyFile: e.place.file("edge-host.pub"), Backend: e.place.backend}
	for _, t := range k.Tunnels {
		l.Ports = append(l.Ports, t.Port)
	}
	return l
}

// startEdge starts our edge with one tcp socket that has a tunnel for each connection.
func startEdge(ctx context.Context, program string, p place, connections int) (*server, error) {
	e, err := runEdge(ctx, []string{program}, p)
	if err != nil {
		return nil, err
	}
	k, err := e.socket(ctx, "tcp", connections)
	if err != nil {
		return nil, err
	}
	if len(k.Ports) != 1 {
		return nil, fmt.Errorf("the edge made a tcp socket with the ports %v", k.Ports)
	}
	return &server{name: "our edge", process: e.process, login: e.login(k), entries: []string{net.JoinHostPort("127.0.0.1", strconv.Itoa(k.Ports[0]))}}, nil
}

// api is as much of the Mysocket API as is needed here.
type api struct {
	base, token string
	client      *http.Client
}

// apiLanes is how many calls may be under way at once without new connections.
const apiLanes = 16

func newAPI(base, caFile string) (*api, error) {
	ca, err := os.ReadFile(caFile) //nolint:gosec // our own file
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	return &api{base: base, client: &http.Client{Timeout: patience, Transport: &http.Transport{MaxIdleConnsPerHost: apiLanes, TLSClientConfig: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}}}}, nil
}

func (a *api) call(ctx context.Context, path string, body, answer any) error {
	data, err := json.Marshal(body)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, a.base+path, bytes.NewReader(data))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("X-Access-Token", a.token)
	res, err := a.client.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = res.Body.Close() }()
	text, err := io.ReadAll(io.LimitReader(res.Body, 1<<20))
	if err != nil {
		return err
	}
	if res.StatusCode > 204 {
		return fmt.Errorf("POST %s: %s: %s", path, res.Status, text)
	}
	return json.Unmarshal(text, answer)
}

func knock(ctx context.Context, address string) error {
	conn, err := (&net.Dialer{Timeout: time.Second}).DialContext(ctx, "tcp", address)
	if err != nil {
		return err
	}
	return conn.Close()
}

// startOurs connects the sidecar's tunnels.
func startOurs(ctx context.Context, l login) (*process, error) {
	arg, err := json.Marshal(l)
	if err != nil {
		return nil, err
	}
	p, _, err := self(ctx, "tunnel", string(arg))
	return p, err
}

// startOpenSSH connects OpenSSH's client, with one connection.
func startOpenSSH(ctx context.Context, p place, l login) (*process, error) {
	host, port, err := net.SplitHostPort(l.Address)
	if err != nil {
		return nil, err
	}
	hostKey, err := os.ReadFile(l.HostKeyFile)
	if err != nil {
		return nil, err
	}
	known := p.file("known_hosts")
	if err := os.WriteFile(known, fmt.Appendf(nil, "[%s]:%s %s", host, port, hostKey), 0o600); err != nil { //nolint:gosec // our own file
		return nil, err
	}
	return start(ctx, "ssh", "-N", "-F", "none", "-p", port, "-l", l.User, "-i", l.KeyFile, "-c", "aes128-gcm@openssh.com",
		"-o", "IdentitiesOnly=yes", "-o", "UserKnownHostsFile="+known, "-o", "GlobalKnownHostsFile=none", "-o", "StrictHostKeyChecking=yes",
		"-o", "ExitOnForwardFailure=yes", "-o", "BatchMode=yes", "-R", fmt.Sprintf("localhost:%d:%s", l.Ports[0], l.Backend), host)
}
