package metrics

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// tlsMetrics are those of the certificates that visitors are shown.
type tlsMetrics struct {
	fileExpiry prometheus.Gauge
}

func newTLSMetrics(r *prometheus.Registry) *tlsMetrics {
	m := &tlsMetrics{
		fileExpiry: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "mysocket_edge_certificate_file_expiry_seconds", Help: "Unix time at which the certificate of --tls-cert expires; 0 without one.",
		}),
	}
	r.MustRegister(m.fileExpiry)
	return m
}

// FileCertificateExpires says when the certificate in files expires.
func (m *tlsMetrics) FileCertificateExpires(at time.Time) { m.fileExpiry.Set(float64(at.Unix())) }
