package metrics

import "github.com/prometheus/client_golang/prometheus"

// WatchState adds the metric of whether what the state is kept in answers.
func (m *Metrics) WatchState(up func() bool) {
	m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "mysocket_edge_state_up", Help: "Whether what the state is kept in answered when it was last asked: 1, or 0 while changes are refused.",
	}, func() float64 {
		if up() {
			return 1
		}
		return 0
	}))
}
