//go:build cluster

package tests

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestSideBySide runs the tests that disturb nothing but their own namespace.
func TestSideBySide(t *testing.T) {
	for _, sub := range []struct {
		name string
		test func(*testing.T)
	}{
		{"NewPods", testNewPods},
		{"ExistingPods", testExistingPods},
		{"Scale", testScale},
		{"RolloutRestart", testRolloutRestart},
		{"Eviction", testEviction},
		{"SlowRequests", testSlowRequests},
		{"AnnotationRemoved", testAnnotationRemoved},
		{"PodKilled", testPodKilled},
		{"AppKilled", testAppKilled},
		{"AppStops", testAppStops},
		{"AppNotReady", testAppNotReady},
		{"BadInput", testBadInput},
		{"Warnings", testWarnings},
		{"Order", testOrder},
		{"Restricted", testRestricted},
		{"GatewayAuthorization", testGatewayAuthorization},
		{"GatewayLimits", testGatewayLimits},
		{"Connections", testConnections},
		{"ProxyProtocol", testProxyProtocol},
		{"TLSSocket", testTLSSocket},
		{"Guards", testGuards},
		{"ProtectedSecret", testProtectedSecret},
		{"LoadBalancer", testLoadBalancer},
		{"LiveChange", testLiveChange},
		{"SkippedPods", testSkippedPods},
	} {
		t.Run(sub.name, func(t *testing.T) {
			t.Parallel()
			sub.test(t)
		})
	}
}

// testNewPods is the announcement's demo: three replicas, sixty requests, one after the other.
func testNewPods(t *testing.T) {
	s := newStage(t, injectable)
	url := s.publish(3)
	t.Run("sixty requests", func(t *testing.T) {
		client, err := visitor(func(tr *http.Transport) { tr.DisableKeepAlives = true })
		if err != nil {
			t.Fatal(err)
		}
		counts := map[string]int{}
		for i := range 60 {
			server, err := ask(s.ctx, client, url)
			if err != nil {
				t.Fatalf("request %d: %v", i+1, err)
			}
			counts[server]++
		}
		for name := range s.pods() {
			if n := counts[name]; n < 15 || n > 25 {
				t.Errorf("pod %s answered %d of 60 requests, want 15 to 25", name, n)
			}
		}
		if len(counts) != 3 {
			t.Errorf("%d pods answered, want 3: %v", len(counts), counts)
		}
	})
	t.Run("one connection per pod, from the pod's own address", func(t *testing.T) {
		want := map[string]string{}
		for name, p := range s.pods() {
			want[p.Status.PodIP] = name
		}
		k, _ := s.socket(web)
		for _, tun := range k.Tunnels {
			ip, _, err := net.SplitHostPort(tun.Remote)
			if err != nil || want[ip] == "" {
				t.Errorf("a tunnel comes from %s, which is no pod's address, or a second time: %v", tun.Remote, err)
			}
			delete(want, ip)
		}
		for ip, name := range want {
			t.Errorf("no tunnel comes from pod %s at %s", name, ip)
		}
	})
	t.Run("no warnings on the way", func(t *testing.T) {
		for _, e := range s.events(web) {
			if e.Type != "Normal" {
				t.Errorf("the Service has the Event %+v", e)
			}
		}
	})
}

// testExistingPods annotates the Service of pods that run: their workload is restarted.
func testExistingPods(t *testing.T) {
	s := newStage(t, injectable)
	s.apply(s.demoApp("service.yaml"))
	s.deploy(3)
	s.rolledOut()
	before := s.pods()
	for name, p := range before {
		if p.hasSidecar() {
			t.Fatalf("pod %s has a sidecar before its Service is annotated", name)
		}
	}
	s.annotate(web, enabled)
	s.awaitConnected(web, 3)
	s.awaitEvent(web, "Normal", "Restarted", "Deployment web", "tunnel sidecar")
	s.rolledOut()
	after := s.pods()
	for name, p := range after {
		if _, old := before[name]; old || !p.hasSidecar() {
			t.Errorf("pod %s was there before (%t), or has no sidecar", name, old)
		}
	}
	client, err := visitor(nil)
	if err != nil {
		t.Fatal(err)
	}
	if server, err := ask(s.ctx, client, s.url(web)); err != nil || after[server].Metadata.Name == "" {
		t.Errorf("answered by %q, %v", server, err)
	}
}

// testScale moves traffic over 3, 5 and 2 replicas.
func testScale(t *testing.T) {
	s := newStage(t, injectable)
	l := s.startHeavyLoad(s.publish(3))
	first := s.pods()
	s.kube("scale", "deployment/"+web, "--replicas=5")
	s.awaitConnected(web, 5)
	s.await(patience, "traffic to the new pods", func() error {
		from := l.from()
		for name := range s.pods() {
			if from[name] == 0 {
				return fmt.Errorf("pod %s (new: %t) has answered nothing", name, first[name].Metadata.Name == "")
			}
		}
		return nil
	})
	s.kube("scale", "deployment/"+web, "--replicas=2")
	s.awaitConnected(web, 2)
	s.await(patience, "the pods", func() error {
		all, err := pods(s.ctx, s.ns, "app="+web)
		if err == nil && len(all) != 2 {
			err = fmt.Errorf("there are %d pods, those that are ending included", len(all))
		}
		return err
	})
	s.awaitConnected(web, 2) // still, now that all has ended
	s.awaitMore(l, 50)
	s.endLoad(l, time.Time{})
}

func testRolloutRestart(t *testing.T) {
	s := newStage(t, injectable)
	l := s.startHeavyLoad(s.publish(3))
	s.kube("rollout", "restart", "deployment/"+web)
	s.rolledOut()
	s.awaitConnected(web, 3)
	s.awaitAllClosed(l)
	s.awaitMore(l, 50)
	s.endLoad(l, time.Time{})
}

// awaitAllClosed waits until the app has closed all WebSockets that were open at first, since all its pods have gone.
func (s *stage) awaitAllClosed(l *load) {
	s.t.Helper()
	s.await(patience, "the app to close its WebSockets", func() error {
		if n := l.closedByApp(); n < longLived {
			return fmt.Errorf("it has closed %d, want %d at least", n, longLived)
		}
		return nil
	})
}

// testEviction evicts all pods, one after the other, as kubectl drain does: with the Eviction API, and again while a
// PodDisruptionBudget does not allow it.
func testEviction(t *testing.T) {
	s := newStage(t, injectable)
	url := s.publish(3)
	s.apply(`apiVersion: policy/v1
kind: PodDisruptionBudget
metadata: {name: web}
spec:
  maxUnavailable: 1
  selector: {matchLabels: {app: web}}`)
	l := s.startHeavyLoad(url)
	old, refused := s.pods(), 0
	for _, name := range slices.Sorted(maps.Keys(old)) {
		s.await(patience, "the eviction of pod "+name, func() error {
			var answer struct{}
			err := env.api.do(s.ctx, http.MethodPost, s.path("pods/"+name+"/eviction"),
				fmt.Sprintf(`{"apiVersion":"policy/v1","kind":"Eviction","metadata":{"name":%q,"namespace":%q}}`, name, s.ns), &answer)
			switch {
			case err == nil:
			case strings.Contains(err.Error(), ": 404 "): // of the one before only the answer was late
				return nil
			case strings.Contains(err.Error(), ": 429 "):
				refused++
			}
			return err
		})
	}
	s.await(patience, "the evicted pods to end", func() error {
		all, err := pods(s.ctx, s.ns, "app="+web)
		if err != nil {
			return err
		}
		for _, p := range all {
			if old[p.Metadata.Name].Metadata.UID == p.Metadata.UID {
				return fmt.Errorf("pod %s is still there", p.Metadata.Name)
			}
		}
		return nil
	})
	s.rolledOut()
	s.awaitConnected(web, 3)
	s.awaitAllClosed(l)
	s.awaitMore(l, 50)
	s.endLoad(l, time.Time{})
	t.Logf("%d evictions were put off", refused)
}

// testSlowRequests deletes all pods while each of them is at work on a request.
func testSlowRequests(t *testing.T) {
	const requests = 6
	s := newStage(t, injectable)
	url := s.publish(3)
	client, err := visitor(func(tr *http.Transport) { tr.DisableKeepAlives = true })
	if err != nil {
		t.Fatal(err)
	}
	type answer struct {
		server string
		err    error
	}
	answers := make(chan answer, requests)
	for range requests {
		go func() {
			server, err := ask(s.ctx, client, url+"/slow?ms=3000")
			answers <- answer{server, err}
		}()
	}
	s.await(patience, "the slow requests", func() error {
		k, _ := s.socket(web)
		open := 0
		for _, tun := range k.Tunnels {
			open += tun.Open
		}
		if open != requests || len(answers) > 0 {
			return fmt.Errorf("%d requests are open and %d answered, want %d and 0", open, len(answers), requests)
		}
		return nil
	})
	old := s.pods()
	s.kube("delete", "pods", "-l", "app="+web, "--wait=false")
	from := map[string]int{}
	for range requests {
		a := <-answers
		if a.err != nil {
			t.Errorf("a request that was open when its pod was deleted: %v", a.err)
			continue
		}
		from[a.server]++
	}
	for name := range old {
		if from[name] == 0 {
			t.Errorf("no answer came from pod %s; they came from %v", name, from)
		}
	}
	s.awaitConnected(web, 3)
}

// testAnnotationRemoved turns a Service off and on again. Its pods notice nothing.
func testAnnotationRemoved(t *testing.T) {
	s := newStage(t, injectable)
	s.publish(2)
	before := s.pods()
	s.annotate(web, disable)
	s.await(15*time.Second, "the end of the tunnels", func() error {
		if k, ok := s.socket(web); ok {
			return fmt.Errorf("the edge still has the socket, with %d tunnels", len(k.Tunnels))
		}
		return nil
	})
	s.await(15*time.Second, "a clean Service", func() error {
		svc := s.service(web)
		for k := range svc.Metadata.Annotations {
			if strings.HasPrefix(k, "mysocket.io/") {
				return fmt.Errorf("it still has the annotation %s", k)
			}
		}
		if len(svc.Status.Conditions) > 0 || len(svc.Metadata.Finalizers) > 0 {
			return fmt.Errorf("it still has %v, %v", svc.Status.Conditions, svc.Metadata.Finalizers)
		}
		if left := s.tunnels(); len(left) > 0 {
			return fmt.Errorf("there are still %d Tunnels", len(left))
		}
		return nil
	})
	s.awaitEvent(web, "Normal", "SocketDeleted", "was deleted")
	s.samePods(before)

	s.annotate(web, enabled)
	s.awaitConnected(web, 2)
	s.samePods(before)
	s.awaitAnswer(web)
}

// samePods checks that the pods are the same as before, and ready, with the same containers.
func (s *stage) samePods(before map[string]pod) {
	s.t.Helper()
	after := s.pods()
	if !slices.Equal(slices.Sorted(maps.Keys(before)), slices.Sorted(maps.Keys(after))) {
		s.t.Errorf("the pods are %v, and were %v", slices.Sorted(maps.Keys(after)), slices.Sorted(maps.Keys(before)))
	}
	for name, p := range after {
		if p.Metadata.UID != before[name].Metadata.UID || !slices.Equal(p.containers(), before[name].containers()) || !p.ready() {
			s.t.Errorf("pod %s (ready: %t) was made anew or restarted: %+v, before %+v", name, p.ready(), p.containers(), before[name].containers())
		}
	}
}

// awaitAnswer waits until a Service's public URL answers.
func (s *stage) awaitAnswer(service string) {
	s.t.Helper()
	client, err := visitor(func(tr *http.Transport) { tr.DisableKeepAlives = true })
	if err != nil {
		s.t.Fatal(err)
	}
	s.await(patience, "a public answer", func() error {
		url := s.url(service)
		if url == "" {
			return errors.New("the Service has no public URL")
		}
		_, err := ask(s.ctx, client, url)
		return err
	})
}

// testPodKilled takes a pod away without a word.
func testPodKilled(t *testing.T) {
	s := newStage(t, injectable)
	l := s.startLoad(s.publish(3))
	victim := s.somePod()
	k, _ := s.socket(web)
	remote := s.pods()[victim].Status.PodIP + ":"
	killed := time.Now()
	s.kube("delete", "pod", victim, "--grace-period=0", "--force")
	s.await(15*time.Second-time.Since(killed), "the end of the killed pod's tunnel", func() error {
		for _, tun := range s.tunnels() {
			if tun.Spec.PodName == victim {
				return fmt.Errorf("Tunnel %s is still there, %s", tun.Metadata.Name, tun.Status.State)
			}
		}
		k, _ = s.socket(web)
		for _, tun := range k.Tunnels {
			if strings.HasPrefix(tun.Remote, remote) {
				return fmt.Errorf("tunnel %s is still connected at the edge", tun.ID)
			}
		}
		if k.Registered > 3 {
			return fmt.Errorf("the edge has %d tunnels registered", k.Registered)
		}
		return nil
	})
	t.Logf("the killed pod's tunnel was gone after %s", time.Since(killed).Round(10*time.Millisecond))
	s.awaitConnected(web, 3)
	s.awaitMore(l, 50)
	s.endLoad(l, killed.Add(time.Second))
}

// testAppKilled kills the app of one pod. What it was at work on fails, and nothing else.
func testAppKilled(t *testing.T) {
	s := newStage(t, injectable)
	l := s.startHeavyLoad(s.publish(3))
	before, victim := s.pods(), ""
	s.await(patience, "a pod with something open", func() error {
		for name := range before {
			if l.longOpen(name) > 0 {
				victim = name
				return nil
			}
		}
		return errors.New("none has")
	})
	process := killProcess(s, before[victim], "demo-app")
	s.await(patience, "the end of the app", func() error {
		b, err := os.ReadFile(filepath.Join(process, "stat"))
		if err == nil && !strings.Contains(string(b), ") Z ") { // a zombie has no files any more
			err = fmt.Errorf("it is there: %s", b)
		} else {
			err = nil
		}
		return err
	})
	gone := time.Now()
	s.await(patience, "the app's next start", func() error {
		p := s.pods()[victim]
		for _, c := range p.containers() {
			want := 0
			if c.Name == "app" {
				want = 1
			}
			if c.RestartCount != want {
				return fmt.Errorf("container %s was restarted %d times, want %d", c.Name, c.RestartCount, want)
			}
		}
		if !p.ready() {
			return errors.New("the pod is not ready")
		}
		return nil
	})
	s.awaitConnected(web, 3)
	answers := l.from()[victim]
	s.await(patience, "traffic to the app that is back", func() error {
		if l.from()[victim] <= answers+5 {
			return errors.New("it answers nothing")
		}
		return nil
	})
	s.awaitMore(l, 2*heavyRate)
	s.judgeLoad(l, func(f failure) bool { return f.at.Before(gone) && (f.server == victim || f.server == "") })
}

// testAppStops has the app of one pod refuse connections for a while.
func testAppStops(t *testing.T) {
	s := newStage(t, injectable)
	url := s.publish(2)
	before := s.pods()
	l := s.startLoad(url)
	victim := s.somePod()
	client := &http.Client{Timeout: 10 * time.Second}
	if _, err := ask(s.ctx, client, "http://"+net.JoinHostPort(before[victim].Status.PodIP, "8000")+"/stop?ms=8000"); err != nil {
		t.Fatal(err)
	}
	state := func(want string) func() error {
		return func() error {
			for _, tun := range s.tunnels() {
				if tun.Spec.PodName == victim && tun.Status.State != want {
					return fmt.Errorf("the Tunnel of pod %s is %s: %s", victim, tun.Status.State, tun.Status.Message)
				}
			}
			return nil
		}
	}
	s.await(patience, "the app's stop to be noticed", state("WaitingForApp"))
	if k, _ := s.socket(web); len(k.Tunnels) != 1 || k.Registered != 2 {
		t.Errorf("the edge has %d tunnels in rotation and %d registered, want 1 and 2", len(k.Tunnels), k.Registered)
	}
	answers := l.from()[victim]
	s.awaitMore(l, 50)
	if more := l.from()[victim] - answers; more > 5 {
		t.Errorf("%d more answers came from the app that takes no connections", more)
	}
	s.await(patience, "the app to be back", state("Connected"))
	s.awaitConnected(web, 2)
	s.await(patience, "traffic to the app that is back", func() error {
		if l.from()[victim] <= answers+5 {
			return errors.New("it answers nothing")
		}
		return nil
	})
	s.await(patience, "the pod to be ready", func() error {
		if p := s.pods()[victim]; !p.ready() {
			return errors.New("it is not")
		}
		return nil
	})
	s.samePods(before)
	s.endLoad(l, time.Time{})
}

// testAppNotReady has the readiness probe of one pod fail for a while, as an app does that is too busy, and takes connections
// all the time.
func testAppNotReady(t *testing.T) {
	s := newStage(t, injectable)
	url := s.publish(2)
	before := s.pods()
	l := s.startLoad(url)
	victim := s.somePod()
	tell := func(what string) {
		t.Helper()
		client := &http.Client{Timeout: 10 * time.Second}
		if _, err := ask(s.ctx, client, "http://"+net.JoinHostPort(before[victim].Status.PodIP, "8000")+what); err != nil {
			t.Fatal(err)
		}
	}
	tell("/unready?ms=600000")
	s.await(patience, "the failing probe to be noticed", func() error {
		for _, tun := range s.tunnels() {
			if tun.Spec.PodName == victim && (tun.Status.State != "WaitingForApp" || !strings.Contains(tun.Status.Message, "http GET /healthz on port 8000: status 503")) {
				return fmt.Errorf("the Tunnel of pod %s is %s: %s", victim, tun.Status.State, tun.Status.Message)
			}
		}
		return nil
	})
	if k, _ := s.socket(web); len(k.Tunnels) != 1 || k.Registered != 2 {
		t.Errorf("the edge has %d tunnels in rotation and %d registered, want 1 and 2", len(k.Tunnels), k.Registered)
	}
	answers := l.from()[victim]
	s.awaitMore(l, 50)
	if more := l.from()[victim] - answers; more > 5 {
		t.Errorf("%d more answers came from the app that is not ready", more)
	}
	tell("/unready?ms=0")
	s.awaitConnected(web, 2)
	s.await(patience, "traffic to the app that is ready again", func() error {
		if l.from()[victim] <= answers+5 {
			return errors.New("it answers nothing")
		}
		return nil
	})
	s.await(patience, "the kubelet to see it, too", func() error {
		if p := s.pods()[victim]; !p.ready() {
			return errors.New("the pod is not ready")
		}
		return nil
	})
	s.samePods(before)
	s.endLoad(l, time.Time{})
}
