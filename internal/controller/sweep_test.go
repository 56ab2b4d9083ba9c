package controller

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/mysocketio/mysocket-injector/api/v1alpha1"
	"github.com/mysocketio/mysocket-injector/internal/annotations"
	"github.com/mysocketio/mysocket-injector/internal/mysocket"
	"github.com/mysocketio/mysocket-injector/internal/mysocket/mysockettest"
)

// sweeps is a Sweeper whose time passes as the test says.
type sweeps struct {
	*Sweeper
	s   *stage
	now time.Time
}

func (s *stage) sweeper() *sweeps {
	c := s.cleanupClient()
	w := &sweeps{s: s, now: time.Now()}
	w.Sweeper = &Sweeper{Client: c, Live: c, API: s.api, Now: func() time.Time { return w.now }}
	return w
}

// sweep looks once, after some time.
func (w *sweeps) sweep(after time.Duration) time.Duration {
	w.s.t.Helper()
	w.now = w.now.Add(after)
	again, err := w.Sweep(w.s.t.Context())
	if err != nil {
		w.s.t.Fatal(err)
	}
	return again
}

func (s *stage) owner(service string) owner {
	s.t.Helper()
	id, err := clusterID(s.t.Context(), cluster.Client)
	if err != nil {
		s.t.Fatal(err)
	}
	return owner{id, s.ns, service}
}

// tagged makes a socket that names these owners.
func (s *stage) tagged(name string, owners map[owner]string) mysocket.Socket {
	s.t.Helper()
	k := mysocket.Socket{Name: name, Type: "http", Tags: map[string]string{"team": "shop"}}
	for o, policy := range owners {
		k.Tags = o.claim(k, policy)
	}
	made, err := s.api.CreateSocket(s.t.Context(), k)
	if err != nil {
		s.t.Fatal(err)
	}
	return made
}

func (s *stage) remoteTunnel(socketID string) string {
	s.t.Helper()
	made, err := s.api.CreateTunnel(s.t.Context(), socketID)
	if err != nil {
		s.t.Fatal(err)
	}
	return made.ID
}

// left lists the ids of the tunnels of a socket at Mysocket.
func (s *stage) left(socketID string) []string {
	s.t.Helper()
	ids := []string{}
	for _, k := range s.sockets() {
		for _, t := range k.Tunnels {
			if k.ID == socketID {
				ids = append(ids, t.ID)
			}
		}
	}
	return ids
}

var elsewhere = owner{"another-cluster", "shop", "web"}

func TestOwnersOf(t *testing.T) {
	me := owner{"0b7c", "shop", "web"}
	k := mysocket.Socket{Tags: map[string]string{
		me.tag(): "retain", elsewhere.tag(): "delete", "team": "shop", "mysocket-injector/x": "delete", "mysocket-injector/a/b/c/d": "delete",
	}}
	if got := ownersOf(k); len(got) != 2 || got[me] != "retain" || got[elsewhere] != "delete" {
		t.Errorf("owners %v", got)
	}
	if got := me.without(k); len(got) != 4 || len(k.Tags) != 5 {
		t.Errorf("tags without %v, of %v", got, k.Tags)
	}
	if got := me.claim(k, "delete"); len(got) != 5 || got[me.tag()] != "delete" || k.Tags[me.tag()] != "retain" {
		t.Errorf("tags with %v, of %v", got, k.Tags)
	}
	longest := owner{strings.Repeat("u", 36), strings.Repeat("n", 63), strings.Repeat("s", 63)}
	if n := len(longest.tag()); n > 256 { // our edge's limit
		t.Errorf("a tag may have %d bytes", n)
	}
}

// TestTunnelNobodyNames is left when the answer to its making is lost. One that is being registered looks the same.
func TestTunnelNobodyNames(t *testing.T) {
	s := newStage(t)
	svc, object := s.live("web")
	id := svc.Annotations[annotations.SocketID]
	lost, registering := s.remoteTunnel(id), s.remoteTunnel(id)
	w := s.sweeper()
	if again := w.sweep(0); again != sweepGrace {
		t.Errorf("looks again after %s, want %s", again, sweepGrace)
	}
	w.sweep(sweepGrace - time.Second)
	if got := s.left(id); len(got) != 3 {
		t.Fatalf("deleted before the grace period was over: %v left", got)
	}
	// The informers may not have this yet; the API server has.
	w.Client = interceptor.NewClient(withWatch(t), interceptor.Funcs{
		List: func(ctx context.Context, c client.WithWatch, list client.ObjectList, _ ...client.ListOption) error {
			if tunnels, ok := list.(*v1alpha1.TunnelList); ok {
				tunnels.Items = []v1alpha1.Tunnel{*object}
				return nil
			}
			return c.List(ctx, list, client.InNamespace(s.ns))
		},
	})
	s.tunnel(svc, s.pod("web-2", injected), v1alpha1.TunnelStatus{TunnelID: registering, State: "Connected"})
	w.sweep(2 * time.Second)
	got := s.left(id)
	if len(got) != 2 || slices.Contains(got, lost) || !slices.Contains(got, registering) || !slices.Contains(got, object.Status.TunnelID) {
		t.Errorf("tunnels %v left, want all but %s", got, lost)
	}
}

// TestSweepTouchesNothingElse: what names another cluster, or nobody, is not ours to judge.
func TestSweepTouchesNothingElse(t *testing.T) {
	s := newStage(t)
	me := s.owner("web")
	sockets := map[string]mysocket.Socket{
		"named for us, and nobody says whose it is": s.tagged("k8s "+s.ns+".web", nil),
		"of another cluster":                        s.tagged("k8s "+s.ns+".web", map[owner]string{elsewhere: "delete"}),
		"retained by a Service that is gone":        s.tagged("k8s "+s.ns+".web", map[owner]string{me: "retain"}),
		"of a policy that is not known":             s.tagged("k8s "+s.ns+".web", map[owner]string{elsewhere: "x", me: "retain"}),
	}
	for name, k := range sockets {
		if name != "retained by a Service that is gone" { // whose tunnels are ours
			s.remoteTunnel(k.ID)
		}
	}
	w := s.sweeper()
	for range 3 {
		w.sweep(sweepGrace)
	}
	left := s.sockets()
	for name, k := range sockets {
		i := slices.IndexFunc(left, func(l mysocket.Socket) bool { return l.ID == k.ID })
		if i < 0 || len(left[i].Tags) != len(k.Tags) || name != "retained by a Service that is gone" && len(left[i].Tunnels) != 1 {
			t.Errorf("the socket %s was touched", name)
		}
	}
}

func TestSocketThatNoServiceUses(t *testing.T) {
	s := newStage(t)
	used, _ := s.live("web")
	uses := used.Annotations[annotations.SocketID]
	off := s.service(nil, func(svc *corev1.Service) { svc.Name = "off" })
	for name, tc := range map[string]struct {
		socket string
		owners map[owner]string
		want   int // owners in the end, -1 for a socket that is deleted
	}{
		"of a Service that is gone":                         {"k8s " + s.ns + ".gone", map[owner]string{s.owner("gone"): "delete"}, -1},
		"of a Service that is not public":                   {"k8s " + s.ns + ".off", map[owner]string{s.owner(off.Name): "delete"}, -1},
		"shared with another cluster":                       {"shared", map[owner]string{s.owner("gone"): "delete", elsewhere: "delete"}, 1},
		"shared with one that is retained":                  {"shared", map[owner]string{s.owner("gone"): "delete", s.owner("gone-2"): "retain"}, 1},
		"second of its name":                                {"k8s " + s.ns + ".web", map[owner]string{s.owner("web"): "delete"}, -1},
		"second of its name, retained":                      {"k8s " + s.ns + ".web", map[owner]string{s.owner("web"): "retain"}, -1},
		"second of its name, of another cluster as well":    {"k8s " + s.ns + ".web", map[owner]string{s.owner("web"): "delete", elsewhere: "delete"}, 1},
		"of the name that the Service had before":           {"k8s north " + s.ns + ".web", map[owner]string{s.owner("web"): "delete"}, -1},
		"of the name that the Service had, and is retained": {"k8s north " + s.ns + ".web", map[owner]string{s.owner("web"): "retain"}, 1},
	} {
		t.Run(name, func(t *testing.T) {
			k := s.tagged(tc.socket, tc.owners)
			w := s.sweeper()
			w.sweep(0)
			if !slices.ContainsFunc(s.sockets(), func(l mysocket.Socket) bool { return l.ID == k.ID && len(l.Tags) == len(k.Tags) }) {
				t.Fatal("touched at once")
			}
			w.sweep(sweepGrace)
			got := -1
			for _, l := range s.sockets() {
				if l.ID == k.ID {
					got = len(ownersOf(l))
					if l.Tags["team"] != "shop" {
						t.Errorf("tags %v lack what is not ours", l.Tags)
					}
				}
			}
			if got != tc.want {
				t.Errorf("%d owners, want %d (-1: deleted)", got, tc.want)
			}
			if !slices.ContainsFunc(s.sockets(), func(l mysocket.Socket) bool { return l.ID == uses }) {
				t.Fatal("the socket in use was deleted")
			}
		})
	}
}

// TestServiceThatCameBack is one that the informers do not know yet.
func TestServiceThatCameBack(t *testing.T) {
	s := newStage(t)
	k := s.tagged("k8s "+s.ns+".web", map[owner]string{s.owner("web"): "delete"})
	w := s.sweeper()
	w.sweep(0)
	none := s.cleanupClient()
	w.Client = interceptor.NewClient(withWatch(t), interceptor.Funcs{
		List: func(ctx context.Context, c client.WithWatch, list client.ObjectList, _ ...client.ListOption) error {
			if _, ok := list.(*corev1.ServiceList); ok {
				return nil
			}
			return none.List(ctx, list)
		},
	})
	s.service(enabled())
	w.sweep(sweepGrace)
	if list := s.sockets(); len(list) != 1 || list[0].ID != k.ID {
		t.Errorf("sockets %+v", list)
	}
}

// TestTunnelObjectNobodyUses: a registration may have made it while its Service was being released.
func TestTunnelObjectNobodyUses(t *testing.T) {
	s := newStage(t)
	svc, used := s.live("web")
	gone := *svc
	gone.Name = "gone"
	of := s.tunnel(&gone, s.pod("web-2", injected), v1alpha1.TunnelStatus{})
	former := *svc
	former.Annotations = map[string]string{annotations.SocketID: "7c3bd1a6-0000-4000-8000-000000000000"}
	other := s.tunnel(&former, s.pod("web-3", injected), v1alpha1.TunnelStatus{})
	w := s.sweeper()
	w.sweep(0)
	cluster.Get(t, of)
	w.sweep(sweepGrace)
	for _, o := range []*v1alpha1.Tunnel{of, other} {
		if cluster.Get(t, o); o.DeletionTimestamp == nil {
			t.Errorf("Tunnel %s of Service %s and socket %s is not deleted", o.Name, o.Spec.ServiceName, o.Spec.SocketID)
		}
	}
	if cluster.Get(t, used); used.DeletionTimestamp != nil {
		t.Error("the one in use is deleted")
	}
}

// TestSweepFails: what was found stays found.
func TestSweepFails(t *testing.T) {
	s := newStage(t)
	svc, _ := s.live("web")
	id := svc.Annotations[annotations.SocketID]
	lost := s.remoteTunnel(id)
	s.remoteTunnel(id)
	w := s.sweeper()
	w.sweep(0)
	w.now = w.now.Add(sweepGrace)
	for _, tc := range []struct {
		endpoint string
		fault    mysockettest.Fault
		wait     time.Duration
	}{
		{"GET /socket", mysockettest.Answer(500, ""), slowRetry / 2},
		{"GET /socket", mysockettest.Answer(429, "", "Retry-After", "300"), 5 * time.Minute},
		{"DELETE /socket/{}/tunnel/{}", mysockettest.Answer(429, "", "Retry-After", "300"), 5 * time.Minute},
	} {
		s.proxy.Fail(tc.endpoint, tc.fault)
		if again, err := w.Sweep(t.Context()); err == nil || again < tc.wait {
			t.Errorf("%s: looks again after %s, %v", tc.endpoint, again, err)
		}
	}
	if got := s.left(id); len(got) != 3 {
		t.Errorf("tunnels %v", got)
	}
	w.sweep(0)
	if got := s.left(id); len(got) != 1 || got[0] == lost {
		t.Errorf("tunnels %v left", got)
	}
}

// TestSweeperRuns until it is told to stop.
func TestSweeperRuns(t *testing.T) {
	s := newStage(t)
	w := s.sweeper()
	if !w.NeedLeaderElection() {
		t.Error("would run on every replica")
	}
	for range 3 {
		w.Wake() // never blocks
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.Start(ctx) }()
	eventually(t, "the account to be looked at", func(context.Context) bool { return s.proxy.Requests("GET /socket") > 0 })
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	woken := make(chan struct{}, 1)
	woken <- struct{}{}
	if !wait(t.Context(), time.Hour, woken) || wait(ctx, time.Hour, nil) || !wait(t.Context(), -time.Second, nil) {
		t.Error("waits wrongly")
	}
}

// TestReleaseOfASharedSocket leaves it to its other owners, whoever asks for what.
func TestReleaseOfASharedSocket(t *testing.T) {
	for name, tc := range map[string]struct {
		others map[owner]string
		policy string
		left   int // owners; -1 for a socket that is deleted
		event  string
	}{
		"alone":                     {nil, "delete", -1, "Normal SocketDeleted"},
		"alone, retained":           {nil, "retain", 1, "Normal SocketRetained"},
		"another cluster's, too":    {map[owner]string{elsewhere: "delete"}, "delete", 1, "Normal SocketStillOwned"},
		"retained by somebody else": {map[owner]string{elsewhere: "retain"}, "delete", 1, "Normal SocketStillOwned"},
		"both retained":             {map[owner]string{elsewhere: "retain"}, "retain", 2, "Normal SocketRetained"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStage(t)
			made := s.tagged("k8s "+s.ns+".web", tc.others)
			svc := s.service(enabled(annotations.DeletionPolicy, tc.policy))
			if again := s.mustReconcile(svc).RequeueAfter; again > claimCheck {
				t.Errorf("looks after %s whether the socket still names it", again)
			}
			list := s.sockets()
			if len(list) != 1 || list[0].ID != made.ID || ownersOf(list[0])[s.owner("web")] != tc.policy || len(ownersOf(list[0])) != len(tc.others)+1 || list[0].Tags["team"] != "shop" {
				t.Fatalf("sockets %+v", list)
			}
			s.events.take()
			cluster.Change(t, svc, func() { delete(svc.Annotations, annotations.Enabled) })
			s.mustReconcile(svc)
			wantUntouched(t, svc)
			left := -1
			for _, k := range s.sockets() {
				left = len(ownersOf(k))
			}
			if left != tc.left {
				t.Errorf("%d owners, want %d (-1: deleted)", left, tc.left)
			}
			s.wantEvent(tc.event)
		})
	}
}

// TestReleaseTakesTheSecondOneAlong, which has no use for anybody.
func TestReleaseTakesTheSecondOneAlong(t *testing.T) {
	for _, policy := range []string{"delete", "retain"} {
		s := newStage(t)
		svc := s.service(enabled(annotations.DeletionPolicy, policy))
		s.mustReconcile(svc)
		s.mustReconcile(svc) // a new socket is marked as one to be kept when its Service names it
		s.tagged("k8s "+s.ns+".web", map[owner]string{s.owner("web"): "delete"})
		bystander := s.tagged("k8s "+s.ns+".web", map[owner]string{elsewhere: "delete"})
		id := svc.Annotations[annotations.SocketID]
		cluster.Delete(t, svc)
		s.mustReconcile(svc)
		want := []string{bystander.ID}
		if policy == "retain" {
			want = append(want, id)
			w := s.sweeper()
			w.sweep(0)
			w.sweep(sweepGrace)
		}
		var got []string
		for _, k := range s.sockets() {
			got = append(got, k.ID)
		}
		slices.Sort(got)
		slices.Sort(want)
		if !slices.Equal(got, want) {
			t.Errorf("%s: sockets %v left, want %v", policy, got, want)
		}
	}
}

// forgetful is an API that keeps no tags, as the first ones did.
type forgetful struct {
	MysocketAPI
	updates int
}

func (f *forgetful) Sockets(ctx context.Context, maxAge time.Duration) ([]mysocket.Socket, error) {
	list, err := f.MysocketAPI.Sockets(ctx, maxAge)
	list = slices.Clone(list)
	for i := range list {
		list[i].Tags = nil
	}
	return list, err
}

func (f *forgetful) UpdateSocket(ctx context.Context, k mysocket.Socket) (mysocket.Socket, error) {
	f.updates++
	k, err := f.MysocketAPI.UpdateSocket(ctx, k)
	k.Tags = nil
	return k, err
}

func TestAnAPIWithoutTags(t *testing.T) {
	s := newStage(t)
	api := &forgetful{MysocketAPI: s.api}
	svc := s.service(enabled())
	r := &ServiceReconciler{Client: cluster.Client, API: api, Events: s.events, Outdated: outdated, Secrets: s.secrets}
	reconciled := func() {
		t.Helper()
		if _, err := r.Reconcile(t.Context(), reconcile.Request{NamespacedName: client.ObjectKeyFromObject(svc)}); err != nil {
			t.Fatal(err)
		}
	}
	for range 4 {
		reconciled()
	}
	if api.updates > 1 {
		t.Errorf("%d updates", api.updates)
	}
	w := s.sweeper()
	w.API = api
	s.remoteTunnel(s.sockets()[0].ID)
	for range 3 {
		w.sweep(sweepGrace)
	}
	if list := s.sockets(); len(list) != 1 || len(list[0].Tunnels) != 1 {
		t.Errorf("sockets %+v: nobody says whose they are", list)
	}
	cluster.Change(t, svc, func() { delete(svc.Annotations, annotations.Enabled) })
	reconciled()
	if list := s.sockets(); len(list) != 0 {
		t.Errorf("sockets %+v", list)
	}
}

// TestRetainedWithoutMysocket: that a socket is to be kept is known there beforehand, so that nobody has to be asked. A
// change of mind at the last moment has to be told, lest the sweep delete what was to be kept.
func TestRetainedWithoutMysocket(t *testing.T) {
	s := newStage(t)
	down := func() { s.proxy.FailAlways("GET /socket", mysockettest.Refused) }
	svc := s.service(enabled(annotations.DeletionPolicy, "retain"))
	s.mustReconcile(svc)
	if k := s.sockets()[0]; svc.Annotations[annotations.Applied] != "" || ownersOf(k)[s.owner("web")] != "delete" {
		t.Errorf("to be kept before its Service names it: %v, %v", svc.Annotations, k.Tags)
	}
	s.mustReconcile(svc)
	if got := svc.Annotations[annotations.Applied]; got != "retain" {
		t.Errorf("applied is %q", got)
	}
	down()
	cluster.Delete(t, svc)
	s.mustReconcile(svc)
	if svc.UID != "" {
		t.Error("the Service waits for Mysocket")
	}
	s.proxy.Heal()

	again := s.service(enabled())
	s.mustReconcile(again)
	if got, set := again.Annotations[annotations.Applied]; set || ownersOf(s.sockets()[0])[s.owner("web")] != "delete" {
		t.Errorf("applied is %q", got)
	}
	cluster.Change(t, again, func() { again.Annotations[annotations.DeletionPolicy] = "retain" })
	down()
	cluster.Delete(t, again)
	if _, err := s.reconcile(again); err == nil || again.UID == "" {
		t.Errorf("the Service does not wait for Mysocket: %v", err)
	}
	wantCondition(t, again, annotations.SocketReady, metav1.ConditionFalse, "SocketNotDeleted", "the socket could not be marked as one to be kept yet")
	s.proxy.Heal()
	s.mustReconcile(again)
	w := s.sweeper()
	for range 3 {
		w.sweep(sweepGrace)
	}
	if list := s.sockets(); again.UID != "" || len(list) != 1 || ownersOf(list[0])[s.owner("web")] != "retain" {
		t.Errorf("sockets %+v", list)
	}
}

// TestRetainIsNoLongerAskedFor: what the Service says of the socket is taken back before the socket's own word is.
func TestRetainIsNoLongerAskedFor(t *testing.T) {
	s := newStage(t)
	svc := s.service(enabled(annotations.DeletionPolicy, "retain"))
	s.mustReconcile(svc)
	s.mustReconcile(svc)
	cluster.Change(t, svc, func() { delete(svc.Annotations, annotations.DeletionPolicy) })
	s.proxy.Fail("PUT /socket/{}", mysockettest.LostAnswer)
	if _, err := s.reconcile(svc); err == nil {
		t.Fatal("no error")
	}
	if got, set := svc.Annotations[annotations.Applied]; set {
		t.Errorf("applied is still %q", got)
	}
	s.mustReconcile(svc)
	cluster.Delete(t, svc)
	s.mustReconcile(svc)
	if list := s.sockets(); len(list) != 0 {
		t.Errorf("sockets %+v", list)
	}
}
