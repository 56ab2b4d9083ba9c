package cluster

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

func TestParseStat(t *testing.T) {
	fields := "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20"
	for _, tc := range []struct {
		line  string
		state string
		start uint64
		ok    bool
	}{
		{"12 (cluster) " + fields, "S", 4711, true},
		{"12 (a) Z (b) " + fields, "S", 4711, true},
		{"12 (x) Z 1 2", "", 0, false},
		{"nothing", "", 0, false},
	} {
		state, start, err := parseStat(tc.line)
		if (err == nil) != tc.ok || tc.ok && (state != tc.state || start != tc.start) {
			t.Errorf("%q: %s %d %v", tc.line, state, start, err)
		}
	}
}

func TestProcessIdentity(t *testing.T) {
	cmd := exec.CommandContext(t.Context(), "sleep", "600")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p, err := Identify(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	other := p
	other.Start++
	if !p.Alive() || other.Alive() {
		t.Errorf("alive: %v, with another start time: %v", p.Alive(), other.Alive())
	}
	if err := other.End(t.Context(), syscall.SIGKILL); err != nil || !p.Alive() {
		t.Errorf("a process that only has the pid of ours was ended (%v)", err)
	}
	// Nobody has waited for it yet: what is left is a zombie, which counts as ended.
	if err := p.End(t.Context(), syscall.SIGKILL); err != nil || p.Alive() {
		t.Errorf("after End: %v, alive %v", err, p.Alive())
	}
	if err := cmd.Wait(); err == nil {
		t.Error("sleep ended well")
	}
	if (Process{}).Alive() {
		t.Error("no process is alive")
	}
}

func TestStateRoundTrip(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.json")
	want := state{Init: Process{PID: 7, Start: 8, Boot: "b"}, Built: map[string]string{"x": "k"}, Made: []string{"/var/lib/cni"}, Started: time.Unix(9, 0).UTC()}
	if err := want.write(path); err != nil {
		t.Fatal(err)
	}
	got, err := readState(path)
	if err != nil || got.Init != want.Init || !got.Started.Equal(want.Started) || !slices.Equal(got.Made, want.Made) || got.Built["x"] != "k" {
		t.Errorf("got %+v, %v", got, err)
	}
}

func TestCgroupRoots(t *testing.T) {
	hybrid, unified, none := t.TempDir(), t.TempDir(), t.TempDir()
	for _, dir := range []string{"memory", "cpu,cpuacct", "unified", "systemd"} {
		if err := os.Mkdir(filepath.Join(hybrid, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("cpu,cpuacct", filepath.Join(hybrid, "cpu")); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{filepath.Join(hybrid, "unified"), unified} {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.controllers"), []byte("cpu memory\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	roots, v2, err := cgroupRoots(hybrid)
	want := []string{filepath.Join(hybrid, "cpu,cpuacct"), filepath.Join(hybrid, "memory"), filepath.Join(hybrid, "systemd")}
	if err != nil || v2 || !slices.Equal(roots, want) {
		t.Errorf("hybrid: %v %v %v", roots, v2, err)
	}
	roots, v2, err = cgroupRoots(unified)
	if err != nil || !v2 || !slices.Equal(roots, []string{unified}) {
		t.Errorf("unified: %v %v %v", roots, v2, err)
	}
	if _, _, err = cgroupRoots(none); err == nil {
		t.Error("no hierarchy, and no error")
	}
}

func TestMakeAndRemoveCgroups(t *testing.T) {
	mount := t.TempDir()
	cpuset := filepath.Join(mount, "cpuset")
	if err := os.Mkdir(cpuset, 0o755); err != nil {
		t.Fatal(err)
	}
	for file, content := range map[string]string{"cpuset.cpus": "0-1", "cpuset.mems": "0"} {
		if err := os.WriteFile(filepath.Join(cpuset, file), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(makeCgroups(mount), makeCgroups(mount)); err != nil {
		t.Fatalf("make, twice: %v", err)
	}
	mine := filepath.Join(cpuset, cgroupName)
	b, err := os.ReadFile(filepath.Join(mine, "cpuset.cpus"))
	if err != nil || string(b) != "0-1" {
		t.Errorf("cpuset.cpus %q, %v", b, err)
	}
	// A plain directory keeps its files, where the cgroup file system drops them by itself.
	for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
		if err := os.Remove(filepath.Join(mine, file)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.MkdirAll(filepath.Join(mine, "kubepods", "pod1"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := removeCgroups(t.Context(), mount); err != nil || exists(mine) {
		t.Errorf("remove: %v, still there: %v", err, exists(mine))
	}
}

func TestMountsBelow(t *testing.T) {
	file := filepath.Join(t.TempDir(), "mountinfo")
	text := "22 1 0:20 / / rw - ext4 /dev/a rw\n23 22 0:21 / /var/tmp/x/data rw - tmpfs tmpfs rw\n24 22 0:22 / /var/tmp/xy rw - tmpfs tmpfs rw\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := mountsBelow(file, "/var/tmp/x")
	if err != nil || !slices.Equal(got, []string{"/var/tmp/x/data"}) {
		t.Errorf("got %v, %v", got, err)
	}
}

func TestCleanLeavesForeignDirectoriesAlone(t *testing.T) {
	o := testOptions(t)
	if err := clean(t.Context(), o); err != nil {
		t.Errorf("nothing there: %v", err)
	}
	precious := filepath.Join(o.RunDir, "precious")
	if err := os.MkdirAll(precious, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := clean(t.Context(), o); err == nil || !strings.Contains(err.Error(), "it is not a cluster's") || !exists(precious) {
		t.Errorf("a directory of someone else: %v", err)
	}
}

func TestOpenWithoutCluster(t *testing.T) {
	o := testOptions(t)
	if _, err := Open(o); !errors.Is(err, ErrNotRunning) {
		t.Errorf("got %v", err)
	}
	if err := os.MkdirAll(o.RunDir, 0o755); err != nil {
		t.Fatal(err)
	}
	// A state whose process is gone, as after a reboot.
	if err := (state{Init: Process{PID: os.Getpid(), Start: 1, Boot: "another"}}).write(o.statePath()); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(o); !errors.Is(err, ErrNotRunning) {
		t.Errorf("got %v", err)
	}
}

func TestInnerIsNotForPeople(t *testing.T) {
	if err := Inner("plan.json"); err == nil || !strings.Contains(err.Error(), "only up starts it") {
		t.Errorf("got %v", err)
	}
}

func TestLockFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	var told syncBuffer
	unlock, err := lockFile(t.Context(), &told, path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := lockFile(ctx, &told, path); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a second lock: %v", err)
	}
	if !strings.Contains(told.String(), "waiting for another cluster command") {
		t.Errorf("it said %q", told.String())
	}
	got := make(chan error, 1)
	go func() {
		unlock, err := lockFile(t.Context(), &told, path)
		if err == nil {
			unlock()
		}
		got <- err
	}()
	unlock()
	if err := <-got; err != nil {
		t.Errorf("after the first was given back: %v", err)
	}
	if exists(path) {
		t.Error("the lock's file is left")
	}
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

func TestElapsed(t *testing.T) {
	for d, want := range map[time.Duration]string{
		400 * time.Millisecond: "0.4s", 12400 * time.Millisecond: "12s", 135 * time.Second: "2m15s",
	} {
		if got := elapsed(d); got != want {
			t.Errorf("%v: %s, want %s", d, got, want)
		}
	}
}

func TestStep(t *testing.T) {
	var out bytes.Buffer
	if err := Step(&out, "waiting for x", func() error { return nil }); err != nil {
		t.Fatal(err)
	}
	if got := out.String(); got != "waiting for x ... done in 0.0s\n" {
		t.Errorf("printed %q", got)
	}
	out.Reset()
	err := Step(&out, "waiting for y", func() error { return os.ErrNotExist })
	if !errors.Is(err, os.ErrNotExist) || !strings.HasPrefix(err.Error(), "waiting for y: ") || !strings.Contains(out.String(), "failed after") {
		t.Errorf("printed %q, returned %v", out.String(), err)
	}
}
