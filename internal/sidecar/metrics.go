package sidecar

import (
	"runtime"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/mysocketio/mysocket-injector/internal/gatewayapi"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/tunnel"
)

// metrics are all that the sidecar counts. No label holds a name that grows with use: a pod has few tunnels, and its own
// labels come from whoever scrapes it.
type metrics struct {
	registry *prometheus.Registry

	tunnels          *prometheus.GaugeVec
	assignments      prometheus.Gauge
	streamConnected  prometheus.Gauge
	ready            prometheus.Gauge
	drainingNow      prometheus.Gauge
	openConnections  prometheus.Gauge
	connections      prometheus.Counter
	connectionsCut   prometheus.Counter
	bytesToApp       prometheus.Counter
	bytesToEdge      prometheus.Counter
	dialFailures     *prometheus.CounterVec
	rejected         *prometheus.CounterVec
	reconnects       *prometheus.CounterVec
	connectFailures  *prometheus.CounterVec
	connectSeconds   prometheus.Histogram
	handshakeSeconds prometheus.Histogram
	roundTripSeconds prometheus.Histogram
	drainSeconds     prometheus.Histogram
	appCheckFailures prometheus.Counter
	gatewayRequests  *prometheus.CounterVec
}

var _ tunnel.Observer = (*metrics)(nil)

func newMetrics(version string) *metrics {
	const namespace = "mysocket_sidecar"
	gauge := func(name, help string) prometheus.Gauge {
		return prometheus.NewGauge(prometheus.GaugeOpts{Namespace: namespace, Name: name, Help: help})
	}
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Namespace: namespace, Name: name, Help: help})
	}
	counters := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: namespace, Name: name, Help: help}, labels)
	}
	bytes := counters("bytes_total", "Bytes moved between visitors and the app.", "direction")
	m := &metrics{
		registry:         prometheus.NewRegistry(),
		tunnels:          prometheus.NewGaugeVec(prometheus.GaugeOpts{Namespace: namespace, Name: "tunnels", Help: "Tunnels by state."}, []string{"state"}),
		assignments:      gauge("assignments", "Sockets that the gateway assigned to this pod."),
		streamConnected:  gauge("gateway_stream_connected", "1 while assignments are streamed from the gateway."),
		ready:            gauge("ready", "1 once the pod has been reachable, or the grace period is over."),
		drainingNow:      gauge("draining", "1 after a drain has begun."),
		openConnections:  gauge("open_connections", "Visitors' connections that are open."),
		connections:      counter("connections_total", "Visitors' connections that the app took."),
		connectionsCut:   counter("connections_cut_total", "Visitors' connections that were open when their tunnel was closed."),
		bytesToApp:       bytes.WithLabelValues("to_app"),
		bytesToEdge:      bytes.WithLabelValues("to_edge"),
		dialFailures:     counters("dial_failures_total", "Visitors whom the app did not take.", "reason"),
		rejected:         counters("rejected_connections_total", "Visitors who were turned away before the app was asked.", "reason"),
		reconnects:       counters("reconnects_total", "Tunnels that were lost or given up, by reason.", "reason"),
		connectFailures:  counters("connect_failures_total", "Failed attempts to get a tunnel, by the step that failed.", "step"),
		appCheckFailures: counter("app_check_failures_total", "Failed checks of the app of a connected tunnel."),
		gatewayRequests:  counters("gateway_requests_total", "Calls of the gateway by operation and status code.", "operation", "code"),
		connectSeconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Namespace: namespace, Name: "connect_seconds", Help: "Time that a successful attempt took, registration included.",
			Buckets: []float64{.025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30},
		}),
	}
	m.handshakeSeconds = prometheus.NewHistogram(prometheus.HistogramOpts{
		Namespace: namespace, Name: "handshake_seconds", Help: "Time that a successful SSH handshake with the edge took, login included.",
		Buckets: []float64{.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 15},
	})
	m.roundTripSeconds = prometheus.NewHistogram(prometheus.HistogramOpts{
		Namespace: namespace, Name: "round_trip_seconds", Help: "Time that the edge took to answer a keepalive.",
		Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 20},
	})
	m.drainSeconds = prometheus.NewHistogram(prometheus.HistogramOpts{
		Namespace: namespace, Name: "drain_seconds", Help: "Time that a drain took, those that ran out of time included.",
		Buckets: []float64{.1, .5, 1, 2.5, 5, 10, 25, 60, 300},
	})
	build := prometheus.NewGaugeVec(prometheus.GaugeOpts{Namespace: namespace, Name: "build_info", Help: "The version that runs, always 1."}, []string{"version"})
	build.WithLabelValues(version).Set(1)
	goroutines := prometheus.NewGaugeFunc(prometheus.GaugeOpts{Namespace: namespace, Name: "goroutines", Help: "Goroutines that exist."},
		func() float64 { return float64(runtime.NumGoroutine()) })
	m.registry.MustRegister(m.tunnels, m.assignments, m.streamConnected, m.ready, m.drainingNow, m.openConnections, m.connections, m.connectionsCut,
		bytes, m.dialFailures, m.rejected, m.reconnects, m.connectFailures, m.connectSeconds, m.handshakeSeconds, m.roundTripSeconds, m.drainSeconds, m.appCheckFailures, m.gatewayRequests, build, goroutines)
	// Known label values are there from the start, so that rates are right from the first event on.
	for _, state := range []gatewayapi.State{
		gatewayapi.StateWaitingForApp, gatewayapi.StateRegistering, gatewayapi.StateConnecting, gatewayapi.StateConnected, gatewayapi.StateDraining,
	} {
		m.tunnels.WithLabelValues(string(state))
	}
	for _, reason := range []string{tunnel.DialRefused, tunnel.DialTimeout, tunnel.DialUnreachable, tunnel.DialBusy, tunnel.DialOther} {
		m.dialFailures.WithLabelValues(reason)
	}
	for _, reason := range []string{tunnel.RejectLimit, tunnel.RejectMalformed, tunnel.RejectNotForwarded, tunnel.RejectType} {
		m.rejected.WithLabelValues(reason)
	}
	for _, reason := range []string{tunnel.LostClosed, tunnel.LostKeepalive, tunnel.LostFlood, string(endSession), string(endForward)} {
		m.reconnects.WithLabelValues(reason)
	}
	return m
}

// moveTunnel counts a tunnel that goes from one state to another; an empty state is none.
func (m *metrics) moveTunnel(from, to gatewayapi.State) {
	if from != "" {
		m.tunnels.WithLabelValues(string(from)).Dec()
	}
	if to != "" {
		m.tunnels.WithLabelValues(string(to)).Inc()
	}
}

func (m *metrics) ConnectionOpened() {
	m.connections.Inc()
	m.openConnections.Inc()
}

func (m *metrics) ConnectionClosed()        { m.openConnections.Dec() }
func (m *metrics) BytesToApp(n int)         { m.bytesToApp.Add(float64(n)) }
func (m *metrics) BytesToEdge(n int)        { m.bytesToEdge.Add(float64(n)) }
func (m *metrics) DialFailed(reason string) { m.dialFailures.WithLabelValues(reason).Inc() }
func (m *metrics) Rejected(reason string)   { m.rejected.WithLabelValues(reason).Inc() }

func (m *metrics) HandshakeTook(d time.Duration) { m.handshakeSeconds.Observe(d.Seconds()) }
func (m *metrics) RoundTrip(d time.Duration)     { m.roundTripSeconds.Observe(d.Seconds()) }

func (m *metrics) observeGateway(operation, code string) {
	m.gatewayRequests.WithLabelValues(operation, code).Inc()
}
