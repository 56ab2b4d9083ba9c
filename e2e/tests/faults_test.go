//go:build cluster

package tests

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/mysocketio/mysocket-injector/e2e/cluster"
	"github.com/mysocketio/mysocket-injector/e2e/lab"
)

// TestControlPlaneDeleted deletes both pods of the control plane at once: the tunnels that run do
// not notice.
func TestControlPlaneDeleted(t *testing.T) {
	checkControlPlaneLog(t)
	s := newStage(t, injectable)
	l := s.startLoad(s.publish(3))
	before, _ := s.socket(web)
	cmd(t, "delete", "pods", "-n", lab.Namespace, "-l", controlPlaneSelector, "--wait=false")
	s.awaitMore(l, 50)
	awaitControlPlane(s, controlPlaneReplicas)

	// It does all its work again.
	fresh := newStage(t, injectable)
	fresh.publish(1)
	fresh.awaitAnswer(web)

	s.awaitConnected(web, 3)
	after, _ := s.socket(web)
	if !slices.EqualFunc(before.Tunnels, after.Tunnels, func(a, b lab.Tunnel) bool { return a.ID == b.ID && a.Remote == b.Remote }) {
		t.Errorf("the connections at the edge are %+v, and were %+v", after.Tunnels, before.Tunnels)
	}
	s.endLoad(l, time.Time{})
}

// TestEdgeRestart stops the edge and starts it again.
func TestEdgeRestart(t *testing.T) {
	s := newStage(t, injectable)
	url := s.publish(3)
	before := s.pods()
	if err := env.Edge.Stop(s.ctx); err != nil {
		t.Fatal(err)
	}
	if err := env.Edge.Start(s.ctx); err != nil {
		t.Fatal(err)
	}
	up := time.Now()
	s.await(40*time.Second, "the sidecars", func() error {
		if k, _ := s.socket(web); len(k.Tunnels) != 3 {
			return fmt.Errorf("%d of 3 are back", len(k.Tunnels))
		}
		return nil
	})
	t.Logf("all sidecars were back %s after the edge", time.Since(up).Round(10*time.Millisecond))
	s.awaitConnected(web, 3)
	s.awaitAnswer(web)
	if now := s.url(web); now != url {
		t.Errorf("the public name is now %s, and was %s", now, url)
	}
	s.samePods(before)
}

// TestWebhookDown makes pods while there is no control plane. They start without a sidecar, and get
// one when it is back.
func TestWebhookDown(t *testing.T) {
	checkControlPlaneLog(t)
	s := newStage(t, injectable)
	s.apply(s.demoApp("service.yaml"))
	s.annotate(web, enabled)
	s.awaitCondition(web, socketReady, "True", "Ready")
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if _, err := env.Kube(ctx, "scale", controlPlane, "-n", lab.Namespace, fmt.Sprint("--replicas=", controlPlaneReplicas)); err != nil {
			t.Error(err)
		}
	})
	cmd(t, "scale", controlPlane, "-n", lab.Namespace, "--replicas=0")
	awaitControlPlane(s, 0)
	s.deploy(2)
	s.rolledOut()
	for name, p := range s.pods() {
		if p.hasSidecar() {
			t.Errorf("pod %s has a sidecar", name)
		}
	}
	cmd(t, "scale", controlPlane, "-n", lab.Namespace, fmt.Sprint("--replicas=", controlPlaneReplicas))
	awaitControlPlane(s, controlPlaneReplicas)
	s.awaitConnected(web, 2)
	s.awaitEvent(web, "Normal", "Restarted", "Deployment web")
	s.awaitAnswer(web)
}

// TestAccountAndAddresses gives the release what operators get wrong. Each is told on the Service,
// is tried again slowly, crashes nothing, and mends by itself when the release is mended.
func TestAccountAndAddresses(t *testing.T) {
	const closedPort = "edge." + cluster.HostDomain + ":1"
	for _, tc := range []struct {
		name      string
		edge      func(*lab.Edge)
		values    []string
		condition string
		reason    string
		words     []string
		hasSocket bool
		// mostCalls of the API within the time it is watched are no busy loop: a few Services of other tests may still be
		// there, each with its own back-off that begins at a second.
		mostCalls int
	}{
		{
			// The Secret that the chart makes of its values, for once.
			name: "WrongPassword", edge: func(*lab.Edge) {}, values: []string{"account.existingSecret=", "account.email=" + env.Edge.Email, "account.password=wrong"},
			condition: socketReady, reason: "AccountRefused", words: []string{"e-mail and password", "Secret"}, mostCalls: 4,
		},
		{
			// In its right form, and known to nobody.
			name: "WrongToken", edge: func(*lab.Edge) {}, values: []string{"account.existingSecret=", "account.token=eyJhbGciOiJIUzI1NiJ9.eyJ1c2VyX2lkIjoiMDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWYifQ.AAAA"},
			condition: socketReady, reason: "AccountRefused", words: []string{"access token", "Secret", "not known there, or was revoked"}, mostCalls: 4,
		},
		{
			name: "UnreachableAPI", edge: func(e *lab.Edge) { e.APIURL = "https://" + closedPort },
			condition: socketReady, reason: "APIUnavailable", words: []string{closedPort, "connection refused"}, mostCalls: 30,
		},
		{
			name: "UnreachableSSH", edge: func(e *lab.Edge) { e.SSHAddress = closedPort },
			condition: tunnelsReady, reason: "TunnelFailing", words: []string{"0 of 1 pods connected", "pod web-", "tcp", "connection refused"},
			hasSocket: true, mostCalls: 15,
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			checkControlPlaneLog(t)
			s := newStage(t, injectable)
			edge := *env.Edge
			tc.edge(&edge)
			wrong := *env.Lab
			wrong.Edge = &edge
			mended := false
			mend := func(ctx context.Context) error {
				if mended {
					return nil
				}
				mended = true
				return env.Install(ctx)
			}
			t.Cleanup(func() {
				ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
				defer cancel()
				if err := mend(ctx); err != nil {
					t.Error(err)
				}
			})
			// What is public already must not notice.
			before := newStage(t, injectable)
			visitors := before.startLoad(before.publish(1))
			start := time.Now()
			if err := wrong.Install(s.ctx, tc.values...); err != nil {
				t.Fatal(err)
			}
			// A mounted Secret changes within a minute. The test does not wait for that twice.
			cmd(t, "rollout", "restart", controlPlane, "-n", lab.Namespace)
			cmd(t, "rollout", "status", controlPlane, "-n", lab.Namespace, "--timeout="+patience.String())
			awaitControlPlane(s, controlPlaneReplicas)

			s.apply(s.demoApp("service.yaml"))
			s.annotate(web, enabled)
			s.deploy(1)
			s.awaitCondition(web, tc.condition, "False", tc.reason, tc.words...)
			s.awaitEvent(web, "Warning", tc.reason, tc.words...)

			const watched = 15 * time.Second
			earlier := apiCalls(s, "")
			s.holds(watched, "meanwhile", func() error {
				k, ok := s.socket(web)
				if ok != tc.hasSocket {
					return fmt.Errorf("the edge has a socket of the Service: %t", ok)
				}
				if k.Registered > 1 {
					return fmt.Errorf("the edge has %d tunnels registered", k.Registered)
				}
				if c := s.service(web).condition(tc.condition); c.Reason != tc.reason {
					return errors.New("the condition turned to " + c.String())
				}
				return controlPlaneWell(s)
			})
			calls := apiCalls(s, "").since(earlier)
			if calls > tc.mostCalls {
				t.Errorf("the control plane asked the API %d times in %s", calls, watched)
			}
			t.Logf("%d calls of the API in %s", calls, watched)

			before.endLoad(visitors, start)

			if err := mend(s.ctx); err != nil {
				t.Fatal(err)
			}
			since := time.Now()
			s.awaitConnected(web, 1)
			t.Logf("it worked %s after it was mended", time.Since(since).Round(100*time.Millisecond))
			s.awaitAnswer(web)
			if err := controlPlaneWell(s); err != nil {
				t.Error(err)
			}
		})
	}
}
