package gateway

import (
	"fmt"
	"net/http"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	requests           *prometheus.CounterVec
	duration           *prometheus.HistogramVec
	streams            prometheus.Gauge
	streamsEnded       *prometheus.CounterVec
	reviews            *prometheus.CounterVec
	limited            *prometheus.CounterVec
	connections        prometheus.Gauge
	connectionsRefused *prometheus.CounterVec
}

// newMetrics makes the metrics and registers them, unless registerer is nil.
func newMetrics(registerer prometheus.Registerer) (*metrics, error) {
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
	}
	gauge := func(name, help string) prometheus.Gauge {
		return prometheus.NewGauge(prometheus.GaugeOpts{Name: name, Help: help})
	}
	m := &metrics{
		requests: counter("mysocket_gateway_requests_total", "Requests to the gateway by endpoint and HTTP status.", "endpoint", "code"),
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "mysocket_gateway_request_duration_seconds",
			Help:    "Time to answer a request to the gateway; for a stream of assignments, until its first line.",
			Buckets: prometheus.ExponentialBuckets(0.0005, 2.5, 13), // 0.5 ms to 30 s
		}, []string{"endpoint"}),
		streams:            gauge("mysocket_gateway_streams", "Streams of assignments that are open."),
		streamsEnded:       counter("mysocket_gateway_streams_ended_total", "Streams of assignments that ended, by reason.", "reason"),
		reviews:            counter("mysocket_gateway_token_reviews_total", "Tokens that were to be checked, by result.", "result"),
		limited:            counter("mysocket_gateway_limited_total", "Requests refused with 429, by the limit that they met.", "limit"),
		connections:        gauge("mysocket_gateway_connections", "Connections to the gateway that are open."),
		connectionsRefused: counter("mysocket_gateway_connections_refused_total", "Connections closed as soon as they came, by reason.", "reason"),
	}
	if registerer == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.requests, m.duration, m.streams, m.streamsEnded, m.reviews, m.limited, m.connections, m.connectionsRefused} {
		if err := registerer.Register(c); err != nil {
			return nil, fmt.Errorf("register the gateway's metrics: %w", err)
		}
	}
	return m, nil
}

// endpointOther is the label of paths and methods that the gateway doesn't have.
const endpointOther = "other"

// observed counts what h answers. names has the endpoint of each pattern.
func (m *metrics) observed(h http.Handler, names map[string]string, now func() time.Time) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		began := now()
		code := &statusWriter{ResponseWriter: w, status: http.StatusOK}
		h.ServeHTTP(code, r)
		endpoint, ok := names[r.Pattern]
		if !ok {
			endpoint = endpointOther
		}
		m.requests.WithLabelValues(endpoint, strconv.Itoa(code.status)).Inc()
		m.duration.WithLabelValues(endpoint).Observe(now().Sub(began).Seconds())
	})
}

// statusWriter notes the status of an answer.
type statusWriter struct {
	http.ResponseWriter
	status int
}

// WriteHeader implements http.ResponseWriter.
func (w *statusWriter) WriteHeader(status int) {
	w.status = status
	w.ResponseWriter.WriteHeader(status)
}

// Unwrap is for http.ResponseController.
func (w *statusWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }
