package controller

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mysocketio/mysocket-injector/internal/annotations"
	"github.com/mysocketio/mysocket-injector/internal/mysocket"
	"github.com/mysocketio/mysocket-injector/internal/mysocket/mysockettest"
)

// memory is a Mysocket API that takes every setting, in memory.
type memory struct {
	mu      sync.Mutex
	sockets []mysocket.Socket
	writes  int
	// before, when set, is called with what is to be written, and may refuse it or change it.
	before func(*mysocket.Socket) error
}

func (m *memory) Sockets(context.Context, time.Duration) ([]mysocket.Socket, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	list := slices.Clone(m.sockets)
	for i := range list {
		list[i].ProtectedPassword = "" // as the API answers
	}
	return list, nil
}

func (m *memory) CreateSocket(_ context.Context, s mysocket.Socket) (mysocket.Socket, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.writes++
	if m.before != nil {
		if err := m.before(&s); err != nil {
			return mysocket.Socket{}, err
		}
	}
	s.ID = fmt.Sprintf("00000000-0000-4000-8000-%012d", len(m.sockets)+1)
	s.DNSName = fmt.Sprintf("bold-fox-%d.example", len(m.sockets)+1)
	m.sockets = append(m.sockets, s)
	return s, nil
}

func (m *memory) UpdateSocket(_ context.Context, s mysocket.Socket) (mysocket.Socket, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.writes++
	if m.before != nil {
		if err := m.before(&s); err != nil {
			return mysocket.Socket{}, err
		}
	}
	i := slices.IndexFunc(m.sockets, func(k mysocket.Socket) bool { return k.ID == s.ID })
	if s.Protected && s.ProtectedPassword == "" {
		s.ProtectedPassword = m.sockets[i].ProtectedPassword
	}
	m.sockets[i] = s
	return s, nil
}

func (m *memory) DeleteSocket(_ context.Context, id string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.sockets = slices.DeleteFunc(m.sockets, func(k mysocket.Socket) bool { return k.ID == id })
	return nil
}

func (m *memory) DeleteTunnel(context.Context, string, string) error { return nil }

// with changes what is at the API behind the controller's back, or looks at it.
func (m *memory) with(do func(*mysocket.Socket)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	do(&m.sockets[0])
}

// take returns how often something was written since the last call.
func (m *memory) take() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := m.writes
	m.writes = 0
	return n
}

func wantApplied(t *testing.T, svc *corev1.Service, want string) {
	t.Helper()
	if got := svc.Annotations[annotations.Applied]; got != want {
		t.Errorf("annotation applied is %q, want %q", got, want)
	}
}

func guarded(t *testing.T, svc *corev1.Service) bool {
	t.Helper()
	spec, err := annotations.Parse(svc, annotations.Names{})
	if err != nil {
		t.Fatal(err)
	}
	return spec.Guarded(svc)
}

// TestAccess limits who may come in, changes that, and takes it back.
func TestAccess(t *testing.T) {
	s := newStage(t)
	api := &memory{}
	s.use = api
	svc := s.service(enabled(annotations.AllowedEmails, "bob@example.com, Ann@example.com"))
	s.mustReconcile(svc)
	wantApplied(t, svc, "access")
	api.with(func(k *mysocket.Socket) {
		if !k.CloudAuth || !slices.Equal(k.AllowedEmails, []string{"Ann@example.com", "bob@example.com"}) || len(k.AllowedDomains) != 0 {
			t.Errorf("made with %+v", k.Access)
		}
		k.AllowedEmails = []string{"ANN@example.com", "bob@example.com"} // as an API may write it back
	})
	if s.mustReconcile(svc); api.take() != 1 {
		t.Error("written again though nothing changed")
	}

	// Changed: the old limit holds until the new one does.
	cluster.Change(t, svc, func() {
		delete(svc.Annotations, annotations.AllowedEmails)
		svc.Annotations[annotations.AllowedEmailDomains] = "example.com"
	})
	api.before = func(*mysocket.Socket) error {
		cluster.Get(t, svc)
		if !guarded(t, svc) {
			t.Error("the pods stop serving while one limit is replaced by another")
		}
		return nil
	}
	s.mustReconcile(svc)
	api.before = nil
	api.with(func(k *mysocket.Socket) {
		if !k.CloudAuth || len(k.AllowedEmails) != 0 || !slices.Equal(k.AllowedDomains, []string{"example.com"}) {
			t.Errorf("changed to %+v", k.Access)
		}
	})

	// Taken off by somebody at the API: noted first, then put right.
	api.with(func(k *mysocket.Socket) { k.Access = nil })
	api.before = func(*mysocket.Socket) error {
		cluster.Get(t, svc)
		if guarded(t, svc) {
			t.Error("the pods serve a socket that lets everybody in")
		}
		return nil
	}
	s.mustReconcile(svc)
	api.before = nil
	wantApplied(t, svc, "access")

	// Taken back by its owner: not relied on from before the socket is opened.
	cluster.Change(t, svc, func() { delete(svc.Annotations, annotations.AllowedEmailDomains) })
	api.before = func(*mysocket.Socket) error {
		cluster.Get(t, svc)
		wantApplied(t, svc, "access-ending")
		return errTest
	}
	if _, err := s.reconcile(svc); err == nil {
		t.Error("no error")
	}
	api.before = nil
	s.mustReconcile(svc) // by a leader that knows of it only from the annotation
	wantApplied(t, svc, "")
	api.with(func(k *mysocket.Socket) {
		if k.CloudAuth || len(k.AllowedDomains) != 0 {
			t.Errorf("taken back to %+v", k.Access)
		}
		// What others set at the API is theirs.
		k.Access = &mysocket.Access{CloudAuth: true, AllowedDomains: []string{"example.org"}}
	})
	api.take()
	if s.mustReconcile(svc); api.take() != 0 {
		t.Error("somebody else's limit was taken off")
	}
}

var errTest = fmt.Errorf("the test's own error")

// TestAnAPIThatIgnoresAGuard must not leave a socket open that its owner wants closed.
func TestAnAPIThatIgnoresAGuard(t *testing.T) {
	s := newStage(t)
	api := &memory{before: func(k *mysocket.Socket) error { k.Access = nil; return nil }}
	s.use = api
	svc := s.service(enabled(annotations.AllowedEmails, "ann@example.com"))
	for range 2 {
		if got := s.mustReconcile(svc); !between(got.RequeueAfter, slowRetry/2, slowRetry) {
			t.Errorf("again after %s", got.RequeueAfter)
		}
	}
	wantCondition(t, svc, annotations.SocketReady, metav1.ConditionFalse, "SocketRefused", "is not limited to the e-mail addresses")
	if svc.Annotations[annotations.SocketID] != "" || guarded(t, svc) {
		t.Errorf("annotations %v", svc.Annotations)
	}
	if list, _ := api.Sockets(t.Context(), 0); len(list) != 1 {
		t.Errorf("%d sockets", len(list))
	}
}

// TestAccessAtOurEdge is refused with the edge's sentence; a Service that was public serves nothing from then on.
func TestAccessAtOurEdge(t *testing.T) {
	s := newStage(t)
	const sentence = "cloud authentication (allowed e-mail addresses and domains) is not supported by this edge"
	svc := s.service(enabled(annotations.AllowedEmailDomains, "example.com"))
	s.mustReconcile(svc)
	wantCondition(t, svc, annotations.SocketReady, metav1.ConditionFalse, "SocketRefused", sentence)
	s.wantEvent("Warning SocketRefused: ")
	if len(s.sockets()) != 0 {
		t.Error("a socket was made")
	}
	cluster.Change(t, svc, func() { delete(svc.Annotations, annotations.AllowedEmailDomains) })
	s.mustReconcile(svc)
	s.events.take()
	if !guarded(t, svc) || svc.Annotations[annotations.SocketID] == "" {
		t.Errorf("annotations %v", svc.Annotations)
	}
	cluster.Change(t, svc, func() { svc.Annotations[annotations.AllowedEmails] = "ann@example.com" })
	s.mustReconcile(svc)
	wantCondition(t, svc, annotations.SocketReady, metav1.ConditionFalse, "SocketRefused", sentence)
	wantCondition(t, svc, annotations.TunnelsReady, metav1.ConditionFalse, "NotRestrictedYet", "serve nothing")
	if guarded(t, svc) {
		t.Error("the pods serve on")
	}
}

// TestUpstream is set, changed and taken back at our edge, and refused by an edge that lacks it.
func TestUpstream(t *testing.T) {
	s := newStage(t)
	svc := s.service(enabled(annotations.UpstreamHTTPHostname, "shop.example.com"))
	host := func() string { return deref(s.sockets()[0].Upstream).UpstreamHTTPHostname }
	s.mustReconcile(svc)
	wantApplied(t, svc, "upstream")
	if host() != "shop.example.com" {
		t.Errorf("made with %q", host())
	}
	s.mustReconcile(svc)
	if n := s.proxy.Requests("PUT /socket/{}"); n != 0 {
		t.Errorf("%d updates though nothing changed", n)
	}
	cluster.Change(t, svc, func() {
		svc.Annotations[annotations.UpstreamHTTPHostname] = "www.example.com:8443"
		svc.Annotations[annotations.UpstreamType] = "http"
	})
	s.mustReconcile(svc)
	if host() != "www.example.com:8443" {
		t.Errorf("changed to %q", host())
	}
	s.events.take()
	cluster.Change(t, svc, func() { svc.Annotations[annotations.UpstreamType] = "https" })
	s.proxy.Fail("PUT /socket/{}", mysockettest.Answer(400, `{"error_message":"no https here"}`))
	s.mustReconcile(svc)
	wantCondition(t, svc, annotations.SocketReady, metav1.ConditionFalse, "SocketRefused", "no https here")
	if !guarded(t, svc) {
		t.Error("how the edge speaks to the app is no guard")
	}
	s.mustReconcile(svc)
	wantCondition(t, svc, annotations.SocketReady, metav1.ConditionTrue, "Ready", "")
	if kind := deref(s.sockets()[0].Upstream).UpstreamType; kind != "https" {
		t.Errorf("the upstream type is %q", kind)
	}
	// Taken back in the face of an API that fails, and then not.
	cluster.Change(t, svc, func() {
		delete(svc.Annotations, annotations.UpstreamHTTPHostname)
		delete(svc.Annotations, annotations.UpstreamType)
	})
	s.proxy.Fail("PUT /socket/{}", mysockettest.Answer(500, ""))
	if _, err := s.reconcile(svc); err == nil || svc.Annotations[annotations.Applied] != "upstream" {
		t.Errorf("error %v, annotations %v", err, svc.Annotations)
	}
	s.mustReconcile(svc)
	wantApplied(t, svc, "")
	wantCondition(t, svc, annotations.SocketReady, metav1.ConditionTrue, "Ready", "")
	if host() != "" {
		t.Errorf("taken back to %q", host())
	}
}
