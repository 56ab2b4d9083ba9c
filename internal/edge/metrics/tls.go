package metrics

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// tlsMetrics are those of the certificates that visitors are shown.
type tlsMetrics struct {
	fileExpiry prometheus.Gauge
	orders     *prometheus.CounterVec
	handshakes prometheus.Counter
}

func newTLSMetrics(r *prometheus.Registry) *tlsMetrics {
	m := &tlsMetrics{
		fileExpiry: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "mysocket_edge_certificate_file_expiry_seconds", Help: "Unix time at which the certificate of --tls-cert expires; 0 without one.",
		}),
		orders: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "mysocket_edge_acme_orders_total", Help: "Certificates that were ordered from the ACME authority, renewals included, by result.",
		}, []string{"result"}),
		handshakes: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "mysocket_edge_tls_handshake_failures_total", Help: "Public connections to tls sockets that did not agree on TLS.",
		}),
	}
	r.MustRegister(m.fileExpiry, m.orders, m.handshakes)
	for _, result := range []string{orderObtained, orderFailed} {
		m.orders.WithLabelValues(result)
	}
	return m
}

// FileCertificateExpires says when the certificate in files expires.
func (m *tlsMetrics) FileCertificateExpires(at time.Time) { m.fileExpiry.Set(float64(at.Unix())) }

// Results of orders.
const (
	orderObtained = "obtained"
	orderFailed   = "failed"
)

// OrderDone counts an order of a certificate that ended.
func (m *tlsMetrics) OrderDone(obtained bool) {
	if obtained {
		m.orders.WithLabelValues(orderObtained).Inc()
	} else {
		m.orders.WithLabelValues(orderFailed).Inc()
	}
}

// HandshakeFailed counts a connection to a tls socket that did not agree on TLS.
func (m *tlsMetrics) HandshakeFailed() { m.handshakes.Inc() }
