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

// startEdge starts our edge with one tcp socket that has a tunnel for each connection.
func startEdge(ctx context.Context, program string, p place, connections int) (*server, error) {
	password := rand.Text()
	if err := os.WriteFile(p.file("password"), []byte(password), 0o600); err != nil {
		return nil, err
	}
	add := exec.CommandContext(ctx, program, "user", "add", "--state", p.file("edge.db"), "--email", "bench@example.com", "--name", "bench", //nolint:gosec // our own program
		"--password-file", p.file("password"), "--ssh-key-file", p.keyFile+".pub")
	if out, err := add.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("%w: %s", err, out)
	}
	var addrs [5]string
	for i := range addrs {
		port, err := freePort()
		if err != nil {
			return nil, err
		}
		addrs[i] = fmt.Sprintf("127.0.0.1:%d", port)
	}
	edge, err := start(ctx, program, "serve", "--state", p.file("edge.db"), "--domain", "edge.example", "--log-level", "warn",
		"--api-address", addrs[0], "--ssh-address", addrs[1], "--http-address", addrs[2], "--https-address", addrs[3], "--admin-address", addrs[4],
		"--ca-out", p.file("ca.pem"), "--ssh-host-key-out", p.file("edge-host.pub"))
	if err != nil {
		return nil, err
	}
	s := &server{name: "our edge", process: edge, login: login{Address: addrs[1], KeyFile: p.keyFile, HostKeyFile: p.file("edge-host.pub"), Backend: p.backend}}
	if err := await(ctx, "the edge", func() error { return knock(ctx, addrs[0]) }); err != nil {
		return nil, fmt.Errorf("%w: %s", err, edge.log)
	}
	api, err := newAPI("https://"+addrs[0], p.file("ca.pem"))
	if err != nil {
		return nil, err
	}
	var session struct{ Token string }
	if err := api.call(ctx, "/login", map[string]string{"email": "bench@example.com", "password": password}, &session); err != nil {
		return nil, err
	}
	api.token = session.Token
	var socket struct {
		ID       string `json:"socket_id"`
		Ports    []int  `json:"socket_tcp_ports"`
		UserName string `json:"user_name"`
		Tunnels  []struct {
			Port uint32 `json:"local_port"`
		}
	}
	if err := api.call(ctx, "/connect", map[string]any{"name": "bench", "socket_type": "tcp"}, &socket); err != nil {
		return nil, err
	}
	if len(socket.Ports) != 1 || len(socket.Tunnels) != 1 {
		return nil, fmt.Errorf("the edge made a socket of another shape: %+v", socket)
	}
	s.login.User, s.login.Ports = socket.UserName, []uint32{socket.Tunnels[0].Port}
	for len(s.login.Ports) < connections {
		var more struct {
			Port uint32 `json:"local_port"`
		}
		if err := api.call(ctx, "/socket/"+socket.ID+"/tunnel", struct{}{}, &more); err != nil {
			return nil, err
		}
		s.login.Ports = append(s.login.Ports, more.Port)
	}
	s.entries = []string{net.JoinHostPort("127.0.0.1", strconv.Itoa(socket.Ports[0]))}
	return s, nil
}

// api is as much of the Mysocket API as is needed here.
type api struct {
	base, token string
	client      *http.Client
}

func newAPI(base, caFile string) (*api, error) {
	ca, err := os.ReadFile(caFile) //nolint:gosec // our own file
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	return &api{base: base, client: &http.Client{Timeout: patience, Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}}}, nil
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
