//go:build cluster

package tests

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"
)

// TestPreStopSleep has the chart put off the end of apps. A container without a preStop hook gets the kubelet's sleep; so its app
// takes connections when its pod is deleted and has left the edge's rotation.
func TestPreStopSleep(t *testing.T) {
	const seconds = 25 // of the grace period of 30: the longer, the busier the machine may be
	checkControlPlaneLog(t)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		defer cancel()
		if err := env.Install(ctx); err != nil {
			t.Error(err)
		}
	})
	s := newStage(t, injectable)
	if err := env.Install(s.ctx, fmt.Sprint("sidecar.preStopSleep=", seconds)); err != nil {
		t.Fatal(err)
	}
	awaitControlPlane(s, controlPlaneReplicas)
	s.apply(s.demoApp("service.yaml"))
	s.annotate(web, enabled)
	s.deploy(1, "      containers:\n", `      containers:
      - name: own
        image: localhost/mysocket-injector/demo-app:dev
        args: ["--addr=:8002"]
        lifecycle: {preStop: {sleep: {seconds: 1}}}
`)
	s.awaitConnected(web, 1)
	victim := s.pods()[s.somePod()]
	want := map[string]int{"app": seconds, "own": 1}
	for _, c := range victim.Spec.Containers {
		if got := c.Lifecycle.PreStop.Sleep.Seconds; got != want[c.Name] {
			t.Errorf("container %s sleeps %d seconds, want %d", c.Name, got, want[c.Name])
		}
	}
	s.kube("delete", "pod", victim.Metadata.Name, "--wait=false")
	s.await(patience, "the pod to leave the rotation", func() error {
		k, _ := s.socket(web)
		for _, tun := range k.Tunnels {
			if strings.HasPrefix(tun.Remote, victim.Status.PodIP+":") {
				return fmt.Errorf("tunnel %s is in it", tun.ID)
			}
		}
		return nil
	})
	client := &http.Client{Timeout: 10 * time.Second}
	defer client.CloseIdleConnections()
	if got, err := ask(s.ctx, client, "http://"+net.JoinHostPort(victim.Status.PodIP, "8000")); err != nil || got != victim.Metadata.Name {
		t.Errorf("the app of the pod that is deleted: %q, %v", got, err)
	}
}
