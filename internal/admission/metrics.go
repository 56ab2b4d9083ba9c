package admission

import (
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// result is what became of one admission: the label of a metric. Of a Service, skipped is what was allowed without a look
// at what it asks for, and failed what was allowed after an internal error.
type result string

const (
	resultInjected  result = "injected"
	resultUnchanged result = "unchanged" // the sidecar was there already, as it should be
	resultSkipped   result = "skipped"
	resultFailed    result = "failed"    // let through without a sidecar after an internal error
	resultMalformed result = "malformed" // refused: the request isn't one that an API server sends

	// Of Services only.
	resultAllowed result = "allowed"
	resultRefused result = "refused"
)

type metrics struct {
	pods     *prometheus.CounterVec
	duration prometheus.Histogram
	live     *prometheus.CounterVec
}

func newMetrics(registerer prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		pods: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "mysocket_admission_pods_total",
			Help: "Admissions of pods by result and, when there was no sidecar to inject, by reason.",
		}, []string{"result", "reason"}),
		duration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "mysocket_admission_duration_seconds",
			Help:    "Time to answer the admission of a pod.",
			Buckets: prometheus.ExponentialBuckets(100e-6, 2, 14), // 100 µs to 0.8 s
		}),
		live: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "mysocket_admission_live_lookups_total",
			Help: "Lists of Services at the API server because the cache knew none for the pod, by result (found, none, failed).",
		}, []string{"result"}),
	}
	for _, c := range []prometheus.Collector{m.pods, m.duration, m.live} {
		if err := registerer.Register(c); err != nil {
			return nil, fmt.Errorf("register admission metrics: %w", err)
		}
	}
	return m, nil
}

func (m *metrics) observe(o outcome, took time.Duration) {
	m.pods.WithLabelValues(string(o.result), string(o.reason)).Inc()
	m.duration.Observe(took.Seconds())
}

func (m *metrics) observeLive(names []string, err error) {
	result := "none"
	switch {
	case err != nil:
		result = "failed"
	case len(names) > 0:
		result = "found"
	}
	m.live.WithLabelValues(result).Inc()
}

type serviceMetrics struct {
	services *prometheus.CounterVec
	duration prometheus.Histogram
}

func newServiceMetrics(registerer prometheus.Registerer) (*serviceMetrics, error) {
	m := &serviceMetrics{
		services: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "mysocket_admission_services_total",
			Help: "Admissions of Services by result and, when the Service was not found right, by reason.",
		}, []string{"result", "reason"}),
		duration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "mysocket_admission_service_duration_seconds",
			Help:    "Time to answer the admission of a Service.",
			Buckets: prometheus.ExponentialBuckets(100e-6, 2, 14), // 100 µs to 0.8 s
		}),
	}
	for _, c := range []prometheus.Collector{m.services, m.duration} {
		if err := registerer.Register(c); err != nil {
			return nil, fmt.Errorf("register admission metrics: %w", err)
		}
	}
	return m, nil
}

func (m *serviceMetrics) observe(v verdict, took time.Duration) {
	m.services.WithLabelValues(string(v.result), v.reason).Inc()
	m.duration.Observe(took.Seconds())
}
