package metrics

import (
	"testing"

	"github.com/mysocketio/mysocket-injector/internal/docstest"
)

func TestMetricsAreDocumented(t *testing.T) {
	m := New(func() int { return 0 })
	m.WatchState(func() bool { return true })
	docstest.CompareMetrics(t, "Edge", m.registry)
}
