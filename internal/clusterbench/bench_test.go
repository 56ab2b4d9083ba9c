package main

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"sigs.k8s.io/controller-runtime/pkg/client"
)

func TestQuantile(t *testing.T) {
	var values []time.Duration
	for i := 100; i > 0; i-- {
		values = append(values, time.Duration(i))
	}
	for q, want := range map[float64]time.Duration{0: 1, 0.5: 51, 0.99: 100, 1: 100} {
		if got := quantile(values, q); got != want {
			t.Errorf("quantile %v of 1 to 100: %d, want %d", q, got, want)
		}
	}
	if got := quantile(nil, 0.5); got != 0 {
		t.Errorf("quantile of nothing: %d", got)
	}
}

// TestOverhead takes the ratio of each round, not of the medians.
func TestOverhead(t *testing.T) {
	got := overhead([]float64{6, 9, 20}, []float64{2, 5, 10}, []float64{4, 7, 14}) // 4/2, 4/2, 10/4
	if want := (spread{median: 2, least: 2, most: 2.5}); got != want {
		t.Errorf("%v, want %v", got, want)
	}
	if text := got.text("%.1f"); text != "2.0 (2.0 - 2.5)" {
		t.Errorf("%q", text)
	}
}

func TestParse(t *testing.T) {
	for name, tc := range map[string]struct{ args, want string }{
		"a command":              {"admission", ""},
		"flags":                  {"--rounds 3 --namespaces 2 --services 4 --pods 8 --streams 8 scale", ""},
		"no command":             {"", "give one command"},
		"two commands":           {"admission scale", "give one command"},
		"nothing to do":          {"--rounds 0 admission", "--rounds 0: it must be at least 1"},
		"uneven":                 {"--namespaces 3 --services 10 scale", "--services 10 must be a multiple of --namespaces 3"},
		"more streams than pods": {"--streams 20001 scale", "there are only 20000 pods"},
	} {
		t.Run(name, func(t *testing.T) {
			_, _, err := parse(strings.Fields(tc.args), func(string) string { return "/assets" }, io.Discard)
			if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
				t.Errorf("%v, want %q", err, tc.want)
			}
		})
	}
	if _, _, err := parse([]string{"scale"}, func(string) string { return "" }, io.Discard); err == nil || !strings.Contains(err.Error(), "--assets") {
		t.Errorf("without assets: %v", err)
	}
}

func TestInParallel(t *testing.T) {
	var sum atomic.Int64
	if err := inParallel(t.Context(), 100, func(_ context.Context, i int) error {
		sum.Add(int64(i))
		return nil
	}); err != nil || sum.Load() != 4950 {
		t.Errorf("%v, sum %d", err, sum.Load())
	}
	broken := errors.New("broken")
	if err := inParallel(t.Context(), 1000, func(_ context.Context, i int) error {
		if i == 3 {
			return broken
		}
		return nil
	}); !errors.Is(err, broken) {
		t.Errorf("%v, want the error of one", err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if err := inParallel(ended, 10, func(context.Context, int) error { return nil }); !errors.Is(err, context.Canceled) {
		t.Errorf("%v after the end", err)
	}
}

// TestPodOf: the API server must not refuse what is measured, and Services must select it.
func TestPodOf(t *testing.T) {
	pod := podOf("shop", "web-1", "web")
	if key := client.ObjectKeyFromObject(pod); key.String() != "shop/web-1" || pod.Labels["app"] != "web" || pod.Spec.ServiceAccountName != serviceAccount {
		t.Errorf("%s, labels %v, ServiceAccount %s", key, pod.Labels, pod.Spec.ServiceAccountName)
	}
}

func TestSelfSigned(t *testing.T) {
	certificate, key, err := selfSigned("noop.mysocket-system.svc")
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.X509KeyPair(certificate, key)
	if err != nil {
		t.Fatal(err)
	}
	if err := pair.Leaf.VerifyHostname("noop.mysocket-system.svc"); err != nil {
		t.Error(err)
	}
}
