package controller

import (
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/mysocketio/mysocket-injector/internal/annotations"
	"github.com/mysocketio/mysocket-injector/internal/index"
)

// laterQueue notes what is to be looked at later. Nothing may be added at once.
type laterQueue struct {
	workqueue.TypedRateLimitingInterface[reconcile.Request]
	t     *testing.T
	added []string
}

func (q *laterQueue) AddAfter(req reconcile.Request, after time.Duration) {
	if after != podsSettle {
		q.t.Errorf("%s after %s, want %s", req, after, podsSettle)
	}
	q.added = append(q.added, req.String())
}

func TestOnPod(t *testing.T) {
	const by index.Services = "test"
	public := func(ns, name, app string) *corev1.Service {
		return &corev1.Service{
			ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name, Annotations: map[string]string{annotations.Enabled: "true"}},
			Spec:       corev1.ServiceSpec{Selector: map[string]string{"app": app}},
		}
	}
	cached := fake.NewClientBuilder().WithIndex(&corev1.Service{}, string(by), index.Keys).WithObjects(
		public("shop", "a", "a"), public("shop", "b", "b"), public("other", "a", "a")).Build()
	pod := func(app, version string, change func(*corev1.Pod)) *corev1.Pod {
		p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "pod", Labels: map[string]string{"app": app}, ResourceVersion: version}}
		if change != nil {
			change(p)
		}
		return p
	}
	ended := func(p *corev1.Pod) { p.Status.Phase = corev1.PodFailed }
	h := onPod(cached, by)
	for name, tc := range map[string]struct {
		happen func(*laterQueue)
		want   []string
	}{
		"made": {func(q *laterQueue) { h.Create(t.Context(), event.CreateEvent{Object: pod("a", "1", nil)}, q) }, []string{"shop/a"}},
		"was there at the start": {func(q *laterQueue) {
			h.Create(t.Context(), event.CreateEvent{Object: pod("a", "1", nil), IsInInitialList: true}, q)
		}, nil},
		"selected by none": {func(q *laterQueue) { h.Create(t.Context(), event.CreateEvent{Object: pod("c", "1", nil)}, q) }, nil},
		"what is kept of it is the same": {func(q *laterQueue) {
			h.Update(t.Context(), event.UpdateEvent{ObjectOld: pod("a", "1", nil), ObjectNew: pod("a", "2", nil)}, q)
		}, nil},
		"ended": {func(q *laterQueue) {
			h.Update(t.Context(), event.UpdateEvent{ObjectOld: pod("a", "1", nil), ObjectNew: pod("a", "2", ended)}, q)
		}, []string{"shop/a"}},
		"has another label": {func(q *laterQueue) {
			h.Update(t.Context(), event.UpdateEvent{ObjectOld: pod("a", "1", nil), ObjectNew: pod("b", "2", nil)}, q)
		}, []string{"shop/a", "shop/b"}},
		"deleted": {func(q *laterQueue) { h.Delete(t.Context(), event.DeleteEvent{Object: pod("b", "1", nil)}, q) }, []string{"shop/b"}},
	} {
		t.Run(name, func(t *testing.T) {
			q := &laterQueue{t: t}
			tc.happen(q)
			if !slices.Equal(q.added, tc.want) {
				t.Errorf("%v, want %v", q.added, tc.want)
			}
		})
	}
}
