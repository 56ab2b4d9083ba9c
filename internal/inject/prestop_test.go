package inject

import (
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/utils/ptr"

	"github.com/mysocketio/mysocket-injector/internal/annotations"
)

func TestPreStopSleep(t *testing.T) {
	const none = "none"
	for _, c := range []struct {
		name    string
		chart   int
		asked   string
		grace   *int64
		want    int64
		problem bool
	}{
		{"off", 0, none, nil, 0, false},
		{"by the chart", 5, none, nil, 5, false},
		{"by the pod", 0, "7", nil, 7, false},
		{"the pod knows better", 5, "7", nil, 7, false},
		{"the pod wants none", 5, "0", nil, 0, false},
		{"the most", 0, "60", ptr.To[int64](120), 60, false},
		{"more", 5, "61", ptr.To[int64](120), 5, true},
		{"negative", 0, "-1", nil, 0, true},
		{"empty", 5, "", nil, 5, true},
		{"with a unit", 0, "5s", nil, 0, true},
		{"huge", 0, strings.Repeat("9", 1000), nil, 0, true},
		{"as long as the default grace period", 0, "30", nil, 29, false},
		{"longer than the grace period", 60, none, ptr.To[int64](10), 9, false},
		{"a grace period of a second", 5, none, ptr.To[int64](1), 0, false},
		{"no grace period", 5, none, ptr.To[int64](0), 0, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg := testConfig()
			cfg.PreStopSleep = c.chart
			if err := cfg.Validate(); err != nil {
				t.Fatal(err)
			}
			pod := &corev1.Pod{Spec: corev1.PodSpec{TerminationGracePeriodSeconds: c.grace, Containers: []corev1.Container{{Name: "app"}}}}
			if c.asked != none {
				pod.Annotations = map[string]string{annotations.PodPreStopSleep: c.asked}
			}
			err := Problem(pod)
			if (err != nil) != c.problem {
				t.Errorf("problem: %v", err)
			}
			if err != nil && (len(err.Error()) > 200 || !strings.Contains(err.Error(), "0 to 60")) {
				t.Errorf("the problem %q does not say what is allowed, briefly", err)
			}
			got, skip := Inject(pod, cfg)
			if skip != nil {
				t.Fatal(skip)
			}
			var seconds int64
			if l := got.Spec.Containers[0].Lifecycle; l != nil {
				seconds = l.PreStop.Sleep.Seconds
			}
			if seconds != c.want {
				t.Errorf("%d seconds, want %d", seconds, c.want)
			}
		})
	}
	for _, seconds := range []int{-1, MaxPreStopSleep + 1} {
		cfg := testConfig()
		cfg.PreStopSleep = seconds
		if err := cfg.Validate(); err == nil || !strings.Contains(err.Error(), "allowed are 0 to 60") {
			t.Errorf("a configuration with %d seconds: %v", seconds, err)
		}
	}
}
