//go:build cluster

package tests

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/mysocketio/mysocket-injector/e2e/lab"
)

// tokenCalls are requests that are made only with an access token.
const tokenCalls = `endpoint="GET /sockets"`

// TestAccessToken puts an access token into the account's Secret in the place of e-mail and password. The control plane takes it up
// without a restart; what is public stays so, and what becomes public is served by all its pods, without tunnel objects.
func TestAccessToken(t *testing.T) {
	checkControlPlaneLog(t)
	before := newStage(t, injectable)
	oldURL := before.publish(1)
	if err := env.Edge.Stop(before.ctx); err != nil {
		t.Fatal(err)
	}
	token, err := env.Edge.CreateToken(before.ctx, "of the end-to-end tests")
	if err := errors.Join(err, env.Edge.Start(before.ctx)); err != nil {
		t.Fatal(err)
	}
	before.awaitConnected(web, 1)
	was := before.pods()
	visitors := before.startLoad(oldURL)

	t.Cleanup(func() { // after the namespace below is gone
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		defer cancel()
		if err := env.Install(ctx); err != nil {
			t.Error(err)
		}
		for _, args := range [][]string{{"rollout", "restart", controlPlane}, {"rollout", "status", controlPlane, "--timeout=90s"}} {
			if _, err := env.Kube(ctx, append([]string{"-n", lab.Namespace}, args...)...); err != nil {
				t.Error(err)
			}
		}
		// One that ends leads on for a few seconds, and with the token would make the next test's sockets under other names.
		if err := lab.WaitFor(ctx, patience, func() error {
			out, err := env.Kube(ctx, "-n", lab.Namespace, "get", "pods", "-l", controlPlaneSelector, "-o", "name")
			if n := len(strings.Fields(out)); err == nil && n != controlPlaneReplicas {
				err = fmt.Errorf("there are %d pods of the control plane, want %d", n, controlPlaneReplicas)
			}
			return err
		}); err != nil {
			t.Error(err)
		}
	})
	secret := cmd(t, "create", "secret", "generic", lab.AccountSecret, "-n", lab.Namespace, "--from-file=token="+token, "--dry-run=client", "-o", "yaml")
	if err := env.Apply(before.ctx, lab.Namespace, secret); err != nil {
		t.Fatal(err)
	}
	start, touched := time.Now(), 0
	before.await(2*patience, "the token to be used", func() error {
		// A look at a Service is what has the leader ask; the kubelet takes up to a minute to change the files.
		touched++
		before.annotate(web, fmt.Sprint("example.com/touched=", touched))
		if apiCalls(before, tokenCalls).total() == 0 {
			return errors.New("the account is still used with e-mail and password")
		}
		return nil
	})
	t.Logf("the token was used %s after it was put into the Secret", time.Since(start).Round(time.Second))

	s := newStage(t, injectable)
	t.Cleanup(func() { // with the token, which alone finds the socket
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		defer cancel()
		if _, err := env.Kube(ctx, "delete", "namespace", s.ns, "--ignore-not-found", "--timeout=90s"); err != nil {
			t.Error(err)
		}
	})
	s.apply(s.demoApp("service.yaml"))
	s.annotate(web, enabled)
	s.deploy(3)
	s.awaitWithoutObjects(3)
	s.rolledOut()
	client, err := visitor(func(tr *http.Transport) { tr.DisableKeepAlives = true })
	if err != nil {
		t.Fatal(err)
	}
	counts := map[string]int{}
	url := s.url(web)
	for i := range 60 {
		server, err := ask(s.ctx, client, url)
		if err != nil {
			t.Fatalf("request %d: %v", i+1, err)
		}
		counts[server]++
	}
	t.Logf("60 requests went to %v", counts)
	for name := range s.pods() {
		if n := counts[name]; n < 15 || n > 25 {
			t.Errorf("pod %s answered %d of 60 requests, want 15 to 25", name, n)
		}
	}
	load := s.startLoad(url)
	s.kube("scale", "deployment/"+web, "--replicas=2")
	s.awaitWithoutObjects(2)
	s.kube("rollout", "restart", "deployment/"+web)
	s.rolledOut()
	s.awaitWithoutObjects(2)
	s.endLoad(load, time.Time{})

	if err := controlPlaneWell(s); err != nil {
		t.Error(err)
	}
	if now := before.url(web); now != oldURL {
		t.Errorf("the public name is now %s, and was %s", now, oldURL)
	}
	before.samePods(was)
	before.endLoad(visitors, time.Time{})

	s.annotate(web, disable)
	s.await(patience, "the socket to go", func() error {
		if _, ok := s.sockets()["k8s---"+s.ns+"--"+web]; ok {
			return errors.New("the edge still has it")
		}
		return nil
	})
}

// awaitWithoutObjects is awaitConnected for an account with an access token.
func (s *stage) awaitWithoutObjects(n int) {
	s.t.Helper()
	s.awaitCondition(web, socketReady, "True", "Ready", "https://")
	s.awaitCondition(web, tunnelsReady, "True", "AllConnected", fmt.Sprintf("%d of %d pods connected", n, n))
	s.await(patience, "the tunnels", func() error {
		k, ok := s.sockets()["k8s---"+s.ns+"--"+web]
		if !ok {
			return errors.New("the edge has no socket of the Service")
		}
		if len(k.Tunnels) != n || k.Registered != 0 {
			return fmt.Errorf("the edge has %d tunnels connected and %d objects, want %d and none", len(k.Tunnels), k.Registered, n)
		}
		if count := len(s.tunnels()); count != n {
			return fmt.Errorf("there are %d Tunnels, want %d", count, n)
		}
		return nil
	})
}
