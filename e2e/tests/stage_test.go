//go:build cluster

package tests

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mysocketio/mysocket-injector/e2e/lab"
)

const (
	socketReady  = "mysocket.io/SocketReady"
	tunnelsReady = "mysocket.io/TunnelsReady"

	enabled = "mysocket.io/enabled=true"
	disable = "mysocket.io/enabled-"
	web     = "web" // the demo's Service and Deployment
)

// stage is a test's own namespace and what is done in it. Its methods end the test when they fail.
type stage struct {
	t   *testing.T
	ctx context.Context
	ns  string
}

// newStage makes a namespace with these labels. It is deleted when the test ends; if that failed,
// what a person would look at is printed before.
func newStage(t *testing.T, labels ...string) *stage {
	t.Helper()
	name := t.Name()[strings.LastIndexByte(t.Name(), '/')+1:]
	name = strings.ToLower(strings.TrimPrefix(strings.ReplaceAll(name, "_", "-"), "Test"))
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	s := &stage{t: t, ctx: ctx, ns: "e2e-" + name[:min(len(name), 30)] + "-" + strings.ToLower(rand.Text()[:4])}
	t.Cleanup(func() {
		cancel()
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if t.Failed() {
			s.explain(ctx)
		}
		if _, err := env.Kube(ctx, "delete", "namespace", s.ns, "--wait=false", "--ignore-not-found"); err != nil {
			t.Error(err)
		}
	})
	cmd(t, "create", "namespace", s.ns)
	cmd(t, append([]string{"label", "namespace", s.ns, ownLabel + "="}, labels...)...)
	return s
}

// cmd runs kubectl and returns what it printed.
func cmd(t *testing.T, args ...string) string {
	t.Helper()
	out, err := env.Kube(t.Context(), args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// kube runs kubectl in the namespace and returns what it printed.
func (s *stage) kube(args ...string) string {
	s.t.Helper()
	return cmd(s.t, append([]string{"-n", s.ns}, args...)...)
}

// apply applies manifests to the namespace.
func (s *stage) apply(manifests ...string) {
	s.t.Helper()
	if err := env.Apply(s.ctx, s.ns, strings.Join(manifests, "\n---\n")); err != nil {
		s.t.Fatal(err)
	}
}

func (s *stage) annotate(service string, annotations ...string) {
	s.t.Helper()
	s.kube(append([]string{"annotate", "--overwrite", "service", service}, annotations...)...)
}

// demoApp returns a manifest of the demo app with other words in it, given as pairs of old and new.
func (s *stage) demoApp(file string, oldNew ...string) string {
	s.t.Helper()
	b, err := os.ReadFile(filepath.Join(env.Root, "e2e", "demoapp", file))
	if err != nil {
		s.t.Fatal(err)
	}
	text := string(b)
	for i := 0; i < len(oldNew); i += 2 {
		if !strings.Contains(text, oldNew[i]) {
			s.t.Fatalf("%s does not hold %q", file, oldNew[i])
		}
		text = strings.ReplaceAll(text, oldNew[i], oldNew[i+1])
	}
	return text
}

// deploy makes the demo's Deployment, with other words in it if given.
func (s *stage) deploy(replicas int, oldNew ...string) {
	s.t.Helper()
	s.apply(s.demoApp("deployment.yaml", append([]string{"replicas: 3", fmt.Sprint("replicas: ", replicas)}, oldNew...)...))
}

func (s *stage) rolledOut() {
	s.t.Helper()
	s.kube("rollout", "status", "deployment/"+web, "--timeout="+patience.String())
}

// publish makes the demo with its Service annotated first, and waits until all is connected. It
// returns the public URL.
func (s *stage) publish(replicas int) string {
	s.t.Helper()
	s.apply(s.demoApp("service.yaml"))
	s.annotate(web, enabled)
	s.deploy(replicas)
	s.awaitConnected(web, replicas)
	s.rolledOut()
	return s.url(web)
}

// await waits until ok returns nil.
func (s *stage) await(atMost time.Duration, what string, ok func() error) {
	s.t.Helper()
	if err := lab.WaitFor(s.ctx, atMost, ok); err != nil {
		s.t.Fatalf("%s: %v", what, err)
	}
}

// holds checks that ok stays nil for a while.
func (s *stage) holds(during time.Duration, what string, ok func() error) {
	s.t.Helper()
	over := time.NewTimer(during)
	defer over.Stop()
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	for {
		if err := ok(); err != nil {
			s.t.Fatalf("%s: %v", what, err)
		}
		select {
		case <-over.C:
			return
		case <-tick.C:
		}
	}
}

func (s *stage) path(resource string) string { return "/api/v1/namespaces/" + s.ns + "/" + resource }

func (s *stage) get(path string, into any) {
	s.t.Helper()
	if err := env.api.get(s.ctx, path, into); err != nil {
		s.t.Fatal(err)
	}
}

func (s *stage) service(name string) service {
	s.t.Helper()
	var svc service
	s.get(s.path("services/"+name), &svc)
	return svc
}

func (s *stage) url(service string) string {
	s.t.Helper()
	return s.service(service).Metadata.Annotations["mysocket.io/url"]
}

// pods are the demo's pods that are not on their way out, by name.
func (s *stage) pods() map[string]pod {
	s.t.Helper()
	all, err := pods(s.ctx, s.ns, "app="+web)
	if err != nil {
		s.t.Fatal(err)
	}
	out := map[string]pod{}
	for _, p := range all {
		if p.Metadata.Deleted == "" {
			out[p.Metadata.Name] = p
		}
	}
	return out
}

// somePod is the name of one of the demo's pods.
func (s *stage) somePod() string {
	s.t.Helper()
	names := slices.Sorted(maps.Keys(s.pods()))
	if len(names) == 0 {
		s.t.Fatal("there is no pod")
	}
	return names[0]
}

func (s *stage) tunnels() []tunnel {
	s.t.Helper()
	var l list[tunnel]
	s.get("/apis/mysocket.io/v1alpha1/namespaces/"+s.ns+"/tunnels", &l)
	return l.Items
}

// events are the Events of a Service.
func (s *stage) events(service string) []event {
	s.t.Helper()
	var l list[event]
	s.get(s.path("events"), &l)
	return slices.DeleteFunc(l.Items, func(e event) bool { return e.Involved.Kind != "Service" || e.Involved.Name != service })
}

// awaitEvent waits for an Event of a Service whose message contains all the words.
func (s *stage) awaitEvent(service, kind, reason string, words ...string) {
	s.t.Helper()
	s.await(patience, fmt.Sprintf("a %s Event %s on Service %s", kind, reason, service), func() error {
		all := s.events(service)
		if !slices.ContainsFunc(all, func(e event) bool {
			return e.Type == kind && e.Reason == reason && containsAll(e.Message, words) == nil
		}) {
			return fmt.Errorf("there are %+v", all)
		}
		return nil
	})
}

// awaitCondition waits for a condition of a Service whose message contains all the words.
func (s *stage) awaitCondition(service, kind, status, reason string, words ...string) condition {
	s.t.Helper()
	var c condition
	s.await(patience, "Service "+service, func() error {
		c = s.service(service).condition(kind)
		if c.Status != status || c.Reason != reason {
			return fmt.Errorf("want %s=%s, %s; it says %s", kind, status, reason, c)
		}
		return containsAll(c.Message, words)
	})
	return c
}

func containsAll(text string, words []string) error {
	for _, w := range words {
		if !strings.Contains(text, w) {
			return fmt.Errorf("%q does not say %q", text, w)
		}
	}
	return nil
}

// socketNames are the edge's sockets by their names.
func (s *stage) sockets() map[string]lab.Socket {
	s.t.Helper()
	all, err := env.Edge.Sockets(s.ctx)
	if err != nil {
		s.t.Fatal(err)
	}
	out := map[string]lab.Socket{}
	for _, k := range all {
		if _, again := out[k.Name]; again {
			s.t.Fatalf("the edge has two sockets named %q", k.Name)
		}
		out[k.Name] = k
	}
	return out
}

// socket is the edge's socket of a Service.
func (s *stage) socket(service string) (lab.Socket, bool) {
	s.t.Helper()
	k, ok := s.sockets()["k8s "+s.ns+"."+service]
	return k, ok
}

// awaitConnected waits until everybody agrees that a Service has n replicas, all connected: its
// condition, the Tunnels and the edge.
func (s *stage) awaitConnected(service string, n int) {
	s.t.Helper()
	s.awaitCondition(service, socketReady, "True", "Ready", "https://")
	s.awaitCondition(service, tunnelsReady, "True", "AllConnected", fmt.Sprintf("%d of %d pods connected", n, n))
	s.await(patience, "the tunnels of Service "+service, func() error {
		k, ok := s.socket(service)
		if !ok {
			return errors.New("the edge has no socket of it")
		}
		if len(k.Tunnels) != n || k.Registered != n {
			return fmt.Errorf("the edge has %d tunnels connected and %d registered, want %d", len(k.Tunnels), k.Registered, n)
		}
		count := 0
		for _, t := range s.tunnels() {
			if t.Spec.ServiceName != service {
				continue
			}
			if count++; t.Status.State != "Connected" || t.Status.Message != "" {
				return fmt.Errorf("Tunnel %s is %s: %s", t.Metadata.Name, t.Status.State, t.Status.Message)
			}
		}
		if count != n {
			return fmt.Errorf("there are %d Tunnels, want %d", count, n)
		}
		return nil
	})
}

// explain prints what a person would look at.
func (s *stage) explain(ctx context.Context) {
	for _, args := range [][]string{
		{"describe", "services"},
		{"get", "pods,tunnels", "-o", "wide"},
		{"logs", "-l", "app=" + web, "-c", sidecarName, "--prefix", "--tail=25"},
		{"logs", "-n", lab.Namespace, "-l", controlPlaneSelector, "--prefix", "--tail=40"},
	} {
		out, err := env.Kube(ctx, append([]string{"-n", s.ns}, args...)...)
		if err != nil {
			out += err.Error()
		}
		s.t.Logf("$ kubectl -n %s %s\n%s", s.ns, strings.Join(args, " "), out)
	}
	s.t.Logf("the edge's log, but for good answers:\n%s", edgeLog(40))
}

// edgeLog returns the last lines of the edge's log without requests that went well.
func edgeLog(lines int) string {
	b, err := os.ReadFile(env.Edge.LogFile)
	if err != nil {
		return err.Error()
	}
	var out []string
	for line := range strings.Lines(string(b)) {
		if !strings.Contains(line, " status=200 ") {
			out = append(out, line)
		}
	}
	return strings.Join(out[max(0, len(out)-lines):], "")
}
