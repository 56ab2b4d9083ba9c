package admission

import (
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/utils/ptr"

	"github.com/mysocketio/mysocket-injector/internal/annotations"
)

// change is what of a Service that matters to us differs between two versions of it. A Service that is created differs
// from an empty one.
type change struct {
	// set are the annotations of ours that were added or got another value, but for those that we write ourselves.
	set []string
	// removed tells whether such an annotation was taken away.
	removed bool
	// written are the annotations that we write ourselves and that differ.
	written []string
	// ports and pods tell whether the Service has other ports, or is of another type or class or has another selector.
	ports, pods bool
}

func compare(was, is *corev1.Service) change {
	c := change{
		ports: !apiequality.Semantic.DeepEqual(was.Spec.Ports, is.Spec.Ports),
		pods: was.Spec.Type != is.Spec.Type || !ptr.Equal(was.Spec.LoadBalancerClass, is.Spec.LoadBalancerClass) ||
			!apiequality.Semantic.DeepEqual(was.Spec.Selector, is.Spec.Selector),
	}
	for k, v := range is.Annotations {
		old, had := was.Annotations[k]
		switch {
		case !strings.HasPrefix(k, annotations.Prefix) || had && old == v:
		case annotations.IsWrittenByUs(k):
			c.written = append(c.written, k)
		default:
			c.set = append(c.set, k)
		}
	}
	for k := range was.Annotations {
		if _, has := is.Annotations[k]; has || !strings.HasPrefix(k, annotations.Prefix) {
			continue
		}
		if annotations.IsWrittenByUs(k) {
			c.written = append(c.written, k)
		} else {
			c.removed = true
		}
	}
	slices.Sort(c.set)
	slices.Sort(c.written)
	return c
}

func (c change) nothing() bool {
	return len(c.set) == 0 && !c.removed && len(c.written) == 0 && !c.ports && !c.pods
}

// touches tells whether a problem that the Service has after the change, and may have had before, is this change's
// business. Who writes an annotation of ours is told of any problem. Somebody who changes other parts, a tool that swaps
// selectors during a rollout, say, is not to be stopped by an annotation that has been wrong all along.
func (c change) touches(p *annotations.Problem) bool {
	switch {
	case len(c.set) > 0:
		return true
	case p.Reason == annotations.ReasonPortNotFound:
		return c.ports
	case p.Reason == annotations.ReasonNoSelector:
		return c.pods
	}
	return false
}
