package main

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
)

func TestAdmissionReady(t *testing.T) {
	now := time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC)
	pod := func(name string, change func(*corev1.Pod)) *corev1.Pod {
		p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ours", Name: name, Labels: map[string]string{"app": "webhook"}}}
		change(p)
		return p
	}
	ready := func(since time.Duration) func(*corev1.Pod) {
		return func(p *corev1.Pod) {
			p.Status.Conditions = []corev1.PodCondition{
				{Type: corev1.PodScheduled, Status: corev1.ConditionTrue},
				{Type: corev1.PodReady, Status: corev1.ConditionTrue, LastTransitionTime: metav1.NewTime(now.Add(-since))},
			}
		}
	}
	of := func(version string) func(*corev1.Pod) {
		return func(p *corev1.Pod) {
			ready(time.Hour)(p)
			p.Labels["pod-template-hash"] = version
		}
	}
	service := func(selector map[string]string) *corev1.Service {
		return &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "ours", Name: "webhook"}, Spec: corev1.ServiceSpec{Selector: selector}}
	}
	ours := service(map[string]string{"app": "webhook"})
	for _, tc := range []struct {
		name      string
		published error
		objects   []client.Object
		want      string // empty: ready
	}{
		{"one has been ready for long", nil, []client.Object{ours, pod("a", ready(time.Hour)), pod("b", ready(0))}, ""},
		{"just long enough", nil, []client.Object{ours, pod("a", ready(settleTime))}, ""},
		{"ready only now", nil, []client.Object{ours, pod("a", ready(time.Second)), pod("b", ready(0))}, "no pod of the webhook's Service ours/webhook has been ready for 3s, of 2"},
		{"not ready", nil, []client.Object{ours, pod("a", func(*corev1.Pod) {})}, "of 1"},
		{"on its way out", nil, []client.Object{ours, pod("a", func(p *corev1.Pod) {
			ready(time.Hour)(p)
			p.DeletionTimestamp, p.Finalizers = &metav1.Time{Time: now}, []string{"test/hold"}
		})}, "of 1"},
		{"another Service's pod", nil, []client.Object{ours, pod("a", func(p *corev1.Pod) {
			ready(time.Hour)(p)
			p.Labels = nil
		})}, "of 0"},
		{"the control plane is rolled out", nil, []client.Object{ours, pod("a", of("v1")), pod("b", of("v2"))}, "are being replaced by a new version"},
		{"it was rolled out, and a pod that was evicted is left", nil, []client.Object{ours, pod("a", of("v2")), pod("b", func(p *corev1.Pod) {
			of("v1")(p)
			p.Status.Phase = corev1.PodFailed
		})}, ""},
		{"a Service without a selector", nil, []client.Object{service(nil)}, ""},
		{"no Service", nil, nil, "read the webhook's Service ours/webhook"},
		{"CA not published", errors.New("no CA"), []client.Object{ours, pod("a", ready(time.Hour))}, "no CA"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			reader := fake.NewClientBuilder().WithObjects(tc.objects...).Build()
			err := admissionReady(reader, func() error { return tc.published }, "ours", "webhook", func() time.Time { return now })(context.Background())
			if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
				t.Errorf("got %v, want %q", err, tc.want)
			}
		})
	}
}
