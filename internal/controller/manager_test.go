package controller

import (
	"context"
	"testing"

	"k8s.io/utils/ptr"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/config"
	"sigs.k8s.io/controller-runtime/pkg/metrics/server"
)

type managed = ctrl.Manager

// setup is a reconciler that can be registered.
type setup interface{ SetupWithManager(ctrl.Manager) error }

// start runs reconcilers in a manager until the test ends. With a namespace, they see no other.
func start(t *testing.T, ns string, reconcilers func(managed) []setup) {
	t.Helper()
	cluster.Require(t)
	options := ctrl.Options{
		Scheme:     cluster.Scheme,
		Metrics:    server.Options{BindAddress: "0"},
		Controller: config.Controller{SkipNameValidation: ptr.To(true)},
	}
	options.Cache.ByObject = RestartingOnly() // as the program has it
	if ns != "" {
		options.Cache.DefaultNamespaces = map[string]cache.Config{ns: {}}
	}
	mgr, err := ctrl.NewManager(cluster.Config, options)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range reconcilers(mgr) {
		if err := r.SetupWithManager(mgr); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- mgr.Start(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("manager: %v", err)
		}
	})
}
