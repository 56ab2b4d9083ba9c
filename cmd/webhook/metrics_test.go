package main

import (
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"

	"github.com/mysocketio/mysocket-injector/internal/admission"
	"github.com/mysocketio/mysocket-injector/internal/certs"
	"github.com/mysocketio/mysocket-injector/internal/docstest"
	"github.com/mysocketio/mysocket-injector/internal/gateway"
)

func TestMetricsAreDocumented(t *testing.T) {
	o, err := parse(t)
	if err != nil {
		t.Fatal(err)
	}
	registry := prometheus.NewRegistry()
	c := fake.NewClientBuilder().Build()
	api, err := newAPI(o, registry)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := admission.NewPodMutator(admission.Options{Services: c, LiveServices: c, Sidecar: o.sidecar, Registerer: registry}); err != nil {
		t.Fatal(err)
	}
	if _, err := admission.NewServiceValidator(admission.ValidatorOptions{Cluster: c, Namespace: o.namespace, Registerer: registry}); err != nil {
		t.Fatal(err)
	}
	if _, err := gateway.New(gateway.Config{Cache: c, Live: c, API: api, Changes: &gateway.Changes{}, EdgeAddress: o.sshAddress, Registerer: registry}); err != nil {
		t.Fatal(err)
	}
	if _, err := certs.New(certs.Config{
		Namespace: o.namespace, SecretName: o.certificateSecret, DNSNames: []string{"a"}, MutatingWebhook: "a", Certificate: "serving", Overlap: o.certificateOverlap, Registerer: registry,
	}, c); err != nil {
		t.Fatal(err)
	}
	docstest.CompareMetrics(t, "Control plane", registry)

	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	histograms := 0
	for _, family := range families {
		switch family.GetName() {
		case "mysocket_admission_duration_seconds", "mysocket_admission_service_duration_seconds":
			histograms++
			if first := family.GetMetric()[0].GetHistogram().GetBucket()[0].GetUpperBound(); first != 100e-6 {
				t.Errorf("the buckets of %s begin at %g seconds, want 100 microseconds", family.GetName(), first)
			}
		}
	}
	if histograms != 2 {
		t.Errorf("found %d histograms of the latency of admissions", histograms)
	}
}
