package admission

import (
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"

	"github.com/mysocketio/mysocket-injector/internal/annotations"
)

// TestLoadBalancersAreFound without an annotation, in the cache and at the API server.
func TestLoadBalancersAreFound(t *testing.T) {
	balancer := func(name, class string) *corev1.Service {
		return &corev1.Service{
			ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name},
			Spec: corev1.ServiceSpec{
				Type: corev1.ServiceTypeLoadBalancer, LoadBalancerClass: ptr.To(class), Selector: map[string]string{"app": "web"}, Ports: []corev1.ServicePort{{Port: 80}},
			},
		}
	}
	all := reader(balancer("ours", annotations.LoadBalancerClass), balancer("another", "example.com/lb"))
	found := newServices(all, all)
	pod := map[string]string{"app": "web"}
	for name, look := range map[string]func() ([]string, error){
		"cache":  func() ([]string, error) { return found.fromCache(t.Context(), "shop", pod) },
		"server": func() ([]string, error) { return found.fromServer(t.Context(), "shop", pod) },
	} {
		if names, err := look(); err != nil || !slices.Equal(names, []string{"ours"}) {
			t.Errorf("%s: %v, %v", name, names, err)
		}
	}
}
