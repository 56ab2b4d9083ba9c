package main

import (
	"context"
	"fmt"
	"io"

	"github.com/mysocketio/mysocket-injector/internal/edge/control"
	"github.com/mysocketio/mysocket-injector/internal/edge/store"
)

func backup(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	fs := newFlags("mysocket-edge backup", "Copies the state, while the edge runs or not, and looks the copy over. It holds private keys; its mode is 0600.", stderr)
	where := stateFlags(fs)
	out := fs.String("out", "", "`file` to make; required")
	force := fs.Bool("force", false, "replace a file that is there")
	if code, ok := parse(fs, args, stderr); !ok {
		return code
	}
	if *out == "" {
		_, _ = fmt.Fprintln(stderr, "mysocket-edge backup: --out is required")
		return 2
	}
	return withAccounts(ctx, where, "backup", stderr, func(a control.Accounts) error {
		if err := store.SaveBackup(*out, *force, a.Backup); err != nil {
			return err
		}
		_, _ = fmt.Fprintln(stdout, "saved", *out)
		return nil
	})
}

func restore(args []string, stdout, stderr io.Writer) int {
	fs := newFlags("mysocket-edge restore", "Looks a copy of the state over and puts it in the state's place. The edge must not be running.", stderr)
	state := stateFlag(fs)
	from := fs.String("from", "", "`file` that backup made; required")
	force := fs.Bool("force", false, "replace a state that is there")
	if code, ok := parse(fs, args, stderr); !ok {
		return code
	}
	if *from == "" {
		_, _ = fmt.Fprintln(stderr, "mysocket-edge restore: --from is required")
		return 2
	}
	if err := store.Restore(*from, *state, *force); err != nil {
		return fail(stderr, "restore", err)
	}
	_, _ = fmt.Fprintln(stdout, "restored", *state)
	return 0
}
