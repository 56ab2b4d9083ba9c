package gateway

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/mysocketio/mysocket-injector/api/v1alpha1"
	"github.com/mysocketio/mysocket-injector/internal/annotations"
	"github.com/mysocketio/mysocket-injector/internal/edge/edgetest"
	"github.com/mysocketio/mysocket-injector/internal/gatewayapi"
	"github.com/mysocketio/mysocket-injector/internal/kubetest"
	"github.com/mysocketio/mysocket-injector/internal/mysocket"
	"github.com/mysocketio/mysocket-injector/internal/mysocket/mysockettest"
)

var cluster kubetest.Cluster

func TestMain(m *testing.M) {
	if os.Getenv(benchPeers) != "" {
		os.Exit(peersMain(os.Getenv(benchPeers), os.Stdout))
	}
	os.Exit(kubetest.Main(m, &cluster))
}

// stage is a namespace with a gateway in front of a real API server and a real edge. In it, the Service web has a socket
// and selects the pods labelled app=web.
type stage struct {
	t      *testing.T
	ns     string
	edge   *edgetest.Edge
	proxy  *mysockettest.Proxy
	api    *mysocket.Client
	server *Server
	http   *httptest.Server
	svc    *corev1.Service
	socket mysocket.Socket
}

func newStage(t *testing.T, changes ...func(*stage)) *stage {
	t.Helper()
	s := &stage{t: t, ns: cluster.Namespace(t, nil), edge: edgetest.Start(t)}
	s.proxy = mysockettest.Start(t, s.edge)
	s.api = s.proxy.Client(t)
	for _, change := range changes {
		change(s)
	}
	s.svc, s.socket = s.service("web", nil)

	watched := &Changes{}
	var err error
	s.server, err = New(Config{
		Cache: s.informers(watched), Live: cluster.Client, API: s.api, Changes: watched,
		EdgeAddress: s.edge.SSHAddress, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	s.http = httptest.NewTLSServer(s.server)
	t.Cleanup(func() {
		s.http.CloseClientConnections()
		s.http.Close()
		s.server.streams.end()
	})
	return s
}

// informers is a running cache.
func (s *stage) informers(changes *Changes) client.Reader {
	s.t.Helper()
	c, err := cache.New(cluster.Config, cache.Options{Scheme: cluster.Scheme})
	if err != nil {
		s.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- c.Start(ctx) }()
	s.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			s.t.Errorf("cache: %v", err)
		}
	})
	if err := changes.Watch(ctx, c); err != nil {
		s.t.Fatal(err)
	}
	if !c.WaitForCacheSync(ctx) {
		s.t.Fatal("the cache did not start")
	}
	return c
}

// service makes an enabled Service with its socket.
func (s *stage) service(name string, more map[string]string) (*corev1.Service, mysocket.Socket) {
	s.t.Helper()
	socket, err := s.api.CreateSocket(s.t.Context(), mysocket.Socket{Name: "k8s " + s.ns + "." + name, Type: "http"})
	if err != nil {
		s.t.Fatal(err)
	}
	svc := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: s.ns, Name: name, Annotations: map[string]string{
			annotations.Enabled: "true", annotations.SocketID: socket.ID, annotations.URL: socket.URL(),
		}},
		Spec: corev1.ServiceSpec{Selector: map[string]string{"app": "web"}, Ports: []corev1.ServicePort{{Name: "http", Port: 8000}, {Name: "admin", Port: 9000}}},
	}
	for k, v := range more {
		svc.Annotations[k] = v
	}
	cluster.Create(s.t, svc)
	return svc, socket
}

// pod makes a pod in a namespace and returns it with a token that is bound to it, as its projected volume would have.
func (s *stage) pod(ns, name string, changes ...func(*corev1.Pod)) (*corev1.Pod, string) {
	s.t.Helper()
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name, Labels: map[string]string{"app": "web"}},
		Spec:       corev1.PodSpec{ServiceAccountName: "app", Containers: []corev1.Container{{Name: "app", Image: "example.com/app"}}},
		Status:     corev1.PodStatus{Phase: corev1.PodRunning},
	}
	for _, change := range changes {
		change(pod)
	}
	cluster.Create(s.t, pod)
	return pod, s.token(ns, []string{gatewayapi.Audience}, &authenticationv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: name, UID: pod.UID})
}

func (s *stage) token(ns string, audiences []string, bound *authenticationv1.BoundObjectReference) string {
	s.t.Helper()
	account := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "app"}}
	if err := cluster.Client.Create(s.t.Context(), account); client.IgnoreAlreadyExists(err) != nil {
		s.t.Fatal(err)
	}
	request := &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{Audiences: audiences, BoundObjectRef: bound}}
	if err := cluster.Client.SubResource("token").Create(s.t.Context(), account, request); err != nil {
		s.t.Fatal(err)
	}
	return request.Status.Token
}

// answer is what the gateway answered.
type answer struct {
	status int
	header http.Header
	body   []byte
}

func (s *stage) call(token, method, path string, body any) answer {
	s.t.Helper()
	var reader io.Reader = http.NoBody
	switch b := body.(type) {
	case nil:
	case string:
		reader = strings.NewReader(b)
	default:
		text, err := json.Marshal(b)
		if err != nil {
			s.t.Fatal(err)
		}
		reader = bytes.NewReader(text)
	}
	r, err := http.NewRequestWithContext(s.t.Context(), method, s.http.URL+path, reader)
	if err != nil {
		s.t.Fatal(err)
	}
	if token != "" {
		r.Header.Set("Authorization", "Bearer "+token)
	}
	resp, err := s.http.Client().Do(r)
	if err != nil {
		s.t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	return answer{resp.StatusCode, resp.Header, text}
}

// want wants a refusal with this reason and part of its message.
func (a answer) want(t *testing.T, status int, reason gatewayapi.Reason, message string) {
	t.Helper()
	var e gatewayapi.Error
	if err := json.Unmarshal(a.body, &e); err != nil || a.status != status || e.Reason != reason || !strings.Contains(e.Message, message) || e.Message == "" {
		t.Errorf("answer %d %s\nwant   %d %s with %q", a.status, a.body, status, reason, message)
	}
}

func (s *stage) tunnelsPath(socket string) string {
	return gatewayapi.SocketsPath + socket + "/tunnels"
}

func (s *stage) certificatePath(tunnel string) string {
	return s.tunnelsPath(s.socket.ID) + "/" + tunnel + "/certificate"
}

func (s *stage) register(token string, key *key) gatewayapi.Registration {
	s.t.Helper()
	return s.registration(s.call(token, http.MethodPost, s.tunnelsPath(s.socket.ID), key.request()))
}

func (s *stage) registration(a answer) gatewayapi.Registration {
	s.t.Helper()
	var out gatewayapi.Registration
	if err := json.Unmarshal(a.body, &out); err != nil || a.status != http.StatusOK {
		s.t.Fatalf("answer %d %s", a.status, a.body)
	}
	return out
}

// atEdge lists the tunnels that the edge has for the socket.
func (s *stage) atEdge() []mysocket.Tunnel {
	s.t.Helper()
	list, err := s.proxy.Client(s.t).Tunnels(s.t.Context(), s.socket.ID)
	if err != nil {
		s.t.Fatal(err)
	}
	return list
}

// object reads the Tunnel of a pod for the stage's socket.
func (s *stage) object(pod *corev1.Pod) (*v1alpha1.Tunnel, error) {
	t := &v1alpha1.Tunnel{}
	err := cluster.Client.Get(s.t.Context(), client.ObjectKey{Namespace: pod.Namespace, Name: tunnelName(pod.Name, string(pod.UID), s.socket.ID, 0)}, t)
	return t, err
}

// key is a sidecar's key.
type key struct {
	signer ssh.Signer
}

func newKey(t testing.TB) *key {
	t.Helper()
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := ssh.NewSignerFromKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return &key{signer}
}

func (k *key) line() string {
	return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(k.signer.PublicKey())))
}

func (k *key) request() gatewayapi.RegisterRequest {
	return gatewayapi.RegisterRequest{PublicKey: k.line()}
}

// connect logs in at the edge with a registration and asks for its forward.
func (k *key) connect(t *testing.T, reg gatewayapi.Registration) *ssh.Client {
	t.Helper()
	public, _, _, _, err := ssh.ParseAuthorizedKey([]byte(reg.Certificate))
	if err != nil {
		t.Fatal(err)
	}
	certificate, ok := public.(*ssh.Certificate)
	if !ok {
		t.Fatalf("%T is no certificate", public)
	}
	signer, err := ssh.NewCertSigner(certificate, k.signer)
	if err != nil {
		t.Fatal(err)
	}
	if len(reg.HostKeys) != 1 {
		t.Fatalf("host keys %q", reg.HostKeys)
	}
	hostKey, _, _, _, err := ssh.ParseAuthorizedKey([]byte(reg.HostKeys[0]))
	if err != nil {
		t.Fatal(err)
	}
	c, err := ssh.Dial("tcp", reg.EdgeAddress, &ssh.ClientConfig{User: reg.User, Auth: []ssh.AuthMethod{ssh.PublicKeys(signer)}, HostKeyCallback: ssh.FixedHostKey(hostKey)})
	if err != nil {
		t.Fatalf("log in at the edge: %v", err)
	}
	t.Cleanup(func() { _ = c.Close() })
	if _, err := c.Listen("tcp", fmt.Sprintf("%s:%d", reg.ForwardHost, reg.ForwardPort)); err != nil {
		t.Fatalf("ask for the forward: %v", err)
	}
	return c
}
