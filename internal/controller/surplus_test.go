package controller

import (
	"testing"
	"time"

	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/mysocketio/mysocket-injector/api/v1alpha1"
	"github.com/mysocketio/mysocket-injector/internal/annotations"
)

// TestSurplusTunnels are withdrawn by their sidecars as a rule. What is still there after the grace is deleted.
func TestSurplusTunnels(t *testing.T) {
	s := newStage(t)
	svc := s.service(enabled(annotations.Connections, "2"))
	pod := s.pod("a", injected)
	s.mustReconcile(svc)
	kept := s.tunnel(svc, pod, v1alpha1.TunnelStatus{State: "Connected"})
	extra := newTunnel(svc, pod, v1alpha1.TunnelStatus{State: "Connected"})
	extra.Namespace, extra.Name, extra.Spec.Connection = s.ns, "a-second", 1
	cluster.Create(t, extra)

	r := s.reconciler()
	now := time.Now()
	look := func(connections int, after time.Duration) time.Duration {
		t.Helper()
		wait, err := r.dropSurplus(t.Context(), client.ObjectKeyFromObject(svc), annotations.Spec{Connections: connections}, svc.Annotations[annotations.SocketID], now.Add(after))
		if err != nil {
			t.Fatal(err)
		}
		return wait
	}
	if wait := look(2, 0); wait != 0 {
		t.Errorf("nothing is too many, and it looks again after %s", wait)
	}
	if wait := look(1, 0); wait != surplusGrace {
		t.Errorf("looks again after %s", wait)
	}
	if wait := look(2, surplusGrace); wait != 0 { // wanted again
		t.Errorf("looks again after %s", wait)
	}
	if wait := look(1, surplusGrace); wait != surplusGrace {
		t.Errorf("the grace did not begin anew: %s", wait)
	}
	cluster.Get(t, extra)
	if extra.DeletionTimestamp != nil {
		t.Fatal("deleted before its time")
	}
	look(1, 2*surplusGrace)
	cluster.Get(t, extra)
	cluster.Get(t, kept)
	if extra.DeletionTimestamp == nil || kept.DeletionTimestamp != nil {
		t.Errorf("deleted: the one too many %v, the other %v", extra.DeletionTimestamp, kept.DeletionTimestamp)
	}
}
