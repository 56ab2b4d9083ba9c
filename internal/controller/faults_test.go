package controller

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/mysocketio/mysocket-injector/api/v1alpha1"
	"github.com/mysocketio/mysocket-injector/internal/annotations"
	"github.com/mysocketio/mysocket-injector/internal/mysocket"
	"github.com/mysocketio/mysocket-injector/internal/mysocket/mysockettest"
)

// impatience is how long the client of these tests waits for an answer.
const impatience = 500 * time.Millisecond

// badDays is what an API does on a bad day, each with the words that a user reads then.
var badDays = []struct {
	name, words string
	fault       mysockettest.Fault
}{
	{"500", "500 Internal Server Error", mysockettest.Answer(500, `{"error_message":"the database is away"}`)},
	{"429", "429 Too Many Requests", mysockettest.Answer(429, "", "Retry-After", "1")},
	{"time-out", "timeout", mysockettest.Silence},
	{"garbage", "not the expected JSON", mysockettest.Answer(200, "<html>Welcome</html>")},
	{"half an answer", "unexpected EOF", mysockettest.HalfAnswer},
	{"connection lost", "EOF", mysockettest.Refused},
}

// controllers runs the controllers with a client that is impatient. The API's bad day needs no hand after it: nothing but them
// writes.
func (s *stage) controllers(api *mysocket.Client) {
	s.t.Helper()
	start(s.t, s.ns, func(m managed) []setup {
		return []setup{
			&ServiceReconciler{Client: m.GetClient(), API: api, Events: m.GetEventRecorder("mysocket-injector"), Outdated: outdated},
			&TunnelReconciler{Client: m.GetClient(), API: api},
		}
	})
}

// awaitSocketReady waits until the condition has this status and reason, and holds the words.
func (s *stage) awaitSocketReady(svc *corev1.Service, status metav1.ConditionStatus, reason, words string) {
	s.t.Helper()
	var last string
	s.t.Cleanup(func() {
		if s.t.Failed() {
			s.t.Log("the condition was ", last)
		}
	})
	eventually(s.t, fmt.Sprintf("SocketReady to be %s, %s, with %q", status, reason, words), func(ctx context.Context) bool {
		if cluster.Client.Get(ctx, client.ObjectKeyFromObject(svc), svc) != nil {
			return false
		}
		c := apimeta.FindStatusCondition(svc.Status.Conditions, annotations.SocketReady)
		last = fmt.Sprintf("%+v", c)
		return c != nil && c.Status == status && c.Reason == reason && strings.Contains(c.Message, words)
	})
}

// TestMysocketHasABadDay has each request that the controllers make fail in each way for a while, in the life of a Service with a
// tunnel. The condition says it, nothing is made twice, and all goes on by itself afterwards.
func TestMysocketHasABadDay(t *testing.T) {
	for _, day := range badDays {
		t.Run(day.name, func(t *testing.T) {
			t.Parallel()
			s := newStage(t)
			s.controllers(s.proxy.HastyClient(t, impatience))
			const list, create, remove, withdraw = "GET /socket", "POST /socket", "DELETE /socket/{}", "DELETE /socket/{}/tunnel/{}"

			// While its socket is looked for, and then made.
			s.proxy.FailAlways(list, day.fault)
			svc := s.service(enabled())
			s.awaitSocketReady(svc, metav1.ConditionFalse, "APIUnavailable", day.words)
			s.proxy.FailAlways(create, mysockettest.After(day.fault)) // made, and nobody is told: the worst
			asked := s.proxy.Requests(create)
			s.proxy.FailAlways(list, nil)
			eventually(t, "the socket to be asked for", func(context.Context) bool { return s.proxy.Requests(create) > asked })
			s.proxy.Heal()
			s.awaitSocketReady(svc, metav1.ConditionTrue, "Ready", "https://")
			if sockets := s.sockets(); len(sockets) != 1 || sockets[0].ID != svc.Annotations[annotations.SocketID] {
				t.Fatalf("sockets %+v, annotations %v", sockets, svc.Annotations)
			}

			// While a tunnel is withdrawn.
			remote, err := s.api.CreateTunnel(t.Context(), svc.Annotations[annotations.SocketID])
			if err != nil {
				t.Fatal(err)
			}
			tunnel := s.tunnel(svc, s.pod("web-1", injected), v1alpha1.TunnelStatus{TunnelID: remote.ID, State: "Connected"})
			s.proxy.FailAlways(withdraw, mysockettest.After(day.fault))
			cluster.Delete(t, tunnel)
			eventually(t, "the tunnel to be withdrawn", func(context.Context) bool { return s.proxy.Requests(withdraw) > 0 })
			s.proxy.Heal()
			eventually(t, "the Tunnel to go", func(ctx context.Context) bool {
				return cluster.Client.Get(ctx, client.ObjectKeyFromObject(tunnel), tunnel) != nil
			})
			if n := tunnelsLeft(t, s, svc); n != 0 {
				t.Errorf("%d tunnels are left", n)
			}

			// While its socket is deleted.
			s.proxy.FailAlways(remove, day.fault)
			cluster.Delete(t, svc)
			s.awaitSocketReady(svc, metav1.ConditionFalse, "SocketNotDeleted", day.words)
			s.proxy.Heal()
			eventually(t, "the Service to go", func(ctx context.Context) bool {
				return cluster.Client.Get(ctx, client.ObjectKeyFromObject(svc), svc) != nil
			})
			if sockets := s.sockets(); len(sockets) != 0 {
				t.Errorf("sockets %+v are left", sockets)
			}
		})
	}
}

// TestRefusedInTheMiddle has the API forget the token in the middle of everything: nobody notices.
func TestRefusedInTheMiddle(t *testing.T) {
	s := newStage(t)
	forgotten := mysockettest.Answer(401, `{"error_message":"unknown token"}`)
	for _, endpoint := range []string{"GET /socket", "POST /socket", "DELETE /socket/{}", "DELETE /socket/{}/tunnel/{}"} {
		s.proxy.Fail(endpoint, forgotten)
	}
	svc := s.service(enabled())
	s.mustReconcile(svc)
	wantCondition(t, svc, annotations.SocketReady, metav1.ConditionTrue, "Ready", "https://")
	s.wantEvents("Normal SocketCreated: ", "Normal Ready: ")
	remote, err := s.api.CreateTunnel(t.Context(), svc.Annotations[annotations.SocketID])
	if err != nil {
		t.Fatal(err)
	}
	tunnel := s.tunnel(svc, s.pod("web-1", injected), v1alpha1.TunnelStatus{TunnelID: remote.ID, State: "Connected"})
	cluster.Delete(t, tunnel)
	if _, err := (&TunnelReconciler{Client: cluster.Client, API: s.api}).Reconcile(t.Context(), request(tunnel)); err != nil {
		t.Fatal(err)
	}
	if n := tunnelsLeft(t, s, svc); n != 0 {
		t.Errorf("%d tunnels are left", n)
	}
	cluster.Delete(t, svc)
	if s.mustReconcile(svc); svc.UID != "" || len(s.sockets()) != 0 {
		t.Errorf("the Service is still there, or its sockets: %v", s.sockets())
	}
	if n := s.proxy.Requests("POST /socket"); n != 2 {
		t.Errorf("a socket was asked for %d times, want twice: refused, and made", n)
	}
}

// TestChangedAccount has the account's Secret changed under the running control plane, first to a wrong one.
func TestChangedAccount(t *testing.T) {
	s := newStage(t)
	var password atomic.Value
	password.Store("wrong wrong wrong")
	s.controllers(s.proxy.ClientWith(t, func() (mysocket.Account, error) {
		now, ok := password.Load().(string)
		if !ok || now == "" {
			return mysocket.Account{}, errors.New(`the account's Secret has no key "password"`)
		}
		return mysocket.Account{Email: s.edge.Email, Password: now}, nil
	}))
	svc := s.service(enabled())
	s.awaitSocketReady(svc, metav1.ConditionFalse, "AccountRefused", "check the e-mail and password")
	password.Store("")
	touch := func(value string) { // looked at sooner than by its slow retry
		cluster.Change(t, svc, func() { metav1.SetMetaDataAnnotation(&svc.ObjectMeta, "example.com/touched", value) })
	}
	touch("1")
	s.awaitSocketReady(svc, metav1.ConditionFalse, "AccountRefused", `no key "password"`)
	password.Store(s.edge.Password)
	touch("2")
	s.awaitSocketReady(svc, metav1.ConditionTrue, "Ready", "https://")
	if sockets := s.sockets(); len(sockets) != 1 {
		t.Errorf("sockets %+v", sockets)
	}
}
