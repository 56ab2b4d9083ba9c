//go:build cluster

package tests

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/mysocketio/mysocket-injector/e2e/lab"
)

// awaitTunnels waits until a Service's condition is that all pods are connected, and the edge has this many tunnels of it.
func (s *stage) awaitTunnels(service string, tunnels int) {
	s.t.Helper()
	s.awaitCondition(service, tunnelsReady, "True", "AllConnected")
	s.await(patience, "the tunnels of Service "+service, func() error {
		k, _ := s.socket(service)
		if len(k.Tunnels) != tunnels || k.Registered != tunnels || len(s.tunnels()) != tunnels {
			return fmt.Errorf("the edge has %d tunnels connected and %d registered, and there are %d Tunnels; want %d", len(k.Tunnels), k.Registered, len(s.tunnels()), tunnels)
		}
		return nil
	})
}

// testConnections asks for more connections of the pods that run, and for fewer, under load.
func testConnections(t *testing.T) {
	s := newStage(t, injectable)
	l := s.startLoad(s.publish(2))
	before := s.pods()
	s.annotate(web, "mysocket.io/connections=3")
	s.awaitTunnels(web, 6)
	s.awaitMore(l, 40)
	s.annotate(web, "mysocket.io/connections-")
	s.awaitTunnels(web, 2)
	s.awaitMore(l, 40)
	s.endLoad(l, time.Time{})
	for name, p := range s.pods() {
		if before[name].Metadata.UID != p.Metadata.UID {
			t.Errorf("pod %s was made anew", name)
		}
	}
}

// status asks a public URL, with a login if a user is given, and returns the status.
func (s *stage) status(url, user, password string) (int, error) {
	s.t.Helper()
	client, err := visitor(func(tr *http.Transport) { tr.DisableKeepAlives = true })
	if err != nil {
		return 0, err
	}
	req, err := http.NewRequestWithContext(s.ctx, http.MethodGet, url, nil)
	if err != nil {
		return 0, err
	}
	if user != "" {
		req.SetBasicAuth(user, password)
	}
	res, err := client.Do(req)
	if err != nil {
		return 0, err
	}
	return res.StatusCode, res.Body.Close()
}

func (s *stage) awaitStatus(url, user, password string, want int) {
	s.t.Helper()
	s.await(patience, "the public name", func() error {
		got, err := s.status(url, user, password)
		if err == nil && got != want {
			err = fmt.Errorf("it answers %d, want %d", got, want)
		}
		return err
	})
}

// testGuards asks for what our edge refuses. A Service that was public before serves nothing then, and what is no
// guard does not stop it.
func testGuards(t *testing.T) {
	s := newStage(t, injectable)
	url := s.publish(1)
	s.annotate(web, "mysocket.io/type=https")
	s.awaitCondition(web, socketReady, "False", "SocketRefused", "socket_type cannot change")
	s.awaitStatus(url, "", "", http.StatusOK)
	s.annotate(web, "mysocket.io/type-", "mysocket.io/allowed-emails=ann@example.com")
	s.awaitCondition(web, socketReady, "False", "SocketRefused", "cloud authentication", "is not supported by this edge")
	s.awaitCondition(web, tunnelsReady, "False", "NotRestrictedYet")
	s.awaitStatus(url, "", "", http.StatusBadGateway)
	s.annotate(web, "mysocket.io/allowed-emails-")
	s.awaitConnected(web, 1)
	s.awaitStatus(url, "", "", http.StatusOK)
}

// testProtectedSecret has visitors log in, first without the right to read the Secret and without the Secret.
func testProtectedSecret(t *testing.T) {
	s := newStage(t, injectable)
	s.apply(s.demoApp("service.yaml"))
	s.annotate(web, enabled, "mysocket.io/protected-secret=login")
	s.deploy(1)
	s.awaitCondition(web, socketReady, "False", "ProtectedSecretUnavailable", "may not read", s.ns, "protectedSecretNamespaces")
	s.awaitEvent(web, "Warning", "ProtectedSecretUnavailable", "protectedSecretNamespaces")
	if k, ok := s.socket(web); ok {
		t.Errorf("the edge has a socket: %+v", k)
	}
	// As the chart does for the namespaces in protectedSecretNamespaces.
	s.kube("create", "role", "protected-secrets", "--verb=get", "--resource=secrets")
	s.kube("create", "rolebinding", "protected-secrets", "--role=protected-secrets", "--serviceaccount="+lab.Namespace+":mysocket-injector")
	s.annotate(web, "example.com/look=now")
	s.awaitCondition(web, socketReady, "False", "ProtectedSecretUnavailable", "does not exist", "username and password")
	const first, second = "first-e2e-password", "second-e2e-password"
	s.kube("create", "secret", "generic", "login", "--from-literal=username=me", "--from-literal=password="+first)
	s.annotate(web, "example.com/look=again")
	s.awaitConnected(web, 1)
	url := s.url(web)
	s.awaitStatus(url, "me", first, http.StatusOK)
	for _, wrong := range [][2]string{{"", ""}, {"me", second}, {"you", first}} {
		if got, err := s.status(url, wrong[0], wrong[1]); err != nil || got != http.StatusUnauthorized {
			t.Errorf("as %q: %d, %v", wrong, got, err)
		}
	}
	// Changed: within a minute, by itself.
	s.apply(`apiVersion: v1
kind: Secret
metadata: {name: login}
stringData: {username: me, password: ` + second + `}`)
	s.awaitStatus(url, "me", second, http.StatusOK)
	s.awaitStatus(url, "me", first, http.StatusUnauthorized)
	// Nowhere but in its Secret.
	for _, args := range [][]string{
		{"-n", s.ns, "get", "services,pods,events,configmaps,tunnels", "-o", "yaml"},
		{"-n", lab.Namespace, "logs", "-l", controlPlaneSelector, "--tail=-1"},
	} {
		out, err := env.Kube(context.WithoutCancel(s.ctx), args...)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(out, first) || strings.Contains(out, second) {
			t.Errorf("a password is in what kubectl %s prints", strings.Join(args, " "))
		}
	}
	s.annotate(web, "mysocket.io/protected-secret-")
	s.awaitStatus(url, "", "", http.StatusOK)
}

// testLoadBalancer makes a Service public by its class alone.
func testLoadBalancer(t *testing.T) {
	s := newStage(t, injectable)
	s.apply(s.demoApp("service.yaml", "  selector: {app: web}\n",
		"  selector: {app: web}\n  type: LoadBalancer\n  loadBalancerClass: mysocket.io/edge\n  allocateLoadBalancerNodePorts: false\n"))
	s.deploy(1)
	s.awaitConnected(web, 1)
	s.awaitStatus(s.url(web), "", "", http.StatusOK)
	name := s.kube("get", "service", web, "-o", "jsonpath={.status.loadBalancer.ingress[*].hostname}")
	if want := s.service(web).Metadata.Annotations["mysocket.io/dnsname"]; strings.TrimSpace(name) != want || want == "" {
		t.Errorf("the status has the name %q, want %q", name, want)
	}
	s.annotate(web, "mysocket.io/enabled=false")
	s.await(patience, "the end of the load balancer", func() error {
		if name := s.kube("get", "service", web, "-o", "jsonpath={.status.loadBalancer.ingress}"); strings.TrimSpace(name) != "" {
			return fmt.Errorf("the status still has %s", name)
		}
		if k, ok := s.socket(web); ok {
			return fmt.Errorf("the edge still has the socket %+v", k)
		}
		return nil
	})
}
