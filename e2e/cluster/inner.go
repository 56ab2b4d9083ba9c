package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"syscall"
	"time"
)

const (
	innerCommand     = "inner"
	containerdSocket = "/run/containerd/containerd.sock"
	nodeLink         = "eth0"
	startTimeout     = 2 * time.Minute
)

// Inner is the first process of the cluster's namespaces: it makes the private mounts, sets up
// the node's end of the link, starts the components of the plan, restarts those that end and
// reaps what is left to it. It returns when it is told to end or cannot go on; the kernel then
// ends everything else in the namespaces.
func Inner(planPath string) error {
	if os.Getpid() != 1 {
		return errors.New("inner is the first process of the cluster's namespaces: only up starts it")
	}
	b, err := os.ReadFile(planPath)
	if err != nil {
		return err
	}
	var p plan
	if err := json.Unmarshal(b, &p); err != nil {
		return fmt.Errorf("%s: %w", planPath, err)
	}
	events, err := os.OpenFile(filepath.Join(p.RunDir, "log", "events.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(events, nil))
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if err := raiseFileLimit(); err != nil {
		return err
	}
	if err := privateMounts(p); err != nil {
		return err
	}
	if err := nodeNetwork(ctx); err != nil {
		return err
	}
	log.Info("namespaces ready")
	s := &supervisor{logDir: filepath.Join(p.RunDir, "log"), log: log, running: map[int]component{}}
	return s.run(ctx, p)
}

// raiseFileLimit sets the soft limit explicitly: the Go runtime raises it for itself, but gives
// children the old one.
func raiseFileLimit() error {
	var l syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l); err != nil {
		return fmt.Errorf("read the limit of open files: %w", err)
	}
	l.Cur = l.Max
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &l); err != nil {
		return fmt.Errorf("raise the limit of open files to %d: %w", l.Max, err)
	}
	return nil
}

func privateMounts(p plan) error {
	mount := func(source, target, fstype string, flags uintptr, data string) error {
		if err := syscall.Mount(source, target, fstype, flags, data); err != nil {
			return fmt.Errorf("mount %s at %s: %w", source, target, err)
		}
		return nil
	}
	// First of all: from here on nothing reaches the machine's own mounts.
	if err := mount("none", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
		return err
	}
	if err := mount("proc", "/proc", "proc", syscall.MS_NOSUID|syscall.MS_NODEV|syscall.MS_NOEXEC, ""); err != nil {
		return err
	}
	if err := mount("tmpfs", "/run", "tmpfs", 0, "mode=755"); err != nil {
		return err
	}
	for _, to := range slices.Sorted(maps.Keys(p.Binds)) {
		if err := mount(p.Binds[to], to, "", syscall.MS_BIND, ""); err != nil {
			return err
		}
	}
	const shown = "/run/sysctl"
	if err := os.Mkdir(shown, 0o755); err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(p.Sysctls)) {
		file := filepath.Join(shown, filepath.Base(name))
		if err := os.WriteFile(file, []byte(p.Sysctls[name]+"\n"), 0o600); err != nil {
			return err
		}
		if err := mount(file, "/proc/sys/"+name, "", syscall.MS_BIND, ""); err != nil {
			return err
		}
	}
	// Containers' mounts are to reach the kubelet and the other way round, all within here.
	return mount("none", "/", "", syscall.MS_REC|syscall.MS_SHARED, "")
}

// nodeNetwork waits for the link that up moves in here and gives the node its address.
func nodeNetwork(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	err := waitFor(ctx, 10*time.Millisecond, func() error {
		_, err := net.InterfaceByName(nodeLink)
		return err
	})
	if err != nil {
		return fmt.Errorf("wait for the link %s: %w", nodeLink, err)
	}
	for _, args := range [][]string{
		{"link", "set", "lo", "up"},
		{"addr", "add", NodeIP + "/" + linkPrefix, "dev", nodeLink},
		{"link", "set", nodeLink, "up"},
		{"route", "add", "default", "via", HostIP},
	} {
		if err := runIP(ctx, args...); err != nil {
			return err
		}
	}
	return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0o600)
}

func runIP(ctx context.Context, args ...string) error {
	ip, err := lookPath("ip")
	if err != nil {
		return err
	}
	return run(ctx, nil, ip, args...)
}

// restartDelay keeps a component that cannot start from taking the machine's time.
const restartDelay = time.Second

// supervisor keeps the components running. All its state belongs to the goroutine of run.
type supervisor struct {
	logDir  string
	log     *slog.Logger
	running map[int]component // by pid
}

func (s *supervisor) run(ctx context.Context, p plan) error {
	children := make(chan os.Signal, 1)
	signal.Notify(children, syscall.SIGCHLD)
	defer signal.Stop(children)
	due := make(chan component, len(p.Components))
	for _, c := range p.Components {
		go func() {
			if err := s.waitBefore(ctx, p, c); err != nil {
				s.log.Error("component not started", "component", c.Name, "err", err)
				return
			}
			due <- c
		}()
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case c := <-due:
			if err := s.start(c); err != nil {
				return err
			}
		case <-children:
			for _, c := range s.reap() {
				go func() {
					if pause(ctx, restartDelay) == nil {
						due <- c
					}
				}()
			}
		}
	}
}

// waitBefore waits until what the component needs answers.
func (s *supervisor) waitBefore(ctx context.Context, p plan, c component) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	switch c.After {
	case "":
		return nil
	case afterContainerd:
		return waitFor(ctx, 20*time.Millisecond, func() error {
			_, err := os.Stat(containerdSocket)
			return err
		})
	case afterAPIServer:
		api, err := newAPIClient(filepath.Join(p.RunDir, "pki"))
		if err != nil {
			return err
		}
		return waitFor(ctx, 50*time.Millisecond, func() error { return api.ready(ctx) })
	}
	return fmt.Errorf("component %s waits for %q, which is nothing to wait for", c.Name, c.After)
}

// start runs a component. It is never waited for by itself: reap waits for every child, since
// the containers' orphans come to this process, too.
func (s *supervisor) start(c component) error {
	out, err := os.OpenFile(filepath.Join(s.logDir, c.Name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() { _ = out.Close() }()
	in, err := os.Open(os.DevNull)
	if err != nil {
		return err
	}
	defer func() { _ = in.Close() }()
	program, err := exec.LookPath(c.Args[0])
	if err != nil {
		return fmt.Errorf("start %s: %w", c.Name, err)
	}
	proc, err := os.StartProcess(program, c.Args, &os.ProcAttr{Dir: "/", Env: componentEnv(), Files: []*os.File{in, out, out}})
	if err != nil {
		return fmt.Errorf("start %s: %w", c.Name, err)
	}
	s.running[proc.Pid] = c
	s.log.Info("started", "component", c.Name, "pid", proc.Pid)
	return proc.Release()
}

// componentEnv has nothing of the user's own environment (proxies, KUBECONFIG) but a PATH that
// has the sbin directories, where runc and nft are.
func componentEnv() []string {
	return []string{defaultPath, "HOME=/root", "LANG=C.UTF-8"}
}

// reap collects every child that has ended and returns the components among them.
func (s *supervisor) reap() []component {
	var ended []component
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, syscall.WNOHANG, nil)
		if errors.Is(err, syscall.EINTR) {
			continue
		}
		if err != nil || pid <= 0 {
			return ended
		}
		c, ok := s.running[pid]
		if !ok {
			continue
		}
		delete(s.running, pid)
		s.log.Warn("ended", "component", c.Name, "pid", pid, "code", status.ExitStatus(), "signal", int(status.Signal()))
		ended = append(ended, c)
	}
}
