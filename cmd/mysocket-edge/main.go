// Command mysocket-edge is a self-hosted Mysocket edge: it gives sockets public names, takes the tunnels of their origins
// in over SSH, and balances public HTTP, HTTPS and TCP over them.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"syscall"
)

// version is set when a release is built.
var version = "dev"

const usage = `mysocket-edge is a self-hosted Mysocket edge.

Usage:
  mysocket-edge serve [flags]          run the edge
  mysocket-edge user add [flags]       make an account; the password is read from stdin or a file
  mysocket-edge user list [flags]      list the accounts
  mysocket-edge user delete [flags]    delete an account with all its sockets
  mysocket-edge user password [flags]  change a password; it is read from stdin or a file
  mysocket-edge token create [flags]   make an access token of an account and print it
  mysocket-edge token list [flags]     list the access tokens
  mysocket-edge token revoke [flags]   end the use of an access token
  mysocket-edge backup [flags]         copy the state to a file
  mysocket-edge restore [flags]        put such a copy in the place of the state
  mysocket-edge ca [flags]             print the certificate of a running edge's own authority
  mysocket-edge version                print the version

The user and token commands and backup ask the running edge, if there is one, and change the state file themselves if not.
"mysocket-edge COMMAND --help" lists the flags of a command.
`

func main() {
	ctx, stop := context.Background(), func() {}
	if endsItself(os.Args[1:]) {
		ctx, stop = signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	}
	code := run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// endsItself says whether a command has something to do when it is told to end. The others wait for a password, or an etcd that does not answer, and
// Control-C must not have to wait, too; what they change is changed in one step.
func endsItself(args []string) bool {
	return len(args) > 0 && slices.Contains([]string{"serve", "backup", "restore"}, args[0])
}

// run does what the arguments say and returns the exit code: 0, 1 for a failure, 2 for wrong usage.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	if len(args) == 0 {
		_, _ = io.WriteString(stderr, usage)
		return 2
	}
	switch command := args[0]; command {
	case "serve":
		return serve(ctx, args[1:], stderr)
	case "user":
		return user(ctx, args[1:], stdin, stdout, stderr)
	case "token":
		return token(ctx, args[1:], stdout, stderr)
	case "backup":
		return backup(ctx, args[1:], stdout, stderr)
	case "restore":
		return restore(args[1:], stdout, stderr)
	case "ca":
		return ca(args[1:], stdout, stderr)
	case "version", "--version":
		_, _ = fmt.Fprintln(stdout, "mysocket-edge", version)
		return 0
	case "help", "--help", "-help", "-h":
		_, _ = io.WriteString(stdout, usage)
		return 0
	default:
		_, _ = fmt.Fprintf(stderr, "mysocket-edge: there is no command %q\n\n%s", command, usage)
		return 2
	}
}
