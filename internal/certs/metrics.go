package certs

import (
	"fmt"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct{ expiry *prometheus.GaugeVec }

func newMetrics(registerer prometheus.Registerer) (*metrics, error) {
	m := &metrics{prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "mysocket_certificate_expiry_seconds",
		Help: "Unix time at which the certificate in use (ca or leaf) expires.",
	}, []string{"certificate"})}
	if err := registerer.Register(m.expiry); err != nil {
		return nil, fmt.Errorf("register certificate metrics: %w", err)
	}
	return m, nil
}

func (m *metrics) observe(read *material) {
	m.expiry.WithLabelValues("ca").Set(float64(read.ca.cert.NotAfter.Unix()))
	m.expiry.WithLabelValues("leaf").Set(float64(read.leaf.cert.NotAfter.Unix()))
}
