//go:build cluster

package cluster

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// smokePod is a pod with a native sidecar, restricted-clean as the product's own.
const smokePod = `
apiVersion: v1
kind: Namespace
metadata: {name: smoke, labels: {pod-security.kubernetes.io/enforce: restricted}}
---
apiVersion: v1
kind: Pod
metadata: {name: app, namespace: smoke, labels: {app: demo}}
spec:
  terminationGracePeriodSeconds: 1
  securityContext: {runAsNonRoot: true, seccompProfile: {type: RuntimeDefault}}
  initContainers:
  - name: probe
    image: localhost/mysocket-injector/netprobe:smoke
    imagePullPolicy: Never
    restartPolicy: Always
    args: [hold]
    securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
    volumeMounts: [{name: token, mountPath: /token}]
  containers:
  - name: app
    image: localhost/mysocket-injector/demo-app:smoke
    imagePullPolicy: Never
    readinessProbe: {httpGet: {path: /healthz, port: 8000}, periodSeconds: 1}
    securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
  volumes:
  - name: token
    projected: {sources: [{serviceAccountToken: {path: token, audience: smoke, expirationSeconds: 600}}]}
---
apiVersion: v1
kind: Service
metadata: {name: demo, namespace: smoke}
spec:
  selector: {app: demo}
  ports: [{port: 80, targetPort: 8000}]
`

// TestSmoke takes a running cluster down, and through a whole life: down leaves the machine as
// it was, a warm up is quick, and in between everything that the product's tests build on works.
// It leaves a fresh cluster up.
//
//	go test -tags cluster -run TestSmoke -v ./cluster
func TestSmoke(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Minute)
	defer cancel()
	opts := Options{Out: t.Output()}
	if _, err := Build(ctx, opts); err != nil {
		t.Fatal(err)
	}
	if err := Down(ctx, opts); err != nil {
		t.Fatal(err)
	}
	before := machine(t)
	c := up(ctx, t, opts)

	images, err := BuildImages(ctx, opts, "smoke", "demo-app", "netprobe")
	if err != nil {
		t.Fatal(err)
	}
	for _, img := range images {
		if err := c.LoadImage(ctx, img.Archive); err != nil {
			t.Fatal(err)
		}
	}
	kubectl := func(args ...string) string {
		t.Helper()
		out, err := c.Kubectl(ctx, args...).CombinedOutput()
		if err != nil {
			t.Fatalf("kubectl %s: %v\n%s", strings.Join(args, " "), err, out)
		}
		return strings.TrimSpace(string(out))
	}
	apply := c.Kubectl(ctx, "apply", "-f", "-")
	apply.Stdin = strings.NewReader(smokePod)
	if err := runCmd(apply); err != nil {
		t.Fatal(err)
	}
	kubectl("wait", "-n", "smoke", "pod/app", "--for=condition=Ready", "--timeout=60s")
	podIP := kubectl("get", "-n", "smoke", "pod", "app", "-o", "jsonpath={.status.podIP}")
	probe := func(args ...string) string {
		t.Helper()
		return kubectl(append([]string{"exec", "-n", "smoke", "app", "-c", "probe", "--", "/netprobe"}, args...)...)
	}

	t.Run("sidecar and app are ready", func(t *testing.T) {
		if got := kubectl("get", "-n", "smoke", "pod", "app", "--no-headers"); !strings.Contains(got, "2/2") {
			t.Errorf("got %s", got)
		}
	})
	t.Run("logs", func(t *testing.T) {
		if got := kubectl("logs", "-n", "smoke", "app", "-c", "app"); !strings.Contains(got, "listening") {
			t.Errorf("got %q", got)
		}
	})
	t.Run("a pod resolves and calls a Service, its own pod's as well", func(t *testing.T) {
		clusterIP := kubectl("get", "-n", "smoke", "service", "demo", "-o", "jsonpath={.spec.clusterIP}")
		if got := probe("lookup", "demo"); got != clusterIP {
			t.Errorf("demo resolves to %q, want %s", got, clusterIP)
		}
		if got := probe("get", "http://demo/"); got != "Server: app" {
			t.Errorf("got %q", got)
		}
		if got := probe("lookup", "api.edge."+HostDomain); got != HostIP {
			t.Errorf("a name of the host resolves to %q, want %s", got, HostIP)
		}
	})
	t.Run("the host calls pods, Services and the API", func(t *testing.T) {
		clusterIP := kubectl("get", "-n", "smoke", "service", "demo", "-o", "jsonpath={.spec.clusterIP}")
		for _, addr := range []string{net.JoinHostPort(podIP, "8000"), net.JoinHostPort(clusterIP, "80"), net.JoinHostPort(NodeIP, "6443")} {
			conn, err := (&net.Dialer{Timeout: 5 * time.Second}).DialContext(ctx, "tcp", addr)
			if err != nil {
				t.Error(err)
				continue
			}
			_ = conn.Close()
		}
	})
	t.Run("a server on the host sees the pod's own address", func(t *testing.T) {
		l, err := net.Listen("tcp", net.JoinHostPort(HostIP, "0"))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = l.Close() }()
		go func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				_, _ = fmt.Fprintln(conn, conn.RemoteAddr())
				_ = conn.Close()
			}
		}()
		got := probe("dial", l.Addr().String())
		if host, _, err := net.SplitHostPort(got); err != nil || host != podIP {
			t.Errorf("the server saw %q, want %s", got, podIP)
		}
	})
	t.Run("port-forward", func(t *testing.T) { portForward(ctx, t, c) })
	t.Run("helm", func(t *testing.T) {
		if out, err := c.Helm(ctx, "list", "-A").CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
	})
	t.Run("up again does nothing", func(t *testing.T) {
		again, err := Up(ctx, opts)
		if err != nil {
			t.Fatal(err)
		}
		if !again.Started.Equal(c.Started) {
			t.Error("it started another cluster")
		}
	})
	t.Run("a component that dies comes back", func(t *testing.T) {
		const started = "msg=started component=kube-scheduler pid="
		events := func() string {
			b, err := os.ReadFile(filepath.Join(c.LogDir, "events.log"))
			if err != nil {
				t.Fatal(err)
			}
			return string(b)
		}
		// The pid is the one inside the node's pid namespace.
		_, pid, _ := strings.Cut(events(), started)
		pid, _, _ = strings.Cut(pid, "\n")
		if err := runCmd(c.Enter(ctx, "sh", "-c", "kill -9 "+pid)); err != nil {
			t.Fatal(err)
		}
		err := waitFor(ctx, 100*time.Millisecond, func() error {
			if n := strings.Count(events(), started); n < 2 {
				return fmt.Errorf("started %d times", n)
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	})

	start := time.Now()
	if err := Down(ctx, opts); err != nil {
		t.Fatal(err)
	}
	t.Logf("down took %s", elapsed(time.Since(start)))
	for what, was := range before {
		now := machine(t)[what]
		for _, x := range now {
			if !slices.Contains(was, x) {
				t.Errorf("down left: %s %s", what, x)
			}
		}
		for _, x := range was {
			if !slices.Contains(now, x) {
				t.Errorf("down took away what was there before: %s %s", what, x)
			}
		}
	}
	if err := Down(ctx, opts); err != nil {
		t.Errorf("down when there is nothing: %v", err)
	}
	start = time.Now()
	c = up(ctx, t, opts)
	if took := time.Since(start); took > time.Minute {
		t.Errorf("a warm up took %s, want under a minute", elapsed(took))
	}
	// Half dead: the init is gone, all else that up made outside is still there.
	if err := c.init.End(ctx, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	up(ctx, t, opts)
}

func up(ctx context.Context, t *testing.T, opts Options) *Cluster {
	t.Helper()
	start := time.Now()
	c, err := Up(ctx, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("up took %s", elapsed(time.Since(start)))
	return c
}

// portForward asks the app through kubectl port-forward.
func portForward(ctx context.Context, t *testing.T, c *Cluster) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	cmd := c.Kubectl(ctx, "port-forward", "-n", "smoke", "pod/app", ":8000")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		cancel()
		_ = cmd.Wait()
	}()
	line, err := bufio.NewReader(out).ReadString('\n') // Forwarding from 127.0.0.1:41234 -> 8000
	fields := strings.Fields(line)
	if err != nil || len(fields) < 3 {
		t.Fatalf("it said %q, %v", line, err)
	}
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", fields[2])
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if _, err := fmt.Fprint(conn, "GET / HTTP/1.0\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	answer := make([]byte, 4096)
	n, err := conn.Read(answer)
	if err != nil || !strings.HasPrefix(string(answer[:n]), "HTTP/1.0 200 OK") {
		t.Errorf("answer %q, %v", answer[:n], err)
	}
}

// machine describes what of the machine the cluster may not change.
func machine(t *testing.T) map[string][]string {
	t.Helper()
	lines := func(name string, args ...string) []string {
		t.Helper()
		b, err := exec.CommandContext(t.Context(), name, args...).Output()
		if err != nil {
			t.Fatal(err)
		}
		return strings.Split(strings.TrimSpace(string(b)), "\n")
	}
	out := map[string][]string{
		"route":   lines("ip", "route"),
		"sysctl":  lines("cat", "/proc/sys/net/ipv4/ip_forward", "/proc/sys/vm/overcommit_memory", "/proc/sys/kernel/panic", "/proc/sys/kernel/panic_on_oops"),
		"ruleset": lines("nft", "list", "ruleset"),
	}
	for _, l := range lines("ip", "-br", "link") {
		out["link"] = append(out["link"], strings.Fields(l)[0])
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		out["mount"] = append(out["mount"], strings.Fields(line)[4])
	}
	for _, pattern := range []string{"/sys/fs/cgroup/*", "/sys/fs/cgroup/*/*", "/var/lib/*", "/var/log/*", "/var/tmp/*", "/run/*", "/run/netns/*"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		out["file"] = append(out["file"], found...)
	}
	exes, err := filepath.Glob("/proc/[0-9]*/exe")
	if err != nil {
		t.Fatal(err)
	}
	own, err := os.Readlink("/proc/self/ns/pid")
	if err != nil {
		t.Fatal(err)
	}
	for _, exe := range exes {
		program, _ := os.Readlink(exe) // a kernel thread has none
		// The cluster's processes are in a pid namespace of their own. The same programs outside of one, an API server that
		// some other test runs, say, are not the cluster's.
		if ns, err := os.Readlink(filepath.Join(filepath.Dir(exe), "ns", "pid")); (err != nil || ns == own) && filepath.Base(program) != initBinary {
			continue
		}
		for _, ours := range []string{"/bin/hyperkube", "/" + initBinary, "containerd", "/coredns", "/pause", "/demo-app", "/netprobe"} {
			if strings.Contains(program, ours) {
				out["process"] = append(out["process"], filepath.Dir(exe)+" "+program)
			}
		}
	}
	return out
}
