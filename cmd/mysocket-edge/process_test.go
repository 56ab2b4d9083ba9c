package main

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

const patience = 30 * time.Second

// binary is where the program is built, once, for all tests that run it.
var binary struct {
	dir  string
	once sync.Once
	err  error
}

func TestMain(m *testing.M) {
	var err error
	if binary.dir, err = os.MkdirTemp("", "mysocket-edge"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	_ = os.RemoveAll(binary.dir)
	os.Exit(code)
}

func program(t testing.TB) string {
	t.Helper()
	path := filepath.Join(binary.dir, "mysocket-edge")
	binary.once.Do(func() {
		if out, err := exec.Command("go", "build", "-o", path, ".").CombinedOutput(); err != nil {
			binary.err = fmt.Errorf("%w: %s", err, out)
		}
	})
	if binary.err != nil {
		t.Fatal(binary.err)
	}
	return path
}

// edgeLog collects what a process writes, and tells what is in it.
type edgeLog struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *edgeLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *edgeLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

func (l *edgeLog) has(text string) bool { return strings.Contains(l.String(), text) }

// process is a running mysocket-edge on loopback.
type process struct {
	t      testing.TB
	state  string
	stderr *edgeLog
	cmd    *exec.Cmd
	exited chan struct{}
	err    error // valid once exited is closed
}

// startProcess runs the program until the test ends, and returns when it is ready. wrap is what runs it, if anything.
func startProcess(t testing.TB, state string, wrap []string, flags ...string) *process {
	t.Helper()
	p := launch(t, state, wrap, flags...)
	p.wait("ready", func() bool { return p.stderr.has("msg=ready") })
	return p
}

// launch does not wait.
func launch(t testing.TB, state string, wrap []string, flags ...string) *process {
	t.Helper()
	p := &process{t: t, state: state, stderr: &edgeLog{}, exited: make(chan struct{})}
	args := append(append(wrap, program(t), "serve", "--state", state, "--domain", "edge.example.com", "--api-address", "127.0.0.1:0", "--ssh-address", "127.0.0.1:0",
		"--http-address", "127.0.0.1:0", "--https-address", "127.0.0.1:0", "--admin-address", "127.0.0.1:0"), flags...)
	p.cmd = exec.Command(args[0], args[1:]...)
	p.cmd.Stderr = p.stderr
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.exited)
	}()
	t.Cleanup(p.kill)
	return p
}

// wait waits for a condition while the process runs.
func (p *process) wait(what string, condition func() bool) {
	p.t.Helper()
	timeout := time.NewTimer(patience)
	defer timeout.Stop()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !condition() {
		select {
		case <-p.exited:
			p.t.Fatalf("it ended before: %s: %v: %s", what, p.err, p.stderr)
		case <-timeout.C:
			p.t.Fatalf("waited %s for: %s: %s", patience, what, p.stderr)
		case <-tick.C:
		}
	}
}

// kill is kill -9.
func (p *process) kill() {
	_ = p.cmd.Process.Kill()
	<-p.exited
}

// stop drains it.
func (p *process) stop() {
	p.t.Helper()
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		p.t.Fatal(err)
	}
	select {
	case <-p.exited:
		if p.err != nil || !p.stderr.has("msg=stopped") {
			p.t.Errorf("SIGTERM: %v: %s", p.err, p.stderr)
		}
	case <-time.After(patience):
		p.t.Fatalf("still running %s after SIGTERM: %s", patience, p.stderr)
	}
}

// address is where a part listens.
func (p *process) address(part string) string {
	p.t.Helper()
	m := regexp.MustCompile(`msg=listening part=` + part + ` address=(\S+)`).FindStringSubmatch(p.stderr.String())
	if m == nil {
		p.t.Fatalf("no line says where %s listens: %s", part, p.stderr)
	}
	return m[1]
}

// apiClient speaks to the API of a process; ca is the file of its authority.
type apiClient struct {
	t     testing.TB
	base  string
	token string
	http  *http.Client
}

func (p *process) api(ca string) *apiClient {
	p.t.Helper()
	pem, err := os.ReadFile(ca)
	if err != nil {
		p.t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(pem)
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}, MaxIdleConnsPerHost: 16}
	p.t.Cleanup(transport.CloseIdleConnections)
	return &apiClient{t: p.t, base: "https://" + p.address("api"), http: &http.Client{Transport: transport, Timeout: patience}}
}

// call returns the status and the answer; a status of 0 when there was none.
func (c *apiClient) call(method, path, body string) (int, map[string]any) {
	req, err := http.NewRequest(method, c.base+path, strings.NewReader(body))
	if err != nil {
		c.t.Error(err)
		return 0, nil
	}
	req.Header.Set("X-Access-Token", c.token)
	resp, err := c.http.Do(req)
	if err != nil {
		return 0, nil
	}
	defer func() { _ = resp.Body.Close() }()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, nil
	}
	var answer map[string]any
	_ = json.Unmarshal(data, &answer) // lists are of no interest here
	return resp.StatusCode, answer
}

func (c *apiClient) login(email, password string) int {
	status, answer := c.call("POST", "/login", fmt.Sprintf(`{"email": %q, "password": %q}`, email, password))
	if token, ok := answer["token"].(string); ok {
		c.token = token
	}
	return status
}

// TestProcess runs the real program: it says where it listens, is ready, holds its state file, and ends with 0 at SIGTERM.
func TestProcess(t *testing.T) {
	dir := t.TempDir()
	ca, state := filepath.Join(dir, "ca.pem"), filepath.Join(dir, "x.db")
	p := startProcess(t, state, nil, "--ca-out", ca, "--ssh-host-key-out", filepath.Join(dir, "host.pub"), "--control-socket", "off")
	for _, part := range []string{"api", "ssh", "http", "https", "admin"} {
		p.address(part)
	}
	for _, file := range []string{"ca.pem", "host.pub"} {
		if info, err := os.Stat(filepath.Join(dir, file)); err != nil || info.Size() == 0 {
			t.Errorf("%s: %v", file, err)
		}
	}
	checkCA(t, p.address("admin"), ca)
	if code, _, errs := invoke(t, "a long password", "user", "add", "--email", "a@example.com", "--state", state); code != 1 ||
		!strings.Contains(errs, "in use") || !strings.Contains(errs, "no edge listens on the control socket "+state+".sock") {
		t.Errorf("user add beside an edge without a control socket: exit %d, %s", code, errs)
	}
	p.stop()
}

// TestCommandsBesideTheEdge makes accounts and tokens while the edge runs and while it doesn't, with the same commands.
func TestCommandsBesideTheEdge(t *testing.T) {
	dir := t.TempDir()
	ca, state := filepath.Join(dir, "ca.pem"), filepath.Join(dir, "x.db")
	do := func(stdin string, args ...string) string {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), program(t), append(args, "--state", state)...)
		cmd.Stdin = strings.NewReader(stdin)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%q: %v: %s", args, err, out)
		}
		return strings.TrimSpace(string(out))
	}
	do("a long password", "user", "add", "--email", "before@example.com")
	p := startProcess(t, state, nil, "--ca-out", ca)
	if info, err := os.Stat(state + ".sock"); err != nil || info.Mode() != os.ModeSocket|0o600 {
		t.Errorf("the control socket: %v, %v", info, err)
	}
	api := p.api(ca)
	for _, email := range []string{"before@example.com", "beside@example.com"} {
		if email == "beside@example.com" {
			do("a long password", "user", "add", "--email", email)
		}
		if status := api.login(email, "a long password"); status != http.StatusOK {
			t.Errorf("login of %s: %d", email, status)
		}
	}
	do("another password", "user", "password", "--email", "beside@example.com")
	if status := api.login("beside@example.com", "a long password"); status != http.StatusUnauthorized {
		t.Errorf("the old password: %d", status)
	}
	if status := api.login("beside@example.com", "another password"); status != http.StatusOK {
		t.Errorf("the new password: %d", status)
	}
	session := api.token
	api.token = do("", "token", "create", "--email", "beside@example.com", "--lifetime", "24h")
	if status, _ := api.call("GET", "/api/v1/sockets", ""); status != http.StatusOK {
		t.Errorf("the access token: %d", status)
	}
	list := do("", "token", "list")
	do("", "token", "revoke", "--id", strings.Fields(strings.Split(list, "\n")[1])[0])
	if status, _ := api.call("GET", "/api/v1/sockets", ""); status != http.StatusUnauthorized {
		t.Errorf("the revoked token: %d", status)
	}
	api.token = session
	if list := do("", "user", "list"); strings.Count(list, "@") != 2 {
		t.Errorf("the list is\n%s", list)
	}
	do("", "user", "delete", "--email", "beside@example.com")
	if status, _ := api.call("GET", "/socket", ""); status != http.StatusUnauthorized {
		t.Errorf("the deleted account: %d", status)
	}
	if code, _, errs := invoke(t, "", "user", "delete", "--email", "beside@example.com", "--state", state); code != 1 || !strings.Contains(errs, `no account for "beside@example.com"`) {
		t.Errorf("exit %d, %s", code, errs)
	}
	if p.stderr.has("a long password") || p.stderr.has("another password") {
		t.Error("a password is in the log")
	}

	// A socket that a killed edge left behind is in nobody's way.
	p.kill()
	if _, err := os.Lstat(state + ".sock"); err != nil {
		t.Errorf("kill -9 leaves the socket: %v", err)
	}
	do("a long password", "user", "add", "--email", "after@example.com")
	p = startProcess(t, state, nil)
	if list := do("", "user", "list"); strings.Count(list, "@") != 2 {
		t.Errorf("the list is\n%s", list)
	}
	// Where the environment says where the state is, as in a container, the commands know it too.
	t.Setenv("MYSOCKET_EDGE_STATE", state)
	if code, out, errs := invoke(t, "", "user", "list"); code != 0 || !strings.Contains(out, "after@example.com") {
		t.Errorf("exit %d, %s%s", code, out, errs)
	}
	p.stop()
	if _, err := os.Lstat(state + ".sock"); !os.IsNotExist(err) {
		t.Errorf("the control socket is left behind: %v", err)
	}
}

// TestControlCEndsACommand that waits for its password.
func TestControlCEndsACommand(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "password")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), program(t), "user", "add", "--email", "a@example.com", "--state", filepath.Join(dir, "x.db"), "--password-file", fifo)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	opened, err := os.OpenFile(fifo, os.O_WRONLY, 0) // returns when the command reads
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = opened.Close() }()
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	late := time.AfterFunc(patience, func() { _ = cmd.Process.Kill() })
	defer late.Stop()
	_ = cmd.Wait()
	if status, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || status.Signal() != syscall.SIGINT {
		t.Errorf("it ended with %s", cmd.ProcessState)
	}
}

// TestBackupAndRestore copies the state of a running edge, loses the edge with all it has, and goes on with the copy: clients need to
// be told nothing.
func TestBackupAndRestore(t *testing.T) {
	dir := t.TempDir()
	ca, state, copied := filepath.Join(dir, "ca.pem"), filepath.Join(dir, "x.db"), filepath.Join(dir, "copy.db")
	hostKey := filepath.Join(dir, "host.pub")
	must := func(code int, says string, args ...string) {
		t.Helper()
		got, out, errs := invoke(t, "a long password", args...)
		if got != code || !strings.Contains(out+errs, says) {
			t.Errorf("%q: exit %d, %s%s; want %d with %q", args, got, out, errs, code, says)
		}
	}
	must(0, "", "user", "add", "--email", "a@example.com", "--state", state)
	p := startProcess(t, state, nil, "--ca-out", ca, "--ssh-host-key-out", hostKey)
	api := p.api(ca)
	if status := api.login("a@example.com", "a long password"); status != http.StatusOK {
		t.Fatalf("login: %d", status)
	}
	_, made := api.call("POST", "/connect", `{"name": "before"}`)
	must(0, "saved "+copied, "backup", "--state", state, "--out", copied)
	must(1, "--force", "backup", "--state", state, "--out", copied)
	must(0, "saved", "backup", "--state", state, "--out", copied, "--force")
	must(1, "in use", "backup", "--state", state, "--out", state, "--force")
	api.call("POST", "/connect", `{"name": "after"}`)
	must(1, "in use", "restore", "--state", state, "--from", copied, "--force")
	p.stop()
	must(0, "saved", "backup", "--state", state, "--out", filepath.Join(dir, "offline.db"))
	must(1, "in use", "backup", "--state", state, "--out", state, "--force")
	must(1, "--force", "restore", "--state", state, "--from", copied)
	must(1, "copy is not in order", "restore", "--state", state, "--from", ca, "--force")
	must(0, "restored "+state, "restore", "--state", state, "--from", copied, "--force")
	if err := os.Remove(state); err != nil {
		t.Fatal(err)
	}
	must(0, "restored "+state, "restore", "--state", state, "--from", copied)
	if info, err := os.Stat(state); err != nil || info.Mode() != 0o600 {
		t.Errorf("the state: %v, %v", info, err)
	}

	key, err := os.ReadFile(hostKey)
	if err != nil {
		t.Fatal(err)
	}
	p = startProcess(t, state, nil, "--ssh-host-key-out", hostKey)
	if again, err := os.ReadFile(hostKey); err != nil || !bytes.Equal(again, key) {
		t.Errorf("the host key is another: %v", err)
	}
	restored := p.api(ca) // the authority of before
	restored.token = api.token
	if status, got := restored.call("GET", "/socket/"+made["socket_id"].(string), ""); status != http.StatusOK || got["dnsname"] != made["dnsname"] || len(got["tunnels"].([]any)) != 1 {
		t.Errorf("the socket of before: %d, %v", status, got)
	}
	if _, out, _ := invoke(t, "", "user", "list", "--state", state); !strings.Contains(out, "  1  ") {
		t.Errorf("the account has not one socket: %s", out)
	}
	p.stop()
}
