//go:build cluster

package tests

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/mysocketio/mysocket-injector/e2e/lab"
)

// TestUninstall uninstalls the chart while Services are public, and installs it again.
func TestUninstall(t *testing.T) {
	const kept = "kept"
	checkControlPlaneLog(t)
	s := newStage(t, injectable)
	s.publish(2)
	s.apply(s.demoApp("service.yaml", "name: web", "name: "+kept))
	s.annotate(kept, enabled, "mysocket.io/deletion-policy=retain")
	s.awaitConnected(kept, 2)
	name := s.url(kept)
	before := s.pods()
	gone := newStage(t, injectable) // is deleted while there is nobody to look after it
	gone.publish(1)

	installed := false
	install := func(ctx context.Context) error {
		if installed {
			return nil
		}
		installed = true
		return env.Install(ctx)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
		defer cancel()
		if err := install(ctx); err != nil {
			t.Error(err)
		}
	})
	start := time.Now()
	if out, err := env.Helm(s.ctx, "uninstall", lab.Release, "-n", lab.Namespace, "--wait", "--timeout=4m").CombinedOutput(); err != nil {
		t.Fatalf("helm uninstall: %v: %s", err, out)
	}
	t.Logf("helm uninstall took %s", time.Since(start).Round(100*time.Millisecond))

	for _, service := range []string{web, kept} {
		svc := s.service(service)
		if len(svc.Metadata.Finalizers) > 0 || len(svc.Status.Conditions) > 0 {
			t.Errorf("Service %s still has %v, %v", service, svc.Metadata.Finalizers, svc.Status.Conditions)
		}
		for _, a := range []string{"socket-id", "dnsname", "url"} {
			if v, ok := svc.Metadata.Annotations["mysocket.io/"+a]; ok {
				t.Errorf("Service %s still has the annotation %s: %s", service, a, v)
			}
		}
		if svc.Metadata.Annotations["mysocket.io/enabled"] != "true" {
			t.Errorf("Service %s lost what its owner wrote", service)
		}
	}
	s.awaitEvent(web, "Normal", "SocketDeleted", "was deleted")
	s.awaitEvent(kept, "Normal", "SocketRetained", "was kept")
	if left := cmd(t, "get", "tunnels", "-A", "-o", "name"); left != "" {
		t.Errorf("Tunnels are left: %s", left)
	}
	if _, ok := s.socket(web); ok {
		t.Error("the edge still has the socket")
	}
	if k, ok := s.socket(kept); !ok || k.Registered != 0 || len(k.Tunnels) != 0 {
		t.Errorf("of the retained socket the edge has %+v, %t", k, ok)
	}
	for _, kind := range []string{"mutatingwebhookconfigurations", "validatingwebhookconfigurations", "clusterroles", "clusterrolebindings"} {
		if out := cmd(t, "get", kind, "-o", "name"); strings.Contains(out, "mysocket-injector") {
			t.Errorf("left: %s", out)
		}
	}
	if out := cmd(t, "get", "deployments,jobs,serviceaccounts,roles,rolebindings", "-n", lab.Namespace, "-o", "name"); strings.Contains(out, "mysocket-injector") {
		t.Errorf("left: %s", out)
	}
	s.samePods(before)
	// Nothing waits for the control plane.
	cmd(t, "delete", "namespace", gone.ns, "--timeout="+patience.String())
	if _, ok := gone.socket(web); ok {
		t.Error("the edge still has the socket of the namespace that was deleted")
	}

	// The CRD is still there, and the annotations; so all comes back with it, in the same pods.
	if err := install(s.ctx); err != nil {
		t.Fatal(err)
	}
	s.awaitConnected(web, 2)
	s.awaitConnected(kept, 2)
	s.awaitAnswer(web)
	if now := s.url(kept); now != name {
		t.Errorf("the retained name was %s, and is %s", name, now)
	}
	s.samePods(before)
	s.annotate(kept, "mysocket.io/deletion-policy=delete")
	s.await(patience, "the policy", func() error {
		if p := s.service(kept).Metadata.Annotations["mysocket.io/deletion-policy"]; p != "delete" {
			return errors.New("it is " + p)
		}
		return nil
	})
}

// TestNamespaceDeletedMeanwhile deletes a namespace while the control plane is down. It goes when that is back.
func TestNamespaceDeletedMeanwhile(t *testing.T) {
	checkControlPlaneLog(t)
	s := newStage(t, injectable)
	s.publish(1)
	scale := func(ctx context.Context, replicas int) error {
		_, err := env.Kube(ctx, "scale", controlPlane, "-n", lab.Namespace, fmt.Sprint("--replicas=", replicas))
		return err
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := scale(ctx, controlPlaneReplicas); err != nil {
			t.Error(err)
		}
	})
	if err := scale(s.ctx, 0); err != nil {
		t.Fatal(err)
	}
	awaitControlPlane(s, 0)
	cmd(t, "delete", "namespace", s.ns, "--wait=false")
	s.await(patience, "the pods to go", func() error {
		if left := s.pods(); len(left) > 0 {
			return fmt.Errorf("there are %d", len(left))
		}
		return nil
	})
	s.await(patience, "the Service to be marked as deleted", func() error {
		if s.service(web).Metadata.Deleted == "" {
			return errors.New("it is not")
		}
		return nil
	})
	if _, ok := s.socket(web); !ok {
		t.Error("the socket is gone while nobody was there to delete it")
	}
	if err := scale(s.ctx, controlPlaneReplicas); err != nil {
		t.Fatal(err)
	}
	awaitControlPlane(s, controlPlaneReplicas)
	s.await(patience, "the namespace to go", func() error {
		if out := cmd(t, "get", "namespace", s.ns, "--ignore-not-found", "-o", "name"); out != "" {
			return errors.New("it is still there")
		}
		return nil
	})
	if k, ok := s.socket(web); ok {
		t.Errorf("the edge still has the socket, with %d tunnels", len(k.Tunnels))
	}
	checkControlPlaneLog(t)
}
