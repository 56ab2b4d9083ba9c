//go:build cluster

package tests

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mysocketio/mysocket-injector/e2e/cluster"
	"github.com/mysocketio/mysocket-injector/e2e/lab"
)

const (
	servingCertificate = "mysocket-injector-serving"
	servingSecret      = "mysocket-injector-serving-tls"
	caSecret           = "mysocket-injector-ca"
	webhookName        = "mysocket-injector.mysocket-system.mysocket.io"

	// overlap is longer than the way of a CA to the sidecars here: this cluster's kubelet looks every 10 s.
	overlap = 20 * time.Second
)

// certManagerManifest runs cert-manager's controller. Of what it needs, its own chart gives it each right; here it has all.
const certManagerManifest = `
apiVersion: v1
kind: ServiceAccount
metadata: {name: cert-manager}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: cert-manager}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: cluster-admin}
subjects: [{kind: ServiceAccount, name: cert-manager, namespace: NAMESPACE}]
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: cert-manager}
spec:
  selector: {matchLabels: {app: cert-manager}}
  template:
    metadata: {labels: {app: cert-manager}}
    spec:
      serviceAccountName: cert-manager
      terminationGracePeriodSeconds: 1
      containers:
      - name: controller
        image: IMAGE
        imagePullPolicy: Never
        env: [{name: POD_NAMESPACE, value: NAMESPACE}]
`

// TestCertManager takes the control plane from its own certificates to cert-manager's and back, with renewals and a new CA in between,
// while pods are created and visitors come. Nobody notices.
func TestCertManager(t *testing.T) {
	checkControlPlaneLog(t)
	start := time.Now()
	installCertManager(t)
	t.Logf("cert-manager was there after %s", time.Since(start).Round(100*time.Millisecond))
	s := newStage(t, injectable)
	url := s.publish(2)
	before := s.pods()
	visitors := s.startLoad(url)
	admissions := s.startAdmissions()
	values := []string{"certificates.overlap=" + overlap.String()}
	install := func(more ...string) {
		t.Helper()
		checkControlPlaneLog(t)
		if err := env.Install(s.ctx, append(values, more...)...); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
		defer cancel()
		if err := env.Install(ctx); err != nil {
			t.Error(err)
		}
	})

	install("certificates.mode=cert-manager")
	s.awaitServed("cert-manager's certificate", func(c *x509.Certificate) error { return s.isIssued(c) })
	for _, p := range controlPlanePods(s) {
		text, err := fetch(s.ctx, "http://"+p.Status.PodIP+":8080/metrics")
		if err != nil {
			t.Fatal(err)
		}
		for _, want := range []string{"mysocket_certmanager_certificate_ready 1\n", `mysocket_certificate_expiry_seconds{certificate="leaf"}`, `mysocket_certificate_expiry_seconds{certificate="ca"}`} {
			if !strings.Contains(text, want) {
				t.Errorf("pod %s has no metric %s", p.Metadata.Name, want)
			}
		}
	}
	s.checkPublished("of cert-manager", secretCerts(t, caSecret, "tls.crt")[0])

	renew := func() {
		t.Helper()
		// As "cmctl renew" does it.
		cmd(t, "patch", "certificate", servingCertificate, "-n", lab.Namespace, "--subresource=status", "--type=json", "-p",
			`[{"op":"add","path":"/status/conditions/-","value":{"type":"Issuing","status":"True","reason":"ManuallyTriggered","message":"by a test"}}]`)
	}
	last := secretCerts(t, servingSecret, "tls.crt")[0]
	isNewer := func(c *x509.Certificate) error {
		if c.Equal(last) {
			return errors.New("it is still the old one")
		}
		return s.isIssued(c)
	}
	renew()
	s.awaitServed("a renewed certificate", isNewer)
	last = secretCerts(t, servingSecret, "tls.crt")[0]
	cmd(t, "delete", "secret", servingSecret, "-n", lab.Namespace)
	s.awaitServed("a certificate whose Secret was deleted", isNewer)

	// A new CA: it is published beside the old one before anything of it is served.
	last = secretCerts(t, servingSecret, "tls.crt")[0]
	oldCA := secretCerts(t, caSecret, "tls.crt")[0]
	cmd(t, "delete", "secret", caSecret, "-n", lab.Namespace)
	var newCA *x509.Certificate
	s.await(patience, "another CA", func() error {
		if cmd(t, "get", "secret", caSecret, "-n", lab.Namespace, "--ignore-not-found", "-o", "name") == "" {
			return errors.New("there is none")
		}
		if newCA = secretCerts(t, caSecret, "tls.crt")[0]; newCA.Equal(oldCA) {
			return errors.New("it is the old one")
		}
		return nil
	})
	renew()
	s.await(patience, "a certificate of the new CA", func() error {
		issued := secretCerts(t, servingSecret, "tls.crt")[0]
		if issued.CheckSignatureFrom(newCA) != nil {
			renew() // the issuer may not have seen the new CA yet
			return errors.New("it is of another")
		}
		return nil
	})
	s.checkPublished("of the CA in use and of the next", oldCA, newCA)
	if served, err := s.served(controlPlanePods(s)[0]); err != nil || served.CheckSignatureFrom(oldCA) != nil {
		t.Errorf("a certificate of the new CA is served at once, or none: %v", err)
	}
	s.awaitServed("a certificate of the new CA", isNewer)
	s.kube("scale", "deployment/"+web, "--replicas=3")
	s.awaitConnected(web, 3)

	install("certificates.mode=self")
	s.awaitServed("a certificate of our own", func(c *x509.Certificate) error {
		if !strings.HasPrefix(c.Issuer.CommonName, "mysocket-injector CA 2") { // with the time
			return fmt.Errorf("it is of %s", c.Issuer.CommonName)
		}
		return nil
	})
	s.kube("scale", "deployment/"+web, "--replicas=4")
	s.awaitConnected(web, 4)
	for name, p := range before {
		if n := s.pods()[name].restarts(); n != p.restarts() {
			t.Errorf("pod %s was restarted", name)
		}
		if log := s.kube("logs", name, "-c", sidecarName); strings.Contains(log, "x509") || strings.Contains(log, "tls:") {
			t.Errorf("the sidecar of pod %s did not trust the gateway once:\n%s", name, log)
		}
	}
	admissions.check(100)
	s.endLoad(visitors, start)
	t.Logf("all took %s", time.Since(start).Round(100*time.Millisecond))
}

// installCertManager builds and installs cert-manager, and removes it when the test ends.
func installCertManager(t *testing.T) {
	t.Helper()
	const namespace = "mysocket-e2e-cert-manager"
	ctx := t.Context()
	cm, err := cluster.BuildCertManager(ctx, cluster.Options{Out: t.Output()})
	if err != nil {
		t.Fatal(err)
	}
	if err := env.LoadImage(ctx, cm.Archive); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		defer cancel()
		for _, args := range [][]string{
			{"delete", "-f", cm.CRDs, "--ignore-not-found", "--timeout=1m"},
			{"delete", "namespace", namespace, "--ignore-not-found", "--timeout=1m"},
			{"delete", "clusterrolebinding", "cert-manager", "--ignore-not-found"},
			{"delete", "secret", servingSecret, caSecret, "-n", lab.Namespace, "--ignore-not-found"},
		} {
			if _, err := env.Kube(ctx, args...); err != nil {
				t.Error(err)
			}
		}
	})
	cmd(t, "apply", "--server-side", "-f", cm.CRDs)
	cmd(t, "create", "namespace", namespace)
	if err := env.Apply(ctx, namespace, strings.NewReplacer("IMAGE", cm.Ref, "NAMESPACE", namespace).Replace(certManagerManifest)); err != nil {
		t.Fatal(err)
	}
	cmd(t, "wait", "--for=condition=Established", "--timeout="+patience.String(), "crd/certificates.cert-manager.io", "crd/issuers.cert-manager.io")
	cmd(t, "rollout", "status", "deployment/cert-manager", "-n", namespace, "--timeout="+patience.String())
}

// secretCerts are the certificates under a key of a Secret of the control plane's namespace.
func secretCerts(t *testing.T, name, key string) []*x509.Certificate {
	t.Helper()
	text := cmd(t, "get", "secret", name, "-n", lab.Namespace, "-o", "jsonpath={.data."+strings.ReplaceAll(key, ".", `\.`)+"}")
	data, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		t.Fatal(err)
	}
	certs := parseCerts(data)
	if len(certs) == 0 {
		t.Fatalf("the Secret %s has no certificate under %s", name, key)
	}
	return certs
}

func parseCerts(data []byte) []*x509.Certificate {
	var out []*x509.Certificate
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		if c, err := x509.ParseCertificate(block.Bytes); err == nil {
			out = append(out, c)
		}
	}
	return out
}

// isIssued says whether a certificate is what is in cert-manager's Secret.
func (s *stage) isIssued(c *x509.Certificate) error {
	if cmd(s.t, "get", "secret", servingSecret, "-n", lab.Namespace, "--ignore-not-found", "-o", "name") == "" {
		return errors.New("cert-manager's Secret is not there")
	}
	if issued := secretCerts(s.t, servingSecret, "tls.crt")[0]; !issued.Equal(c) {
		return fmt.Errorf("it is not the one in cert-manager's Secret: it is of %s", c.Issuer.CommonName)
	}
	return nil
}

// served is the certificate that a replica of the control plane shows at its webhook's port. (The gateway lets strangers look only so often.)
func (s *stage) served(p pod) (*x509.Certificate, error) {
	// Only looked at, so it is not verified.
	dialer := &tls.Dialer{Config: &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS12}}
	conn, err := dialer.DialContext(s.ctx, "tcp", net.JoinHostPort(p.Status.PodIP, "10250"))
	if err != nil {
		return nil, err
	}
	defer func() { _ = conn.Close() }()
	return conn.(*tls.Conn).ConnectionState().PeerCertificates[0], nil
}

// awaitServed waits until all replicas show a certificate that is ok.
func (s *stage) awaitServed(what string, ok func(*x509.Certificate) error) {
	s.t.Helper()
	start := time.Now()
	s.await(patience, what, func() error {
		for _, p := range controlPlanePods(s) {
			c, err := s.served(p)
			if err == nil {
				err = ok(c)
			}
			if err != nil {
				return fmt.Errorf("pod %s: %w", p.Metadata.Name, err)
			}
		}
		return nil
	})
	s.t.Logf("%s: served after %s", what, time.Since(start).Round(100*time.Millisecond))
}

// checkPublished waits until the webhook configurations and the namespace's ConfigMap have these CAs.
func (s *stage) checkPublished(what string, cas ...*x509.Certificate) {
	s.t.Helper()
	s.await(patience, "the CAs "+what, func() error {
		bundles := map[string][]byte{"the ConfigMap": []byte(s.kube("get", "configmap", "mysocket-gateway-ca", "-o", `jsonpath={.data.ca\.crt}`))}
		for _, kind := range []string{"mutatingwebhookconfiguration", "validatingwebhookconfiguration"} {
			data, err := base64.StdEncoding.DecodeString(cmd(s.t, "get", kind, webhookName, "-o", "jsonpath={.webhooks[0].clientConfig.caBundle}"))
			if err != nil {
				return err
			}
			bundles[kind] = data
		}
		for where, bundle := range bundles {
			for _, ca := range cas {
				found := false
				for _, c := range parseCerts(bundle) {
					found = found || c.Equal(ca)
				}
				if !found {
					return fmt.Errorf("%s lacks the CA until %s", where, ca.NotAfter)
				}
			}
		}
		return nil
	})
}

// admissions creates pods in a dry run, in a steady pace.
type admissions struct {
	s    *stage
	stop func()
	done sync.WaitGroup

	mu       sync.Mutex
	total    int
	failures []failure
}

func (s *stage) startAdmissions() *admissions {
	s.t.Helper()
	ctx, cancel := context.WithCancel(s.ctx)
	a := &admissions{s: s, stop: cancel}
	s.t.Cleanup(func() { cancel(); a.done.Wait() })
	a.done.Go(func() {
		tick := time.NewTicker(200 * time.Millisecond)
		defer tick.Stop()
		for {
			err := s.admitted(ctx)
			if ctx.Err() != nil {
				return
			}
			a.mu.Lock()
			a.total++
			if err != nil {
				a.failures = append(a.failures, failure{time.Now(), "admission", "", err})
			}
			a.mu.Unlock()
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
		}
	})
	return a
}

// admitted says why a pod that is created now would lack the sidecar.
func (s *stage) admitted(ctx context.Context) error {
	body, err := json.Marshal(map[string]any{
		"apiVersion": "v1", "kind": "Pod",
		"metadata": map[string]any{"name": "dry-run", "labels": map[string]string{"app": web}},
		"spec":     map[string]any{"containers": []map[string]any{{"name": "app", "image": "app", "ports": []map[string]any{{"name": "http", "containerPort": 8000}}}}},
	})
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, env.api.server+s.path("pods")+"?dryRun=All", bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	res, err := env.api.http.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = res.Body.Close() }()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		return err
	}
	var p pod
	switch {
	case res.StatusCode != http.StatusCreated:
		return fmt.Errorf("%s: %s", res.Status, text)
	case json.Unmarshal(text, &p) != nil || !p.hasSidecar():
		return errors.New("the pod has no sidecar")
	}
	return nil
}

// check ends it and fails the test when one of the admissions failed, or when there were fewer.
func (a *admissions) check(atLeast int) {
	a.s.t.Helper()
	a.stop()
	a.done.Wait()
	a.s.t.Logf("%d admissions, %d failed", a.total, len(a.failures))
	if a.total < atLeast {
		a.s.t.Errorf("there were only %d admissions", a.total)
	}
	for i, f := range a.failures {
		if i == 10 {
			break
		}
		a.s.t.Error(f)
	}
}
