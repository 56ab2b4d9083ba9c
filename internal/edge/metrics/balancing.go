package metrics

import "github.com/prometheus/client_golang/prometheus"

// balancing are the metrics of how tunnels are chosen.
type balancing struct {
	ejections prometheus.Counter
	probes    *prometheus.CounterVec
	sticky    *prometheus.CounterVec
}

// Results of a probe.
const (
	ProbeOpened = "opened"
	ProbeFailed = "failed"
)

// What became of a request to a socket whose visitors stick to a tunnel by a cookie.
const (
	// StickyKept went to the tunnel that its cookie names, StickyMoved to another, StickyNew had no cookie.
	StickyKept  = "kept"
	StickyMoved = "moved"
	StickyNew   = "new"
)

func newBalancing(r prometheus.Registerer) balancing {
	b := balancing{
		ejections: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "mysocket_edge_ejections_total", Help: "Tunnels that were taken out of the rotation because they did not work.",
		}),
		probes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "mysocket_edge_probes_total", Help: "Channels opened to see whether an ejected tunnel works again, by result.",
		}, []string{"result"}),
		sticky: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "mysocket_edge_sticky_requests_total", Help: "Requests to sockets with sticky visitors that reached a tunnel, by what became of their cookie.",
		}, []string{"result"}),
	}
	r.MustRegister(b.ejections, b.probes, b.sticky)
	for _, result := range []string{ProbeOpened, ProbeFailed} {
		b.probes.WithLabelValues(result)
	}
	for _, result := range []string{StickyKept, StickyMoved, StickyNew} {
		b.sticky.WithLabelValues(result)
	}
	return b
}

// Ejected counts a tunnel that was taken out of the rotation.
func (b *balancing) Ejected() { b.ejections.Inc() }

// Probed counts a probe of an ejected tunnel.
func (b *balancing) Probed(result string) { b.probes.WithLabelValues(result).Inc() }

// Sticky counts a request to a socket with sticky visitors.
func (b *balancing) Sticky(result string) { b.sticky.WithLabelValues(result).Inc() }
