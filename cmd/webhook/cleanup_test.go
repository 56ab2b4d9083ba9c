package main

import (
	"bytes"
	"errors"
	"flag"
	"strings"
	"testing"
	"time"
)

func TestCleanupOptions(t *testing.T) {
	parse := func(args ...string) (*cleanupOptions, error) {
		return parseCleanup(append([]string{"--namespace=mysocket-system", "--deployment=mysocket-injector", "--webhook-configuration=x"}, args...), noEnv, &bytes.Buffer{})
	}
	o, err := parse("--cluster-name=north", "--patience=2m", "--log-format=json")
	if err != nil || o.namespace != "mysocket-system" || o.deployment != "mysocket-injector" || o.names.Cluster != "north" || o.patience != 2*time.Minute ||
		o.accountDir != "/etc/mysocket/account" || o.logFormat != "json" {
		t.Errorf("options %+v, %v", o, err)
	}
	for _, tc := range []struct{ arg, want string }{
		{"x", `unexpected argument "x": there are only flags`},
		{"--namespace=", "--namespace is missing, and so is the environment variable POD_NAMESPACE"},
		{"--deployment=", "--deployment is missing"},
		{"--webhook-configuration=", "--webhook-configuration is missing"},
		{"--cluster-name=a b", `--cluster-name "a b": allowed are up to 63 letters`},
		{"--patience=0s", "--patience 0s: it must be longer than zero"},
		{"--mysocket-api=http://api.example.com", "--mysocket-api: the API address"},
		{"--log-level=trace", `--log-level "trace": allowed`},
		{"--log-format=xml", `--log-format "xml": allowed`},
		{"--mysocket-ca=/nowhere", "--mysocket-ca: open /nowhere"},
	} {
		if _, err := parse(tc.arg); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: got %v, want %s", tc.arg, err, tc.want)
		}
	}
	if _, err := parse("--help"); !errors.Is(err, flag.ErrHelp) {
		t.Errorf("--help: %v", err)
	}
}
