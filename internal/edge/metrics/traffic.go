package metrics

import "github.com/prometheus/client_golang/prometheus"

// traffic are the metrics of what visitors send and get.
type traffic struct {
	firstByte prometheus.Histogram
	bytes     *prometheus.CounterVec
	cuts      *prometheus.CounterVec
}

// Reasons why a visitor's request was ended by the edge.
const (
	CutSending = "sending"
	CutTaking  = "taking"
	CutIdle    = "idle"
)

func newTraffic(r prometheus.Registerer) traffic {
	t := traffic{
		firstByte: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "mysocket_edge_first_byte_seconds", Help: "How long public HTTP requests took to the first byte of the answer.",
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60},
		}),
		bytes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "mysocket_edge_bytes_total", Help: "Bytes of bodies and connections, counted when the request or connection is over.",
		}, []string{"direction"}),
		cuts: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "mysocket_edge_visitors_cut_total", Help: "Requests that the edge ended because of their visitor, by reason.",
		}, []string{"reason"}),
	}
	r.MustRegister(t.firstByte, t.bytes, t.cuts)
	for _, direction := range []string{"in", "out"} {
		t.bytes.WithLabelValues(direction)
	}
	for _, reason := range []string{CutSending, CutTaking, CutIdle} {
		t.cuts.WithLabelValues(reason)
	}
	return t
}

// FirstByte counts how long the first byte of an answer took.
func (t *traffic) FirstByte(seconds float64) { t.firstByte.Observe(seconds) }

// Moved counts bytes from visitors, and to them.
func (t *traffic) Moved(in, out int64) {
	t.bytes.WithLabelValues("in").Add(float64(in))
	t.bytes.WithLabelValues("out").Add(float64(out))
}

// Cut counts a request that was ended because of its visitor.
func (t *traffic) Cut(reason string) { t.cuts.WithLabelValues(reason).Inc() }
