// Command cluster brings up a real single-node Kubernetes for the end-to-end tests and the
// demo, builds images for it, and takes it down again. Run it with help for its commands.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/mysocketio/mysocket-injector/e2e/cluster"
)

const usage = `usage: cluster [-root DIR] COMMAND

  up                       start the cluster, or make sure that it is up and healthy
  down                     end it and remove what up made
  status                   say whether it is up and healthy
  build                    build what up runs, and helm
  images [-tag TAG] [NAME...]  build the project's images from its Dockerfiles and load them if the cluster is up
  load IMAGE.tar...        load image archives into the cluster
  kubectl ARGS...          run kubectl as the cluster's administrator
  helm ARGS...             run helm as the cluster's administrator
  enter COMMAND...         run a command inside the node, as root
  logs [NAME]              print a component's log, or the names of the logs
  bin                      build, and print the directory of the binaries
  envtest-assets           print a directory for KUBEBUILDER_ASSETS

environment: MYSOCKET_E2E_RUN (what changes while it runs, default /var/tmp/mysocket-e2e),
MYSOCKET_E2E_CACHE (what is built, default mysocket-injector in the user's cache directory)
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	err := mainErr(ctx, os.Args[1:])
	stop()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() > 0 {
		os.Exit(exit.ExitCode()) // of kubectl, helm or enter, which have said why
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "cluster:", err)
		os.Exit(1)
	}
}

func mainErr(ctx context.Context, argv []string) error {
	// The node's init is this program, too; it has no flags and no repository.
	if len(argv) == 2 && argv[0] == "inner" {
		return cluster.Inner(argv[1])
	}
	flags := flag.NewFlagSet("cluster", flag.ContinueOnError)
	flags.Usage = func() { _, _ = fmt.Fprint(flags.Output(), usage) }
	root := flags.String("root", "", "root of the repository")
	if err := flags.Parse(argv); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return nil
		}
		return err
	}
	if flags.NArg() == 0 {
		return errors.New("no command: run it with help for the list")
	}
	opts := cluster.Options{Root: *root, Out: os.Stdout}
	command, args := flags.Arg(0), flags.Args()[1:]
	switch command {
	case "help":
		_, err := fmt.Print(usage)
		return err
	case "up":
		c, err := cluster.Up(ctx, opts)
		if err != nil {
			return err
		}
		_, err = fmt.Printf("export KUBECONFIG=%s\n", c.Kubeconfig)
		return err
	case "down":
		return cluster.Down(ctx, opts)
	case "build":
		_, err := cluster.Build(ctx, opts)
		return err
	case "bin", "envtest-assets":
		return printDir(ctx, opts, command)
	case "images":
		return images(ctx, opts, args)
	case "load", "status", "kubectl", "helm", "enter", "logs":
		c, err := cluster.Open(opts)
		if err != nil {
			return err
		}
		return withCluster(ctx, c, command, args)
	}
	return fmt.Errorf("%q is no command: run it with help for the list", command)
}

// printDir prints a directory and nothing else on standard output, for use in $(...).
func printDir(ctx context.Context, opts cluster.Options, command string) error {
	opts.Out = os.Stderr
	get := cluster.Build
	if command == "envtest-assets" {
		get = cluster.BuildEnvtestAssets
	}
	dir, err := get(ctx, opts)
	if err != nil {
		return err
	}
	_, err = fmt.Println(dir)
	return err
}

func images(ctx context.Context, opts cluster.Options, args []string) error {
	flags := flag.NewFlagSet("images", flag.ContinueOnError)
	tag := flags.String("tag", "dev", "tag of the images, and version of the programs in them")
	if err := flags.Parse(args); err != nil {
		return err
	}
	built, err := cluster.BuildImages(ctx, opts, *tag, flags.Args()...)
	if err != nil {
		return err
	}
	c, err := cluster.Open(opts)
	if errors.Is(err, cluster.ErrNotRunning) {
		for _, img := range built {
			fmt.Println(img.Archive)
		}
		return nil
	}
	if err != nil {
		return err
	}
	for _, img := range built {
		if err := c.LoadImage(ctx, img.Archive); err != nil {
			return err
		}
		fmt.Println("loaded", img.Ref)
	}
	return nil
}

func withCluster(ctx context.Context, c *cluster.Cluster, command string, args []string) error {
	if len(args) == 0 && (command == "load" || command == "enter") {
		return fmt.Errorf("%s: nothing named: run it with help for its arguments", command)
	}
	switch command {
	case "load":
		return c.LoadImage(ctx, args...)
	case "status":
		return status(ctx, c)
	case "logs":
		return logs(c, args)
	case "kubectl":
		return attached(c.Kubectl(ctx, args...))
	case "helm":
		return attached(c.Helm(ctx, args...))
	default:
		return attached(c.Enter(ctx, args...))
	}
}

// attached runs a command on our terminal. An interrupt reaches it as it reaches us; it is to
// end by itself.
func attached(cmd *exec.Cmd) error {
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	return cmd.Run()
}

func status(ctx context.Context, c *cluster.Cluster) error {
	if err := c.Healthy(ctx); err != nil {
		return fmt.Errorf("the cluster of %s is not healthy: %w", c.Started.Local().Format("15:04:05"), err)
	}
	fmt.Printf("healthy, up since %s\nexport KUBECONFIG=%s\n", c.Started.Local().Format("15:04:05"), c.Kubeconfig)
	return attached(c.Kubectl(ctx, "get", "nodes,pods", "--all-namespaces", "-o", "wide"))
}

func logs(c *cluster.Cluster, args []string) error {
	if len(args) == 1 && args[0] == filepath.Base(args[0]) {
		f, err := os.Open(filepath.Join(c.LogDir, strings.TrimSuffix(args[0], ".log")+".log"))
		if err != nil {
			return err
		}
		_, err = io.Copy(os.Stdout, f)
		return errors.Join(err, f.Close())
	}
	entries, err := os.ReadDir(c.LogDir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		fmt.Println(strings.TrimSuffix(e.Name(), ".log"))
	}
	return nil
}
