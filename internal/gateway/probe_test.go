package gateway

import (
	"reflect"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/utils/ptr"

	"github.com/mysocketio/mysocket-injector/internal/gatewayapi"
)

func TestProbeOf(t *testing.T) {
	httpGet := func(path string) *corev1.Probe {
		return &corev1.Probe{ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: path, Port: intstr.FromString("admin"), Scheme: corev1.URISchemeHTTPS, HTTPHeaders: []corev1.HTTPHeader{{Name: "Host", Value: "shop"}}}}, PeriodSeconds: 7, TimeoutSeconds: 2, SuccessThreshold: 1, FailureThreshold: 4}
	}
	ports := []corev1.ContainerPort{{Name: "http", ContainerPort: 8000}, {Name: "admin", ContainerPort: 9000}}
	app := func(change func(*corev1.Container)) corev1.PodSpec {
		c := corev1.Container{Name: "app", Ports: ports, ReadinessProbe: httpGet("/ready")}
		change(&c)
		return corev1.PodSpec{Containers: []corev1.Container{c}}
	}
	defaults := gatewayapi.Probe{PeriodSeconds: 10, TimeoutSeconds: 1, SuccessThreshold: 1, FailureThreshold: 3}
	with := func(change func(*gatewayapi.Probe)) *gatewayapi.Probe {
		p := defaults
		change(&p)
		return &p
	}
	want := &gatewayapi.Probe{Kind: gatewayapi.ProbeHTTPS, Port: 9000, Path: "/ready", Headers: []gatewayapi.Header{{Name: "Host", Value: "shop"}}, PeriodSeconds: 7, TimeoutSeconds: 2, SuccessThreshold: 1, FailureThreshold: 4}
	always := corev1.ContainerRestartPolicyAlways
	for _, tc := range []struct {
		name string
		pod  corev1.PodSpec
		want *gatewayapi.Probe
	}{
		{"of the container with the port", app(func(*corev1.Container) {}), want},
		{"of the only container, which names no such port", app(func(c *corev1.Container) { c.Ports = ports[1:] }), want},
		{"none", app(func(c *corev1.Container) { c.ReadinessProbe = nil }), nil},
		{"a command", app(func(c *corev1.Container) {
			c.ReadinessProbe = &corev1.Probe{ProbeHandler: corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: []string{"true"}}}}
		}), nil},
		{"a port of an unknown name", app(func(c *corev1.Container) { c.Ports = ports[:1] }), nil},
		{"too long", app(func(c *corev1.Container) { c.ReadinessProbe = httpGet("/" + strings.Repeat("x", maxProbe)) }), nil},
		{"tcp, with the defaults", app(func(c *corev1.Container) {
			c.ReadinessProbe = &corev1.Probe{ProbeHandler: corev1.ProbeHandler{TCPSocket: &corev1.TCPSocketAction{Port: intstr.FromInt32(8000)}}}
		}), with(func(p *gatewayapi.Probe) { p.Kind, p.Port = gatewayapi.ProbeTCP, 8000 })},
		{"grpc", app(func(c *corev1.Container) {
			c.ReadinessProbe = &corev1.Probe{ProbeHandler: corev1.ProbeHandler{GRPC: &corev1.GRPCAction{Port: 8000, Service: ptr.To("shop")}}}
		}), with(func(p *gatewayapi.Probe) { p.Kind, p.Port, p.Service = gatewayapi.ProbeGRPC, 8000, "shop" })},
		{"of another container than the app", corev1.PodSpec{Containers: []corev1.Container{{Name: "app", Ports: ports[:1]}, {Name: "other", Ports: ports[1:], ReadinessProbe: httpGet("/other")}}}, nil},
		{"of none of two", corev1.PodSpec{Containers: []corev1.Container{{Name: "app"}, {Name: "other", ReadinessProbe: httpGet("/other")}}}, nil},
		{"of a sidecar that takes the visitors", corev1.PodSpec{
			Containers:     []corev1.Container{{Name: "app"}},
			InitContainers: []corev1.Container{{Name: "setup", Ports: ports}, {Name: "proxy", RestartPolicy: &always, Ports: ports, ReadinessProbe: httpGet("/ready")}},
		}, want},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := probeOf(&tc.pod, 8000); !reflect.DeepEqual(got, tc.want) {
				t.Errorf("got %+v, want %+v", got, tc.want)
			}
		})
	}
}
