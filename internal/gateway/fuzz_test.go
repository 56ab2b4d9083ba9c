package gateway

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/mysocketio/mysocket-injector/internal/annotations"
	"github.com/mysocketio/mysocket-injector/internal/gatewayapi"
	"github.com/mysocketio/mysocket-injector/internal/mysocket"
)

func discard() *slog.Logger { return slog.New(slog.DiscardHandler) }

// world is a cluster of one pod and one Service, and a Mysocket API of one socket, in memory and without any change.
type world struct {
	client.Client // the rest is not called
	t             *testing.T
}

const (
	worldSocket = "11111111-1111-4111-8111-111111111111"
	worldUID    = "22222222-2222-4222-8222-222222222222"
)

func (w *world) Create(_ context.Context, obj client.Object, _ ...client.CreateOption) error {
	if review, ok := obj.(*authenticationv1.TokenReview); ok && review.Spec.Token == "good" {
		review.Status = authenticationv1.TokenReviewStatus{Authenticated: true, Audiences: []string{gatewayapi.Audience}, User: authenticationv1.UserInfo{
			Username: "system:serviceaccount:shop:app", Extra: map[string]authenticationv1.ExtraValue{extraPodName: {"web-1"}, extraPodUID: {worldUID}}}}
	}
	return nil
}

func (w *world) Get(_ context.Context, key client.ObjectKey, obj client.Object, _ ...client.GetOption) error {
	pod, ok := obj.(*corev1.Pod)
	if !ok {
		return apierrors.NewNotFound(corev1.Resource("tunnels"), key.Name)
	}
	if key != (client.ObjectKey{Namespace: "shop", Name: "web-1"}) {
		w.t.Errorf("somebody else's pod: %s", key)
	}
	*pod = corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "web-1", UID: worldUID, Labels: map[string]string{"app": "web"}}}
	return nil
}

func (w *world) List(_ context.Context, list client.ObjectList, _ ...client.ListOption) error {
	services, ok := list.(*corev1.ServiceList)
	if !ok {
		return errors.New("no such list")
	}
	services.Items = []corev1.Service{{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "web", Annotations: map[string]string{annotations.Enabled: "true", annotations.SocketID: worldSocket}},
		Spec:       corev1.ServiceSpec{Selector: map[string]string{"app": "web"}, Ports: []corev1.ServicePort{{Port: 80}}},
	}}
	return nil
}

func (w *world) Status() client.SubResourceWriter { return worldStatus{} }

type worldStatus struct{ client.SubResourceWriter }

func (worldStatus) Patch(context.Context, client.Object, client.Patch, ...client.SubResourcePatchOption) error {
	return nil
}

type worldAPI struct{}

func (worldAPI) Login(context.Context) (string, error) { return "user", nil }
func (worldAPI) Sockets(context.Context, time.Duration) ([]mysocket.Socket, error) {
	return []mysocket.Socket{{ID: worldSocket, Name: "k8s shop.web"}}, nil
}
func (worldAPI) CreateTunnel(context.Context, string) (mysocket.Tunnel, error) {
	return mysocket.Tunnel{ID: "33333333-3333-4333-8333-333333333333", LocalPort: 1}, nil
}
func (worldAPI) DeleteTunnel(context.Context, string, string) error { return nil }
func (worldAPI) SignKey(context.Context, string, string, string) (mysocket.SignedKey, error) {
	return mysocket.SignedKey{Certificate: "certificate"}, nil
}

// FuzzRequests sends the gateway what a pod could send.
func FuzzRequests(f *testing.F) {
	const key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJdD7y3aLq454yWBdwLWbieU1ebz9/cu7/QEXn9OIeZJ"
	f.Add("POST", "/v1/sockets/"+worldSocket+"/tunnels", "Bearer good", `{"publicKey":"`+key+`"}`)
	f.Add("POST", "/v1/sockets/"+worldSocket+"/tunnels/"+worldUID+"/certificate", "Bearer good", `{"publicKey":"`+key+` comment"}`)
	f.Add("PUT", "/v1/sockets/"+worldSocket+"/status", "Bearer good", `{"state":"Connected","message":"\ud800"}`)
	f.Add("DELETE", "/v1/sockets/"+worldSocket+"/tunnels/x", "Bearer good", "")
	f.Add("POST", "/v1/sockets/../sockets/%2e%2e/tunnels", "bearer good", "null")
	f.Add("GET", "/v1/assignments/", "Bearer ", "[]")
	f.Fuzz(func(t *testing.T, method, path, authorization, body string) {
		target, err := url.ParseRequestURI(path)
		if err != nil || target.Path == gatewayapi.AssignmentsPath || !strings.HasPrefix(path, "/") || len(method) == 0 || strings.ContainsAny(method, " \t\r\n\x00") {
			return // the stream does not end by itself
		}
		w := &world{t: t}
		s, err := New(Config{Cache: w, Live: w, API: worldAPI{}, Changes: &Changes{}, EdgeAddress: "edge:22", EdgeHostKeys: []string{key}, Log: discard()})
		if err != nil {
			t.Fatal(err)
		}
		r := &http.Request{Method: method, URL: target, Header: http.Header{"Authorization": {authorization}}, Body: http.NoBody, Host: "gateway", RequestURI: path, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1}
		if body != "" {
			r = httptest.NewRequest(http.MethodPost, "/", strings.NewReader(body))
			r.Method, r.URL, r.RequestURI = method, target, path
			r.Header.Set("Authorization", authorization)
		}
		got := httptest.NewRecorder()
		s.ServeHTTP(got, r.WithContext(t.Context()))
		switch {
		case got.Code == http.StatusOK:
			var reg gatewayapi.Registration
			if err := json.Unmarshal(got.Body.Bytes(), &reg); err != nil || reg.TunnelID == "" || authorization != "Bearer good" {
				t.Fatalf("200 %s (%v)", got.Body, err)
			}
		case got.Code == http.StatusNoContent && authorization == "Bearer good":
		case got.Code == http.StatusNotFound, got.Code == http.StatusMethodNotAllowed, got.Code/100 == 3: // the mux's own, or no such tunnel
		case got.Code >= 400 && got.Code < 500:
			var e gatewayapi.Error
			if err := json.Unmarshal(got.Body.Bytes(), &e); err != nil || e.Reason == "" || e.Message == "" || len(e.Message) > 1000 {
				t.Fatalf("%d %s (%v)", got.Code, got.Body, err)
			}
		default:
			t.Fatalf("%s %q: %d %s", method, path, got.Code, got.Body)
		}
	})
}
