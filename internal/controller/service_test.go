package controller

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"reflect"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/mysocketio/mysocket-injector/api/v1alpha1"
	"github.com/mysocketio/mysocket-injector/internal/annotations"
	"github.com/mysocketio/mysocket-injector/internal/mysocket"
	"github.com/mysocketio/mysocket-injector/internal/mysocket/mysockettest"
)

// The tests of the reconciler are named after the rows of its table.

func TestServiceThatIsNotOurs(t *testing.T) {
	s := newStage(t)
	for _, list := range []map[string]string{nil, {annotations.Type: "http"}, {annotations.Enabled: "false"}} {
		svc := s.service(list, func(svc *corev1.Service) { svc.Name, svc.GenerateName = "", "web-" })
		version := svc.ResourceVersion
		if got := s.mustReconcile(svc); got != (reconcile.Result{}) || svc.ResourceVersion != version {
			t.Errorf("annotations %v: result %+v, Service changed: %v", list, got, svc.ResourceVersion != version)
		}
	}
	gone := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: s.ns, Name: "gone"}}
	s.mustReconcile(gone)
	if s.proxy.Requests("POST /login") != 0 || len(s.events.take()) != 0 {
		t.Error("Mysocket was asked, or an Event written")
	}
}

func TestEnabledInvalid(t *testing.T) {
	s := newStage(t)
	for name, tc := range map[string]struct {
		list            map[string]string
		change          func(*corev1.Service)
		reason, message string
	}{
		"enabled":            {map[string]string{annotations.Enabled: "yes"}, nil, "InvalidAnnotation", `"yes"; allowed: "true" or "false"`},
		"unknown type":       {enabled(annotations.Type, "udp"), nil, "InvalidAnnotation", `"udp"; allowed: http, https, tcp, tls`},
		"unknown annotation": {enabled(annotations.Prefix+"prot", "80"), nil, "InvalidAnnotation", `"mysocket.io/prot" is not known`},
		"port not there":     {enabled(annotations.Port, "80"), nil, "PortNotFound", `no TCP port "80"; it has 8000`},
		"no selector":        {enabled(), func(svc *corev1.Service) { svc.Spec.Selector = nil }, "NoSelector", "set spec.selector"},
	} {
		svc := s.service(tc.list, func(svc *corev1.Service) {
			svc.Name, svc.GenerateName = "", "web-"
			if tc.change != nil {
				tc.change(svc)
			}
		})
		for range 3 { // the same again writes nothing
			if got := s.mustReconcile(svc); got != (reconcile.Result{}) {
				t.Errorf("%s: tried again: %+v", name, got)
			}
		}
		wantCondition(t, svc, annotations.SocketReady, metav1.ConditionFalse, tc.reason, tc.message)
		s.wantEvent("Warning " + tc.reason + ": ")
		if hasFinalizer(svc) {
			t.Errorf("%s: has a finalizer", name)
		}
	}
	if len(s.sockets()) != 0 {
		t.Error("a socket was made")
	}
}

func TestEnabledInvalidKeepsTheSocketThereIs(t *testing.T) {
	s := newStage(t)
	svc := s.service(enabled())
	s.mustReconcile(svc)
	id := svc.Annotations[annotations.SocketID]
	cluster.Change(t, svc, func() { svc.Annotations[annotations.Type] = "htpp" })
	s.mustReconcile(svc)
	wantCondition(t, svc, annotations.SocketReady, metav1.ConditionFalse, "InvalidAnnotation", "htpp")
	if list := s.sockets(); len(list) != 1 || list[0].ID != id || svc.Annotations[annotations.SocketID] != id || !hasFinalizer(svc) {
		t.Errorf("sockets %v, annotations %v", list, svc.Annotations)
	}
	cluster.Change(t, svc, func() { svc.Annotations[annotations.Type] = "http" })
	s.mustReconcile(svc)
	wantCondition(t, svc, annotations.SocketReady, metav1.ConditionTrue, "Ready", "")
}

func TestEnabledValidNoSocketOfItsName(t *testing.T) {
	s := newStage(t)
	svc := s.service(enabled("example.com/other", "stays"))
	finalizerFirst := false
	s.proxy.Fail("POST /socket", func(w http.ResponseWriter, r *http.Request, forward http.Handler) {
		now := &corev1.Service{}
		finalizerFirst = cluster.Client.Get(t.Context(), client.ObjectKeyFromObject(svc), now) == nil && hasFinalizer(now)
		forward.ServeHTTP(w, r)
	})
	got := s.mustReconcile(svc)
	if !finalizerFirst || !hasFinalizer(svc) {
		t.Error("the socket was there before the finalizer")
	}
	if !between(got.RequeueAfter, recheck/2, recheck) {
		t.Errorf("looks again after %s", got.RequeueAfter)
	}
	list := s.sockets()
	if len(list) != 1 || list[0].Name != "k8s "+s.ns+".web" || list[0].Type != "http" {
		t.Fatalf("sockets %+v", list)
	}
	want := enabled("example.com/other", "stays", annotations.SocketID, list[0].ID, annotations.DNSName, list[0].DNSName, annotations.URL, list[0].URL())
	if !reflect.DeepEqual(svc.Annotations, want) {
		t.Errorf("annotations %v, want %v", svc.Annotations, want)
	}
	wantCondition(t, svc, annotations.SocketReady, metav1.ConditionTrue, "Ready", "the public name is "+list[0].URL())
	wantCondition(t, svc, annotations.TunnelsReady, metav1.ConditionFalse, "NoPods", "selects no running pod")
	s.wantEvents(fmt.Sprintf("Normal SocketCreated: the socket %q was made: its public name is %s", list[0].Name, list[0].DNSName), "Normal Ready: the public name is "+list[0].URL())

	version := svc.ResourceVersion
	s.mustReconcile(svc)
	if svc.ResourceVersion != version || s.proxy.Requests("POST /socket") != 1 || len(s.events.take()) != 0 {
		t.Error("a second look changed something")
	}
}

func TestEnabledValidWithClusterName(t *testing.T) {
	s := newStage(t)
	svc := s.service(enabled(annotations.Type, "tcp"))
	r := s.reconciler()
	r.Names.Cluster = "north"
	if _, err := r.Reconcile(t.Context(), request(svc)); err != nil {
		t.Fatal(err)
	}
	if list := s.sockets(); len(list) != 1 || list[0].Name != "k8s north "+s.ns+".web" || list[0].Type != "tcp" {
		t.Errorf("sockets %+v", list)
	}
}

func TestEnabledValidSocketOfItsName(t *testing.T) {
	s := newStage(t)
	there := s.socket("k8s " + s.ns + ".web")
	svc := s.service(enabled())
	s.mustReconcile(svc)
	if svc.Annotations[annotations.SocketID] != there.ID || svc.Annotations[annotations.URL] != there.URL() || !hasFinalizer(svc) || len(s.sockets()) != 1 {
		t.Errorf("annotations %v, want socket %s", svc.Annotations, there.ID)
	}
	s.wantEvents(fmt.Sprintf("Normal SocketAdopted: the socket %q was there already and is used: its public name is %s", there.Name, there.DNSName), "Normal Ready: ")
}

func TestOfSeveralSocketsTheSmallestIDUnlessAnnotated(t *testing.T) {
	s := newStage(t)
	a, b := s.socket("k8s "+s.ns+".web"), s.socket("k8s "+s.ns+".web")
	if b.ID < a.ID {
		a, b = b, a
	}
	svc := s.service(enabled())
	s.mustReconcile(svc)
	if svc.Annotations[annotations.SocketID] != a.ID {
		t.Errorf("took %s, want %s", svc.Annotations[annotations.SocketID], a.ID)
	}
	cluster.Change(t, svc, func() { svc.Annotations[annotations.SocketID] = b.ID })
	s.mustReconcile(svc)
	if svc.Annotations[annotations.SocketID] != b.ID {
		t.Errorf("took %s, want the annotated %s", svc.Annotations[annotations.SocketID], b.ID)
	}
}

// TestCrashBetweenCreateAndAnnotate has the answer to the creation lost.
func TestCrashBetweenCreateAndAnnotate(t *testing.T) {
	s := newStage(t)
	svc := s.service(enabled())
	s.proxy.Fail("POST /socket", mysockettest.LostAnswer)
	if _, err := s.reconcile(svc); err == nil {
		t.Fatal("no error")
	}
	wantCondition(t, svc, annotations.SocketReady, metav1.ConditionFalse, "APIUnavailable", "POST /socket")
	s.wantEvent("Warning APIUnavailable: ")
	s.mustReconcile(svc)
	if list := s.sockets(); len(list) != 1 || svc.Annotations[annotations.SocketID] != list[0].ID {
		t.Errorf("sockets %v, annotations %v", list, svc.Annotations)
	}
	wantCondition(t, svc, annotations.SocketReady, metav1.ConditionTrue, "Ready", "")
}

func TestTypeIsBroughtInLine(t *testing.T) {
	s := newStage(t)
	svc := s.service(enabled())
	s.mustReconcile(svc)
	s.events.take()
	url, id := svc.Annotations[annotations.URL], svc.Annotations[annotations.SocketID]
	cluster.Change(t, svc, func() { svc.Annotations[annotations.Type] = "tcp" })

	// This edge can't change a type, and says so.
	got := s.mustReconcile(svc)
	wantCondition(t, svc, annotations.SocketReady, metav1.ConditionFalse, "SocketRefused", "socket_type cannot change from http")
	wantCondition(t, svc, annotations.TunnelsReady, metav1.ConditionFalse, "NoPods", "")
	s.wantEvent("Warning SocketRefused: ")
	if svc.Annotations[annotations.URL] != url || !between(got.RequeueAfter, slowRetry/2, slowRetry) {
		t.Errorf("URL %s, again after %s", svc.Annotations[annotations.URL], got.RequeueAfter)
	}
	// Another can.
	s.proxy.Fail("PUT /socket/{}", mysockettest.Answer(200, `{"socket_id":"`+id+`","dnsname":"a.example","socket_type":"tcp","socket_tcp_ports":[20001]}`))
	s.mustReconcile(svc)
	if svc.Annotations[annotations.URL] != "tcp://a.example:20001" {
		t.Errorf("annotations %v", svc.Annotations)
	}
}

// TestTamperedSocketID has the owner of one Service write the id of another's socket into it.
func TestTamperedSocketID(t *testing.T) {
	s := newStage(t)
	victim := s.socket("k8s other.victim")
	svc := s.service(enabled(annotations.SocketID, victim.ID, annotations.URL, "https://evil.example"))
	s.mustReconcile(svc)
	own := svc.Annotations[annotations.SocketID]
	if own == victim.ID || own == "" || strings.Contains(svc.Annotations[annotations.URL], "evil") {
		t.Fatalf("annotations %v", svc.Annotations)
	}
	cluster.Change(t, svc, func() { svc.Annotations[annotations.SocketID] = victim.ID })
	s.mustReconcile(svc)
	if svc.Annotations[annotations.SocketID] != own {
		t.Errorf("socket id %s, want %s", svc.Annotations[annotations.SocketID], own)
	}
	// And in the moment of its release.
	cluster.Change(t, svc, func() {
		svc.Annotations[annotations.SocketID] = victim.ID
		svc.Annotations[annotations.Enabled] = "false"
	})
	s.mustReconcile(svc)
	wantUntouched(t, svc)
	if list := s.sockets(); len(list) != 1 || list[0].ID != victim.ID {
		t.Errorf("sockets %+v, want the victim's alone", list)
	}
}

func TestMysocketDoesNotAnswer(t *testing.T) {
	for _, tc := range []struct {
		name         string
		spoil        func(s *stage)
		reason, text string
		err          bool // and so a retry with back-off
		low, high    time.Duration
	}{
		{"wrong password", func(s *stage) {
			s.api = s.proxy.ClientOf(s.t, mysocket.Account{Email: s.edge.Email, Password: "wrong wrong wrong"})
		}, "AccountRefused", "check the e-mail and password in the account's Secret", false, slowRetry / 2, slowRetry},
		{"no password", func(s *stage) {
			s.api = s.proxy.ClientWith(s.t, func() (mysocket.Account, error) {
				return mysocket.Account{}, errors.New(`the account's Secret has no key "email"`)
			})
		}, "AccountRefused", `no key "email"`, false, slowRetry / 2, slowRetry},
		{"unreachable", func(s *stage) { s.proxy.FailAlways("POST /login", mysockettest.Refused) }, "APIUnavailable", "log in: POST /login at 127.0.0.1", true, 0, 0},
		{"500", func(s *stage) { s.proxy.FailAlways("GET /socket", mysockettest.Answer(500, "")) }, "APIUnavailable", "500 Internal Server Error", true, 0, 0},
		{"garbage", func(s *stage) { s.proxy.FailAlways("GET /socket", mysockettest.Answer(200, "<html>")) }, "APIUnavailable", "not the expected JSON", true, 0, 0},
		{"429", func(s *stage) { s.proxy.FailAlways("GET /socket", mysockettest.Answer(429, "", "Retry-After", "7")) }, "APIUnavailable", "429 Too Many Requests", false, 7 * time.Second, 8 * time.Second},
		{"503 with Retry-After", func(s *stage) {
			s.proxy.FailAlways("GET /socket", mysockettest.Answer(503, "", "Retry-After", "60"))
		}, "APIUnavailable", "503 Service Unavailable", false, 60 * time.Second, 61 * time.Second},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := newStage(t)
			tc.spoil(s)
			svc := s.service(enabled())
			for range 2 {
				got, err := s.reconcile(svc)
				if (err != nil) != tc.err || !between(got.RequeueAfter, tc.low, tc.high) {
					t.Errorf("result %+v, %v", got, err)
				}
			}
			wantCondition(t, svc, annotations.SocketReady, metav1.ConditionFalse, tc.reason, tc.text)
			s.wantEvent("Warning " + tc.reason + ": ")
			if hasFinalizer(svc) || s.proxy.Requests("POST /socket") != 0 {
				t.Error("a finalizer, or the try to make a socket")
			}
			cluster.Delete(t, svc)
			if s.mustReconcile(svc); svc.UID != "" {
				t.Error("the Service can't be deleted")
			}
		})
	}
}

// TestRefusedSetting asks for what this edge lacks.
func TestRefusedSetting(t *testing.T) {
	s := newStage(t)
	svc := s.service(enabled(annotations.AllowedEmails, "a@example.com"))
	got := s.mustReconcile(svc)
	wantCondition(t, svc, annotations.SocketReady, metav1.ConditionFalse, "SocketRefused", `is not supported by this edge`)
	s.wantEvent("Warning SocketRefused: ")
	if !between(got.RequeueAfter, slowRetry/2, slowRetry) || len(s.sockets()) != 0 {
		t.Errorf("again after %s, sockets %v", got.RequeueAfter, s.sockets())
	}
	cluster.Change(t, svc, func() { delete(svc.Annotations, annotations.Enabled) })
	s.mustReconcile(svc)
	wantUntouched(t, svc)
}

func TestNotEnabledWithFinalizer(t *testing.T) {
	for name, end := range map[string]func(*stage, *corev1.Service){
		"annotation removed": func(s *stage, svc *corev1.Service) {
			cluster.Change(s.t, svc, func() { delete(svc.Annotations, annotations.Enabled) })
		},
		"all annotations removed": func(s *stage, svc *corev1.Service) {
			cluster.Change(s.t, svc, func() { svc.Annotations = nil })
		},
		"enabled is false": func(s *stage, svc *corev1.Service) {
			cluster.Change(s.t, svc, func() { svc.Annotations[annotations.Enabled] = "false" })
		},
		"deleted": func(s *stage, svc *corev1.Service) { cluster.Delete(s.t, svc) },
	} {
		t.Run(name, func(t *testing.T) {
			s := newStage(t)
			svc := s.service(enabled())
			s.mustReconcile(svc)
			s.events.take()
			tunnel := s.tunnel(svc, s.pod("web-1"), v1alpha1.TunnelStatus{})
			other := newTunnel(&corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "other", Annotations: svc.Annotations}}, s.pod("web-2"), v1alpha1.TunnelStatus{})
			other.Namespace = s.ns
			cluster.Create(t, other)

			end(s, svc)
			if got := s.mustReconcile(svc); got != (reconcile.Result{}) {
				t.Errorf("again: %+v", got)
			}
			cluster.Get(t, tunnel)
			cluster.Get(t, other)
			if tunnel.DeletionTimestamp == nil || other.DeletionTimestamp != nil {
				t.Errorf("its Tunnel deleted %v, another's %v", tunnel.DeletionTimestamp, other.DeletionTimestamp)
			}
			if len(s.sockets()) != 0 {
				t.Error("the socket is still there")
			}
			s.wantEvent("Normal SocketDeleted: the public name ")
			if name == "deleted" {
				if svc.UID != "" {
					t.Errorf("the Service is still there: %+v", svc.ObjectMeta)
				}
				return
			}
			wantUntouched(t, svc)
			s.mustReconcile(svc)
			if len(s.events.take()) != 0 {
				t.Error("released twice")
			}
		})
	}
}

func TestReleaseKeepsWhatItMust(t *testing.T) {
	s := newStage(t)
	svc := s.service(enabled(annotations.DeletionPolicy, "retain"))
	s.mustReconcile(svc)
	s.events.take()
	id := svc.Annotations[annotations.SocketID]
	cluster.Delete(t, svc)
	s.mustReconcile(svc)
	s.wantEvent("Normal SocketRetained: the public name ")
	if list := s.sockets(); svc.UID != "" || len(list) != 1 || list[0].ID != id {
		t.Fatalf("Service %q, sockets %v", svc.UID, list)
	}
	// The Service comes back and has its name again. Now its policy can't be read, which keeps the name, too.
	svc = s.service(enabled())
	s.mustReconcile(svc)
	if svc.Annotations[annotations.SocketID] != id {
		t.Errorf("socket %s, want the retained %s", svc.Annotations[annotations.SocketID], id)
	}
	cluster.Change(t, svc, func() {
		svc.Annotations[annotations.DeletionPolicy] = "dlete"
		delete(svc.Annotations, annotations.Enabled)
	})
	s.mustReconcile(svc)
	wantUntouched(t, svc)
	if len(s.sockets()) != 1 {
		t.Error("the name is lost")
	}
}

func TestReleaseWaitsForMysocket(t *testing.T) {
	s := newStage(t)
	svc := s.service(enabled())
	s.mustReconcile(svc)
	s.events.take()
	cluster.Delete(t, svc)
	s.proxy.Fail("DELETE /socket/{}", mysockettest.Answer(500, ""), mysockettest.LostAnswer)
	if _, err := s.reconcile(svc); err == nil || !hasFinalizer(svc) {
		t.Errorf("error %v, finalizers %v", err, svc.Finalizers)
	}
	wantCondition(t, svc, annotations.SocketReady, metav1.ConditionFalse, "SocketNotDeleted", "500")
	s.wantEvent("Warning SocketNotDeleted: the socket could not be deleted yet: ")
	if _, err := s.reconcile(svc); err == nil || !hasFinalizer(svc) {
		t.Errorf("error %v, finalizers %v", err, svc.Finalizers)
	}
	s.mustReconcile(svc) // finds it deleted
	if svc.UID != "" || len(s.sockets()) != 0 {
		t.Error("the Service or its socket is still there")
	}
}

func TestChangedBeyondStatus(t *testing.T) {
	base := func() *corev1.Service {
		return &corev1.Service{
			ObjectMeta: metav1.ObjectMeta{ResourceVersion: "1", Annotations: map[string]string{"a": "b"}},
			Spec:       corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: 80}}},
		}
	}
	for name, tc := range map[string]struct {
		change func(*corev1.Service)
		want   bool
	}{
		"resync":         {func(svc *corev1.Service) { svc.ResourceVersion = "1" }, true},
		"conditions":     {func(svc *corev1.Service) { svc.Status.Conditions = []metav1.Condition{{Type: "x"}} }, false},
		"managed fields": {func(svc *corev1.Service) { svc.ManagedFields = []metav1.ManagedFieldsEntry{{Manager: "x"}} }, false},
		"annotation":     {func(svc *corev1.Service) { svc.Annotations["a"] = "c" }, true},
		"finalizer":      {func(svc *corev1.Service) { svc.Finalizers = []string{"x"} }, true},
		"deletion":       {func(svc *corev1.Service) { now := metav1.Now(); svc.DeletionTimestamp = &now }, true},
		"port":           {func(svc *corev1.Service) { svc.Spec.Ports[0].Port = 81 }, true},
		"selector":       {func(svc *corev1.Service) { svc.Spec.Selector = map[string]string{"a": "b"} }, true},
	} {
		old, now := base(), base()
		now.ResourceVersion = "2"
		tc.change(now)
		if got := changedBeyondStatus().Update(event.UpdateEvent{ObjectOld: old, ObjectNew: now}); got != tc.want {
			t.Errorf("%s: %v", name, got)
		}
		if now.Status.Conditions == nil && name == "conditions" {
			t.Error("the object was changed")
		}
	}
}

// TestServiceController runs the controllers in a manager.
func TestServiceController(t *testing.T) {
	s := newStage(t)
	start(t, s.ns, func(m managed) []setup {
		return []setup{
			&ServiceReconciler{Client: m.GetClient(), API: s.api, Events: m.GetEventRecorder("mysocket-injector"), Outdated: outdated},
			&TunnelReconciler{Client: m.GetClient(), API: s.api},
		}
	})
	svc := s.service(enabled())
	pod := s.pod("web-1", injected)
	wait := func(kind string, status metav1.ConditionStatus, reason string) {
		t.Helper()
		eventually(t, kind+" to be "+string(status)+" "+reason, func(ctx context.Context) bool {
			if cluster.Client.Get(ctx, client.ObjectKeyFromObject(svc), svc) != nil {
				return false
			}
			for _, c := range svc.Status.Conditions {
				if c.Type == kind && c.Status == status && c.Reason == reason {
					return true
				}
			}
			return false
		})
	}
	wait(annotations.SocketReady, metav1.ConditionTrue, "Ready")
	wait(annotations.TunnelsReady, metav1.ConditionFalse, "Connecting")
	remote, err := s.api.CreateTunnel(t.Context(), svc.Annotations[annotations.SocketID])
	if err != nil {
		t.Fatal(err)
	}
	tunnel := s.tunnel(svc, pod, v1alpha1.TunnelStatus{TunnelID: remote.ID, State: "Connected"})
	wait(annotations.TunnelsReady, metav1.ConditionTrue, "AllConnected")
	eventually(t, "the Events", func(ctx context.Context) bool {
		var events corev1.EventList
		seen := map[string]bool{}
		if cluster.Client.List(ctx, &events, client.InNamespace(s.ns)) != nil {
			return false
		}
		for _, e := range events.Items {
			seen[e.Reason] = true
		}
		return seen["Ready"] && seen["AllConnected"]
	})
	cluster.Delete(t, tunnel)
	eventually(t, "the tunnel to go at Mysocket, and then its object", func(ctx context.Context) bool {
		return client.IgnoreNotFound(cluster.Client.Get(ctx, client.ObjectKeyFromObject(tunnel), tunnel)) == nil && tunnelsLeft(t, s, svc) == 0
	})
	wait(annotations.TunnelsReady, metav1.ConditionFalse, "Connecting")
	cluster.Delete(t, pod)
	wait(annotations.TunnelsReady, metav1.ConditionFalse, "NoPods")
	cluster.Change(t, svc, func() { svc.Annotations[annotations.URL] = "https://elsewhere.example" })
	eventually(t, "the URL to be put right", func(ctx context.Context) bool {
		return cluster.Client.Get(ctx, client.ObjectKeyFromObject(svc), svc) == nil && strings.Contains(svc.Annotations[annotations.URL], s.edge.Domain)
	})
	cluster.Delete(t, svc)
	eventually(t, "the Service to go", func(ctx context.Context) bool {
		return cluster.Client.Get(ctx, client.ObjectKeyFromObject(svc), svc) != nil
	})
}

// TestFailingAPIMakesNoBusyLoop has an API whose every error is another one, so that every try writes the condition.
func TestFailingAPIMakesNoBusyLoop(t *testing.T) {
	s := newStage(t)
	times := make(chan time.Time, 100)
	s.proxy.FailAlways("GET /socket", func(w http.ResponseWriter, r *http.Request, forward http.Handler) {
		times <- time.Now()
		mysockettest.Answer(500, `{"error_message":"incident `+time.Now().String()+`"}`)(w, r, forward)
	})
	start(t, s.ns, func(m managed) []setup {
		return []setup{&ServiceReconciler{Client: m.GetClient(), API: s.api, Events: m.GetEventRecorder("mysocket-injector"), Outdated: outdated}}
	})
	s.service(enabled())
	first := <-times
	for range 2 {
		<-times
	}
	if took := time.Since(first); took < 2500*time.Millisecond { // 1 s and 2 s
		t.Errorf("three tries in %s", took)
	}
}

func tunnelsLeft(t *testing.T, s *stage, svc *corev1.Service) int {
	t.Helper()
	list, err := s.proxy.Client(t).Tunnels(t.Context(), svc.Annotations[annotations.SocketID])
	if err != nil && !mysocket.IsNotFound(err) {
		t.Fatal(err)
	}
	return len(list)
}
