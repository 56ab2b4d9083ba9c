package gateway

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	toolscache "k8s.io/client-go/tools/cache"
	"k8s.io/utils/ptr"

	"github.com/mysocketio/mysocket-injector/internal/annotations"
	"github.com/mysocketio/mysocket-injector/internal/gatewayapi"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/gatewayclient"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/retry"
)

func assign(services []corev1.Service, pod *corev1.Pod, cluster string) []gatewayapi.Assignment {
	return newOffers(services, annotations.Names{Cluster: cluster}).assign(pod)
}

func TestAssign(t *testing.T) {
	id := func(n int) string { return fmt.Sprintf("00000000-0000-4000-8000-%012d", n) }
	service := func(name string, n int, change func(*corev1.Service)) corev1.Service {
		svc := corev1.Service{
			ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, Annotations: map[string]string{
				annotations.Enabled: "true", annotations.SocketID: id(n), annotations.URL: "https://" + name + ".example",
			}},
			Spec: corev1.ServiceSpec{Selector: map[string]string{"app": "web"}, Ports: []corev1.ServicePort{{Port: 80, TargetPort: intstr.FromString("http")}}},
		}
		if change != nil {
			change(&svc)
		}
		return svc
	}
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"app": "web"}},
		Spec:       corev1.PodSpec{Containers: []corev1.Container{{Ports: []corev1.ContainerPort{{Name: "http", ContainerPort: 8080}}}}},
	}
	got := assign([]corev1.Service{
		service("web", 2, func(svc *corev1.Service) {
			svc.Spec.PublishNotReadyAddresses = true
			svc.Annotations[annotations.Connections] = "3"
			svc.Annotations[annotations.ProxyProtocol] = "v2"
		}),
		service("api", 1, nil),
		service("second-of-one-socket", 1, nil),
		service("not-enabled", 3, func(svc *corev1.Service) { svc.Annotations[annotations.Enabled] = "false" }),
		service("wrong", 3, func(svc *corev1.Service) { svc.Annotations[annotations.Type] = "x" }),
		service("not-guarded", 3, func(svc *corev1.Service) { svc.Annotations[annotations.AllowedEmails] = "ann@example.com" }),
		service("guard-taken-back", 3, func(svc *corev1.Service) {
			svc.Annotations[annotations.AllowedEmails] = "ann@example.com"
			svc.Annotations[annotations.Applied] = "upstream,access-ending"
		}),
		service("guarded", 5, func(svc *corev1.Service) {
			svc.Annotations[annotations.AllowedEmails] = "ann@example.com"
			svc.Annotations[annotations.UpstreamType] = "https"
			svc.Annotations[annotations.Applied] = "access"
		}),
		service("balancer", 6, func(svc *corev1.Service) {
			delete(svc.Annotations, annotations.Enabled)
			svc.Spec.Type, svc.Spec.LoadBalancerClass = corev1.ServiceTypeLoadBalancer, ptr.To(annotations.LoadBalancerClass)
		}),
		service("other-pods", 3, func(svc *corev1.Service) { svc.Spec.Selector["app"] = "other" }),
		service("no-such-port", 3, func(svc *corev1.Service) { svc.Spec.Ports[0].TargetPort = intstr.FromString("grpc") }),
		service("going", 3, func(svc *corev1.Service) { now := metav1.Now(); svc.DeletionTimestamp = &now }),
		service("no-socket", 3, func(svc *corev1.Service) { delete(svc.Annotations, annotations.SocketID) }),
		service("tampered-id", 3, func(svc *corev1.Service) { svc.Annotations[annotations.SocketID] = "../x" }),
		service("tampered-url", 4, func(svc *corev1.Service) { svc.Annotations[annotations.URL] = strings.Repeat("x", 1<<17) }),
	}, pod, "north")
	want := []gatewayapi.Assignment{
		{SocketID: id(1), SocketName: "k8s north shop.api", Service: "api", URL: "https://api.example", Port: 8080, Connections: 1},
		{SocketID: id(6), SocketName: "k8s north shop.balancer", Service: "balancer", URL: "https://balancer.example", Port: 8080, Connections: 1},
		{SocketID: id(5), SocketName: "k8s north shop.guarded", Service: "guarded", URL: "https://guarded.example", Port: 8080, Connections: 1},
		{SocketID: id(4), SocketName: "k8s north shop.tampered-url", Service: "tampered-url", Port: 8080, Connections: 1},
		{SocketID: id(2), SocketName: "k8s north shop.web", Service: "web", URL: "https://web.example", Port: 8080, PublishNotReady: true, Connections: 3, ProxyProtocol: "v2"},
	}
	if !slices.Equal(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}

	// The most that fits into a line, with names as long as they can be.
	var many []corev1.Service
	for n := range gatewayapi.MaxAssignments + 10 {
		many = append(many, service(fmt.Sprintf("s%062d", n), n, func(svc *corev1.Service) {
			svc.Namespace = strings.Repeat("n", 63)
			svc.Annotations[annotations.URL] = strings.Repeat("u", maxURL)
		}))
	}
	most := assign(many, pod, strings.Repeat("c", 63))
	line, err := json.Marshal(gatewayapi.Snapshot{Assignments: most})
	if err != nil || len(most) != gatewayapi.MaxAssignments || len(line) > gatewayapi.MaxBodyBytes {
		t.Errorf("%d assignments in %d bytes, %v", len(most), len(line), err)
	}
	if snapshot, err := gatewayclient.ParseSnapshot(line); err != nil || len(snapshot.Assignments) != len(most) {
		t.Errorf("the sidecar does not take it: %v", err)
	}
	if none := assign(nil, pod, ""); none == nil {
		t.Error("no assignments are null in JSON")
	}
}

func TestChanges(t *testing.T) {
	c := &Changes{}
	web, stop := c.subscribe(identity{namespace: "shop", pod: "web-1"})
	api, stopAPI := c.subscribe(identity{namespace: "shop", pod: "api-1"})
	elsewhere, stopElsewhere := c.subscribe(identity{namespace: "other", pod: "web-1"})
	woken := func(ch <-chan struct{}) bool {
		select {
		case <-ch:
			return true
		default:
			return false
		}
	}
	in := func(ns, name string) metav1.ObjectMeta { return metav1.ObjectMeta{Namespace: ns, Name: name} }
	for name, tc := range map[string]struct {
		obj                 any
		web, api, elsewhere bool
	}{
		"a Service":         {&corev1.Service{ObjectMeta: in("shop", "web")}, true, true, false},
		"a pod":             {&corev1.Pod{ObjectMeta: in("shop", "web-1")}, true, false, false},
		"another pod":       {&corev1.Pod{ObjectMeta: in("shop", "web-2")}, false, false, false},
		"a tombstone":       {toolscache.DeletedFinalStateUnknown{Obj: &corev1.Pod{ObjectMeta: in("other", "web-1")}}, false, false, true},
		"an empty one":      {toolscache.DeletedFinalStateUnknown{}, false, false, false},
		"something unknown": {7, false, false, false},
	} {
		c.notify(tc.obj)
		c.notify(tc.obj) // nobody reads in between
		if w, a, e := woken(web), woken(api), woken(elsewhere); w != tc.web || a != tc.api || e != tc.elsewhere {
			t.Errorf("%s wakes web %v, api %v, elsewhere %v", name, w, a, e)
		}
	}
	for range maxStreams - 1 {
		if _, more := c.subscribe(identity{namespace: "shop", pod: "web-1"}); more == nil {
			t.Fatal("too few streams")
		} else {
			defer more()
		}
	}
	if _, more := c.subscribe(identity{namespace: "shop", pod: "web-1"}); more != nil {
		t.Error("a pod can open streams without end")
	}
	stop()
	if _, more := c.subscribe(identity{namespace: "shop", pod: "web-1"}); more == nil {
		t.Error("a stream that has ended still counts")
	} else {
		more()
	}
	stopAPI()
	stopElsewhere()
	if len(c.subscribers) != 1 {
		t.Errorf("subscribers %v", c.subscribers)
	}
}

// stream is an open assignment stream.
type stream struct {
	t     *testing.T
	lines chan string // closed at the end
	stop  context.CancelFunc
}

func (s *stage) stream(token string) *stream {
	s.t.Helper()
	ctx, cancel := context.WithCancel(s.t.Context())
	s.t.Cleanup(cancel)
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, s.http.URL+gatewayapi.AssignmentsPath, nil)
	if err != nil {
		s.t.Fatal(err)
	}
	r.Header.Set("Authorization", "Bearer "+token)
	resp, err := s.http.Client().Do(r)
	if err != nil {
		s.t.Fatal(err)
	}
	if resp.StatusCode != http.StatusOK || resp.Header.Get("Content-Type") != "application/x-ndjson" {
		s.t.Fatalf("stream: %d %s", resp.StatusCode, resp.Header)
	}
	out := &stream{t: s.t, lines: make(chan string, 100), stop: cancel}
	go func() {
		defer close(out.lines)
		defer func() { _ = resp.Body.Close() }()
		for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
			if lines.Text() != "" { // no heartbeat
				out.lines <- lines.Text()
			}
		}
	}()
	return out
}

// next is the next snapshot, which is to come within this time.
func (s *stream) next(within time.Duration) []gatewayapi.Assignment {
	s.t.Helper()
	select {
	case line, ok := <-s.lines:
		var snapshot struct {
			Assignments *[]gatewayapi.Assignment `json:"assignments"`
		}
		if err := json.Unmarshal([]byte(line), &snapshot); !ok || err != nil || snapshot.Assignments == nil {
			s.t.Fatalf("line %q, open %v, %v", line, ok, err)
		}
		return *snapshot.Assignments
	case <-time.After(within):
		s.t.Fatalf("no snapshot within %s", within)
		return nil
	}
}

// ended wants the stream to end without another line.
func (s *stream) ended() {
	s.t.Helper()
	select {
	case line, ok := <-s.lines:
		if ok {
			s.t.Errorf("another line: %s", line)
		}
	case <-time.After(10 * time.Second):
		s.t.Error("the stream does not end")
	}
}

func TestStream(t *testing.T) {
	s := newStage(t)
	pod, token := s.pod(s.ns, "web-1")
	st := s.stream(token)
	want := gatewayapi.Assignment{SocketID: s.socket.ID, SocketName: s.socket.Name, Service: "web", URL: s.socket.URL(), Port: 8000, Connections: 1, EdgeAddress: s.edge.SSHAddress}
	if got := st.next(10 * time.Second); len(got) != 1 || got[0] != want {
		t.Fatalf("got %+v, want %+v", got, want)
	}
	// An edit arrives within a second.
	cluster.Change(t, s.svc, func() { s.svc.Annotations[annotations.Port] = "admin" })
	want.Port = 9000
	if got := st.next(time.Second); len(got) != 1 || got[0] != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	// What does not concern the pod is no line: the next one is that of the second Service.
	cluster.Change(t, s.svc, func() { s.svc.Annotations["example.com/note"] = "x" })
	_, other := s.pod(s.ns, "other-1", func(pod *corev1.Pod) { pod.Labels["app"] = "other" })
	second, _ := s.service("api", nil)
	if got := st.next(time.Second); len(got) != 2 || got[0].Service != "api" || got[1] != want {
		t.Errorf("got %+v", got)
	}
	if got := s.stream(other).next(10 * time.Second); len(got) != 0 {
		t.Errorf("a pod that no Service selects gets %+v", got)
	}
	cluster.Delete(t, second)
	if got := st.next(time.Second); len(got) != 1 {
		t.Errorf("got %+v", got)
	}
	cluster.Change(t, s.svc, func() { delete(s.svc.Annotations, annotations.Enabled) })
	if got := st.next(time.Second); len(got) != 0 {
		t.Errorf("got %+v", got)
	}
	cluster.Change(t, s.svc, func() { s.svc.Annotations[annotations.Enabled] = "true" })
	if got := st.next(time.Second); len(got) != 1 {
		t.Errorf("got %+v", got)
	}
	// The labels of the pod count, too.
	cluster.Change(t, pod, func() { pod.Labels["app"] = "debug" })
	if got := st.next(time.Second); len(got) != 0 {
		t.Errorf("got %+v", got)
	}
	cluster.Delete(t, pod)
	st.ended()
}

func TestTooManyStreams(t *testing.T) {
	s := newStage(t)
	_, token := s.pod(s.ns, "web-1")
	first := s.stream(token)
	for range maxStreams - 1 {
		s.stream(token).next(10 * time.Second)
	}
	a := s.call(token, http.MethodGet, gatewayapi.AssignmentsPath, nil)
	a.want(t, http.StatusTooManyRequests, gatewayapi.ReasonTooMany, "has 8 assignment streams open already")
	first.next(10 * time.Second)
	first.stop()
	first.ended()
	deadline := time.Now().Add(10 * time.Second)
	for { // the server notices a moment later
		resp := s.tryStream(token)
		if resp == http.StatusOK {
			break
		}
		if resp != http.StatusTooManyRequests || time.Now().After(deadline) {
			t.Fatalf("answer %d", resp)
		}
	}
}

// tryStream opens a stream, closes it and returns the status.
func (s *stage) tryStream(token string) int {
	s.t.Helper()
	ctx, cancel := context.WithCancel(s.t.Context())
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, s.http.URL+gatewayapi.AssignmentsPath, nil)
	if err != nil {
		s.t.Fatal(err)
	}
	r.Header.Set("Authorization", "Bearer "+token)
	resp, err := s.http.Client().Do(r)
	if err != nil {
		s.t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	return resp.StatusCode
}

// TestServe runs the server as the program does, with the sidecar's own client in front of it, and stops it while a
// registration is under way: the stream ends at once, the registration goes through.
func TestServe(t *testing.T) {
	s := newStage(t)
	pod, token := s.pod(s.ns, "web-1")
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	served := make(chan error, 1)
	go func() {
		served <- s.server.Serve(ctx, listener, &tls.Config{Certificates: s.http.TLS.Certificates, MinVersion: tls.VersionTLS12})
	}()

	dir := t.TempDir()
	for name, text := range map[string][]byte{
		"token":  []byte(token),
		"ca.crt": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.http.Certificate().Raw}),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c, err := gatewayclient.New(gatewayclient.Config{
		URL: "https://" + listener.Addr().String(), TokenFile: filepath.Join(dir, "token"), CAFile: filepath.Join(dir, "ca.crt"),
		UserAgent: "test", Clock: retry.System(),
	})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	events := make(chan gatewayclient.Event, 10)
	streamed := make(chan error, 1)
	go func() {
		streamed <- c.Assignments(t.Context(), func(e gatewayclient.Event) { events <- e })
	}()
	if e := <-events; e.Err != nil || len(e.Snapshot.Assignments) != 1 {
		t.Fatalf("event %+v", e)
	}
	s.proxy.Fail("POST /socket/{}/tunnel", func(w http.ResponseWriter, r *http.Request, forward http.Handler) {
		cancel()
		if err := <-streamed; err == nil {
			t.Error("the stream ended without an error")
		}
		forward.ServeHTTP(w, r)
	})
	reg, err := c.Register(t.Context(), gatewayclient.Connection{SocketID: s.socket.ID}, newKey(t).line())
	if err != nil {
		t.Fatalf("the registration was cut off: %v", err)
	}
	if err := <-served; err != nil {
		t.Errorf("Serve: %v", err)
	}
	if obj, err := s.object(pod); err != nil || obj.Status.TunnelID != reg.TunnelID {
		t.Errorf("object %+v, %v", obj.Status, err)
	}
}

func TestServeFails(t *testing.T) {
	s, err := New(Config{Changes: &Changes{}, Log: discard()})
	if err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_ = listener.Close()
	if err := s.Serve(t.Context(), listener, &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return nil, nil }}); err == nil {
		t.Error("no error on a closed listener")
	}
}
