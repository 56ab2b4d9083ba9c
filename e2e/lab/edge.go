package lab

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/mysocketio/mysocket-injector/e2e/cluster"
)

const (
	edgeDomain = "edge." + cluster.HostDomain
	edgeAdmin  = "127.0.0.1:9190"
	edgeBinary = "mysocket-edge"
)

// Edge is the edge that runs on this machine, outside of the cluster.
type Edge struct {
	// APIURL and SSHAddress are where pods reach it.
	APIURL     string
	SSHAddress string
	// Address is the IP address of its public fronts, ports 80 and 443.
	Address string
	// Domain is the parent of all public names.
	Domain string
	// CAFile has the certificate of its own authority. Email and PasswordFile are an account's.
	CAFile       string
	Email        string
	PasswordFile string
	// LogFile is its log.
	LogFile string

	dir string
}

// edgeState is what stopEdge goes by.
type edgeState struct {
	Process cluster.Process `json:"process"`
}

func edgeDir(o cluster.Options) string {
	dir := o.RunDir
	if dir == "" {
		dir = os.Getenv("MYSOCKET_E2E_RUN")
	}
	if dir == "" {
		dir = "/var/tmp/mysocket-e2e"
	}
	return dir + "-edge"
}

func describeEdge(dir string) *Edge {
	return &Edge{
		APIURL:       "https://api." + edgeDomain + ":8443",
		SSHAddress:   edgeDomain + ":2222",
		Address:      cluster.HostIP,
		Domain:       edgeDomain,
		CAFile:       filepath.Join(dir, "ca.pem"),
		Email:        "demo@example.com",
		PasswordFile: filepath.Join(dir, "password"),
		LogFile:      filepath.Join(dir, "edge.log"),
		dir:          dir,
	}
}

// startEdge builds the edge and starts it, unless the same build runs already.
func startEdge(ctx context.Context, l *Lab, dir string) (*Edge, error) {
	e := describeEdge(dir)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	fresh := filepath.Join(dir, edgeBinary+".new")
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", fresh, "./cmd/mysocket-edge")
	build.Dir = l.Root
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if err := cluster.Step(l.Out, "building the edge", func() error { return run(build) }); err != nil {
		return nil, err
	}
	if e.running() && same(fresh, filepath.Join(dir, edgeBinary)) && e.Healthy(ctx) == nil {
		return e, os.Remove(fresh)
	}
	if err := e.end(ctx); err != nil {
		return nil, err
	}
	if err := os.Rename(fresh, filepath.Join(dir, edgeBinary)); err != nil {
		return nil, err
	}
	if _, err := os.Stat(e.PasswordFile); errors.Is(err, fs.ErrNotExist) {
		if err := os.WriteFile(e.PasswordFile, []byte(rand.Text()), 0o600); err != nil {
			return nil, err
		}
		add := exec.CommandContext(ctx, filepath.Join(dir, edgeBinary), "user", "add", "--state", filepath.Join(dir, "edge.db"),
			"--email", e.Email, "--name", "demo", "--password-file", e.PasswordFile)
		if err := run(add); err != nil {
			return nil, err
		}
	}
	return e, cluster.Step(l.Out, "starting the edge on "+e.Address, func() error { return e.Start(ctx) })
}

// Start starts the edge and returns once it is ready. It must not be running.
func (e *Edge) Start(ctx context.Context) error {
	log, err := os.OpenFile(e.LogFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() { _ = log.Close() }()
	// Not CommandContext: the edge outlives this program.
	cmd := exec.Command(filepath.Join(e.dir, edgeBinary), "serve", "--state", filepath.Join(e.dir, "edge.db"), //nolint:noctx // it outlives this program
		"--domain", e.Domain, "--api-address", e.Address+":8443", "--ssh-address", e.Address+":2222",
		"--http-address", e.Address+":80", "--https-address", e.Address+":443", "--admin-address", edgeAdmin,
		"--ca-out", e.CAFile, "--ssh-host-key-out", filepath.Join(e.dir, "ssh-host-key.pub"))
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	ended := make(chan struct{})
	go func() {
		_ = cmd.Wait() // reaps it, should it end while this program runs
		close(ended)
	}()
	p, err := cluster.Identify(cmd.Process.Pid)
	if err != nil {
		return fmt.Errorf("the edge ended at once; see %s", e.LogFile)
	}
	b, err := json.Marshal(edgeState{Process: p})
	if err != nil {
		return err
	}
	if err := os.WriteFile(e.statePath(), b, 0o600); err != nil {
		return err
	}
	return WaitFor(ctx, 20*time.Second, func() error {
		select {
		case <-ended:
			return fmt.Errorf("the edge ended; see %s", e.LogFile)
		default:
			return e.Healthy(ctx)
		}
	})
}

// Stop ends the edge with SIGTERM, as a service manager would, and waits for it.
func (e *Edge) Stop(ctx context.Context) error { return e.end(ctx) }

// CreateToken makes an access token of the account and returns the file with it. The edge must not be running.
func (e *Edge) CreateToken(ctx context.Context, name string) (string, error) {
	token, err := output(exec.CommandContext(ctx, filepath.Join(e.dir, edgeBinary), "token", "create", "--state", filepath.Join(e.dir, "edge.db"),
		"--email", e.Email, "--name", name, "--lifetime", "24h"))
	if err != nil {
		return "", err
	}
	file := filepath.Join(e.dir, "token")
	return file, os.WriteFile(file, []byte(token), 0o600)
}

// Healthy is nil when all its listeners serve.
func (e *Edge) Healthy(ctx context.Context) error { return e.get(ctx, "/healthz", nil) }

// Socket is one socket of the edge, with the tunnels that are connected.
type Socket struct {
	ID         string   `json:"socket"`
	Name       string   `json:"name"`
	DNSName    string   `json:"dnsname"`
	Registered int      `json:"registered"`
	Tunnels    []Tunnel `json:"tunnels"`
}

// Tunnel is one connected tunnel. Remote is the address and port that its SSH connection comes from, Open the requests
// that it carries now, Total all it was chosen for.
type Tunnel struct {
	ID     string `json:"tunnel"`
	Remote string `json:"remote"`
	Open   int    `json:"open"`
	Total  uint64 `json:"total"`
}

// Sockets are all sockets there are at the edge.
func (e *Edge) Sockets(ctx context.Context) ([]Socket, error) {
	var out []Socket
	err := e.get(ctx, "/debug/tunnels", &out)
	return out, err
}

func (e *Edge) get(ctx context.Context, path string, into any) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+edgeAdmin+path, nil)
	if err != nil {
		return err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = res.Body.Close() }()
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("the edge answers %s with %s", path, res.Status)
	}
	if into == nil {
		return nil
	}
	return json.NewDecoder(res.Body).Decode(into)
}

// CurlArgs are the arguments with which curl fetches a public URL from this edge, as a visitor
// would whose DNS knows the name and who trusts the edge's authority.
func (e *Edge) CurlArgs(url string) []string {
	host := strings.TrimSuffix(strings.TrimPrefix(url, "https://"), "/")
	return []string{"--silent", "--show-error", "--fail", "--max-time", "10", "--cacert", e.CAFile, "--resolve", host + ":443:" + e.Address, url}
}

func (e *Edge) statePath() string { return filepath.Join(e.dir, "state.json") }

func (e *Edge) state() (edgeState, error) {
	var s edgeState
	b, err := os.ReadFile(e.statePath())
	if err != nil {
		return s, err
	}
	return s, json.Unmarshal(b, &s)
}

func (e *Edge) running() bool {
	s, err := e.state()
	return err == nil && s.Process.Alive()
}

func (e *Edge) end(ctx context.Context) error {
	s, err := e.state()
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	polite, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	if err := s.Process.End(polite, syscall.SIGTERM); err != nil {
		if err := s.Process.End(ctx, syscall.SIGKILL); err != nil {
			return err
		}
	}
	return os.Remove(e.statePath())
}

func openEdge(_ *Lab, dir string) (*Edge, error) {
	e := describeEdge(dir)
	if !e.running() {
		return nil, errors.New("no edge is running: start the lab with make demo")
	}
	return e, nil
}

// stopEdge ends the edge and removes its directory.
func stopEdge(ctx context.Context, dir string) error {
	if err := describeEdge(dir).end(ctx); err != nil {
		return err
	}
	return os.RemoveAll(dir)
}

func same(a, b string) bool {
	x, errX := os.ReadFile(a)
	y, errY := os.ReadFile(b)
	return errX == nil && errY == nil && string(x) == string(y)
}
