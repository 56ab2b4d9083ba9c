package gateway

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"testing"

	"github.com/google/uuid"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"github.com/mysocketio/mysocket-injector/internal/annotations"
	"github.com/mysocketio/mysocket-injector/internal/gatewayapi"
	"github.com/mysocketio/mysocket-injector/internal/kubetest"
	"github.com/mysocketio/mysocket-injector/internal/mysocket"
)

// paths is every path of the gateway.
func paths(socket, tunnel string) map[string]string {
	base := gatewayapi.SocketsPath + socket
	return map[string]string{
		gatewayapi.AssignmentsPath:                   http.MethodGet,
		base + "/tunnels":                            http.MethodPost,
		base + "/tunnels/" + tunnel + "/certificate": http.MethodPost,
		base + "/status":                             http.MethodPut,
		base + "/tunnels/" + tunnel:                  http.MethodDelete,
	}
}

func TestWhoMayNotCall(t *testing.T) {
	s := newStage(t)
	pod, good := s.pod(s.ns, "web-1")
	bound := &authenticationv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: pod.Name, UID: pod.UID}
	secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: s.ns, Name: "secret"}}
	cluster.Create(t, secret)
	for name, tc := range map[string]struct{ token, message string }{
		"no token":          {"", "no bearer token"},
		"garbage":           {"x", `not valid for the audience "mysocket-gateway"`},
		"another signature": {good[:len(good)-4] + "AAAA", "not valid for the audience"},
		"another audience":  {s.token(s.ns, []string{"https://kubernetes.default.svc"}, bound), "not valid for the audience"},
		"bound to nothing":  {s.token(s.ns, []string{gatewayapi.Audience}, nil), "not bound to a pod"},
		"bound to a Secret": {s.token(s.ns, []string{gatewayapi.Audience}, &authenticationv1.BoundObjectReference{Kind: "Secret", APIVersion: "v1", Name: secret.Name, UID: secret.UID}), "not bound to a pod"},
	} {
		for path, method := range paths(s.socket.ID, uuid.NewString()) {
			a := s.call(tc.token, method, path, newKey(t).request())
			a.want(t, http.StatusUnauthorized, gatewayapi.ReasonUnauthenticated, tc.message)
			if tc.token != "" && strings.Contains(string(a.body), tc.token) && name != "garbage" {
				t.Errorf("%s: the answer shows the token", name)
			}
		}
	}
	if len(s.atEdge()) != 0 {
		t.Error("a tunnel was made")
	}

	// The token of a pod that is gone, also when another pod has its name by now.
	cluster.Delete(t, pod)
	s.pod(s.ns, "web-1")
	kubetest.Eventually(t, "the token to be refused", func(context.Context) bool {
		return s.call(good, http.MethodPut, gatewayapi.SocketsPath+s.socket.ID+"/status", "{}").status == http.StatusUnauthorized
	})
}

func TestIdentityOf(t *testing.T) {
	good := func() *authenticationv1.TokenReviewStatus {
		return &authenticationv1.TokenReviewStatus{
			Authenticated: true, Audiences: []string{gatewayapi.Audience},
			User: authenticationv1.UserInfo{Username: "system:serviceaccount:shop:app", Extra: map[string]authenticationv1.ExtraValue{extraPodName: {"web-1"}, extraPodUID: {"uid"}}},
		}
	}
	got, err := identityOf(good())
	if want := (identity{"shop", "web-1", "uid"}); err != nil || got != want || got.String() != "shop/web-1" {
		t.Errorf("got %+v, %v", got, err)
	}
	for name, spoil := range map[string]func(*authenticationv1.TokenReviewStatus){
		"not authenticated":      func(st *authenticationv1.TokenReviewStatus) { st.Authenticated = false },
		"no audience":            func(st *authenticationv1.TokenReviewStatus) { st.Audiences = nil }, // of an API server that ignores audiences
		"a person":               func(st *authenticationv1.TokenReviewStatus) { st.User.Username = "alice" },
		"a node":                 func(st *authenticationv1.TokenReviewStatus) { st.User.Username = "system:node:a:b" },
		"no namespace":           func(st *authenticationv1.TokenReviewStatus) { st.User.Username = "system:serviceaccount::app" },
		"no account":             func(st *authenticationv1.TokenReviewStatus) { st.User.Username = "system:serviceaccount:shop" },
		"no pod":                 func(st *authenticationv1.TokenReviewStatus) { delete(st.User.Extra, extraPodName) },
		"no pod UID":             func(st *authenticationv1.TokenReviewStatus) { delete(st.User.Extra, extraPodUID) },
		"two pods":               func(st *authenticationv1.TokenReviewStatus) { st.User.Extra[extraPodName] = []string{"a", "b"} },
		"pod name that is empty": func(st *authenticationv1.TokenReviewStatus) { st.User.Extra[extraPodName] = []string{""} },
	} {
		st := good()
		spoil(st)
		_, err := identityOf(st)
		var e *refusal
		if !errors.As(err, &e) || e.status != http.StatusUnauthorized {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestReviewFails has the API server quote the token in its error.
func TestReviewFails(t *testing.T) {
	s := newStage(t)
	withWatch, err := client.NewWithWatch(cluster.Config, client.Options{Scheme: cluster.Scheme})
	if err != nil {
		t.Fatal(err)
	}
	s.server.Live = interceptor.NewClient(withWatch, interceptor.Funcs{
		Create: func(_ context.Context, _ client.WithWatch, obj client.Object, _ ...client.CreateOption) error {
			review, _ := obj.(*authenticationv1.TokenReview)
			return errors.New("can't create " + review.Spec.Token)
		},
	})
	a := s.call("sesame", http.MethodPut, gatewayapi.SocketsPath+s.socket.ID+"/status", "{}")
	a.want(t, http.StatusServiceUnavailable, gatewayapi.ReasonUnavailable, "could not have the token reviewed")
	if strings.Contains(string(a.body), "sesame") || a.header.Get("Retry-After") != "2" {
		t.Errorf("answer %s, Retry-After %q", a.body, a.header.Get("Retry-After"))
	}
}

func TestWhoMayNotActForASocket(t *testing.T) {
	s := newStage(t)
	victim, err := s.api.CreateSocket(t.Context(), mysocket.Socket{Name: "k8s victim.web", Type: "http"})
	if err != nil {
		t.Fatal(err)
	}
	elsewhere := cluster.Namespace(t, nil)
	_, off := s.service("off", map[string]string{annotations.Enabled: "false"})
	_, wrong := s.service("wrong", map[string]string{annotations.Port: "nowhere"})
	for name, tc := range map[string]struct {
		pod     func() (*corev1.Pod, string)
		socket  string
		message string
	}{
		"pod of another namespace": {func() (*corev1.Pod, string) { return s.pod(elsewhere, "web-1") }, s.socket.ID, "no enabled Service of namespace " + elsewhere},
		"labels not selected": {func() (*corev1.Pod, string) {
			return s.pod(s.ns, "other", func(pod *corev1.Pod) { pod.Labels["app"] = "other" })
		}, s.socket.ID, "has the socket " + s.socket.ID},
		"a socket that nobody claims": {func() (*corev1.Pod, string) { return s.pod(s.ns, "web-2") }, victim.ID, "has the socket " + victim.ID},
		"Service not enabled":         {func() (*corev1.Pod, string) { return s.pod(s.ns, "web-3") }, off.ID, "no enabled Service"},
		"Service that is wrong":       {func() (*corev1.Pod, string) { return s.pod(s.ns, "web-5") }, wrong.ID, "no enabled Service"},
		"pod that is going": {func() (*corev1.Pod, string) {
			pod, token := s.pod(s.ns, "web-4", func(pod *corev1.Pod) { pod.Finalizers = []string{"example.com/wait"} })
			cluster.Delete(t, pod)
			t.Cleanup(func() {
				_ = cluster.Client.Patch(context.Background(), pod, client.RawPatch("application/merge-patch+json", []byte(`{"metadata":{"finalizers":null}}`)))
			})
			return pod, token
		}, s.socket.ID, "is being deleted"},
	} {
		t.Run(name, func(t *testing.T) {
			pod, token := tc.pod()
			socket := tc.socket
			kubetest.Eventually(t, "the informer to see the pod", func(ctx context.Context) bool {
				seen := &corev1.Pod{}
				return s.server.Cache.Get(ctx, client.ObjectKeyFromObject(pod), seen) == nil && (seen.DeletionTimestamp != nil) == strings.Contains(name, "going")
			})
			a := s.call(token, http.MethodPost, s.tunnelsPath(socket), newKey(t).request())
			a.want(t, http.StatusForbidden, gatewayapi.ReasonForbidden, tc.message)
			s.call(token, http.MethodPost, s.tunnelsPath(socket)+"/"+uuid.NewString()+"/certificate", newKey(t).request()).want(t, http.StatusForbidden, gatewayapi.ReasonForbidden, "")
			s.call(token, http.MethodPut, gatewayapi.SocketsPath+socket+"/status", gatewayapi.StatusReport{State: gatewayapi.StateConnecting}).want(t, http.StatusForbidden, gatewayapi.ReasonForbidden, "")
		})
	}

	t.Run("a stolen socket id", func(t *testing.T) {
		_, token := s.pod(s.ns, "thief")
		cluster.Change(t, s.svc, func() { s.svc.Annotations[annotations.SocketID] = victim.ID })
		s.waitForSocket(victim.ID)
		s.call(token, http.MethodPost, s.tunnelsPath(victim.ID), newKey(t).request()).
			want(t, http.StatusForbidden, gatewayapi.ReasonForbidden, "which is not the Service's own")
		if n, err := s.api.Tunnels(t.Context(), victim.ID); err != nil || len(n) != 0 {
			t.Errorf("the victim's tunnels: %v, %v", n, err)
		}
		nobody := uuid.NewString()
		cluster.Change(t, s.svc, func() { s.svc.Annotations[annotations.SocketID] = nobody })
		s.waitForSocket(nobody)
		s.call(token, http.MethodPost, s.tunnelsPath(nobody), newKey(t).request()).
			want(t, http.StatusForbidden, gatewayapi.ReasonForbidden, "does not exist at Mysocket")
	})
}

// waitForSocket waits until the informer has the Service with this socket id.
func (s *stage) waitForSocket(id string) {
	s.t.Helper()
	kubetest.Eventually(s.t, "the informer to see the Service", func(ctx context.Context) bool {
		seen := &corev1.Service{}
		return s.server.Cache.Get(ctx, client.ObjectKeyFromObject(s.svc), seen) == nil && seen.Annotations[annotations.SocketID] == id
	})
}

// TestOthersTunnel has a pod reach for the tunnel of another replica of the same Service.
func TestOthersTunnel(t *testing.T) {
	s := newStage(t)
	owner, ownerToken := s.pod(s.ns, "web-1")
	_, otherToken := s.pod(s.ns, "web-2")
	reg := s.register(ownerToken, newKey(t))
	s.call(otherToken, http.MethodPost, s.certificatePath(reg.TunnelID), newKey(t).request()).want(t, http.StatusNotFound, gatewayapi.ReasonNotFound, "register again")
	if a := s.call(otherToken, http.MethodDelete, s.tunnelsPath(s.socket.ID)+"/"+reg.TunnelID, nil); a.status != http.StatusNoContent {
		t.Errorf("answer %d %s", a.status, a.body)
	}
	if obj, err := s.object(owner); err != nil || obj.DeletionTimestamp != nil {
		t.Errorf("the owner's Tunnel: %v, %v", obj.DeletionTimestamp, err)
	}
}
