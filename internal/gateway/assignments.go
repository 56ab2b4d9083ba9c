package gateway

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/mysocketio/mysocket-injector/internal/annotations"
	"github.com/mysocketio/mysocket-injector/internal/gatewayapi"
)

// maxURL bounds what is passed on of an annotation that is only shown.
const maxURL = 512

// assign works out what a pod serves: the enabled, valid Services of its namespace that select it and have a socket, which
// is guarded as they ask for.
// It does no I/O. The result is ordered by the Service's name and holds at most gatewayapi.MaxAssignments.
func assign(services []corev1.Service, pod *corev1.Pod, cluster string) []gatewayapi.Assignment {
	out := []gatewayapi.Assignment{}
	for i := range services {
		svc := &services[i]
		id := svc.Annotations[annotations.SocketID]
		// An id that is none (the annotations are the user's) would spoil the whole snapshot for the sidecar.
		if !validID(id) || svc.DeletionTimestamp != nil || !annotations.IsEnabled(svc) || !annotations.Selects(svc, pod.Labels) {
			continue
		}
		spec, err := annotations.Parse(svc, cluster)
		if err != nil {
			continue // the Service's condition says so
		}
		if !spec.Guarded(svc) {
			continue // the socket lets everybody in as yet, and its owner wants otherwise
		}
		port, err := annotations.TargetPort(spec.ServicePort, &pod.Spec)
		if err != nil {
			continue // likewise
		}
		url := svc.Annotations[annotations.URL]
		if len(url) > maxURL {
			url = ""
		}
		out = append(out, gatewayapi.Assignment{
			SocketID:        id,
			SocketName:      spec.SocketName,
			Service:         svc.Name,
			URL:             url,
			Port:            port,
			PublishNotReady: spec.PublishNotReady,
			Connections:     spec.Connections,
			ProxyProtocol:   spec.ProxyProtocol,
		})
	}
	slices.SortFunc(out, func(a, b gatewayapi.Assignment) int { return strings.Compare(a.Service, b.Service) })
	// Two Services can't have one socket, but annotations are the user's: the first in order keeps it.
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
	var services corev1.ServiceList
	if err := s.Cache.List(ctx, &services, client.InNamespace(pod.Namespace), client.UnsafeDisableDeepCopy); err != nil {
		return nil, fmt.Errorf("list the Services of %s: %w", pod.Namespace, err)
	}
	return assign(services.Items, pod, s.Cluster), nil
}

// assignments streams snapshots: the present one at once, then a new one whenever it differs.
func (s *Server) assignments(w http.ResponseWriter, r *http.Request, caller identity) {
	ctx, cancel := context.WithTimeout(r.Context(), maxStreamAge-rand.N(maxStreamAge/4)) //nolint:gosec // jitter, no secret
	defer cancel()
	changed, stop := s.Changes.subscribe(caller)
	if stop == nil {
		s.fail(w, r, caller, &refusal{http.StatusTooManyRequests, gatewayapi.ReasonTooMany, fmt.Sprintf("pod %s has %d assignment streams open already", caller, maxStreams), gatewayapi.Heartbeat})
		return
	}
	defer stop()
	rc := http.NewResponseController(w)
	heartbeat := time.NewTicker(gatewayapi.Heartbeat)
	defer heartbeat.Stop()

	write := func(line []byte) bool {
		_ = rc.SetWriteDeadline(time.Now().Add(writeTimeout))
		if _, err := w.Write(append(line, '\n')); err != nil { //nolint:gosec // JSON for a program, not a page
			return false
		}
		return rc.Flush() == nil
	}
	var last []byte
	for {
		line, err := s.snapshot(ctx, caller)
		switch {
		case err != nil && last == nil:
			s.fail(w, r, caller, err)
			return
		case err != nil:
			s.Log.Debug("assignment stream ends", "pod", caller.String(), "err", err)
			return
		case last == nil:
			w.Header().Set("Content-Type", "application/x-ndjson")
		}
		if !bytes.Equal(line, last) {
			if !write(slices.Clone(line)) {
				return
			}
			last = line
		}
		for waiting := true; waiting; {
			select {
			case <-ctx.Done():
				return
			case <-s.ending.Done():
				return
			case <-heartbeat.C:
				if !write(nil) {
					return
				}
			case <-changed:
				waiting = false
			}
		}
	}
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
