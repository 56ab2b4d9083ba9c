//go:build cluster

// Package tests holds the end-to-end tests: the product as its users see it, on a real cluster with
// an edge outside of it. They know the product's programs, chart, annotations and conditions, and
// none of its packages.
//
//	go test -tags cluster -v ./tests
//
// brings the lab up, or current, and leaves it up. Tests that disturb what all share (the control
// plane, the edge, the chart's values) run one after the other; those that keep to their own
// namespace are subtests of TestSideBySide.
package tests

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"testing"
	"time"

	"github.com/mysocketio/mysocket-injector/e2e/cluster"
	"github.com/mysocketio/mysocket-injector/e2e/lab"
)

const (
	// ownLabel marks the namespaces that tests make.
	ownLabel   = "mysocket-e2e"
	injectable = "mysocket.io/injection=enabled"

	controlPlane         = "deployment/mysocket-injector"
	controlPlaneSelector = "app.kubernetes.io/name=mysocket-injector"
	sidecarName          = "mysocket-tunnel"

	// patience is how long a test waits for what should take seconds: the machine may be busy.
	patience = 90 * time.Second
)

// env is what all tests share. TestMain sets it.
var env struct {
	*lab.Lab
	api *apiReader
	// foreign are the ids of the sockets that the edge had before: an interrupted run may have left some.
	foreign map[string]bool
}

func TestMain(m *testing.M) {
	os.Exit(runAll(m))
}

func runAll(m *testing.M) int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := prepare(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "end-to-end tests:", err)
		return 1
	}
	return m.Run()
}

func prepare(ctx context.Context) error {
	var err error
	if env.Lab, err = lab.Up(ctx, lab.Options{Options: cluster.Options{Out: os.Stderr}}); err != nil {
		return err
	}
	if env.api, err = newAPIReader(ctx, env.Lab); err != nil {
		return err
	}
	// What an interrupted run left would be found by the tests that look at everything.
	if _, err = env.Kube(ctx, "delete", "namespaces", "-l", ownLabel, "--timeout=2m"); err != nil {
		return err
	}
	sockets, err := env.Edge.Sockets(ctx)
	env.foreign = map[string]bool{}
	for _, k := range sockets {
		env.foreign[k.ID] = true
	}
	return err
}
