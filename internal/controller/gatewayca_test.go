package controller

import (
	"context"
	"sync/atomic"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/mysocketio/mysocket-injector/internal/annotations"
)

func TestGatewayCA(t *testing.T) {
	cluster.Require(t)
	var bundle atomic.Value
	bundle.Store("first")
	changed := make(chan struct{}, 1)
	labelled := map[string]string{annotations.NamespaceInjection: annotations.NamespaceInjectionEnabled}
	before := cluster.Namespace(t, labelled)
	plain := cluster.Namespace(t, nil)
	start(t, "", func(m managed) []setup {
		return []setup{&GatewayCAReconciler{
			Client: m.GetClient(), ConfigMap: "the-ca", Changed: changed,
			Bundle: func() []byte { return []byte(bundle.Load().(string)) },
		}}
	})
	after := cluster.Namespace(t, labelled)
	cm := &corev1.ConfigMap{}
	wait := func(what, ns, want string) {
		t.Helper()
		eventually(t, what, func(ctx context.Context) bool {
			cm = &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "the-ca"}}
			return cluster.Client.Get(ctx, client.ObjectKeyFromObject(cm), cm) == nil && cm.Data[CAKey] == want
		})
	}
	wait("the CA in a namespace that was there", before, "first")
	wait("the CA in a new namespace", after, "first")
	cluster.Change(t, cm, func() { cm.Data[CAKey], cm.Data["theirs"] = "forged", "stays" })
	wait("the repair", after, "first")
	if cm.Data["theirs"] != "stays" {
		t.Errorf("data %v", cm.Data)
	}
	cluster.Delete(t, cm)
	wait("the CA to come back", after, "first")

	bundle.Store("first second")
	changed <- struct{}{}
	wait("the new CA", before, "first second")
	wait("the new CA everywhere", after, "first second")
	if cluster.Client.Get(t.Context(), client.ObjectKey{Namespace: plain, Name: "the-ca"}, &corev1.ConfigMap{}) == nil {
		t.Error("an unlabelled namespace has the CA")
	}
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: plain}}
	cluster.Change(t, ns, func() { ns.Labels = labelled })
	wait("the CA after the label", plain, "first second")
}

func TestGatewayCAWithoutOne(t *testing.T) {
	ns := cluster.Namespace(t, map[string]string{annotations.NamespaceInjection: annotations.NamespaceInjectionEnabled})
	r := &GatewayCAReconciler{Client: cluster.Client, ConfigMap: "no-ca", Bundle: func() []byte { return nil }}
	if _, err := r.Reconcile(t.Context(), request(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: ns}})); err != nil {
		t.Error(err)
	}
	if cluster.Client.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: "no-ca"}, &corev1.ConfigMap{}) == nil {
		t.Error("an empty CA was published")
	}
}
