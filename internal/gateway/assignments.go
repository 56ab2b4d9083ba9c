package gateway

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/google/uuid"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/mysocketio/mysocket-injector/internal/annotations"
	"github.com/mysocketio/mysocket-injector/internal/gatewayapi"
)

// maxURL bounds what is passed on of an annotation that is only shown.
const maxURL = 512

// offers are what the Services of one namespace ask their pods to serve, worked out once for all pods and found by one
// of the labels that they select: a change of one Service of thousands concerns thousands of streams. It never changes.
type offers map[label][]offer

type label struct{ key, value string }

// offer is an enabled, valid Service that has a socket, which is guarded as it asks for. The assignment lacks the port,
// which the pod decides.
type offer struct {
	assignment gatewayapi.Assignment
	port       corev1.ServicePort
	selector   map[string]string
}

// newOffers does no I/O.
func newOffers(services []corev1.Service, names annotations.Names) offers {
	out := offers{}
	for i := range services {
		svc := &services[i]
		id := svc.Annotations[annotations.SocketID]
		// An id that is none (the annotations are the user's) would spoil the whole snapshot for the sidecar.
		if !validID(id) || svc.DeletionTimestamp != nil || !annotations.IsEnabled(svc) {
			continue
		}
		spec, err := annotations.Parse(svc, names)
		if err != nil {
			continue // the Service's condition says so
		}
		if !spec.Guarded(svc) {
			continue // the socket lets everybody in as yet, and its owner wants otherwise
		}
		url := svc.Annotations[annotations.URL]
		if len(url) > maxURL {
			url = ""
		}
		for key, value := range svc.Spec.Selector { // any one of them
			by := label{key, value}
			out[by] = append(out[by], offer{
				assignment: gatewayapi.Assignment{
					SocketID:        id,
					SocketName:      spec.SocketName,
					Service:         svc.Name,
					URL:             url,
					PublishNotReady: spec.PublishNotReady,
					Connections:     spec.Connections,
					ProxyProtocol:   spec.ProxyProtocol,
				},
				port:     spec.ServicePort,
				selector: svc.Spec.Selector,
			})
			break
		}
	}
	return out
}

func (o *offer) selects(labels map[string]string) bool {
	for key, value := range o.selector {
		if got, ok := labels[key]; !ok || got != value {
			return false
		}
	}
	return true
}

// assign works out what a pod serves: the offers of its namespace that select it. The result is ordered by the Service's
// name and holds at most gatewayapi.MaxAssignments.
func (o offers) assign(pod *corev1.Pod) []gatewayapi.Assignment {
	out := []gatewayapi.Assignment{}
	for key, value := range pod.Labels {
		list := o[label{key, value}]
		for i := range list {
			if !list[i].selects(pod.Labels) {
				continue
			}
			port, err := annotations.TargetPort(list[i].port, &pod.Spec)
			if err != nil {
				continue // the Service's condition says so
			}
			a := list[i].assignment
			a.Port, a.Probe = port, probeOf(&pod.Spec, port)
			out = append(out, a)
		}
	}
	slices.SortFunc(out, func(a, b gatewayapi.Assignment) int { return strings.Compare(a.Service, b.Service) })
	// Two Services may share one socket: of those that select the pod, it serves the first in order.
	seen := map[string]bool{}
	out = slices.DeleteFunc(out, func(a gatewayapi.Assignment) bool {
		again := seen[a.SocketID]
		seen[a.SocketID] = true
		return again
	})
	return out[:min(len(out), gatewayapi.MaxAssignments)]
}

// validID tells whether an id is a UUID in its usual form, as all ids of sockets and tunnels are.
func validID(id string) bool { return len(id) == 36 && uuid.Validate(id) == nil }

func (s *Server) assignedTo(ctx context.Context, pod *corev1.Pod) ([]gatewayapi.Assignment, error) {
	o, err := s.Changes.offersOf(pod.Namespace, func() (offers, error) {
		var services corev1.ServiceList
		// Not the request's context: others wait for the result.
		if err := s.Cache.List(context.WithoutCancel(ctx), &services, client.InNamespace(pod.Namespace), client.UnsafeDisableDeepCopy); err != nil {
			return nil, fmt.Errorf("list the Services of %s: %w", pod.Namespace, err)
		}
		return newOffers(services.Items, s.Names), nil
	})
	if err != nil {
		return nil, err
	}
	return o.assign(pod), nil
}

func (s *Server) snapshot(ctx context.Context, caller identity) ([]byte, error) {
	pod, err := s.podOf(ctx, caller)
	if err != nil {
		return nil, err
	}
	list, err := s.assignedTo(ctx, pod)
	if err != nil {
		return nil, err
	}
	for i := range list {
		list[i].EdgeAddress = s.EdgeAddress
	}
	return json.Marshal(gatewayapi.Snapshot{Assignments: list})
}
