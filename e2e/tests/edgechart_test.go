//go:build cluster

package tests

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mysocketio/mysocket-injector/e2e/cluster"
	"github.com/mysocketio/mysocket-injector/e2e/lab"
)

const edgeChart = "charts/mysocket-edge"

// templateEdge renders the edge's chart with these arguments of helm, and returns what helm said if it refuses.
func templateEdge(t *testing.T, args ...string) (string, error) {
	t.Helper()
	render := env.Helm(t.Context(), append([]string{"template", "edge", edgeChart, "--namespace", "default"}, args...)...)
	render.Dir = env.Root
	out, err := render.CombinedOutput()
	if err != nil {
		return "", errors.New(string(out))
	}
	return string(out), nil
}

// TestEdgeChart renders the edge's chart with values that are good, which the API server looks at, and with such that are not.
func TestEdgeChart(t *testing.T) {
	for _, c := range []struct {
		name   string
		values []string
		has    []string
		lacks  []string
	}{
		{
			name: "default",
			has: []string{"--domain=edge.mysocket.test", "--tcp-ports=20000-20009", "port: 20009", "automountServiceAccountToken: false",
				"volumeClaimTemplates", "--api-hosts=edge-api.default.svc,edge-api.default.svc.cluster.local\n"},
			lacks: []string{"initContainers", "storageClassName", "emptyDir", "name: edge-admin", "port: 20010"},
		},
		{
			name: "flags",
			values: []string{"config.come-back=5s", "config.allow-registration=true", "config.some-number=1000000",
				"config.some-list={a,b}", "apiHosts={edge.example.com,2001:db8::1}"},
			has: []string{"--come-back=5s", "--allow-registration=true", "--some-number=1000000", "--some-list=a,b", ".svc.cluster.local,edge.example.com,2001:db8::1\n"},
		},
		{
			name:   "account",
			values: []string{"account.existingSecret=the-account"},
			has:    []string{"--if-missing", "secretName: the-account", "{name: the-account, key: email}", "--password-file=/etc/mysocket/account/password"},
		},
		{
			name:   "an emptyDir",
			values: []string{"persistence.enabled=false"},
			has:    []string{"emptyDir"},
			lacks:  []string{"volumeClaimTemplates", "claimName"},
		},
		{
			name:   "a claim of one's own",
			values: []string{"persistence.existingClaim=mine"},
			has:    []string{"claimName: mine"},
			lacks:  []string{"volumeClaimTemplates", "emptyDir"},
		},
		{
			name:   "no storage class",
			values: []string{"persistence.storageClass=-", "persistence.size=5Gi"},
			has:    []string{`storageClassName: ""`, "storage: 5Gi"},
		},
		{
			name: "public Services",
			values: []string{"service.web.type=LoadBalancer", "service.web.externalTrafficPolicy=Local", "service.web.annotations.example\\.com/pool=a",
				"service.ssh.type=NodePort", "service.ssh.nodePorts.ssh=30022", "service.admin.enabled=true", "tcpPorts.first=30000", "tcpPorts.count=1"},
			has: []string{"type: LoadBalancer", "externalTrafficPolicy: Local", "example.com/pool: a", "type: NodePort", "nodePort: 30022", "name: edge-admin", "--tcp-ports=30000-30000"},
			// Not of ssh's own: a port of 0 means that the cluster chooses.
			lacks: []string{"nodePort: 0", "port: 30001"},
		},
		{
			name: "volumes",
			values: []string{"extraVolumes[0].name=certificate", "extraVolumes[0].secret.secretName=wildcard",
				"extraVolumeMounts[0].name=certificate", "extraVolumeMounts[0].mountPath=/etc/certificate"},
			has: []string{"secretName: wildcard", "mountPath: /etc/certificate"},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			var args []string
			for _, v := range c.values {
				args = append(args, "--set", v)
			}
			text, err := templateEdge(t, args...)
			if err != nil {
				t.Fatal(err)
			}
			for _, part := range c.has {
				if !strings.Contains(text, part) {
					t.Errorf("%q is missing in\n%s", part, text)
				}
			}
			for _, part := range c.lacks {
				if strings.Contains(text, part) {
					t.Errorf("%q is in\n%s", part, text)
				}
			}
			look := env.Kubectl(t.Context(), "apply", "--dry-run=server", "-f", "-")
			look.Stdin = strings.NewReader(text)
			if out, err := look.CombinedOutput(); err != nil {
				t.Errorf("%v: %s", err, out)
			}
		})
	}
	for value, says := range map[string]string{
		"config.state=/elsewhere":         "state",
		"config.startup-wait=30s":         "startup-wait",
		"config.etcd-endpoints=https://x": "etcd-endpoints",
		"config.UPPER=1":                  "UPPER",
		"config.nested.value=1":           "/config/nested",
		"domain=Not.A.Domain":             "/domain",
		"tcpPorts.count=0":                "/tcpPorts/count",
		"tcpPorts.first=443":              "/tcpPorts/first",
		"service.web.type=ExternalName":   "/service/web/type",
		"service.admin.type=LoadBalancer": "type",
		"service.web.nodePorts.other=1":   "other",
		"persistence.size=much":           "/persistence/size",
		"logLevel=loud":                   "/logLevel",
		"replicas=2":                      "replicas",
	} {
		if text, err := templateEdge(t, "--set", value); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("with %s: %v\n%s", value, err, text)
		}
	}
}

// notes returns the commands that the chart's notes give, up to the first empty line: those that install mysocket-injector.
func notes(t *testing.T, installed string) string {
	t.Helper()
	_, text, found := strings.Cut(installed, "NOTES:\n")
	begin := strings.Index(text, "  kubectl ")
	if !found || begin < 0 {
		t.Fatalf("helm gives no notes with commands:\n%s", installed)
	}
	commands, _, _ := strings.Cut(text[begin:], "\n\n")
	return commands
}

// edgeRelease is an edge that the chart installed in the cluster, and the control plane that its notes installed.
type edgeRelease struct {
	*stage
	caFile string
}

// installEdge installs the edge's chart in a namespace that takes only restricted pods, on a volume made by hand, for this cluster has
// nothing that makes volumes.
func installEdge(t *testing.T) (*edgeRelease, string) {
	t.Helper()
	s := newStage(t, "pod-security.kubernetes.io/enforce=restricted")
	e := &edgeRelease{stage: s}
	dir := "/var/tmp/mysocket-e2e-volume-" + s.ns
	onNode := func(ctx context.Context, args ...string) {
		if out, err := env.Enter(ctx, args...).CombinedOutput(); err != nil {
			t.Errorf("%v: %v: %s", args, err, out)
		}
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
		defer cancel()
		if t.Failed() {
			for _, args := range [][]string{{"describe", "pods"}, {"logs", "edge-0", "--all-containers", "--tail=60"}, {"logs", "-l", controlPlaneSelector, "--tail=40"}} {
				out, err := env.Kube(ctx, append([]string{"-n", s.ns}, args...)...)
				t.Logf("%v: %v\n%s", args, err, out)
			}
		}
		// The namespace must not go before the control plane has let go of what it holds.
		for _, release := range []string{lab.Release, "edge"} {
			if out, err := env.Helm(ctx, "uninstall", release, "-n", s.ns, "--wait", "--ignore-not-found").CombinedOutput(); err != nil {
				t.Errorf("helm uninstall: %v: %s", err, out)
			}
		}
		for _, args := range [][]string{{"delete", "namespace", s.ns, "--timeout=90s"}, {"delete", "persistentvolume", s.ns, "--ignore-not-found", "--timeout=30s"}} {
			if _, err := env.Kube(ctx, args...); err != nil {
				t.Error(err)
			}
		}
		onNode(ctx, "rm", "-rf", dir)
	})
	onNode(s.ctx, "mkdir", "-p", dir)
	s.apply(fmt.Sprintf(`apiVersion: v1
kind: PersistentVolume
metadata: {name: %[1]s}
spec:
  capacity: {storage: 1Gi}
  accessModes: [ReadWriteOnce]
  claimRef: {namespace: %[1]s, name: state-edge-0}
  local: {path: %[2]s}
  nodeAffinity:
    required: {nodeSelectorTerms: [{matchExpressions: [{key: kubernetes.io/hostname, operator: In, values: [%[3]s]}]}]}
`, s.ns, dir, cluster.NodeName))
	password := filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(password, []byte(rand.Text()), 0o600); err != nil {
		t.Fatal(err)
	}
	s.kube("create", "secret", "generic", "edge-account", "--from-literal=email=you@example.com", "--from-file=password="+password)
	install := env.Helm(s.ctx, "install", "edge", edgeChart, "--namespace", s.ns, "--set", "account.existingSecret=edge-account",
		"--set", "persistence.storageClass=-", "--set", "service.admin.enabled=true",
		"--set", "image.repository="+cluster.ImageRepository+"mysocket-edge", "--set", "image.tag="+lab.Tag)
	install.Dir = env.Root
	out, err := install.CombinedOutput()
	if err != nil {
		t.Fatalf("helm install: %v: %s", err, out)
	}
	return e, notes(t, string(out))
}

// follow runs commands as a user would who has kubectl, helm and the repository, with further values of the control plane's chart.
func (e *edgeRelease) follow(commands string, values ...string) {
	e.t.Helper()
	dir := e.t.TempDir()
	if err := os.Symlink(filepath.Join(env.Root, "charts"), filepath.Join(dir, "charts")); err != nil {
		e.t.Fatal(err)
	}
	e.caFile = filepath.Join(dir, "edge-ca.pem")
	shell := exec.CommandContext(e.ctx, "bash", "-euxc", commands+" "+strings.Join(values, " "))
	shell.Dir = dir
	shell.Env = append(os.Environ(), "KUBECONFIG="+env.Kubeconfig, "PATH="+env.BinDir+":"+os.Getenv("PATH"))
	if out, err := shell.CombinedOutput(); err != nil {
		e.t.Fatalf("the notes: %v: %s", err, out)
	}
}

// visitor is somebody who comes in through the edge's Service and trusts its authority.
func (e *edgeRelease) visitor() *http.Client {
	e.t.Helper()
	var svc service
	e.get(e.path("services/edge-web"), &svc)
	ca, err := os.ReadFile(e.caFile)
	if err != nil {
		e.t.Fatal(err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(ca) {
		e.t.Fatalf("%s holds no certificate", e.caFile)
	}
	return &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		TLSClientConfig:   &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12},
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, network, svc.Spec.ClusterIP+":443")
		},
	}}
}

// tunnelsOf counts the tunnels that the edge says are connected.
func (e *edgeRelease) tunnels() (int, error) {
	var svc service
	e.get(e.path("services/edge-admin"), &svc)
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	res, err := client.Get("http://" + svc.Spec.ClusterIP + ":9090/debug/tunnels")
	if err != nil {
		return 0, err
	}
	defer func() { _ = res.Body.Close() }()
	var all []lab.Socket
	if err := json.NewDecoder(res.Body).Decode(&all); err != nil {
		return 0, err
	}
	n := 0
	for _, k := range all {
		n += len(k.Tunnels)
	}
	return n, nil
}

// awaitTunnels waits until the edge has three.
func (e *edgeRelease) awaitTunnels() {
	e.t.Helper()
	e.await(patience, "three tunnels", func() error {
		n, err := e.tunnels()
		if err == nil && n != 3 {
			err = fmt.Errorf("there are %d", n)
		}
		return err
	})
}

// spread asks 60 times and wants each of three pods to answer 20 times.
func (e *edgeRelease) spread(url string) {
	e.t.Helper()
	client := e.visitor()
	answers := map[string]int{}
	for range 60 {
		pod, err := ask(e.ctx, client, url)
		if err != nil {
			e.t.Fatal(err)
		}
		answers[pod]++
	}
	e.t.Logf("60 requests to %s: %v", url, answers)
	if counts := slices.Collect(maps.Values(answers)); len(counts) != 3 || slices.Min(counts) != 20 {
		e.t.Errorf("60 requests were answered by %v, want 20 by each of three", answers)
	}
}

// TestEdgeInTheCluster installs the edge's chart, and then the control plane as its notes say, in the place of the lab's. Visitors of the
// edge's Service are spread over the pods of an annotated Service; a new pod of the edge has the old one's state, and the sidecars come
// back to it by themselves.
func TestEdgeInTheCluster(t *testing.T) {
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
		defer cancel()
		if err := env.Install(ctx); err != nil {
			t.Error(err)
		}
	})
	if out, err := env.Helm(t.Context(), "uninstall", lab.Release, "-n", lab.Namespace, "--wait", "--timeout=4m").CombinedOutput(); err != nil {
		t.Fatalf("helm uninstall: %v: %s", err, out)
	}
	e, commands := installEdge(t)
	e.follow(commands, "--wait",
		"--set", "image.repository="+cluster.ImageRepository+"webhook", "--set", "image.tag="+lab.Tag,
		"--set", "sidecar.image.repository="+cluster.ImageRepository+"tunnel-sidecar", "--set", "sidecar.image.tag="+lab.Tag)

	s := newStage(t, injectable)
	s.apply(s.demoApp("service.yaml"))
	s.annotate(web, enabled)
	s.deploy(3)
	s.awaitCondition(web, socketReady, "True", "Ready", "https://")
	s.awaitCondition(web, tunnelsReady, "True", "AllConnected", "3 of 3 pods connected")
	s.rolledOut()
	url := s.url(web)
	if !strings.HasSuffix(url, ".edge.mysocket.test") {
		t.Fatalf("the public URL is %s", url)
	}
	e.awaitTunnels()
	e.spread(url)

	var before, after pod
	e.get(e.path("pods/edge-0"), &before)
	at := time.Now()
	e.kube("delete", "pod", "edge-0", "--wait=false")
	e.await(patience, "the edge's next pod", func() error {
		after = pod{}
		if err := env.api.get(e.ctx, e.path("pods/edge-0"), &after); err != nil {
			return err
		}
		if after.Metadata.UID == before.Metadata.UID || !after.ready() {
			return errors.New("it is not there")
		}
		return nil
	})
	ready := time.Since(at)
	e.awaitTunnels()
	t.Logf("after its pod was deleted the edge was ready within %s, and all tunnels were back within %s",
		ready.Round(100*time.Millisecond), time.Since(at).Round(100*time.Millisecond))
	e.spread(url)
	if now := s.url(web); now != url {
		t.Errorf("the public URL was %s, and is %s", url, now)
	}
}
