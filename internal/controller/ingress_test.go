package controller

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"

	"github.com/mysocketio/mysocket-injector/internal/annotations"
)

func ofClass(class string) func(*corev1.Service) {
	return func(svc *corev1.Service) {
		svc.Spec.Type, svc.Spec.LoadBalancerClass = corev1.ServiceTypeLoadBalancer, ptr.To(class)
	}
}

// TestLoadBalancer is public without an annotation, and has its name where kubectl get service shows it.
func TestLoadBalancer(t *testing.T) {
	for name, end := range map[string]func(*stage, *corev1.Service){
		"switched off": func(s *stage, svc *corev1.Service) {
			cluster.Change(s.t, svc, func() { svc.Annotations[annotations.Enabled] = "false" })
		},
		"another type": func(s *stage, svc *corev1.Service) {
			cluster.Change(s.t, svc, func() { svc.Spec.Type, svc.Spec.LoadBalancerClass = corev1.ServiceTypeClusterIP, nil })
		},
		"deleted": func(s *stage, svc *corev1.Service) {
			cluster.Change(s.t, svc, func() { svc.Finalizers = append(svc.Finalizers, "example.com/keep") })
			cluster.Delete(s.t, svc)
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStage(t)
			svc := s.service(nil, ofClass(annotations.LoadBalancerClass))
			s.mustReconcile(svc)
			wantCondition(t, svc, annotations.SocketReady, metav1.ConditionTrue, "Ready", "")
			if list := svc.Status.LoadBalancer.Ingress; len(list) != 1 || list[0].Hostname != svc.Annotations[annotations.DNSName] || list[0].Hostname == "" || list[0].IP != "" {
				t.Errorf("ingress %+v, annotations %v", list, svc.Annotations)
			}
			version := svc.ResourceVersion
			if s.mustReconcile(svc); svc.ResourceVersion != version {
				t.Error("written again though nothing changed")
			}
			end(s, svc)
			s.mustReconcile(svc)
			wantUntouched(t, svc)
			if list := svc.Status.LoadBalancer.Ingress; len(list) != 0 || len(s.sockets()) != 0 {
				t.Errorf("ingress %+v, sockets %v", list, s.sockets())
			}
			if name == "deleted" {
				cluster.Change(t, svc, func() { svc.Finalizers = nil })
			}
		})
	}
}

// TestLoadBalancerNoMore stays public by its annotation when it stops to be one.
func TestLoadBalancerNoMore(t *testing.T) {
	s := newStage(t)
	svc := s.service(enabled(), ofClass(annotations.LoadBalancerClass))
	s.mustReconcile(svc)
	if len(svc.Status.LoadBalancer.Ingress) != 1 {
		t.Errorf("ingress %+v", svc.Status.LoadBalancer.Ingress)
	}
	cluster.Change(t, svc, func() { svc.Spec.Type, svc.Spec.LoadBalancerClass = corev1.ServiceTypeClusterIP, nil })
	s.mustReconcile(svc)
	wantCondition(t, svc, annotations.SocketReady, metav1.ConditionTrue, "Ready", "")
	if list := svc.Status.LoadBalancer.Ingress; len(list) != 0 || len(s.sockets()) != 1 {
		t.Errorf("ingress %+v, sockets %v", list, s.sockets())
	}
}

// TestLoadBalancerOfAnother has its status written by somebody else, who must not be disturbed.
func TestLoadBalancerOfAnother(t *testing.T) {
	s := newStage(t)
	svc := s.service(enabled(), ofClass("example.com/lb"))
	svc.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: "192.0.2.1"}}
	if err := cluster.Client.Status().Update(t.Context(), svc); err != nil {
		t.Fatal(err)
	}
	s.mustReconcile(svc)
	wantCondition(t, svc, annotations.SocketReady, metav1.ConditionTrue, "Ready", "")
	cluster.Change(t, svc, func() { delete(svc.Annotations, annotations.Enabled) })
	s.mustReconcile(svc)
	wantUntouched(t, svc)
	if list := svc.Status.LoadBalancer.Ingress; len(list) != 1 || list[0].IP != "192.0.2.1" {
		t.Errorf("ingress %+v", list)
	}
}
