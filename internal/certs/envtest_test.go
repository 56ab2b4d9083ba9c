package certs

import (
	"bytes"
	"os"
	"strings"
	"testing"
	"time"

	cmmeta "github.com/cert-manager/cert-manager/pkg/apis/meta/v1"
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/envtest"
)

// TestRealAPIServer runs two replicas with exactly the rights that New's comment names.
func TestRealAPIServer(t *testing.T) {
	if os.Getenv("KUBEBUILDER_ASSETS") == "" {
		t.Skip("KUBEBUILDER_ASSETS does not say where the API server's binaries are; make test-envtest sets it")
	}
	env := &envtest.Environment{}
	admin, err := env.Start()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := env.Stop(); err != nil {
			t.Error(err)
		}
	})
	c, err := client.New(admin, client.Options{Scheme: certManagerScheme(t)})
	if err != nil {
		t.Fatal(err)
	}
	cfg := testConfig()
	cfg.LeafLifetime, cfg.CALifetime, cfg.Overlap = 0, 0, 0
	cfg.Interval = 100 * time.Millisecond
	cfg.ValidatingWebhook = "mysocket-injector"
	limited := limitedClient(t, c, admin, cfg)

	leader, follower := newManager(t, cfg, limited), newManager(t, cfg, limited)
	stop := run(t, follower, leader, leader.Leader())
	defer stop()
	eventually(t, "both have a certificate", func() bool { return leader.CABundle() != nil && follower.CABundle() != nil })
	if leader.Ready() == nil || follower.Ready() == nil {
		t.Error("ready without a webhook configuration")
	}

	// As helm does it: without a caBundle, which isn't helm's field then.
	mutatingConfig := mutating()
	for i := range mutatingConfig.Webhooks {
		mutatingConfig.Webhooks[i].AdmissionReviewVersions = []string{"v1"}
	}
	validatingConfig := &admissionregistrationv1.ValidatingWebhookConfiguration{
		ObjectMeta: metav1.ObjectMeta{Name: "mysocket-injector"},
		Webhooks: []admissionregistrationv1.ValidatingWebhook{{
			Name:                    "services.mysocket.io",
			AdmissionReviewVersions: []string{"v1"},
			SideEffects:             ptr.To(admissionregistrationv1.SideEffectClassNone),
			ClientConfig:            mutatingConfig.Webhooks[0].ClientConfig,
		}},
	}
	for _, o := range []client.Object{mutatingConfig, validatingConfig} {
		if err := c.Create(t.Context(), o); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "both are ready", func() bool { return leader.Ready() == nil && follower.Ready() == nil })
	published := func() bool {
		for _, w := range readMutating(t, c).Webhooks {
			if !bytes.Equal(w.ClientConfig.CABundle, leader.CABundle()) {
				return false
			}
		}
		return true
	}
	if !published() {
		t.Error("ready, and the CA isn't in the configuration")
	}

	cleared := readMutating(t, c)
	for i := range cleared.Webhooks {
		cleared.Webhooks[i].ClientConfig.CABundle = nil
	}
	if err := c.Update(t.Context(), cleared); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a cleared caBundle is back", published)

	before := leader.CABundle()
	if err := c.Delete(t.Context(), readSecret(t, c)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the deleted Secret is made anew and read", func() bool {
		return !bytes.Equal(leader.CABundle(), before) && bytes.Equal(leader.CABundle(), follower.CABundle()) && published()
	})
	if err := handshake(follower, before); err != nil {
		t.Errorf("a client that still has the old bundle: %v", err)
	}

	// The same with cert-manager, which comes after the control plane that waits for it.
	cfg.Certificate = testCertificate
	issued := newManager(t, cfg, limited)
	defer run(t, issued)()
	says := func(want string) func() bool {
		return func() bool { err := issued.issuanceProblem(); return err != nil && strings.Contains(err.Error(), want) }
	}
	eventually(t, "word of the missing cert-manager", says("cert-manager is not installed: the API server does not know the kind Certificate of cert-manager.io/v1"))
	if _, err := envtest.InstallCRDs(admin, envtest.CRDInstallOptions{Paths: []string{certManagerCRDs(t)}}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "word of the missing Certificate", says("the Certificate mysocket-system/mysocket-serving of cert-manager does not exist"))
	if err := c.Create(t.Context(), testCertificateObject()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "word of a silent cert-manager", says("has not looked at it yet"))
	cm := &certManager{newIssuer(t, time.Now(), issued.rotation.names...), c, testNamespace}
	cm.put(cm.secret(time.Now(), time.Hour))
	cm.say(ready(cmmeta.ConditionTrue, "Ready", ""))
	eventually(t, "an issued certificate", func() bool { return issued.issuanceProblem() == nil })

	// What the rights don't cover.
	other := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: testNamespace, Name: "another"}}
	if err := c.Create(t.Context(), other); err != nil {
		t.Fatal(err)
	}
	if err := limited.Get(t.Context(), client.ObjectKeyFromObject(other), other); !apierrors.IsForbidden(err) {
		t.Errorf("reading another Secret: %v", err)
	}
}

// limitedClient acts as a ServiceAccount that may do what a Manager needs.
func limitedClient(t *testing.T, c client.Client, admin *rest.Config, cfg Config) client.Client {
	t.Helper()
	meta := metav1.ObjectMeta{Name: "mysocket-injector", Namespace: testNamespace}
	subjects := []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Namespace: testNamespace, Name: "mysocket-injector"}}
	for _, o := range []client.Object{
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: testNamespace}},
		&rbacv1.Role{ObjectMeta: meta, Rules: []rbacv1.PolicyRule{
			{APIGroups: []string{""}, Resources: []string{"secrets"}, Verbs: []string{"create"}},
			{APIGroups: []string{""}, Resources: []string{"secrets"}, ResourceNames: []string{cfg.SecretName}, Verbs: []string{"get", "update"}},
			{APIGroups: []string{"cert-manager.io"}, Resources: []string{"certificates"}, ResourceNames: []string{testCertificate}, Verbs: []string{"get"}},
			{APIGroups: []string{""}, Resources: []string{"secrets"}, ResourceNames: []string{testIssuedSecret}, Verbs: []string{"get"}},
		}},
		&rbacv1.RoleBinding{ObjectMeta: meta, Subjects: subjects, RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: meta.Name}},
		&rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: meta.Name}, Rules: []rbacv1.PolicyRule{
			{APIGroups: []string{"admissionregistration.k8s.io"}, Resources: []string{"mutatingwebhookconfigurations"}, ResourceNames: []string{cfg.MutatingWebhook}, Verbs: []string{"get", "patch"}},
			{APIGroups: []string{"admissionregistration.k8s.io"}, Resources: []string{"validatingwebhookconfigurations"}, ResourceNames: []string{cfg.ValidatingWebhook}, Verbs: []string{"get", "patch"}},
		}},
		&rbacv1.ClusterRoleBinding{ObjectMeta: metav1.ObjectMeta{Name: meta.Name}, Subjects: subjects, RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: meta.Name}},
	} {
		if err := c.Create(t.Context(), o); err != nil {
			t.Fatal(err)
		}
	}
	as := rest.CopyConfig(admin)
	as.Impersonate = rest.ImpersonationConfig{UserName: "system:serviceaccount:" + testNamespace + ":mysocket-injector"}
	limited, err := client.New(as, client.Options{Scheme: c.Scheme()})
	if err != nil {
		t.Fatal(err)
	}
	return limited
}

// eventually waits for what takes a real API server a moment.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	deadline := time.After(20 * time.Second)
	for !is() {
		select {
		case <-deadline:
			t.Fatalf("not within 20 s: %s", what)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// issuanceProblem is what is wrong with cert-manager's Certificate, as last seen.
func (m *Manager) issuanceProblem() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.issuance
}
