package controller

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/mysocketio/mysocket-injector/api/v1alpha1"
	"github.com/mysocketio/mysocket-injector/internal/annotations"
	"github.com/mysocketio/mysocket-injector/internal/mysocket"
	"github.com/mysocketio/mysocket-injector/internal/mysocket/mysockettest"
)

const testPassword = "correct-horse-battery"

func (s *stage) secret(name string, data map[string]string) *corev1.Secret {
	s.t.Helper()
	secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: s.ns, Name: name}, StringData: data}
	cluster.Create(s.t, secret)
	return secret
}

// wantHidden wants a password in nothing that anybody can read: the Service, and the Events since the last look.
func (s *stage) wantHidden(svc *corev1.Service, password string) {
	s.t.Helper()
	if all := fmt.Sprintf("%+v %q", svc, s.events.take()); strings.Contains(all, password) {
		s.t.Errorf("the password is in %s", all)
	}
}

// TestProtectedSecret protects a socket of our edge, follows the Secret, and takes the protection back.
func TestProtectedSecret(t *testing.T) {
	s := newStage(t)
	secret := s.secret("login", map[string]string{"username": "me", "password": testPassword + "\n"})
	svc := s.service(enabled(annotations.ProtectedSecret, "login"))
	r := s.reconciler()
	reconcile := func() time.Duration {
		t.Helper()
		got, err := r.Reconcile(t.Context(), request(svc))
		if err != nil {
			t.Fatal(err)
		}
		cluster.Get(t, svc)
		return got.RequeueAfter
	}
	puts := func() int { return s.proxy.Requests("PUT /socket/{}") }
	if again := reconcile(); !between(again, secretPoll/2, secretPoll) {
		t.Errorf("the Secret is read again after %s", again)
	}
	wantApplied(t, svc, "protection")
	if k := s.sockets()[0]; !k.Protected || k.ProtectedUsername != "me" {
		t.Errorf("made with %+v", k)
	}
	s.wantHidden(svc, testPassword)
	if reconcile(); puts() != 0 {
		t.Errorf("%d updates though nothing changed", puts())
	}
	// Another password, another user.
	for i, data := range []map[string][]byte{
		{"username": []byte("me"), "password": []byte("another-" + testPassword)},
		{"username": []byte("you"), "password": []byte("another-" + testPassword)},
	} {
		cluster.Change(t, secret, func() { secret.Data = data })
		reconcile()
		if reconcile(); puts() != i+1 {
			t.Errorf("%d updates after %d changes", puts(), i+1)
		}
	}
	if k := s.sockets()[0]; k.ProtectedUsername != "you" {
		t.Errorf("changed to %+v", k)
	}
	// The next leader gives them once more, since the edge does not tell what it has.
	r = s.reconciler()
	reconcile()
	if reconcile(); puts() != 3 {
		t.Errorf("%d updates after a change of the leader", puts())
	}
	// The Secret goes: what is protected stays so.
	cluster.Delete(t, secret)
	if again := reconcile(); !between(again, slowRetry/2, slowRetry) {
		t.Errorf("again after %s", again)
	}
	wantCondition(t, svc, annotations.SocketReady, metav1.ConditionFalse, "ProtectedSecretUnavailable", "Secret "+s.ns+"/login (annotation mysocket.io/protected-secret) does not exist: make it with the keys username and password")
	wantCondition(t, svc, annotations.TunnelsReady, metav1.ConditionFalse, "NoPods", "")
	if !s.sockets()[0].Protected || !guarded(t, svc) {
		t.Error("it is no longer protected, or no longer served")
	}
	// Somebody takes it off at the edge meanwhile: not served any more.
	k := s.sockets()[0]
	k.Protected = false
	if _, err := s.api.UpdateSocket(t.Context(), k); err != nil {
		t.Fatal(err)
	}
	tunnel := s.tunnel(svc, s.pod("web-1", injected), v1alpha1.TunnelStatus{State: "Connected"})
	reconcile()
	cluster.Get(t, tunnel)
	if guarded(t, svc) || tunnel.DeletionTimestamp == nil {
		t.Error("a socket without its protection is served on")
	}
	// Back, and taken back by its owner.
	s.secret("login", map[string]string{"username": "me", "password": testPassword})
	reconcile()
	wantCondition(t, svc, annotations.SocketReady, metav1.ConditionTrue, "Ready", "")
	if !s.sockets()[0].Protected || !guarded(t, svc) {
		t.Error("the Secret is back, and the protection is not")
	}
	cluster.Change(t, svc, func() { delete(svc.Annotations, annotations.ProtectedSecret) })
	reconcile()
	wantApplied(t, svc, "")
	if k := s.sockets()[0]; k.Protected || k.ProtectedUsername != "" {
		t.Errorf("taken back to %+v", k)
	}
	s.wantHidden(svc, testPassword)
}

// TestProtectionOfOthers was made at the edge by other means, and is not the Service's to take off.
func TestProtectionOfOthers(t *testing.T) {
	s := newStage(t)
	svc := s.service(enabled())
	s.mustReconcile(svc)
	k := s.sockets()[0]
	k.Protected, k.ProtectedUsername, k.ProtectedPassword = true, "them", testPassword
	if _, err := s.api.UpdateSocket(t.Context(), k); err != nil {
		t.Fatal(err)
	}
	cluster.Change(t, svc, func() { svc.Annotations[annotations.UpstreamHTTPHostname] = "shop.example.com" })
	s.mustReconcile(svc)
	if k := s.sockets()[0]; !k.Protected || k.ProtectedUsername != "them" || deref(k.Upstream).UpstreamHTTPHostname != "shop.example.com" {
		t.Errorf("socket %+v", k)
	}
}

// TestSecretThatCannotBeUsed makes no socket, and closes one that was open.
func TestSecretThatCannotBeUsed(t *testing.T) {
	s := newStage(t)
	for name, data := range map[string]map[string]string{
		"no-username": {"password": testPassword},
		"no-password": {"username": "me"},
		"empty":       {"username": "me", "password": "\n"},
		"colon":       {"username": "a:b", "password": testPassword},
		"control":     {"username": "me", "password": testPassword + "\n" + testPassword},
		"long":        {"username": "me", "password": strings.Repeat(testPassword, 20)},
	} {
		s.secret(name, data)
	}
	for name, message := range map[string]string{
		"no-username": `has no key "username"; it needs username and password`,
		"no-password": `has no key "password"; it needs username and password`,
		"empty":       `the key "password" of Secret ` + s.ns + `/empty is empty`,
		"colon":       `the key "username" of Secret ` + s.ns + `/colon must not hold a colon`,
		"control":     `the key "password" of Secret ` + s.ns + `/control must be text without control characters`,
		"long":        `has 420 bytes; allowed are 256`,
		"missing":     `does not exist: make it with the keys username and password`,
	} {
		svc := s.service(enabled(annotations.ProtectedSecret, name), func(svc *corev1.Service) { svc.Name = name })
		if got := s.mustReconcile(svc); !between(got.RequeueAfter, slowRetry/2, slowRetry) {
			t.Errorf("%s: again after %s", name, got.RequeueAfter)
		}
		wantCondition(t, svc, annotations.SocketReady, metav1.ConditionFalse, "ProtectedSecretUnavailable", message)
		if hasFinalizer(svc) {
			t.Errorf("%s: has a finalizer", name)
		}
		s.wantHidden(svc, testPassword)
	}
	if len(s.sockets()) != 0 {
		t.Error("a socket was made")
	}
	// One that was open.
	svc := s.service(enabled())
	s.mustReconcile(svc)
	tunnel := s.tunnel(svc, s.pod("web-1", injected), v1alpha1.TunnelStatus{State: "Connected"})
	cluster.Change(t, svc, func() { svc.Annotations[annotations.ProtectedSecret] = "missing" })
	if guarded(t, svc) {
		t.Error("served from the annotation on")
	}
	s.mustReconcile(svc)
	cluster.Get(t, tunnel)
	if tunnel.DeletionTimestamp == nil {
		t.Error("the tunnel stays open")
	}
	wantCondition(t, svc, annotations.TunnelsReady, metav1.ConditionFalse, "NotRestrictedYet", "")
}

// TestSecretRights are those of a namespace, and no others.
func TestSecretRights(t *testing.T) {
	s := newStage(t)
	config := rest.CopyConfig(cluster.Config)
	config.Impersonate = rest.ImpersonationConfig{UserName: "system:serviceaccount:mysocket-system:mysocket-injector"}
	var err error
	if s.secrets, err = client.New(config, client.Options{Scheme: cluster.Scheme}); err != nil {
		t.Fatal(err)
	}
	s.secret("login", map[string]string{"username": "me", "password": testPassword})
	svc := s.service(enabled(annotations.ProtectedSecret, "login"))
	s.mustReconcile(svc)
	message := "the control plane may not read Secret " + s.ns + `/login (annotation mysocket.io/protected-secret): add "` + s.ns + `" to the chart's value protectedSecretNamespaces`
	wantCondition(t, svc, annotations.SocketReady, metav1.ConditionFalse, "ProtectedSecretUnavailable", message)
	s.wantEvent("Warning ProtectedSecretUnavailable: " + message)
	if len(s.sockets()) != 0 {
		t.Error("a socket was made")
	}
	meta := metav1.ObjectMeta{Namespace: s.ns, Name: "protected-secrets"}
	for _, grant := range []client.Object{
		&rbacv1.Role{ObjectMeta: meta, Rules: []rbacv1.PolicyRule{{APIGroups: []string{""}, Resources: []string{"secrets"}, Verbs: []string{"get"}}}},
		&rbacv1.RoleBinding{ObjectMeta: meta, RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: meta.Name},
			Subjects: []rbacv1.Subject{{Kind: "ServiceAccount", Namespace: "mysocket-system", Name: "mysocket-injector"}}},
	} {
		if err := cluster.Client.Create(t.Context(), grant); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "the right is in force", func(context.Context) bool { s.mustReconcile(svc); return len(s.sockets()) == 1 })
	if !s.sockets()[0].Protected {
		t.Error("made without protection")
	}
}

// TestProtectionFails at the API in every way: refused, failing, ignored. Nothing is served without it, and no answer that
// repeats the password gets it anywhere.
func TestProtectionFails(t *testing.T) {
	ignore := func(k *mysocket.Socket) error { k.Protected = false; return nil }
	for name, tc := range map[string]struct {
		spoil           func(*stage)
		reason, message string
	}{
		"refused": {func(s *stage) {
			s.proxy.FailAlways("PUT /socket/{}", mysockettest.Answer(http.StatusBadRequest, `{"error_message":"`+testPassword+` is too weak"}`))
		}, "SocketRefused", "[password] is too weak"},
		"failing": {func(s *stage) {
			s.proxy.FailAlways("PUT /socket/{}", mysockettest.Answer(500, `{"error_message":"`+testPassword+`"}`))
		}, "APIUnavailable", "500 Internal Server Error: [password]"},
		"ignored": {func(s *stage) {
			list := s.sockets()
			s.use = &memory{sockets: list, before: ignore}
		}, "SocketRefused", "is not protected with the username and password"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStage(t)
			s.secret("login", map[string]string{"username": "me", "password": testPassword})
			svc := s.service(enabled())
			s.mustReconcile(svc)
			tunnel := s.tunnel(svc, s.pod("web-1", injected), v1alpha1.TunnelStatus{State: "Connected"})
			s.events.take()
			tc.spoil(s)
			cluster.Change(t, svc, func() { svc.Annotations[annotations.ProtectedSecret] = "login" })
			if _, err := s.reconcile(svc); err != nil && strings.Contains(err.Error(), testPassword) {
				t.Errorf("the password is in the error %v", err)
			}
			wantCondition(t, svc, annotations.SocketReady, metav1.ConditionFalse, tc.reason, tc.message)
			cluster.Get(t, tunnel)
			if guarded(t, svc) || tunnel.DeletionTimestamp == nil {
				t.Error("served without protection")
			}
			s.wantHidden(svc, testPassword)
		})
	}
}

func TestRedact(t *testing.T) {
	c := &credentials{username: "me", password: `pass"word`}
	inner := &mysocket.APIError{Op: "PUT", Status: 400, Message: `"pass\"word" and pass"word`}
	err := c.redact(fmt.Errorf("update: %w", inner))
	if strings.Contains(err.Error(), "word\"") || strings.Contains(err.Error(), `"word`) || !mysocket.IsRefused(err) {
		t.Errorf("redacted: %v", err)
	}
	other := errors.New("nothing of it")
	for _, got := range []error{c.redact(other), (*credentials)(nil).redact(other)} {
		if got != other { //nolint:errorlint // the very same
			t.Errorf("changed to %v", got)
		}
	}
	if c.redact(nil) != nil {
		t.Error("no error became one")
	}
	if text := fmt.Sprintf("%v %+v %s", c, c, c); strings.Contains(text, "pass\"") {
		t.Errorf("printed: %s", text)
	}
}
