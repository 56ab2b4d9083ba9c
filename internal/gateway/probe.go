package gateway

import (
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/mysocketio/mysocket-injector/internal/annotations"
	"github.com/mysocketio/mysocket-injector/internal/gatewayapi"
)

// maxProbe bounds what of a probe a pod's author chose the length of, in bytes: 64 assignments must fit into a snapshot.
const maxProbe = 512

// probeOf returns the readiness probe of the container that listens on a port: the one that names the port, or the pod's
// only one. It is nil when there is none, when it runs a command (which can't be run outside of the container), when its
// port has a name that the container does not know, or when it is longer than maxProbe.
func probeOf(pod *corev1.PodSpec, port int32) *gatewayapi.Probe {
	c := containerOf(pod, port)
	if c == nil || c.ReadinessProbe == nil {
		return nil
	}
	p := c.ReadinessProbe
	out := &gatewayapi.Probe{
		PeriodSeconds:    atLeastOne(p.PeriodSeconds, 10),
		TimeoutSeconds:   atLeastOne(p.TimeoutSeconds, 1),
		SuccessThreshold: atLeastOne(p.SuccessThreshold, 1),
		FailureThreshold: atLeastOne(p.FailureThreshold, 3),
	}
	switch {
	case p.HTTPGet != nil:
		out.Kind = gatewayapi.ProbeHTTP
		if p.HTTPGet.Scheme == corev1.URISchemeHTTPS {
			out.Kind = gatewayapi.ProbeHTTPS
		}
		out.Port, out.Host, out.Path = portOf(c, p.HTTPGet.Port), p.HTTPGet.Host, p.HTTPGet.Path
		for _, h := range p.HTTPGet.HTTPHeaders {
			out.Headers = append(out.Headers, gatewayapi.Header{Name: h.Name, Value: h.Value})
		}
	case p.TCPSocket != nil:
		out.Kind, out.Port, out.Host = gatewayapi.ProbeTCP, portOf(c, p.TCPSocket.Port), p.TCPSocket.Host
	case p.GRPC != nil:
		out.Kind, out.Port = gatewayapi.ProbeGRPC, p.GRPC.Port
		if p.GRPC.Service != nil {
			out.Service = *p.GRPC.Service
		}
	default:
		return nil
	}
	length := len(out.Host) + len(out.Path) + len(out.Service)
	for _, h := range out.Headers {
		length += len(h.Name) + len(h.Value)
	}
	if out.Port == 0 || length > maxProbe {
		return nil
	}
	return out
}

func containerOf(pod *corev1.PodSpec, port int32) *corev1.Container {
	all := make([]*corev1.Container, 0, len(pod.Containers)+len(pod.InitContainers))
	for i := range pod.Containers {
		all = append(all, &pod.Containers[i])
	}
	for i := range pod.InitContainers {
		if c := &pod.InitContainers[i]; annotations.IsNativeSidecar(c) {
			all = append(all, c)
		}
	}
	for _, c := range all {
		for _, p := range c.Ports {
			if p.ContainerPort == port && (p.Protocol == corev1.ProtocolTCP || p.Protocol == "") {
				return c
			}
		}
	}
	if len(pod.Containers) == 1 {
		return &pod.Containers[0]
	}
	return nil
}

// portOf returns 0 for a name that the container does not know.
func portOf(c *corev1.Container, port intstr.IntOrString) int32 {
	if port.Type == intstr.Int {
		return port.IntVal
	}
	for _, p := range c.Ports {
		if p.Name == port.StrVal {
			return p.ContainerPort
		}
	}
	return 0
}

func atLeastOne(n, otherwise int32) int32 {
	if n < 1 {
		return otherwise
	}
	return n
}
