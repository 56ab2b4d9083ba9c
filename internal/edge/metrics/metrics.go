// Package metrics holds the edge's Prometheus metrics. No label has a value that a stranger or an account can make up, so
// that their number is bounded.
package metrics

import (
	"net/http"
	"strconv"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Metrics are the metrics of one edge. Make them with New.
type Metrics struct {
	registry *prometheus.Registry

	requests    *prometheus.CounterVec
	duration    prometheus.Histogram
	inFlight    prometheus.Gauge
	connections prometheus.Counter
	turnedAway  *prometheus.CounterVec
	// OpenFailures counts channels that could not be opened, Retries requests and connections that were tried on
	// another tunnel because of it or because a tunnel failed before the answer.
	openFailures *prometheus.CounterVec
	retries      prometheus.Counter
	held         prometheus.Counter
	sshRefused   *prometheus.CounterVec

	*tlsMetrics
	balancing
	traffic
}

// New makes the metrics. tunnels tells how many are connected.
func New(tunnels func() int) *Metrics {
	m := &Metrics{
		registry: prometheus.NewRegistry(),
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "mysocket_edge_requests_total", Help: "Public HTTP requests, by status code.",
		}, []string{"code"}),
		duration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "mysocket_edge_request_duration_seconds", Help: "How long public HTTP requests took, to the end of the answer.",
			Buckets: []float64{.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60},
		}),
		inFlight: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "mysocket_edge_requests_in_flight", Help: "Public HTTP requests being answered.",
		}),
		connections: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "mysocket_edge_tcp_connections_total", Help: "Public connections to tcp and tls sockets.",
		}),
		turnedAway: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "mysocket_edge_tcp_refused_total", Help: "Public connections to tcp and tls sockets that were too many, by reason.",
		}, []string{"reason"}),
		openFailures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "mysocket_edge_channel_open_failures_total", Help: "Channels to an origin that could not be opened, by reason.",
		}, []string{"reason"}),
		retries: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "mysocket_edge_retries_total", Help: "Requests and connections tried again on another tunnel.",
		}),
		held: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "mysocket_edge_held_total", Help: "Requests and connections that waited for a tunnel to connect.",
		}),
		sshRefused: newSSHRefused(),
	}
	m.balancing = newBalancing(m.registry)
	m.traffic = newTraffic(m.registry)
	connected := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "mysocket_edge_tunnels_connected", Help: "Tunnels that are connected.",
	}, func() float64 { return float64(tunnels()) })
	m.registry.MustRegister(m.requests, m.duration, m.inFlight, m.connections, m.turnedAway, m.openFailures, m.retries, m.held, m.sshRefused, connected,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	m.tlsMetrics = newTLSMetrics(m.registry)
	for _, reason := range []string{Crowd, OneHost} {
		m.turnedAway.WithLabelValues(reason)
	}
	for _, reason := range []string{Refused, Timeout, Withdrawn, Broken, TLS} {
		m.openFailures.WithLabelValues(reason) // there from the start, so that a first failure is seen as a change
	}
	return m
}

// Handler serves the metrics.
func (m *Metrics) Handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{})
}

// RequestStarted counts a request that is being answered, until RequestDone.
func (m *Metrics) RequestStarted() { m.inFlight.Inc() }

// RequestDone counts an answered request. Codes that HTTP does not know count as "other".
func (m *Metrics) RequestDone(code int, seconds float64) {
	label := "other"
	if code == 499 || http.StatusText(code) != "" {
		label = strconv.Itoa(code)
	}
	m.inFlight.Dec()
	m.requests.WithLabelValues(label).Inc()
	m.duration.Observe(seconds)
}

// Connection counts a connection to a tcp or tls socket.
func (m *Metrics) Connection() { m.connections.Inc() }

// Reasons why a connection to a tcp or tls socket was one too many.
const (
	Crowd   = "crowd"
	OneHost = "address"
)

// ConnectionRefused counts a connection to a tcp or tls socket for which there is no room.
func (m *Metrics) ConnectionRefused(reason string) { m.turnedAway.WithLabelValues(reason).Inc() }

// Reasons why a channel could not be opened.
const (
	Refused   = "refused"
	Timeout   = "timeout"
	Withdrawn = "withdrawn"
	Broken    = "broken"
	TLS       = "tls" // the app does not speak it
)

// OpenFailed counts a channel that could not be opened.
func (m *Metrics) OpenFailed(reason string) { m.openFailures.WithLabelValues(reason).Inc() }

// Retried counts one more try on another tunnel.
func (m *Metrics) Retried() { m.retries.Inc() }

// Held counts a request or connection that has to wait for a tunnel.
func (m *Metrics) Held() { m.held.Inc() }
