package controller

import (
	"net/http"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mysocketio/mysocket-injector/api/v1alpha1"
	"github.com/mysocketio/mysocket-injector/internal/annotations"
	"github.com/mysocketio/mysocket-injector/internal/mysocket"
	"github.com/mysocketio/mysocket-injector/internal/mysocket/mysockettest"
)

// newTokenStage is a stage whose account has an access token, so that the other dialect is spoken.
func newTokenStage(t *testing.T) *stage {
	t.Helper()
	s := newStage(t)
	s.fresh = s.proxy.TokenClient
	s.api = s.fresh(t)
	return s
}

// TestServiceWithAnAccessToken takes a Service through its life in the dialect of unique names and without tunnel objects.
func TestServiceWithAnAccessToken(t *testing.T) {
	s := newTokenStage(t)
	svc := s.service(enabled())
	s.mustReconcile(svc)
	list := s.sockets()
	if len(list) != 1 || list[0].Name != "k8s "+s.ns+".web" || svc.Annotations[annotations.SocketID] != list[0].ID {
		t.Fatalf("sockets %+v, annotations %v", list, svc.Annotations)
	}
	wantCondition(t, svc, annotations.SocketReady, metav1.ConditionTrue, "Ready", "the public name is https://"+list[0].DNSName)
	version := svc.ResourceVersion
	s.mustReconcile(svc)
	if svc.ResourceVersion != version || s.proxy.Requests("POST /api/v1/socket") != 1 {
		t.Error("a second look changed something")
	}
	// Found again by its name.
	cluster.Change(t, svc, func() { delete(svc.Annotations, annotations.SocketID) })
	s.mustReconcile(svc)
	if svc.Annotations[annotations.SocketID] != list[0].ID {
		t.Errorf("annotations %v", svc.Annotations)
	}
	// A guard is put on and taken off.
	s.secretFor(svc)
	s.mustReconcile(svc)
	if k := s.sockets()[0]; !k.Protected || k.ProtectedUsername != "me" {
		t.Errorf("not protected: %+v", k)
	}
	cluster.Change(t, svc, func() { delete(svc.Annotations, annotations.ProtectedSecret) })
	s.mustReconcile(svc)
	if k := s.sockets()[0]; k.Protected {
		t.Errorf("still protected: %+v", k)
	}
	// A Tunnel object goes without a call of the API.
	r := &TunnelReconciler{Client: cluster.Client, API: s.api}
	made, err := s.api.CreateTunnel(t.Context(), list[0].ID)
	if err != nil {
		t.Fatal(err)
	}
	tunnel := s.tunnel(svc, s.pod("web-1"), v1alpha1.TunnelStatus{TunnelID: made.ID})
	cluster.Delete(t, tunnel)
	if _, err := r.Reconcile(t.Context(), request(tunnel)); err != nil {
		t.Error(err)
	}
	if err := cluster.Client.Get(t.Context(), request(tunnel).NamespacedName, tunnel); err == nil {
		t.Error("the Tunnel is still there")
	}
	cluster.Change(t, svc, func() { svc.Annotations[annotations.Enabled] = "false" })
	s.mustReconcile(svc)
	if len(s.sockets()) != 0 || hasFinalizer(svc) {
		t.Errorf("left are %+v, finalizers %v", s.sockets(), svc.Finalizers)
	}
}

// secretFor makes the Secret of a protected socket and asks for it.
func (s *stage) secretFor(svc *corev1.Service) {
	s.t.Helper()
	cluster.Create(s.t, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: s.ns, Name: "visitors"}, Data: map[string][]byte{"username": []byte("me"), "password": []byte("not for everybody")}})
	cluster.Change(s.t, svc, func() { svc.Annotations[annotations.ProtectedSecret] = "visitors" })
}

// TestLaggingListMakesNoDuplicate has an API whose list does not show yet what the control plane's last life has made.
func TestLaggingListMakesNoDuplicate(t *testing.T) {
	s := newTokenStage(t)
	made := s.socket("k8s " + s.ns + ".web")
	svc := s.service(enabled())
	s.proxy.FailAlways("GET /api/v1/sockets", mysockettest.Answer(http.StatusOK, `{"list":[],"pagination":{"next_page":0}}`))
	s.mustReconcile(svc)
	s.proxy.Heal()
	if list := s.sockets(); len(list) != 1 || svc.Annotations[annotations.SocketID] != made.ID {
		t.Errorf("sockets %+v, annotations %v", list, svc.Annotations)
	}
}

// TestAnotherKindOfAccount: the Secret is changed from e-mail and password to an access token of the same account, while a
// Service is public. Its socket and its name stay.
func TestAnotherKindOfAccount(t *testing.T) {
	s := newStage(t)
	account := mysocket.Account{Email: s.edge.Email, Password: s.edge.Password}
	s.api = s.proxy.ClientWith(t, func() (mysocket.Account, error) { return account, nil })
	svc := s.service(enabled())
	s.mustReconcile(svc)
	id := svc.Annotations[annotations.SocketID]
	account = mysocket.Account{Token: s.edge.Token}
	s.mustReconcile(svc)
	if list := s.sockets(); len(list) != 1 || list[0].ID != id || svc.Annotations[annotations.SocketID] != id {
		t.Errorf("sockets %+v, annotations %v", list, svc.Annotations)
	}
	if s.proxy.Requests("GET /api/v1/sockets") == 0 {
		t.Error("the token was not used")
	}
	account = mysocket.Account{Token: "not.a.token"}
	s.mustReconcile(svc)
	wantCondition(t, svc, annotations.SocketReady, metav1.ConditionFalse, "AccountRefused", "the access token in the account's Secret is no JWT")
}
