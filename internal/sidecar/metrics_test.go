package sidecar

import (
	"testing"

	"github.com/mysocketio/mysocket-injector/internal/docstest"
)

func TestMetricsAreDocumented(t *testing.T) {
	docstest.CompareMetrics(t, "Sidecar", newMetrics("test").registry)
}
