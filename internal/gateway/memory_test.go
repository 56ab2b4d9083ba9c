package gateway

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/mysocketio/mysocket-injector/internal/annotations"
	"github.com/mysocketio/mysocket-injector/internal/gatewayapi"
	"github.com/mysocketio/mysocket-injector/internal/kubetest"
)

// memoryCluster is a cluster of pods and Services in memory. Like the informers it hands out what it has, without copies.
// The token of a pod is "namespace/name/uid"; any other is refused.
type memoryCluster struct {
	client.Client // the rest is not called
	changes       *Changes
	reviews       atomic.Int64
	lists         atomic.Int64
	now           func() time.Time

	mu       sync.Mutex
	pods     map[client.ObjectKey]*corev1.Pod
	services map[string][]corev1.Service
}

func newMemoryCluster() *memoryCluster {
	return &memoryCluster{changes: &Changes{}, now: time.Now, pods: map[client.ObjectKey]*corev1.Pod{}, services: map[string][]corev1.Service{}}
}

// pod makes a pod of the namespace shop, labelled app=web, and returns its token.
func (c *memoryCluster) pod(name string) (token string) {
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, UID: types.UID("uid-of-" + name), Labels: map[string]string{
		"app": "web", "pod-template-hash": "5d4f8c7b9", "tier": "front"}}}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pods[client.ObjectKeyFromObject(pod)] = pod
	return "shop/" + name + "/" + string(pod.UID)
}

func (c *memoryCluster) deletePod(name string) {
	key := client.ObjectKey{Namespace: "shop", Name: name}
	c.mu.Lock()
	pod := c.pods[key]
	delete(c.pods, key)
	c.mu.Unlock()
	c.changes.notify(pod)
}

// service makes or replaces the nth Service of the namespace shop.
func (c *memoryCluster) service(n int, app string, port int32) {
	svc := corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: fmt.Sprintf("service-%04d", n), Annotations: map[string]string{
			annotations.Enabled: "true", annotations.SocketID: fmt.Sprintf("00000000-0000-4000-8000-%012d", n), annotations.URL: fmt.Sprintf("https://%032d.edge.example", n)}},
		Spec: corev1.ServiceSpec{Selector: map[string]string{"app": app}, Ports: []corev1.ServicePort{{Port: port}}},
	}
	c.mu.Lock()
	list := append([]corev1.Service(nil), c.services["shop"]...)
	for len(list) <= n {
		list = append(list, corev1.Service{})
	}
	list[n] = svc
	c.services["shop"] = list
	c.mu.Unlock()
	c.changes.notify(&svc)
}

func (c *memoryCluster) Create(_ context.Context, obj client.Object, _ ...client.CreateOption) error {
	review, ok := obj.(*authenticationv1.TokenReview)
	if !ok {
		return fmt.Errorf("no %T is made here", obj)
	}
	c.reviews.Add(1)
	part := strings.Split(review.Spec.Token, "/")
	if len(part) != 3 {
		return nil
	}
	review.Status = authenticationv1.TokenReviewStatus{Authenticated: true, Audiences: []string{gatewayapi.Audience}, User: authenticationv1.UserInfo{
		Username: "system:serviceaccount:" + part[0] + ":app", Extra: map[string]authenticationv1.ExtraValue{extraPodName: {part[1]}, extraPodUID: {part[2]}}}}
	return nil
}

func (c *memoryCluster) Get(_ context.Context, key client.ObjectKey, obj client.Object, _ ...client.GetOption) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	into, isPod := obj.(*corev1.Pod)
	pod, ok := c.pods[key]
	if !isPod || !ok {
		return apierrors.NewNotFound(corev1.Resource("pods"), key.Name)
	}
	*into = *pod
	return nil
}

func (c *memoryCluster) List(_ context.Context, list client.ObjectList, opts ...client.ListOption) error {
	c.lists.Add(1)
	var o client.ListOptions
	o.ApplyOptions(opts)
	c.mu.Lock()
	defer c.mu.Unlock()
	list.(*corev1.ServiceList).Items = c.services[o.Namespace]
	return nil
}

// memoryServer is a gateway of a memoryCluster, and the address at which it serves as the program does.
type memoryServer struct {
	*Server
	cluster *memoryCluster
	address string
}

func (c *memoryCluster) serve(t testing.TB, change func(*limits)) *memoryServer {
	t.Helper()
	l := defaultLimits()
	if change != nil {
		change(&l)
	}
	s, err := newServer(Config{Cache: c, Live: c, API: worldAPI{}, Changes: c.changes, EdgeAddress: "edge.example:22", Log: discard()}, l, c.now)
	if err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	certificate := httptest.NewTLSServer(nil)
	certificate.Close()
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() {
		served <- s.Serve(ctx, listener, &tls.Config{Certificates: certificate.TLS.Certificates, MinVersion: tls.VersionTLS12})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return &memoryServer{s, c, listener.Addr().String()}
}

// peer is a connection to a gateway.
type peer struct {
	net.Conn
	t      testing.TB
	reader *bufio.Reader
}

// dialTCP connects without a TLS handshake.
func (s *memoryServer) dialTCP(t testing.TB) *peer {
	t.Helper()
	c, err := net.Dial("tcp", s.address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return &peer{c, t, bufio.NewReader(c)}
}

func (s *memoryServer) dial(t testing.TB) *peer {
	t.Helper()
	below := s.dialTCP(t)
	c := tls.Client(below.Conn, &tls.Config{InsecureSkipVerify: true})
	_ = c.SetDeadline(time.Now().Add(kubetest.Patience))
	if err := c.Handshake(); err != nil {
		t.Fatal(err)
	}
	return &peer{c, t, bufio.NewReader(c)}
}

// send sends text as it is.
func (p *peer) send(text string) {
	p.t.Helper()
	if _, err := io.WriteString(p, text); err != nil {
		p.t.Fatal(err)
	}
}

func (p *peer) request(method, path, token, body string) {
	p.t.Helper()
	p.send(fmt.Sprintf("%s %s HTTP/1.1\r\nHost: gateway\r\nAuthorization: Bearer %s\r\nContent-Length: %d\r\n\r\n%s", method, path, token, len(body), body))
}

// answer reads an answer whole, but not a stream.
func (p *peer) answer() *http.Response {
	p.t.Helper()
	r, err := http.ReadResponse(p.reader, nil)
	if err != nil {
		p.t.Fatalf("no answer: %v", err)
	}
	if r.StatusCode == http.StatusOK {
		return r
	}
	defer func() { _ = r.Body.Close() }()
	text, err := io.ReadAll(r.Body)
	if err != nil {
		p.t.Fatalf("half an answer: %v", err)
	}
	r.Status += " " + string(text)
	return r
}

// closed wants the gateway to close the connection, whatever it says before that.
func (p *peer) closed() {
	p.t.Helper()
	_ = p.SetReadDeadline(time.Now().Add(kubetest.Patience))
	_, err := io.Copy(io.Discard, p.reader)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		p.t.Error("the connection stays open")
	}
}

// stream opens a stream and reads its first line.
func (p *peer) stream(token string) {
	p.t.Helper()
	p.request("GET", gatewayapi.AssignmentsPath, token, "")
	if r := p.answer(); r.StatusCode != http.StatusOK {
		p.t.Fatalf("stream: %s", r.Status)
	}
	p.line()
}

// line is the next line that is no heartbeat.
func (p *peer) line() string {
	p.t.Helper()
	_ = p.SetReadDeadline(time.Now().Add(kubetest.Patience))
	for {
		text, err := p.reader.ReadString('\n')
		if err != nil {
			p.t.Fatalf("no line: %v", err)
		}
		if text != "\n" {
			return text
		}
	}
}

const memorySocket = gatewayapi.SocketsPath + "00000000-0000-4000-8000-000000000000"
