//go:build cluster

package tests

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/mysocketio/mysocket-injector/e2e/lab"
)

// The tests of this file look at what the others have left. They run last.

// TestWrapUpNothingLeft waits until the namespaces of the other tests are gone, and with them all
// that the edge had of them.
func TestWrapUpNothingLeft(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	if err := lab.WaitFor(ctx, patience, func() error {
		var left list[struct {
			Metadata metadata `json:"metadata"`
		}]
		if err := env.api.get(ctx, "/api/v1/namespaces?labelSelector="+ownLabel, &left); err != nil {
			return err
		}
		if len(left.Items) > 0 {
			return fmt.Errorf("%d namespaces are still there, one is %s", len(left.Items), left.Items[0].Metadata.Name)
		}
		sockets, err := env.Edge.Sockets(ctx)
		if err != nil {
			return err
		}
		for _, k := range sockets {
			ours := strings.HasPrefix(k.Name, "k8s e2e-") || strings.HasPrefix(k.Name, "k8s---e2e-")
			if ours && !env.foreign[k.ID] {
				return fmt.Errorf("the edge still has the socket %q", k.Name)
			}
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}

// TestWrapUpSecrets looks for the account's password everywhere. A Service is public meanwhile, so
// that there are sidecars to look at.
func TestWrapUpSecrets(t *testing.T) {
	s := newStage(t, injectable)
	s.publish(1)
	b, err := os.ReadFile(env.Edge.PasswordFile)
	if err != nil {
		t.Fatal(err)
	}
	password := strings.TrimSpace(string(b))
	if len(password) < 16 {
		t.Fatalf("the password has %d characters: finding it would say nothing", len(password))
	}
	forms := []string{password, base64.StdEncoding.EncodeToString([]byte(password)), base64.RawURLEncoding.EncodeToString([]byte(password))}
	look := func(where, text string) {
		for _, f := range forms {
			if strings.Contains(text, f) {
				t.Errorf("the password is in %s", where)
			}
		}
	}

	for _, kind := range []string{"pods", "events", "tunnels", "configmaps", "services", "deployments", "replicasets", "serviceaccounts", "leases", "mutatingwebhookconfigurations", "validatingwebhookconfigurations", "namespaces"} {
		look(kind, cmd(t, "get", kind, "--all-namespaces", "-o", "json"))
	}
	var all list[pod]
	s.get("/api/v1/pods", &all)
	for _, p := range all.Items {
		look("the log of pod "+p.Metadata.Name, cmd(t, "logs", "-n", p.Metadata.Namespace, p.Metadata.Name, "--all-containers", "--tail=-1"))
	}
	log, err := os.ReadFile(env.Edge.LogFile)
	if err != nil {
		t.Fatal(err)
	}
	look("the edge's log", string(log))
	for _, file := range []string{"cmdline", "environ"} {
		paths, err := filepath.Glob("/proc/[0-9]*/" + file)
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range paths {
			if b, err := os.ReadFile(path); err == nil { // processes end while we look
				look(path, string(b))
			}
		}
	}

	var secrets list[struct {
		Metadata metadata          `json:"metadata"`
		Data     map[string][]byte `json:"data"`
	}]
	s.get("/api/v1/secrets", &secrets)
	found := 0
	for _, sec := range secrets.Items {
		for key, value := range sec.Data {
			switch {
			case !strings.Contains(string(value), password) && !strings.Contains(unpackedRelease(value), password):
			case sec.Metadata.Namespace == lab.Namespace && sec.Metadata.Name == lab.AccountSecret:
				found++
			default:
				t.Errorf("the password is in Secret %s/%s, key %s", sec.Metadata.Namespace, sec.Metadata.Name, key)
			}
		}
	}
	if found != 1 {
		t.Errorf("the password is %d times in Secret %s/%s, want once", found, lab.Namespace, lab.AccountSecret)
	}
}

// unpackedRelease is what Helm keeps in its release Secrets, base64 of gzip; empty for other data.
func unpackedRelease(value []byte) string {
	packed, err := base64.StdEncoding.DecodeString(string(value))
	if err != nil {
		return ""
	}
	unpack, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		return ""
	}
	b, err := io.ReadAll(unpack)
	if err != nil {
		return ""
	}
	return string(b)
}

// TestWrapUpRights spot-checks that the control plane may do what it must and little else, and that
// it missed no right in all the tests.
func TestWrapUpRights(t *testing.T) {
	const (
		own   = lab.Namespace
		other = "default"
	)
	for _, tc := range []struct {
		namespace, verb string
		resource        string // resource, resource/name or resource:subresource
		may             bool
	}{
		{other, "get", "secrets", false},
		{other, "list", "secrets", false},
		{other, "create", "secrets", false},
		{own, "list", "secrets", false},
		{own, "watch", "secrets", false},
		{own, "delete", "secrets", false},
		{own, "get", "secrets/mysocket-injector-account", false}, // it is mounted
		{own, "get", "secrets/mysocket-injector-certificates", true},
		{own, "update", "secrets/mysocket-injector-certificates", true},
		{own, "get", "secrets/mysocket-injector-serving-tls", false}, // cert-manager mode only
		{other, "get", "configmaps/anything", false},
		{other, "update", "configmaps/anything", false},
		{other, "patch", "configmaps/anything", false},
		{other, "list", "configmaps", false},
		{other, "delete", "configmaps/" + gatewayCA, false},
		{other, "patch", "configmaps/" + gatewayCA, true},
		{other, "create", "pods", false},
		{other, "delete", "pods", false},
		{other, "patch", "pods", false},
		{other, "create", "pods:exec", false},
		{other, "get", "pods:log", false},
		{other, "list", "pods", true},
		{other, "delete", "services", false},
		{other, "create", "services", false},
		{other, "patch", "services", true},
		{other, "create", "deployments.apps", false},
		{other, "delete", "deployments.apps", false},
		{other, "patch", "deployments.apps", true},
		{other, "create", "serviceaccounts:token", false},
		{other, "create", "roles.rbac.authorization.k8s.io", false},
		{other, "create", "clusterrolebindings.rbac.authorization.k8s.io", false},
		{other, "patch", "mutatingwebhookconfigurations/anything", false},
		{other, "create", "mutatingwebhookconfigurations", false},
		{other, "patch", "validatingwebhookconfigurations/anything", false},
		{other, "delete", "validatingwebhookconfigurations/mysocket-injector." + own + ".mysocket.io", false},
		{other, "patch", "validatingwebhookconfigurations/mysocket-injector." + own + ".mysocket.io", true},
		{other, "get", "nodes", false},
		{other, "patch", "nodes", false},
		{other, "patch", "namespaces", false},
		{other, "impersonate", "users", false},
		{own, "get", "leases.coordination.k8s.io/mysocket-injector", true},
		{own, "get", "leases.coordination.k8s.io/another", false},
		{other, "create", "tunnels.mysocket.io", true},
	} {
		resource, sub, _ := strings.Cut(tc.resource, ":")
		answer, err := env.Kube(t.Context(), "auth", "can-i", tc.verb, resource, "--subresource="+sub, "-n", tc.namespace, "--as=system:serviceaccount:"+own+":mysocket-injector")
		may := err == nil && strings.HasSuffix(answer, "yes")
		if err != nil && !strings.Contains(err.Error(), "exit status 1") {
			t.Error(err)
			continue
		}
		if may != tc.may {
			t.Errorf("%s %s in namespace %s: it may: %t, want %t", tc.verb, tc.resource, tc.namespace, may, tc.may)
		}
	}
	checkControlPlaneLog(t)
}

// TestWrapUpControlPlane checks that the control plane came through all tests without a crash.
func TestWrapUpControlPlane(t *testing.T) {
	all, err := pods(t.Context(), lab.Namespace, controlPlaneSelector)
	if err == nil && len(all) != controlPlaneReplicas {
		err = errors.New("there are not two pods")
	}
	if err != nil {
		t.Error(err)
	}
	for _, p := range all {
		if n := p.restarts(); n > 0 || !p.ready() {
			t.Errorf("pod %s was restarted %d times; ready: %t", p.Metadata.Name, n, p.ready())
		}
	}
}
