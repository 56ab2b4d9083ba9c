// Command hyperkube is one static binary with every Kubernetes component, kubectl and etcd:
// what the test cluster runs and what envtest needs. It goes by the name it is called by
// (kube-apiserver, etcd and kubectl are symbolic links to it) or else by its first argument.
//
// It is a module of its own because k8s.io/kubernetes needs a replace line for each of its
// staging modules, and those must not reach the modules of the tests or the product.
package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
	"go.etcd.io/etcd/server/v3/etcdmain"
	"k8s.io/component-base/cli"
	_ "k8s.io/component-base/logs/json/register"
	_ "k8s.io/component-base/metrics/prometheus/clientgo"
	_ "k8s.io/component-base/metrics/prometheus/version"
	kubectl "k8s.io/kubectl/pkg/cmd"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	kcm "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	kubeproxy "k8s.io/kubernetes/cmd/kube-proxy/app"
	scheduler "k8s.io/kubernetes/cmd/kube-scheduler/app"
	kubelet "k8s.io/kubernetes/cmd/kubelet/app"
)

func main() {
	name := filepath.Base(os.Args[0])
	if component(name) == nil && name != "etcd" {
		if len(os.Args) < 2 {
			fmt.Fprintln(os.Stderr, "usage: hyperkube etcd|kube-apiserver|kube-controller-manager|kube-scheduler|kubelet|kube-proxy|kubectl ...")
			os.Exit(2)
		}
		name = os.Args[1]
		os.Args = os.Args[1:]
	}
	if name == "etcd" {
		etcdmain.Main(os.Args)
		return
	}
	newCommand := component(name)
	if newCommand == nil {
		fmt.Fprintf(os.Stderr, "hyperkube: %q is no component\n", name)
		os.Exit(2)
	}
	os.Exit(cli.Run(newCommand()))
}

func component(name string) func() *cobra.Command {
	switch name {
	case "kube-apiserver":
		return apiserver.NewAPIServerCommand
	case "kube-controller-manager":
		return kcm.NewControllerManagerCommand
	case "kube-scheduler":
		return func() *cobra.Command { return scheduler.NewSchedulerCommand() }
	case "kubelet":
		return func() *cobra.Command { return kubelet.NewKubeletCommand(context.Background()) }
	case "kube-proxy":
		return kubeproxy.NewProxyCommand
	case "kubectl":
		return kubectl.NewDefaultKubectlCommand
	}
	return nil
}
