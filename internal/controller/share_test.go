package controller

import (
	"context"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/mysocketio/mysocket-injector/api/v1alpha1"
	"github.com/mysocketio/mysocket-injector/internal/annotations"
	"github.com/mysocketio/mysocket-injector/internal/mysocket"
)

// sharing is a stage on which Services may share the socket "shop".
type sharing struct {
	*stage
	r    *ServiceReconciler
	left int // calls of LeftOver
}

func newSharing(t *testing.T) *sharing {
	t.Helper()
	s := &sharing{stage: newStage(t)}
	s.r = s.reconciler()
	s.r.Names.Allowed = map[string][]string{"shop": {s.ns}, "shop-2": {s.ns}}
	s.r.LeftOver = func() { s.left++ }
	return s
}

// public makes a Service with these annotations beside what shares the socket.
func (s *sharing) public(name string, more ...string) *corev1.Service {
	s.t.Helper()
	svc := s.service(enabled(append(more, annotations.SocketName, "shop")...), func(svc *corev1.Service) { svc.Name = name })
	s.run(svc)
	return svc
}

func (s *sharing) run(list ...*corev1.Service) {
	s.t.Helper()
	for _, svc := range list {
		if _, err := s.r.Reconcile(s.t.Context(), reconcile.Request{NamespacedName: client.ObjectKeyFromObject(svc)}); err != nil {
			s.t.Fatal(err)
		}
		if err := cluster.Client.Get(s.t.Context(), client.ObjectKeyFromObject(svc), svc); client.IgnoreNotFound(err) != nil {
			s.t.Fatal(err)
		}
	}
}

func (s *sharing) annotate(svc *corev1.Service, annotation, value string) {
	s.t.Helper()
	cluster.Change(s.t, svc, func() {
		svc.Annotations[annotation] = value
		if value == "" {
			delete(svc.Annotations, annotation)
		}
	})
	s.run(svc)
}

func (s *sharing) only() mysocket.Socket {
	s.t.Helper()
	list := s.sockets()
	if len(list) != 1 {
		s.t.Fatalf("sockets %+v, want one", list)
	}
	return list[0]
}

// TestSharedSocket has two Services ask for one name: they have one socket, a setting of which changes when both ask for
// it, and which the last one deletes.
func TestSharedSocket(t *testing.T) {
	s := newSharing(t)
	a, b := s.public("a"), s.public("b")
	k := s.only()
	for _, svc := range []*corev1.Service{a, b} {
		wantCondition(t, svc, annotations.SocketReady, metav1.ConditionTrue, "Ready", k.DNSName)
		if svc.Annotations[annotations.SocketID] != k.ID || ownersOf(k)[s.owner(svc.Name)] != "delete" {
			t.Errorf("%s: annotations %v, tags %v", svc.Name, svc.Annotations, k.Tags)
		}
	}
	if k.Name != "shop" || len(othersOf(k, s.owner("a"))) != 1 {
		t.Errorf("socket %+v", k)
	}

	const host = "one.example.com"
	s.annotate(a, annotations.UpstreamHTTPHostname, host)
	s.run(b, a, b)
	wantCondition(t, a, annotations.SocketReady, metav1.ConditionFalse, "SharedSettingsDiffer", `the socket "shop" is shared with Service `+s.ns+`/b of this cluster, which asks for other settings (mysocket.io/upstream-type or mysocket.io/upstream-http-hostname): it stays as it is until all ask for the same`)
	wantCondition(t, b, annotations.SocketReady, metav1.ConditionTrue, "Ready", "")
	if got := s.only().Upstream; deref(got).UpstreamHTTPHostname != "" {
		t.Errorf("upstream %+v, which only one asks for", got)
	}
	s.annotate(b, annotations.UpstreamHTTPHostname, host)
	s.run(a)
	for _, svc := range []*corev1.Service{a, b} {
		wantCondition(t, svc, annotations.SocketReady, metav1.ConditionTrue, "Ready", "")
	}
	if got := s.only().Upstream; deref(got).UpstreamHTTPHostname != host {
		t.Errorf("upstream %+v, which both ask for", got)
	}

	s.annotate(a, annotations.Enabled, "")
	wantUntouched(t, a)
	if k := s.only(); len(ownersOf(k)) != 1 {
		t.Errorf("owners %v", ownersOf(k))
	}
	s.annotate(b, annotations.Enabled, "")
	if list := s.sockets(); len(list) != 0 {
		t.Errorf("sockets %+v, which nobody uses", list)
	}
}

// TestJoiningASocketWithOtherSettings: who comes later changes nothing for those who are there.
func TestJoiningASocketWithOtherSettings(t *testing.T) {
	s := newSharing(t)
	a, b := s.public("a"), s.public("b", annotations.Type, "tcp")
	k := s.only()
	wantCondition(t, b, annotations.SocketReady, metav1.ConditionFalse, "SharedSettingsDiffer", `is used by Service `+s.ns+`/a of this cluster and has other settings (mysocket.io/type): ask for the same here, or for another name`)
	if _, in := ownersOf(k)[s.owner("b")]; in || b.Annotations[annotations.SocketID] != "" || k.Type != "http" {
		t.Errorf("socket %+v, annotations %v", k, b.Annotations)
	}
	s.annotate(a, annotations.UpstreamHTTPHostname, "one.example.com") // needs nobody else
	wantCondition(t, a, annotations.SocketReady, metav1.ConditionTrue, "Ready", "")
	s.annotate(b, annotations.Type, "")
	wantCondition(t, b, annotations.SocketReady, metav1.ConditionFalse, "SharedSettingsDiffer", "(mysocket.io/upstream-type or mysocket.io/upstream-http-hostname)")
	s.annotate(b, annotations.UpstreamHTTPHostname, "ONE.example.com")
	wantCondition(t, b, annotations.SocketReady, metav1.ConditionTrue, "Ready", "")
}

// TestMissingSecretIsNoConsent: a Service whose Secret can't be read at the moment still asks for the protection, so that
// nobody else can take it away.
func TestMissingSecretIsNoConsent(t *testing.T) {
	s := newSharing(t)
	login := map[string]string{"username": "ann", "password": testPassword}
	secret := s.secret("login-a", login)
	s.secret("login-b", login)
	a, b := s.public("a", annotations.ProtectedSecret, "login-a"), s.public("b", annotations.ProtectedSecret, "login-b")
	s.run(a, b)
	asked := s.only().Tags[s.owner("a").tag()]
	cluster.Delete(t, secret)
	s.run(a)
	wantCondition(t, a, annotations.SocketReady, metav1.ConditionFalse, "ProtectedSecretUnavailable", "does not exist")
	if got := s.only().Tags[s.owner("a").tag()]; got != asked {
		t.Errorf("the tag says %q, want still %q", got, asked)
	}
	s.annotate(b, annotations.ProtectedSecret, "")
	s.run(b)
	wantCondition(t, b, annotations.SocketReady, metav1.ConditionFalse, "SharedSettingsDiffer", "mysocket.io/protected-secret")
	if !s.only().Protected {
		t.Error("the protection that the other one asks for is gone")
	}
}

// TestVoteKeepsThePassword: writing down what a Service asks for sends the password along, as every write does. Without,
// an API may take the protection away.
func TestVoteKeepsThePassword(t *testing.T) {
	s := newSharing(t)
	s.secret("login", map[string]string{"username": "ann", "password": testPassword})
	a, b := s.public("a", annotations.ProtectedSecret, "login"), s.public("b", annotations.ProtectedSecret, "login")
	s.run(a, b)
	api := &bare{MysocketAPI: s.api}
	s.r.API = api
	s.annotate(a, annotations.UpstreamHTTPHostname, "one.example.com")
	wantCondition(t, a, annotations.SocketReady, metav1.ConditionFalse, "SharedSettingsDiffer", "")
	if api.updates != 1 || api.without != 0 {
		t.Errorf("%d writes, %d without the password", api.updates, api.without)
	}
}

// bare counts the writes of protected sockets that lack the password.
type bare struct {
	MysocketAPI
	updates, without int
}

func (b *bare) UpdateSocket(ctx context.Context, k mysocket.Socket) (mysocket.Socket, error) {
	b.updates++
	if k.Protected && k.ProtectedPassword == "" {
		b.without++
	}
	return b.MysocketAPI.UpdateSocket(ctx, k)
}

// TestServicesOfOneClusterMakeOneAtOnce, and not each one.
func TestServicesOfOneClusterMakeOneAtOnce(t *testing.T) {
	s := newSharing(t)
	var running sync.WaitGroup
	for _, name := range []string{"a", "b", "c", "d"} {
		svc := s.service(enabled(annotations.SocketName, "shop"), func(svc *corev1.Service) { svc.Name = name })
		running.Go(func() {
			if _, err := s.r.Reconcile(t.Context(), reconcile.Request{NamespacedName: client.ObjectKeyFromObject(svc)}); err != nil {
				t.Error(err)
			}
		})
	}
	running.Wait()
	if k := s.only(); k.Name != "shop" || len(ownersOf(k)) != 4 {
		t.Errorf("socket %+v", k)
	}
}

// TestTwoClustersMakeOneAtOnce and meet at one of the two, whichever each has told its users.
func TestTwoClustersMakeOneAtOnce(t *testing.T) {
	s := newSharing(t)
	for i := range 2 {
		svc := s.public("a")
		mine := s.only()
		theirs := s.tagged("shop", map[owner]string{elsewhere: claimValue("delete", settingsOf(mine))})
		s.run(svc)
		met := mine
		if theirs.ID < mine.ID {
			met = theirs
			if s.left == 0 {
				t.Error("nobody was told of the socket that is left")
			}
		}
		if got := svc.Annotations[annotations.SocketID]; got != met.ID {
			t.Errorf("%d: uses %s, want that with the smallest id of %s and %s", i, got, mine.ID, theirs.ID)
		}
		for _, k := range s.sockets() {
			if err := s.api.DeleteSocket(t.Context(), k.ID); err != nil {
				t.Fatal(err)
			}
		}
		cluster.Delete(t, svc)
		s.run(svc)
		s.r.forget(client.ObjectKeyFromObject(svc))
	}
	// A third one comes to where most are, and not to the smallest id.
	one := s.tagged("shop", map[owner]string{elsewhere: "delete -"})
	two := s.tagged("shop", map[owner]string{elsewhere: "delete -", {"a-third-cluster", "shop", "web"}: "retain"})
	three := s.tagged("shop", map[owner]string{elsewhere: "delete -"})
	if got, ok := choose([]mysocket.Socket{one, two, three}, s.serviceOf("a"), s.owner("a"), "shop"); !ok || got.ID != two.ID {
		t.Errorf("chose %+v, want %s", got, two.ID)
	}
}

func (s *sharing) serviceOf(name string) *corev1.Service {
	return &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: s.ns, Name: name}}
}

// TestNameThatIsNotAllowed touches nothing of the socket of that name, neither when it is asked for nor when the Service goes.
func TestNameThatIsNotAllowed(t *testing.T) {
	s := newSharing(t)
	theirs := s.socket("bank") // without a word about whose it is
	svc := s.service(enabled(), func(svc *corev1.Service) { svc.Name = "a" })
	s.run(svc)
	s.annotate(svc, annotations.SocketName, "bank")
	wantCondition(t, svc, annotations.SocketReady, metav1.ConditionFalse, "InvalidAnnotation", `annotation mysocket.io/socket-name has the value "bank"; allowed: in namespace `+s.ns+" shop, shop-2")
	cluster.Delete(t, svc)
	s.run(svc)
	if list := s.sockets(); len(list) != 1 || list[0].ID != theirs.ID {
		t.Errorf("sockets %+v, want the other one alone", list)
	}
}

// TestAnotherSocketName gives the Service another socket, and has the former one looked after, with its Tunnels.
func TestAnotherSocketName(t *testing.T) {
	s := newSharing(t)
	svc := s.public("a")
	former := s.only()
	pod := s.pod("a-1", injected)
	object := s.tunnel(svc, pod, v1alpha1.TunnelStatus{})
	s.annotate(svc, annotations.SocketName, "shop-2")
	if svc.Annotations[annotations.SocketID] == former.ID || s.left != 1 || len(s.sockets()) != 2 {
		t.Errorf("annotations %v, told %d times, sockets %+v", svc.Annotations, s.left, s.sockets())
	}
	s.events.take()
	if wait, err := s.r.dropSurplus(t.Context(), client.ObjectKeyFromObject(svc), annotations.Spec{Connections: 1}, svc.Annotations[annotations.SocketID], time.Now().Add(2*surplusGrace)); err != nil || wait != 0 {
		t.Errorf("looks again after %s, %v", wait, err)
	}
	cluster.Get(t, object)
	if object.DeletionTimestamp == nil {
		t.Error("the Tunnel of the former socket is still there")
	}
	w := s.sweeper()
	w.Names = s.r.Names
	w.sweep(0)
	w.sweep(sweepGrace)
	if k := s.only(); k.Name != "shop-2" {
		t.Errorf("socket %+v", k)
	}
}

// TestSharedByNameWithoutTags keeps a socket of which nobody can say who else uses it.
func TestSharedByNameWithoutTags(t *testing.T) {
	s := newSharing(t)
	s.r.API = &forgetful{MysocketAPI: s.api}
	svc := s.public("a")
	s.events.take()
	s.annotate(svc, annotations.Enabled, "")
	wantUntouched(t, svc)
	if k := s.only(); k.Name != "shop" {
		t.Errorf("socket %+v", k)
	}
	s.wantEvent("Normal SocketRetained: the public name ")
}

// TestRetainedIsNotAsked: a Service that went and wanted the socket kept has no say in its settings any more, also when it
// went without a word to Mysocket.
func TestRetainedIsNotAsked(t *testing.T) {
	s := newSharing(t)
	a, b := s.public("a", annotations.DeletionPolicy, "retain"), s.public("b")
	s.run(a)
	s.annotate(a, annotations.Enabled, "")
	if k := s.only(); len(othersOf(k, s.owner("b"))) != 1 {
		t.Fatalf("tags %v: it was asked needlessly", k.Tags)
	}
	w := s.sweeper()
	w.Names = s.r.Names
	w.sweep(0)
	w.sweep(sweepGrace)
	if k := s.only(); len(othersOf(k, s.owner("b"))) != 0 || ownersOf(k)[s.owner("a")] != "retain" {
		t.Errorf("tags %v", k.Tags)
	}
	s.annotate(b, annotations.UpstreamHTTPHostname, "one.example.com")
	wantCondition(t, b, annotations.SocketReady, metav1.ConditionTrue, "Ready", "")
	if again := w.sweep(sweepGrace); again <= sweepGrace {
		t.Errorf("there is still something to do: looks again after %s", again)
	}
	s.annotate(b, annotations.Enabled, "")
	if k := s.only(); ownersOf(k)[s.owner("a")] != "retain" || len(ownersOf(k)) != 1 {
		t.Errorf("tags %v", k.Tags)
	}
}

// TestWhoMayNotHaveTheNameIsNotAsked: an operator who takes a name from a namespace ends its say in the settings, too, but
// nothing is deleted for that.
func TestWhoMayNotHaveTheNameIsNotAsked(t *testing.T) {
	s := newSharing(t)
	a, b := s.public("a"), s.public("b")
	w := s.sweeper()
	w.Names = annotations.Names{Allowed: map[string][]string{"shop": {s.ns}}}
	w.sweep(0)
	w.sweep(sweepGrace)
	if k := s.only(); len(othersOf(k, s.owner("b"))) != 1 {
		t.Fatalf("tags %v, want both as long as they may", k.Tags)
	}
	cluster.Change(t, a, func() { a.Annotations[annotations.SocketName] = "shop-2" })
	w.sweep(0)
	w.sweep(sweepGrace)
	if k := s.only(); len(othersOf(k, s.owner("b"))) != 0 || ownersOf(k)[s.owner("a")] != "delete" {
		t.Errorf("tags %v", k.Tags)
	}
	if again := w.sweep(sweepGrace); again <= sweepGrace {
		t.Errorf("there is still something to do: looks again after %s", again)
	}
	s.annotate(b, annotations.UpstreamHTTPHostname, "one.example.com")
	wantCondition(t, b, annotations.SocketReady, metav1.ConditionTrue, "Ready", "")
}

func TestSettingsDigest(t *testing.T) {
	base := wanted{kind: "http"}
	equal := []wanted{
		{kind: "http", access: &mysocket.Access{AllowedEmails: []string{"ann@example.com"}}}, // not in force
		{kind: "http", upstream: &mysocket.Upstream{UpstreamType: "http"}},
	}
	for _, w := range equal {
		if w.settings() != base.settings() {
			t.Errorf("%+v differs from nothing", w)
		}
	}
	seen := map[string]wanted{base.settings(): base}
	for _, w := range []wanted{
		{kind: "tcp"},
		{kind: "http", access: &mysocket.Access{CloudAuth: true, AllowedEmails: []string{"ann@example.com"}}},
		{kind: "http", access: &mysocket.Access{CloudAuth: true, AllowedDomains: []string{"ann@example.com"}}},
		{kind: "http", upstream: &mysocket.Upstream{UpstreamType: "https"}},
		{kind: "http", upstream: &mysocket.Upstream{UpstreamHTTPHostname: "a"}},
		{kind: "http", protection: &credentials{username: "ann", password: "1"}},
		{kind: "http", protection: &credentials{username: "bob", password: "1"}},
	} {
		if other, ok := seen[w.settings()]; ok {
			t.Errorf("%+v and %+v have one digest", other, w)
		}
		seen[w.settings()] = w
	}
	if (wanted{protection: &credentials{username: "ann", password: "2"}}).settings() != (wanted{protection: &credentials{username: "ann", password: "1"}}).settings() {
		t.Error("the digest tells something of the password")
	}
}
