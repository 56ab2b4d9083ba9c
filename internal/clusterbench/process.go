package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"
)

var errEnded = errors.New("it should be running")

// process is a program that runs until it is stopped.
type process struct {
	name  string
	cmd   *exec.Cmd
	ended chan error // gets what Wait returned
}

func start(name string, log io.Writer, env []string, program string, args ...string) (*process, error) {
	cmd := exec.Command(program, args...) //nolint:gosec,noctx // our own programs; stop ends them
	cmd.Env = append(os.Environ(), env...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // should this program be killed
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	p := &process{name: name, cmd: cmd, ended: make(chan error, 1)}
	go func() { p.ended <- cmd.Wait() }()
	return p, nil
}

// stop asks the process to end, and waits for that. It may be called again.
func (p *process) stop() {
	if p == nil {
		return
	}
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case err := <-p.ended:
		p.ended <- err
	case <-time.After(20 * time.Second):
		_ = p.cmd.Process.Kill()
		p.ended <- <-p.ended
	}
}

// running returns an error when the process has ended.
func (p *process) running() error {
	select {
	case err := <-p.ended:
		p.ended <- err
		return fmt.Errorf("%s has ended; --log FILE keeps what it said: %w", p.name, errors.Join(errEnded, err))
	default:
		return nil
	}
}

// memory is what /proc/PID/status says of a process, in bytes.
type memory struct{ resident, peak, anonymous int64 }

func (p *process) memory() (memory, error) {
	text, err := os.ReadFile("/proc/" + strconv.Itoa(p.cmd.Process.Pid) + "/status") //nolint:gosec // a number
	if err != nil {
		return memory{}, err
	}
	field := func(name string) int64 {
		_, rest, _ := strings.Cut(string(text), "\n"+name+":")
		n, _ := strconv.ParseInt(strings.Fields(rest + " 0")[0], 10, 64)
		return n << 10
	}
	return memory{resident: field("VmRSS"), peak: field("VmHWM"), anonymous: field("RssAnon")}, nil
}

// processorTime is the time on a processor that a process has used so far.
func (p *process) processorTime() (time.Duration, error) {
	text, err := os.ReadFile("/proc/" + strconv.Itoa(p.cmd.Process.Pid) + "/stat") //nolint:gosec // a number
	if err != nil {
		return 0, err
	}
	fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	if len(fields) < 13 {
		return 0, errors.New("/proc/PID/stat is too short")
	}
	const tick = 10 * time.Millisecond // USER_HZ is 100 on every Linux
	var ticks int64
	for _, f := range fields[11:13] { // utime and stime
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil {
			return 0, err
		}
		ticks += n
	}
	return time.Duration(ticks) * tick, nil
}

// freePort returns a port that nothing listens on at the moment.
func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer func() { _ = l.Close() }()
	_, port, err := net.SplitHostPort(l.Addr().String())
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(port)
}

// waitFor tries until there is no error, within a time.
func waitFor(ctx context.Context, patience time.Duration, what string, try func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := try(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waited for %s: %w", what, err)
		case <-tick.C:
		}
	}
}
