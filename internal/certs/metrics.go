package certs

import (
	"fmt"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	expiry *prometheus.GaugeVec
	ready  prometheus.Gauge
}

// newMetrics registers what there is to measure; what is about cert-manager, only with it.
func newMetrics(registerer prometheus.Registerer, certManager bool) (*metrics, error) {
	m := &metrics{expiry: prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "mysocket_certificate_expiry_seconds",
		Help: "Unix time at which the certificate in use (ca or leaf) expires.",
	}, []string{"certificate"}), ready: prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "mysocket_certmanager_certificate_ready",
		Help: "1 if cert-manager's Certificate is ready and its Secret can be served, 0 if not.",
	})}
	collectors := []prometheus.Collector{m.expiry}
	if certManager {
		collectors = append(collectors, m.ready)
	}
	for _, c := range collectors {
		if err := registerer.Register(c); err != nil {
			return nil, fmt.Errorf("register certificate metrics: %w", err)
		}
	}
	return m, nil
}

func (m *metrics) issued(ready bool) {
	value := 0.0
	if ready {
		value = 1
	}
	m.ready.Set(value)
}

func (m *metrics) observe(read *material) {
	m.expiry.WithLabelValues("ca").Set(float64(read.ca.cert.NotAfter.Unix()))
	m.expiry.WithLabelValues("leaf").Set(float64(read.leaf.cert.NotAfter.Unix()))
}
