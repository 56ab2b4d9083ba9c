//go:build cluster

package tests

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/mysocketio/mysocket-injector/e2e/lab"
)

const (
	gatewayService  = "mysocket-injector-gateway"
	gatewayAudience = "mysocket-gateway"
	gatewayCA       = "mysocket-gateway-ca"
)

// gatewayCaller calls the gateway as a pod would.
type gatewayCaller struct {
	base string
	http *http.Client
}

func newGatewayCaller(s *stage) *gatewayCaller {
	s.t.Helper()
	var ca struct {
		Data map[string]string `json:"data"`
	}
	s.get(s.path("configmaps/"+gatewayCA), &ca)
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM([]byte(ca.Data["ca.crt"])) {
		s.t.Fatalf("ConfigMap %s holds no certificate", gatewayCA)
	}
	var svc service
	s.get("/api/v1/namespaces/"+lab.Namespace+"/services/"+gatewayService, &svc)
	tr := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, ServerName: gatewayService + "." + lab.Namespace + ".svc", MinVersion: tls.VersionTLS12}}
	s.t.Cleanup(tr.CloseIdleConnections)
	return &gatewayCaller{base: "https://" + svc.Spec.ClusterIP, http: &http.Client{Transport: tr, Timeout: 30 * time.Second}}
}

func (g *gatewayCaller) call(ctx context.Context, method, path, token string, body any) (int, string, error) {
	b, err := json.Marshal(body)
	if err != nil {
		return 0, "", err
	}
	req, err := http.NewRequestWithContext(ctx, method, g.base+path, bytes.NewReader(b))
	if err != nil {
		return 0, "", err
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	res, err := g.http.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer func() { _ = res.Body.Close() }()
	answer, err := io.ReadAll(io.LimitReader(res.Body, 1<<16))
	return res.StatusCode, string(answer), err
}

// sshPublicKey makes a key and returns its public half as a line in authorized_keys form.
func sshPublicKey(t *testing.T) string {
	t.Helper()
	key, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	const kind = "ssh-ed25519"
	var wire []byte
	for _, part := range [][]byte{[]byte(kind), key} {
		wire = binary.BigEndian.AppendUint32(wire, uint32(len(part)))
		wire = append(wire, part...)
	}
	return kind + " " + base64.StdEncoding.EncodeToString(wire)
}

// token makes a token of the namespace's ServiceAccount "default", bound to a pod if one is named.
func (s *stage) token(audience, pod string) string {
	s.t.Helper()
	args := []string{"create", "token", "default", "--audience", audience}
	if pod != "" {
		args = append(args, "--bound-object-kind", "Pod", "--bound-object-name", pod)
	}
	return s.kube(args...)
}

// testGatewayAuthorization calls the gateway for a socket as pods that serve it and pods that don't.
func testGatewayAuthorization(t *testing.T) {
	s := newStage(t, injectable)
	s.publish(1)
	other := newStage(t, injectable)
	other.publish(1)
	// A third pod, in the same namespace, that the Service does not select.
	s.apply(`apiVersion: v1
kind: Pod
metadata: {name: bystander, labels: {app: bystander}}
spec:
  terminationGracePeriodSeconds: 1
  containers: [{name: app, image: "localhost/mysocket-injector/demo-app:dev"}]`)
	s.kube("wait", "pod/bystander", "--for=condition=Ready", "--timeout="+patience.String())

	own := s.somePod()
	k, _ := s.socket(web)
	gateway := newGatewayCaller(s)
	register := map[string]string{"publicKey": sshPublicKey(t)}
	report := map[string]string{"state": "Connected", "message": "forged"}
	socket := "/v1/sockets/" + k.ID
	tunnel := socket + "/tunnels/" + k.Tunnels[0].ID

	for _, tc := range []struct {
		who    string
		token  string
		method string
		path   string
		body   any
		status int
		word   string
	}{
		{"its own pod", s.token(gatewayAudience, own), http.MethodPost, socket + "/tunnels", register, http.StatusOK, k.Tunnels[0].ID},
		{"a pod of another namespace registers", other.token(gatewayAudience, other.somePod()), http.MethodPost, socket + "/tunnels", register, http.StatusForbidden, "Forbidden"},
		{"a pod of another namespace renews", other.token(gatewayAudience, other.somePod()), http.MethodPost, tunnel + "/certificate", register, http.StatusForbidden, "Forbidden"},
		{"a pod of another namespace reports", other.token(gatewayAudience, other.somePod()), http.MethodPut, socket + "/status", report, http.StatusForbidden, "Forbidden"},
		{"a pod that is not selected registers", s.token(gatewayAudience, "bystander"), http.MethodPost, socket + "/tunnels", register, http.StatusForbidden, "Forbidden"},
		{"a pod that is not selected renews", s.token(gatewayAudience, "bystander"), http.MethodPost, tunnel + "/certificate", register, http.StatusForbidden, "Forbidden"},
		{"a pod that is not selected reports", s.token(gatewayAudience, "bystander"), http.MethodPut, socket + "/status", report, http.StatusForbidden, "Forbidden"},
		{"no token", "", http.MethodPost, socket + "/tunnels", register, http.StatusUnauthorized, "Unauthenticated"},
		{"no token, assignments", "", http.MethodGet, "/v1/assignments", nil, http.StatusUnauthorized, "Unauthenticated"},
		{"a made-up token", "abc.def.ghi", http.MethodPost, socket + "/tunnels", register, http.StatusUnauthorized, "Unauthenticated"},
		{"another audience", s.token("https://kubernetes.default.svc.cluster.local", own), http.MethodPost, socket + "/tunnels", register, http.StatusUnauthorized, "Unauthenticated"},
		{"a token that is bound to no pod", s.token(gatewayAudience, ""), http.MethodPost, socket + "/tunnels", register, http.StatusUnauthorized, "Unauthenticated"},
	} {
		status, answer, err := gateway.call(s.ctx, tc.method, tc.path, tc.token, tc.body)
		if err != nil || status != tc.status || !strings.Contains(answer, tc.word) {
			t.Errorf("%s: got %d %s, %v; want %d with %q", tc.who, status, answer, err, tc.status, tc.word)
		}
	}

	// Deleting what one does not have is no error, and deletes nothing.
	for _, token := range []string{other.token(gatewayAudience, other.somePod()), s.token(gatewayAudience, "bystander")} {
		if status, answer, err := gateway.call(s.ctx, http.MethodDelete, tunnel, token, nil); err != nil || status >= 500 {
			t.Errorf("delete another's tunnel: %d %s, %v", status, answer, err)
		}
	}
	s.holds(2*time.Second, "the tunnel", func() error {
		if now, _ := s.socket(web); now.Registered != 1 || len(now.Tunnels) != 1 || now.Tunnels[0].Remote != k.Tunnels[0].Remote {
			return fmt.Errorf("it is %+v, and was %+v", now, k)
		}
		for _, tun := range s.tunnels() {
			if tun.Status.Message != "" || tun.Spec.PodName != own {
				return fmt.Errorf("there is %+v", tun)
			}
		}
		return nil
	})
}
