package gateway

import (
	"crypto/tls"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/mysocketio/mysocket-injector/internal/gatewayapi"
	"github.com/mysocketio/mysocket-injector/internal/kubetest"
)

// TestStreamsEnd: with the pod, with the namespace (whose pods go first), with age, and when the sidecar goes.
func TestStreamsEnd(t *testing.T) {
	c := newMemoryCluster()
	s := c.serve(t, func(l *limits) { l.streamAge = time.Hour })
	ended := func(why string) float64 { return value(t, s.metrics.streamsEnded.WithLabelValues(why)) }
	open := func(name string) *peer {
		p := s.dial(t)
		p.stream(c.pod(name))
		return p
	}
	one, two, three := open("web-1"), open("web-2"), open("web-3")
	if n := value(t, s.metrics.streams); n != 3 {
		t.Errorf("%v streams", n)
	}
	c.deletePod("web-1")
	one.closed()
	waitFor(t, "the pod's stream to be counted", func() bool { return ended("pod_gone") == 1 })
	// The token was reviewed a moment ago, and is refused all the same.
	p := s.dial(t)
	p.request("GET", gatewayapi.AssignmentsPath, "shop/web-1/uid-of-web-1", "")
	if r := p.answer(); r.StatusCode != http.StatusUnauthorized || !strings.Contains(r.Status, "does not exist any more") {
		t.Errorf("answer %s", r.Status)
	}
	// Another pod of the same name is another pod.
	c.mu.Lock()
	for key, pod := range c.pods {
		if key.Name == "web-2" {
			successor := pod.DeepCopy()
			successor.UID = "another"
			c.pods[key] = successor
		}
	}
	c.mu.Unlock()
	c.changes.notify(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "web-2"}})
	two.closed()
	_ = three.Close()
	waitFor(t, "the sidecar's going to be noticed", func() bool { return ended("peer") == 1 && value(t, s.metrics.streams) == 0 })
	if len(c.changes.subscribers) != 0 {
		t.Errorf("subscribers %v", c.changes.subscribers)
	}

	const age = 300 * time.Millisecond
	s = c.serve(t, func(l *limits) { l.streamAge = age })
	token := c.pod("web-4")
	began := time.Now()
	p = s.dial(t)
	p.stream(token)
	p.closed()
	if took := time.Since(began); took < age*3/4 {
		t.Errorf("ended after %s", took)
	}
	waitFor(t, "the old stream to be counted", func() bool { return ended("age") == 1 })
}

// TestHeartbeats come again and again, before a change and after it, and do not put off the end.
func TestHeartbeats(t *testing.T) {
	c := newMemoryCluster()
	c.service(0, "web", 80)
	s := c.serve(t, func(l *limits) { l.heartbeat = time.Millisecond })
	p := s.dial(t)
	p.stream(c.pod("web-1"))
	beats := func(p *peer) {
		t.Helper()
		_ = p.SetReadDeadline(time.Now().Add(kubetest.Patience))
		for n := range 3 {
			if text, err := p.reader.ReadString('\n'); err != nil || text != "\n" {
				t.Fatalf("heartbeat %d is %q, %v", n, text, err)
			}
		}
	}
	beats(p)
	c.service(0, "web", 81)
	if text := p.line(); !strings.Contains(text, "81") {
		t.Errorf("the change came as %s", text)
	}
	beats(p)

	s = c.serve(t, func(l *limits) { l.heartbeat, l.streamAge = time.Millisecond, time.Second })
	p = s.dial(t)
	p.stream(c.pod("web-2"))
	beats(p)
	p.closed()
	waitFor(t, "the old stream to be counted", func() bool { return value(t, s.metrics.streamsEnded.WithLabelValues("age")) == 1 })
}

// TestStreamOverHTTP2 is refused, and Serve does not offer it.
func TestStreamOverHTTP2(t *testing.T) {
	c := newMemoryCluster()
	s := c.serve(t, nil)
	below := s.dialTCP(t)
	offered := tls.Client(below.Conn, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2", "http/1.1"}})
	if err := offered.Handshake(); err != nil || offered.ConnectionState().NegotiatedProtocol != "http/1.1" {
		t.Errorf("negotiated %q, %v", offered.ConnectionState().NegotiatedProtocol, err)
	}
	w := noHijacker{http.Header{}, new(int)}
	r, _ := http.NewRequest(http.MethodGet, gatewayapi.AssignmentsPath, nil)
	r.Header.Set("Authorization", "Bearer "+c.pod("web-1"))
	s.ServeHTTP(w, r)
	if *w.status != http.StatusHTTPVersionNotSupported || value(t, s.metrics.streams) != 0 || len(c.changes.subscribers) != 0 {
		t.Errorf("status %d, %v streams", *w.status, value(t, s.metrics.streams))
	}
}

type noHijacker struct {
	header http.Header
	status *int
}

func (w noHijacker) Header() http.Header         { return w.header }
func (w noHijacker) Write(b []byte) (int, error) { return len(b), nil }
func (w noHijacker) WriteHeader(status int)      { *w.status = status }

// TestOneListForAllStreams: however many streams a change wakes, the Services are read once.
func TestOneListForAllStreams(t *testing.T) {
	c := newMemoryCluster()
	for n := range 50 {
		c.service(n, fmt.Sprint("app-", n), 80)
	}
	c.service(50, "web", 80)
	s := c.serve(t, nil)
	var all []*peer
	for n := range 50 {
		p := s.dial(t)
		p.stream(c.pod(fmt.Sprint("web-", n)))
		all = append(all, p)
	}
	c.lists.Store(0)
	c.service(50, "web", 8080)
	for _, p := range all {
		if line := p.line(); !strings.Contains(line, `"service":"service-0050"`) || !strings.Contains(line, `"port":8080`) || strings.Contains(line, "service-0001") {
			t.Fatal(line)
		}
	}
	if n := c.lists.Load(); n != 1 {
		t.Errorf("%d lists", n)
	}
	// A change that is none for a pod is no line: the next is that of the one after.
	c.service(7, "app-7", 81)
	c.service(50, "web", 8081)
	for _, p := range all {
		if line := p.line(); !strings.Contains(line, `"port":8081`) {
			t.Fatal(line)
		}
	}
}

func TestMatters(t *testing.T) {
	service := func(change func(*corev1.Service)) *corev1.Service {
		svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "web", ResourceVersion: "1", Annotations: map[string]string{"a": "b"}},
			Spec: corev1.ServiceSpec{Selector: map[string]string{"app": "web"}, Ports: []corev1.ServicePort{{Port: 80}}}}
		if change != nil {
			change(svc)
		}
		return svc
	}
	pod := func(change func(*corev1.Pod)) *corev1.Pod {
		p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "web-1", Labels: map[string]string{"app": "web"}}}
		if change != nil {
			change(p)
		}
		return p
	}
	now := metav1.Now()
	for name, tc := range map[string]struct {
		was, now any
		want     bool
	}{
		"the informer's resync": {service(nil), service(nil), false},
		"a condition": {service(nil), service(func(s *corev1.Service) {
			s.ResourceVersion = "2"
			s.Status.Conditions = []metav1.Condition{{Type: "x"}}
		}), false},
		"a finalizer":             {service(nil), service(func(s *corev1.Service) { s.Finalizers = []string{"x"} }), false},
		"an annotation":           {service(nil), service(func(s *corev1.Service) { s.Annotations["a"] = "c" }), true},
		"an annotation that goes": {service(nil), service(func(s *corev1.Service) { s.Annotations = nil }), true},
		"a port":                  {service(nil), service(func(s *corev1.Service) { s.Spec.Ports[0].TargetPort = intstr.FromString("http") }), true},
		"the selector":            {service(nil), service(func(s *corev1.Service) { s.Spec.Selector["tier"] = "x" }), true},
		"its deletion":            {service(nil), service(func(s *corev1.Service) { s.DeletionTimestamp = &now }), true},
		"a successor":             {service(nil), service(func(s *corev1.Service) { s.UID = "2" }), true},
		"a pod's health":          {pod(nil), pod(func(p *corev1.Pod) { p.Status.Phase = corev1.PodRunning }), false},
		"a pod's label":           {pod(nil), pod(func(p *corev1.Pod) { p.Labels["app"] = "debug" }), true},
		"a pod's deletion":        {pod(nil), pod(func(p *corev1.Pod) { p.DeletionTimestamp = &now }), true},
		"something unknown":       {1, 2, true},
	} {
		if got := matters(tc.was, tc.now); got != tc.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// FuzzAssign holds the shared offers against the plain reading of each Service.
func FuzzAssign(f *testing.F) {
	f.Add("app=web", "app=web,tier=front")
	f.Add("app=web,tier=front", "app=web")
	f.Add("", "app=")
	f.Fuzz(func(t *testing.T, selector, labels string) {
		parse := func(s string) map[string]string {
			out := map[string]string{}
			for part := range strings.SplitSeq(s, ",") {
				if k, v, ok := strings.Cut(part, "="); ok {
					out[k] = v
				}
			}
			return out
		}
		c := newMemoryCluster()
		c.service(0, "web", 80)
		svc := c.services["shop"][0]
		svc.Spec.Selector = parse(selector)
		pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Labels: parse(labels)}}
		want := len(svc.Spec.Selector) > 0
		for k, v := range svc.Spec.Selector {
			if got, ok := pod.Labels[k]; !ok || got != v {
				want = false
			}
		}
		if got := assign([]corev1.Service{svc}, pod, ""); (len(got) == 1) != want {
			t.Errorf("selector %v, labels %v: %v", svc.Spec.Selector, pod.Labels, got)
		}
	})
}

func TestMetrics(t *testing.T) {
	c := newMemoryCluster()
	token := c.pod("web-1")
	registry := prometheus.NewRegistry()
	cfg := Config{Cache: c, Live: c, API: worldAPI{}, Changes: c.changes, Log: discard(), Registerer: registry}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := New(cfg); err == nil {
		t.Error("registered twice")
	}
	for _, r := range [][3]string{
		{"PUT", memorySocket + "/status", token}, {"PUT", memorySocket + "/status", "x"}, {"POST", memorySocket + "/tunnels", token},
		{"GET", memorySocket + "/status", token}, {"GET", "/etc/passwd", ""}, {"BREW", "/v1/%00/" + strings.Repeat("x", 100), "x"},
	} {
		request, err := http.NewRequest(r[0], r[1], strings.NewReader("{}"))
		if err != nil {
			t.Fatal(err)
		}
		request.Header.Set("Authorization", "Bearer "+r[2])
		s.ServeHTTP(noHijacker{http.Header{}, new(int)}, request)
	}
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, family := range families {
		for _, m := range family.GetMetric() {
			if m.GetCounter() == nil && m.GetHistogram() == nil {
				continue
			}
			var labels []string
			for _, l := range m.GetLabel() {
				labels = append(labels, l.GetName()+"="+l.GetValue())
			}
			got = append(got, fmt.Sprintf("%s{%s} %v", family.GetName(), strings.Join(labels, ","), m.GetCounter().GetValue()+float64(m.GetHistogram().GetSampleCount())))
		}
	}
	want := `mysocket_gateway_request_duration_seconds{endpoint=other} 3
mysocket_gateway_request_duration_seconds{endpoint=register} 1
mysocket_gateway_request_duration_seconds{endpoint=report} 2
mysocket_gateway_requests_total{code=400,endpoint=register} 1
mysocket_gateway_requests_total{code=400,endpoint=report} 1
mysocket_gateway_requests_total{code=401,endpoint=report} 1
mysocket_gateway_requests_total{code=404,endpoint=other} 2
mysocket_gateway_requests_total{code=405,endpoint=other} 1
mysocket_gateway_token_reviews_total{result=cached} 1
mysocket_gateway_token_reviews_total{result=invalid} 1
mysocket_gateway_token_reviews_total{result=valid} 1`
	if text := strings.Join(got, "\n"); text != want {
		t.Errorf("got\n%s\nwant\n%s", text, want)
	}
}
