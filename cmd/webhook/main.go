// Command webhook is the control plane: admission and gateway on every replica, controllers on the leader. "webhook
// cleanup" is what Helm runs before it uninstalls the control plane.
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"

	ctrl "sigs.k8s.io/controller-runtime"
)

// version is set by the linker.
var version = "dev"

func main() {
	if err := mainErr(); err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "webhook: "+err.Error())
		os.Exit(1)
	}
}

func mainErr() error {
	if len(os.Args) > 1 && os.Args[1] == "cleanup" {
		o, err := parseCleanup(os.Args[2:], os.Getenv, os.Stderr)
		if err != nil {
			return err
		}
		return cleanup(ctrl.SetupSignalHandler(), o)
	}
	o, err := parseOptions(os.Args[1:], os.Getenv, os.Stderr)
	if err != nil {
		return err
	}
	if o.version {
		fmt.Println(version)
		return nil
	}
	return run(ctrl.SetupSignalHandler(), o)
}
