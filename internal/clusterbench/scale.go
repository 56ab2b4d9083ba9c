package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/mysocketio/mysocket-injector/internal/annotations"
	"github.com/mysocketio/mysocket-injector/internal/inject"
)

// place is a Service and the pods that it selects.
type place struct {
	namespace, service, socket string
	pods                       []*corev1.Pod // metadata alone, once they are made
}

// scale measures one replica of the control plane, the leader, in a cluster of many Services and pods.
func scale(ctx context.Context, o options, out io.Writer) error {
	l, err := newLab(ctx, o, out)
	defer l.close()
	if err != nil {
		return err
	}
	l.say("load average before: %s", loadAverage())
	l.say("making what is measured:")
	places, err := l.populate(ctx)
	if err != nil {
		return err
	}
	l.say("%d Services and %d injected, connected pods in %d namespaces; one replica, --memory-limit %.0f MiB:", o.services, o.pods, o.namespaces, mebibytes(o.memoryLimit))
	if err := l.measureStart(ctx); err != nil {
		return err
	}
	streams, err := l.openStreams(ctx, places)
	if err != nil {
		return err
	}
	defer func() {
		for _, s := range streams {
			_ = s.conn.Close()
		}
	}()
	if err := l.sayMemory(fmt.Sprintf("with %d streams open", o.streams)); err != nil {
		return err
	}
	if err := l.measureEdits(ctx, places[0], streams[:len(places[0].pods)]); err != nil {
		return err
	}
	if err := l.sayMemory("after the edits"); err != nil {
		return err
	}
	l.say("load average after: %s", loadAverage())
	return nil
}

// populate makes Services and pods as they are when all is well. The pods are injected by the real webhook. What kubelets and
// sidecars would do after that is written while the control plane is away.
func (l *lab) populate(ctx context.Context) ([]*place, error) {
	places := make([]*place, l.services)
	for i := range places {
		ns := i % l.namespaces
		places[i] = &place{namespace: fmt.Sprintf("bench-%03d", ns), service: appName(i / l.namespaces)}
	}
	if err := l.took("namespaces, Services, sockets at the edge", func() error {
		for _, p := range places[:l.namespaces] {
			if err := l.namespace(ctx, p.namespace, map[string]string{annotations.NamespaceInjection: annotations.NamespaceInjectionEnabled}); err != nil {
				return err
			}
		}
		return inParallel(ctx, len(places), func(ctx context.Context, i int) (err error) {
			places[i].socket, err = l.service(ctx, places[i].namespace, places[i].service)
			return err
		})
	}); err != nil {
		return nil, err
	}
	each := l.pods / l.services
	if err := l.took("pods, through the webhook", func() error {
		if _, _, err := l.startWebhook(ctx); err != nil {
			return err
		}
		var mu sync.Mutex
		return inParallel(ctx, l.pods, func(ctx context.Context, i int) error {
			p := places[i/each]
			pod := podOf(p.namespace, fmt.Sprintf("%s-5d4f8c7b9-%05d", p.service, i%each), p.service)
			if err := l.Create(ctx, pod); err != nil {
				return err
			}
			if !inject.HasSidecar(pod) {
				return fmt.Errorf("pod %s was not injected", pod.Name)
			}
			mu.Lock()
			defer mu.Unlock()
			p.pods = append(p.pods, pod)
			return nil
		})
	}); err != nil {
		return nil, err
	}
	l.webhook.stop()
	if err := l.took("status of the pods, tunnels at the edge, Tunnel objects", func() error {
		return inParallel(ctx, l.pods, func(ctx context.Context, i int) error {
			p := places[i/each]
			pod := p.pods[i%each]
			if err := l.run(ctx, pod); err != nil {
				return err
			}
			p.pods[i%each] = &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID}}
			return l.connect(ctx, pod, p.service, p.socket)
		})
	}); err != nil {
		return nil, err
	}
	// Once to adopt the sockets and write the conditions, which is not a start as they usually are.
	if err := l.took("first start, until every Service has its conditions", func() error {
		if _, _, err := l.startWebhook(ctx); err != nil {
			return err
		}
		if _, err := l.settled(ctx); err != nil {
			return err
		}
		return l.allReady(ctx)
	}); err != nil {
		return nil, err
	}
	l.webhook.stop()
	return places, nil
}

// allReady wants all Services to be in order, so that what is measured is what it is said to be.
func (l *lab) allReady(ctx context.Context) error {
	var list corev1.ServiceList
	if err := l.List(ctx, &list); err != nil {
		return err
	}
	ready := 0
	for i := range list.Items {
		for _, c := range list.Items[i].Status.Conditions {
			if c.Type == annotations.TunnelsReady && c.Status == metav1.ConditionTrue {
				ready++
			}
		}
	}
	if ready != l.services {
		return fmt.Errorf("%d Services have all pods connected, want %d", ready, l.services)
	}
	return nil
}

func (l *lab) measureStart(ctx context.Context) error {
	began := time.Now()
	ready, serving, err := l.startWebhook(ctx)
	if err != nil {
		return err
	}
	idle, err := l.settled(ctx)
	if err != nil {
		return err
	}
	used, err := l.webhook.processorTime()
	if err != nil {
		return err
	}
	l.say("  from its start to ready (/readyz): %.2f s", ready.Seconds())
	l.say("  from its start to the gateway's first answer, with all informers in step: %.2f s", serving.Seconds())
	l.say("  from its start to the leader having looked at every object: %.2f s; processor time until then %.2f s", idle.Sub(began).Seconds(), used.Seconds())
	return l.sayMemory("then")
}

func (l *lab) sayMemory(when string) error {
	m, err := l.webhook.memory()
	if err != nil {
		return err
	}
	l.say("  resident memory %s: %.0f MiB (of it %.0f MiB its own and not the program file's); the most so far %.0f MiB", when, mebibytes(m.resident), mebibytes(m.anonymous), mebibytes(m.peak))
	return nil
}

func mebibytes(n int64) float64 { return float64(n) / (1 << 20) }

// openStreams opens streams for the pods of all Services in their order, so for all pods of the first.
func (l *lab) openStreams(ctx context.Context, places []*place) ([]*stream, error) {
	var pods []*corev1.Pod
	for _, p := range places {
		pods = append(pods, p.pods...)
	}
	streams := make([]*stream, l.streams)
	err := l.took(fmt.Sprintf("opening %d streams, each with a token of its own pod", l.streams), func() error {
		return inParallel(ctx, len(streams), func(ctx context.Context, i int) error {
			token, err := l.token(ctx, pods[i])
			if err != nil {
				return err
			}
			streams[i], err = l.openStream(ctx, token)
			return err
		})
	})
	if err != nil {
		for _, s := range streams {
			if s != nil {
				_ = s.conn.Close()
			}
		}
		return nil, err
	}
	for _, s := range streams {
		go s.follow() // until it is closed
	}
	return streams, nil
}

// measureEdits changes a Service's target port and an annotation in turn, and measures from before the request until the last
// of its pods' streams has it.
func (l *lab) measureEdits(ctx context.Context, p *place, streams []*stream) error {
	var ports, annotated []float64
	port, connections := 8080, 1
	for i := range 2 * l.edits {
		var patch string
		if i%2 == 0 {
			port = 9000 + i
			patch = fmt.Sprintf(`[{"op":"replace","path":"/spec/ports/0/targetPort","value":%d}]`, port)
		} else {
			connections = 3 - connections
			patch = fmt.Sprintf(`[{"op":"add","path":"/metadata/annotations/mysocket.io~1connections","value":"%d"}]`, connections)
		}
		svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: p.namespace, Name: p.service}}
		began := time.Now()
		if err := l.Patch(ctx, svc, client.RawPatch(types.JSONPatchType, []byte(patch))); err != nil {
			return err
		}
		last := began
		for _, s := range streams {
			if err := waitFor(ctx, time.Minute, "an edit to reach a stream", func(context.Context) error {
				at, err := s.at(mark(port, connections))
				if at.After(last) {
					last = at
				}
				return err
			}); err != nil {
				return err
			}
		}
		if took := milliseconds(last.Sub(began)); i%2 == 0 {
			ports = append(ports, took)
		} else {
			annotated = append(annotated, took)
		}
		if _, err := l.settled(ctx); err != nil {
			return err
		}
	}
	if len(ports) == 0 {
		return errors.New("nothing was edited")
	}
	l.say("  from the edit of a Service to all %d streams of its pods, ms, median of %d (least - most): targetPort %s, annotation %s",
		len(streams), l.edits, spreadOf(ports).text("%.0f"), spreadOf(annotated).text("%.0f"))
	return nil
}
