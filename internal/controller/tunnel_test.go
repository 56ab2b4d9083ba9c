package controller

import (
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/mysocketio/mysocket-injector/api/v1alpha1"
	"github.com/mysocketio/mysocket-injector/internal/annotations"
	"github.com/mysocketio/mysocket-injector/internal/mysocket"
	"github.com/mysocketio/mysocket-injector/internal/mysocket/mysockettest"
)

func TestTunnelReconciler(t *testing.T) {
	s := newStage(t)
	socket := s.socket("k8s " + s.ns + ".web")
	svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "web", Annotations: enabled(annotations.SocketID, socket.ID)}}
	r := &TunnelReconciler{Client: cluster.Client, API: s.api}
	withRemote := func(name string) *v1alpha1.Tunnel {
		t.Helper()
		remote, err := s.api.CreateTunnel(t.Context(), socket.ID)
		if err != nil {
			t.Fatal(err)
		}
		return s.tunnel(svc, s.pod(name), v1alpha1.TunnelStatus{TunnelID: remote.ID})
	}
	isGone := func(tunnel *v1alpha1.Tunnel) bool {
		return cluster.Client.Get(t.Context(), client.ObjectKeyFromObject(tunnel), tunnel) != nil
	}

	t.Run("not deleted", func(t *testing.T) {
		tunnel := withRemote("a")
		if got, err := r.Reconcile(t.Context(), request(tunnel)); err != nil || got != (reconcile.Result{}) || isGone(tunnel) || tunnelsLeft(t, s, svc) != 1 {
			t.Errorf("result %+v, %v", got, err)
		}
		cluster.Delete(t, tunnel)
		if _, err := r.Reconcile(t.Context(), request(tunnel)); err != nil || !isGone(tunnel) || tunnelsLeft(t, s, svc) != 0 {
			t.Errorf("after its deletion: %v", err)
		}
	})
	t.Run("never had a tunnel at Mysocket", func(t *testing.T) {
		tunnel := s.tunnel(svc, s.pod("b"), v1alpha1.TunnelStatus{})
		cluster.Delete(t, tunnel)
		before := s.proxy.Requests("DELETE /socket/{}/tunnel/{}")
		if _, err := r.Reconcile(t.Context(), request(tunnel)); err != nil || !isGone(tunnel) || s.proxy.Requests("DELETE /socket/{}/tunnel/{}") != before {
			t.Errorf("got %v", err)
		}
	})
	t.Run("the API fails first", func(t *testing.T) {
		tunnel := withRemote("c")
		cluster.Delete(t, tunnel)
		s.proxy.Fail("DELETE /socket/{}/tunnel/{}", mysockettest.Answer(500, ""), mysockettest.Refused, mysockettest.Answer(429, "", "Retry-After", "10"), mysockettest.LostAnswer)
		for _, wait := range []bool{false, false, true, false} {
			got, err := r.Reconcile(t.Context(), request(tunnel))
			if wait != (err == nil) || wait && !between(got.RequeueAfter, 5*time.Second, 10*time.Second) {
				t.Errorf("result %+v, %v", got, err)
			}
			if isGone(tunnel) {
				t.Fatal("the object is gone before the tunnel")
			}
		}
		if _, err := r.Reconcile(t.Context(), request(tunnel)); err != nil || !isGone(tunnel) || tunnelsLeft(t, s, svc) != 0 {
			t.Errorf("in the end: %v", err)
		}
	})
	t.Run("the account is refused", func(t *testing.T) {
		tunnel := withRemote("d")
		cluster.Delete(t, tunnel)
		stranger := &TunnelReconciler{Client: cluster.Client, API: s.proxy.ClientOf(t, mysocket.Account{Email: s.edge.Email, Password: "wrong wrong wrong"})}
		got, err := stranger.Reconcile(t.Context(), request(tunnel))
		if err != nil || !between(got.RequeueAfter, slowRetry/2, slowRetry) || isGone(tunnel) {
			t.Errorf("result %+v, %v", got, err)
		}
		if _, err := r.Reconcile(t.Context(), request(tunnel)); err != nil || !isGone(tunnel) {
			t.Error(err)
		}
	})
	t.Run("gone", func(t *testing.T) {
		if _, err := r.Reconcile(t.Context(), reconcile.Request{NamespacedName: client.ObjectKey{Namespace: s.ns, Name: "nobody"}}); err != nil {
			t.Error(err)
		}
	})
}
