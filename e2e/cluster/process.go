package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Process names one process for good: a pid alone may come to mean another process, a pid with
// its start time within one boot cannot.
type Process struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // clock ticks after boot
	Boot  string `json:"boot"`
}

// state is what up records and down goes by.
type state struct {
	Init    Process           `json:"init"`  // the first process of the namespaces, by its pid outside of them
	Built   map[string]string `json:"built"` // part name to the key it was built under
	Made    []string          `json:"made"`  // directories outside of the run directory that did not exist before
	Started time.Time         `json:"started,omitzero"`
}

func bootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// Identify describes the process that has the pid now. A zombie is no process: it has ended
// and only waits for its parent to ask.
func Identify(pid int) (Process, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return Process{}, err
	}
	state, start, err := parseStat(string(b))
	if err != nil {
		return Process{}, fmt.Errorf("process %d: %w", pid, err)
	}
	if state == "Z" || state == "X" {
		return Process{}, fmt.Errorf("process %d has ended: %w", pid, os.ErrNotExist)
	}
	return Process{PID: pid, Start: start, Boot: bootID()}, nil
}

// parseStat reads the state (field 3) and the start time (field 22) of a line of
// /proc/PID/stat. The command name before them may itself hold spaces and parentheses.
func parseStat(line string) (state string, start uint64, err error) {
	end := strings.LastIndexByte(line, ')')
	if end < 0 {
		return "", 0, errors.New("its stat line has no command name")
	}
	fields := strings.Fields(line[end+1:])
	if len(fields) < 20 {
		return "", 0, fmt.Errorf("its stat line has only %d fields after the command name", len(fields))
	}
	start, err = strconv.ParseUint(fields[19], 10, 64)
	return fields[0], start, err
}

// Alive tells whether this very process still runs.
func (p Process) Alive() bool {
	now, err := Identify(p.PID)
	return p.PID > 0 && err == nil && now == p
}

// End sends the process a signal and waits until it is gone. The first process of a pid
// namespace takes every other process in it along.
func (p Process) End(ctx context.Context, signal syscall.Signal) error {
	if !p.Alive() {
		return nil
	}
	if err := syscall.Kill(p.PID, signal); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("end process %d: %w", p.PID, err)
	}
	return waitFor(ctx, 10*time.Millisecond, func() error {
		if p.Alive() {
			return fmt.Errorf("process %d is still there", p.PID)
		}
		return nil
	})
}

func readState(path string) (state, error) {
	var s state
	b, err := os.ReadFile(path)
	if err != nil {
		return s, err
	}
	if err := json.Unmarshal(b, &s); err != nil {
		return s, fmt.Errorf("%s: %w", path, err)
	}
	return s, nil
}

func (s state) write(path string) error {
	b, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	return writeFile(path, append(b, '\n'), 0o600)
}

// writeFile replaces path as a whole, so that a reader sees the old content or the new.
func writeFile(path string, b []byte, mode os.FileMode) error {
	tmp, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-*")
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(tmp.Name()) }()
	_, err = tmp.Write(b)
	if err := errors.Join(err, tmp.Chmod(mode), tmp.Close()); err != nil {
		return err
	}
	return os.Rename(tmp.Name(), path)
}
