package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/go-logr/logr"
	"github.com/prometheus/client_golang/prometheus"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/klog/v2"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/mysocketio/mysocket-injector/internal/controller"
	"github.com/mysocketio/mysocket-injector/internal/mysocket"
)

// cleanupOptions are the flags of "webhook cleanup", validated. Of the program's other options it has those that lead to
// Mysocket.
type cleanupOptions struct {
	options
	deployment string
	patience   time.Duration
}

func parseCleanup(args []string, getenv func(string) string, stderr io.Writer) (*cleanupOptions, error) {
	o := &cleanupOptions{}
	var level string
	f := flag.NewFlagSet("webhook cleanup", flag.ContinueOnError)
	f.SetOutput(stderr)
	f.StringVar(&o.namespace, "namespace", getenv("POD_NAMESPACE"), "the control plane's namespace (default: env POD_NAMESPACE)")
	f.StringVar(&o.deployment, "deployment", "", "name of the control plane's Deployment, which is scaled to 0 (required)")
	f.StringVar(&o.webhookConfiguration, "webhook-configuration", "", "name of the webhook configurations, which are deleted (required)")
	f.StringVar(&o.apiURL, "mysocket-api", "https://api.mysocket.io", "base URL of the Mysocket API; https only")
	f.StringVar(&o.apiCAFile, "mysocket-ca", "", "file with PEM certificates to trust for the API beside the system's; may be empty")
	f.StringVar(&o.accountDir, "account-dir", "/etc/mysocket/account", "directory with the files email and password, or token")
	f.StringVar(&o.names.Cluster, "cluster-name", "", "this cluster's name in socket names; letters, digits and dashes")
	f.DurationVar(&o.patience, "patience", 90*time.Second, "how long Mysocket may take; what it has not taken back then is let go and stays there")
	f.StringVar(&level, "log-level", "info", "debug, info, warn or error")
	f.StringVar(&o.logFormat, "log-format", "text", "text or json")
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	switch {
	case f.NArg() > 0:
		return nil, fmt.Errorf("unexpected argument %q: there are only flags", f.Arg(0))
	case o.namespace == "":
		return nil, errors.New("--namespace is missing, and so is the environment variable POD_NAMESPACE")
	case o.deployment == "":
		return nil, errors.New("--deployment is missing")
	case o.webhookConfiguration == "":
		return nil, errors.New("--webhook-configuration is missing")
	case !clusterNamePattern.MatchString(o.names.Cluster):
		return nil, fmt.Errorf("--cluster-name %q: allowed are up to 63 letters, digits and dashes, beginning and ending with a letter or digit", o.names.Cluster)
	case o.patience <= 0:
		return nil, fmt.Errorf("--patience %s: it must be longer than zero", o.patience)
	}
	if _, err := mysocket.ParseBaseURL(o.apiURL); err != nil {
		return nil, fmt.Errorf("--mysocket-api: %w", err)
	}
	if err := o.setLogging(level); err != nil {
		return nil, err
	}
	var err error
	o.apiCA, err = readCA(o.apiCAFile)
	return o, err
}

// cleanup ends the control plane and releases all that it had.
func cleanup(ctx context.Context, o *cleanupOptions) error {
	log := newLogger(&o.options)
	ctrl.SetLogger(logr.FromSlogHandler(log.Handler()))
	klog.SetSlogLogger(log)
	scheme := runtime.NewScheme()
	for _, add := range schemes {
		if err := add(scheme); err != nil {
			return err
		}
	}
	rest, err := ctrl.GetConfig()
	if err != nil {
		return fmt.Errorf("find the cluster: %w", err)
	}
	rest.QPS, rest.Burst = 100, 200
	live, err := client.New(rest, client.Options{Scheme: scheme})
	if err != nil {
		return fmt.Errorf("connect to the cluster: %w", err)
	}
	api, err := newAPI(&o.options, prometheus.NewRegistry())
	if err != nil {
		return err
	}
	instance, err := os.Hostname()
	if err != nil {
		return err
	}
	return (&controller.Cleanup{
		Client:               live,
		API:                  api,
		Events:               &controller.DirectEvents{Client: live, Log: log, Instance: instance},
		Log:                  log,
		Namespace:            o.namespace,
		Cluster:              o.names.Cluster,
		Deployment:           o.deployment,
		WebhookConfiguration: o.webhookConfiguration,
		Patience:             o.patience,
	}).Run(ctx)
}
