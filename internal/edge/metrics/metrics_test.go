package metrics

import (
	"testing"

	"github.com/mysocketio/mysocket-injector/internal/docstest"
)

func TestMetricsAreDocumented(t *testing.T) {
	docstest.CompareMetrics(t, "Edge", New(func() int { return 0 }).registry)
}
