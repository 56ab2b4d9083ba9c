//go:build cluster

package tests

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"
)

// TestSharedSocket has Services of two namespaces ask for one socket name: one public name leads to the pods of both, and
// stays for the other when one goes. A third namespace, which the operator has not named, is refused.
func TestSharedSocket(t *testing.T) {
	checkControlPlaneLog(t)
	a, b, stranger := newStage(t, injectable), newStage(t, injectable), newStage(t, injectable)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		defer cancel()
		for _, s := range []*stage{a, b} { // while they may have the name
			if _, err := env.Kube(ctx, "-n", s.ns, "delete", "service", web, "--ignore-not-found", "--timeout=60s"); err != nil {
				t.Error(err)
			}
		}
		if err := env.Install(ctx); err != nil {
			t.Error(err)
		}
	})
	if err := env.Install(a.ctx, fmt.Sprintf("socketNames.together={%s,%s}", a.ns, b.ns)); err != nil {
		t.Fatal(err)
	}
	awaitControlPlane(a, controlPlaneReplicas) // one with the former values answers for some seconds more
	const name = "mysocket.io/socket-name=together"
	for _, s := range []*stage{a, b} {
		s.apply(s.demoApp("service.yaml"))
		s.annotate(web, enabled, name)
		s.deploy(2)
	}
	for _, s := range []*stage{a, b} {
		s.awaitCondition(web, tunnelsReady, "True", "AllConnected", "2 of 2 pods connected")
		s.rolledOut()
	}
	url := a.url(web)
	if other := b.url(web); other != url {
		t.Fatalf("two public names: %s and %s", url, other)
	}
	client, err := visitor(func(tr *http.Transport) { tr.DisableKeepAlives = true })
	if err != nil {
		t.Fatal(err)
	}
	counts := map[string]int{}
	for i := range 40 {
		server, err := ask(a.ctx, client, url)
		if err != nil {
			t.Fatalf("request %d: %v", i+1, err)
		}
		counts[server]++
	}
	t.Logf("40 requests went to %v", counts)
	for _, s := range []*stage{a, b} {
		for pod := range s.pods() {
			if n := counts[pod]; n < 5 || n > 15 {
				t.Errorf("pod %s answered %d of 40 requests, want 5 to 15", pod, n)
			}
		}
	}

	stranger.apply(stranger.demoApp("service.yaml"))
	if out, err := stranger.tryAnnotate(web, enabled, name); err == nil || !strings.Contains(out, "mysocket.io/socket-name has the value \"together\"; allowed: in namespace "+stranger.ns+" none") {
		t.Errorf("a namespace that was not named may use the name: %v: %s", err, out)
	}

	load := b.startLoad(url)
	b.awaitMore(load, 20)
	start := time.Now()
	a.annotate(web, disable)
	a.await(patience, "the Service that went to be released", func() error {
		if svc := a.service(web); len(svc.Metadata.Finalizers) > 0 {
			return fmt.Errorf("finalizers %v", svc.Metadata.Finalizers)
		}
		return nil
	})
	b.awaitMore(load, 20)
	b.endLoad(load, start)
	for range 10 {
		server, err := ask(b.ctx, client, url)
		if err != nil {
			t.Fatal(err)
		}
		if _, theirs := b.pods()[server]; !theirs {
			t.Errorf("%s answered, which is not of the Service that is left", server)
		}
	}
	b.annotate(web, disable)
	b.await(patience, "the socket to be deleted", func() error {
		for _, k := range b.sockets() {
			if k.Name == "together" {
				return fmt.Errorf("socket %+v", k)
			}
		}
		return nil
	})
}
