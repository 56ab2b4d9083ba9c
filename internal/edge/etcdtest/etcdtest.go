// Package etcdtest runs a real etcd for tests of edges that share their state.
package etcdtest

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"
)

const (
	// assets names the directory of the binary: kubetest's.
	assets   = "KUBEBUILDER_ASSETS"
	patience = 30 * time.Second
)

// Etcd is a running etcd of one member.
type Etcd struct {
	// URL is where clients reach it. It stays the same over restarts.
	URL string

	t       testing.TB
	program string
	dir     string
	peer    string
	health  string
	args    []string
	client  *http.Client
	cmd     *exec.Cmd
	exited  chan struct{}
	out     output
}

// output is what etcd says, its last part.
type output struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.buf.Len() > 64<<10 {
		o.buf.Reset()
	}
	return o.buf.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

// Start runs an etcd until the test ends. Without KUBEBUILDER_ASSETS the test is skipped.
func Start(t testing.TB) *Etcd {
	t.Helper()
	return StartWith(t, func(string) []string { return nil })
}

// StartWith does the same with the further arguments of etcd that args makes for the IP address that it will have. With --cert-file its
// URL is https.
func StartWith(t testing.TB, args func(host string) []string) *Etcd {
	t.Helper()
	dir := os.Getenv(assets)
	if dir == "" {
		t.Skip(assets + " is not set: this test needs the binary of etcd (make test sets it)")
	}
	e := &Etcd{t: t, program: filepath.Join(dir, "etcd"), dir: t.TempDir()}
	e.client = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 5 * time.Second}
	// A loopback address of its own, so that no other program has the ports.
	for try := 0; ; try++ {
		host := fmt.Sprintf("127.%d.%d.%d", 100+rand.IntN(100), rand.IntN(256), 1+rand.IntN(254)) // #nosec G404 -- no secret
		e.URL, e.peer, e.health = "http://"+host+":2379", "http://"+host+":2380", "http://"+host+":2381"
		e.args = args(host)
		if slices.Contains(e.args, "--cert-file") {
			e.URL = "https://" + host + ":2379"
		}
		err := e.run()
		if err == nil {
			break
		}
		e.Kill()
		if try == 2 {
			t.Fatal(err)
		}
	}
	t.Cleanup(e.Kill)
	return e
}

// Restart starts it again after Kill, with the same state and URL.
func (e *Etcd) Restart() {
	e.t.Helper()
	if err := e.run(); err != nil {
		e.t.Fatal(err)
	}
}

func (e *Etcd) run() error {
	e.exited = make(chan struct{})
	e.cmd = exec.CommandContext(context.Background(), e.program, append([]string{
		"--name", "test", "--data-dir", filepath.Join(e.dir, "data"), "--unsafe-no-fsync",
		// It is alone: it need not wait long for others before it leads.
		"--heartbeat-interval", "20", "--election-timeout", "200",
		"--listen-metrics-urls", e.health, "--listen-client-urls", e.URL, "--advertise-client-urls", e.URL,
		"--listen-peer-urls", e.peer, "--initial-advertise-peer-urls", e.peer, "--initial-cluster", "test=" + e.peer,
	}, e.args...)...) // #nosec G204 -- a test's own
	e.cmd.Stderr, e.cmd.Stdout = &e.out, &e.out
	if err := e.cmd.Start(); err != nil {
		close(e.exited)
		return fmt.Errorf("start etcd: %w", err)
	}
	exited, cmd := e.exited, e.cmd
	go func() {
		_ = cmd.Wait()
		close(exited)
	}()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !e.healthy(ctx) {
		select {
		case <-e.exited:
			return fmt.Errorf("etcd ended: %s", e.out.String())
		case <-ctx.Done():
			return fmt.Errorf("etcd is not healthy after %s: %s", patience, e.out.String())
		case <-tick.C:
		}
	}
	return nil
}

func (e *Etcd) healthy(ctx context.Context) bool {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, e.health+"/health", nil)
	if err != nil {
		return false
	}
	resp, err := e.client.Do(req)
	if err != nil {
		return false
	}
	_ = resp.Body.Close()
	return resp.StatusCode == http.StatusOK
}

// Kill ends it without a word. What was acknowledged stays.
func (e *Etcd) Kill() {
	if e.cmd.Process != nil {
		_ = e.cmd.Process.Kill()
	}
	<-e.exited
}

// Freeze has it be silent until it is killed, while its connections stay.
func (e *Etcd) Freeze() {
	e.t.Helper()
	if err := e.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		e.t.Fatal(err)
	}
	limit := time.After(patience)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !e.stopped() {
		select {
		case <-limit:
			e.t.Fatal("etcd does not stop")
		case <-tick.C:
		}
	}
}

// stopped says whether none of its threads runs any more: each stops for itself.
func (e *Etcd) stopped() bool {
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", e.cmd.Process.Pid))
	for _, thread := range threads {
		stat, readErr := os.ReadFile(thread) // #nosec G304 -- of the kernel
		// The state follows the name, which is in brackets.
		if _, state, _ := bytes.Cut(stat, []byte(") ")); readErr != nil || !bytes.HasPrefix(state, []byte("T")) {
			return false
		}
	}
	return err == nil && len(threads) > 0
}

// Forget removes the state of an etcd that was killed, as if it were a new one.
func (e *Etcd) Forget() {
	e.t.Helper()
	if err := os.RemoveAll(filepath.Join(e.dir, "data")); err != nil {
		e.t.Fatal(err)
	}
}
