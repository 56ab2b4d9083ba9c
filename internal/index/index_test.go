package index

import (
	"fmt"
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"

	"github.com/mysocketio/mysocket-injector/internal/annotations"
)

const test Services = "test"

func service(namespace, name, enabled string, selector map[string]string) *corev1.Service {
	return &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Annotations: map[string]string{annotations.Enabled: enabled}},
		Spec:       corev1.ServiceSpec{Selector: selector},
	}
}

func TestSelecting(t *testing.T) {
	cached := fake.NewClientBuilder().WithIndex(&corev1.Service{}, string(test), Keys).WithObjects(
		service("shop", "by-one", "true", map[string]string{"app": "web"}),
		service("shop", "by-another", "true", map[string]string{"tier": "front"}),
		service("shop", "by-both", "true", map[string]string{"tier": "front", "app": "web"}),
		service("shop", "needs-more", "true", map[string]string{"app": "web", "track": "canary"}),
		service("shop", "empty-value", "true", map[string]string{"debug": ""}),
		service("shop", "off", "false", map[string]string{"app": "web"}),
		service("shop", "no-selector", "true", nil),
		service("other", "elsewhere", "true", map[string]string{"app": "web"}),
	).Build()
	for name, tc := range map[string]struct {
		labels map[string]string
		want   []string
	}{
		"several Services":     {map[string]string{"app": "web", "tier": "front"}, []string{"by-another", "by-both", "by-one"}},
		"not all labels":       {map[string]string{"app": "web"}, []string{"by-one"}},
		"further labels":       {map[string]string{"app": "web", "track": "canary", "x": "y"}, []string{"by-one", "needs-more"}},
		"another value":        {map[string]string{"app": "api"}, nil},
		"an empty value":       {map[string]string{"debug": ""}, []string{"empty-value"}},
		"a label is missing":   {map[string]string{"track": "canary"}, nil},
		"no labels whatsoever": {nil, nil},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := test.Selecting(t.Context(), cached, "shop", tc.labels)
			if err != nil || !slices.Equal(got, tc.want) {
				t.Errorf("%v, %v, want %v", got, err, tc.want)
			}
		})
	}
}

// TestSelectingNeedsTheIndex: who forgets to register it must hear of it.
func TestSelectingNeedsTheIndex(t *testing.T) {
	if got, err := test.Selecting(t.Context(), fake.NewClientBuilder().Build(), "shop", map[string]string{"app": "web"}); err == nil {
		t.Errorf("%v without an index", got)
	}
}

// TestSelectingAgreesWithAScan compares both ways for all labels of a small alphabet.
func TestSelectingAgreesWithAScan(t *testing.T) {
	var sets []map[string]string
	for _, a := range []string{"", "1", "2"} {
		for _, b := range []string{"", "1", "2"} {
			for _, c := range []string{"", "1"} {
				set := map[string]string{}
				for key, value := range map[string]string{"a": a, "b": b, "c": c} {
					if value != "" {
						set[key] = value
					}
				}
				sets = append(sets, set)
			}
		}
	}
	builder := fake.NewClientBuilder().WithIndex(&corev1.Service{}, string(test), Keys)
	var all []corev1.Service
	for i, selector := range sets {
		svc := service("shop", fmt.Sprintf("s-%02d", i), "true", selector)
		builder = builder.WithObjects(svc)
		all = append(all, *svc)
	}
	cached := builder.Build()
	for _, labels := range sets {
		got, err := test.Selecting(t.Context(), cached, "shop", labels)
		if want := Names(all, labels); err != nil || !slices.Equal(got, want) {
			t.Errorf("labels %v: %v, %v, want %v", labels, got, err, want)
		}
	}
}
