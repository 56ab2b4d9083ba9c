package main

import (
	"context"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/mysocketio/mysocket-injector/internal/edge"
	"github.com/mysocketio/mysocket-injector/internal/edge/control"
)

func token(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	if len(args) == 0 {
		_, _ = io.WriteString(stderr, usage)
		return 2
	}
	switch args[0] {
	case "create":
		return tokenCreate(ctx, args[1:], stdout, stderr)
	case "list":
		return tokenList(ctx, args[1:], stdout, stderr)
	case "revoke":
		return tokenRevoke(ctx, args[1:], stdout, stderr)
	case "help", "--help", "-help", "-h":
		_, _ = io.WriteString(stdout, usage)
		return 0
	}
	_, _ = fmt.Fprintf(stderr, "mysocket-edge token: there is no command %q; there are create, list and revoke\n", args[0])
	return 2
}

func tokenCreate(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	fs := newFlags("mysocket-edge token create", "Makes an access token of an account and prints it. It is not kept and can't be shown again: send it to a file of mode 0600.", stderr)
	where := stateFlags(fs)
	email := fs.String("email", "", "e-mail `address` of the account; required")
	name := fs.String("name", "", "`name` of the token, to know it by in the list")
	lifetime := fs.Duration("lifetime", 0, "how long it is good, such as 2160h; 0: until it is revoked")
	if code, ok := parse(fs, args, stderr); !ok {
		return code
	}
	switch {
	case *email == "":
		_, _ = fmt.Fprintln(stderr, "mysocket-edge token create: --email is required")
		return 2
	case *lifetime < 0:
		_, _ = fmt.Fprintf(stderr, "mysocket-edge token create: --lifetime %s is negative\n", *lifetime)
		return 2
	}
	return withAccounts(ctx, where, "token create", stderr, func(a control.Accounts) error {
		token, err := a.AddToken(edge.NewToken{Email: *email, Name: *name, Lifetime: *lifetime})
		if err == nil {
			_, _ = fmt.Fprintln(stdout, token)
		}
		return err
	})
}

func tokenList(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	fs := newFlags("mysocket-edge token list", "Lists the access tokens, without what makes them tokens.", stderr)
	where := stateFlags(fs)
	if code, ok := parse(fs, args, stderr); !ok {
		return code
	}
	return withAccounts(ctx, where, "token list", stderr, func(a control.Accounts) error {
		w := tabwriter.NewWriter(stdout, 0, 8, 2, ' ', 0)
		_, _ = fmt.Fprintln(w, "ID\tE-MAIL\tNAME\tCREATED\tEXPIRES")
		tokens, err := a.Tokens()
		if err != nil {
			return err
		}
		for _, t := range tokens {
			expires := "never"
			if !t.Expires.IsZero() {
				expires = t.Expires.Format(time.RFC3339)
			}
			_, _ = fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", t.ID, t.Email, t.Name, t.Created.Format(time.RFC3339), expires)
		}
		return w.Flush()
	})
}

func tokenRevoke(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	fs := newFlags("mysocket-edge token revoke", "Ends the use of an access token. Tunnels that are connected stay.", stderr)
	where := stateFlags(fs)
	id := fs.String("id", "", "`id` of the token, as the list has it; required")
	if code, ok := parse(fs, args, stderr); !ok {
		return code
	}
	if *id == "" {
		_, _ = fmt.Fprintln(stderr, "mysocket-edge token revoke: --id is required")
		return 2
	}
	return withAccounts(ctx, where, "token revoke", stderr, func(a control.Accounts) error {
		if err := a.RevokeToken(*id); err != nil {
			return err
		}
		_, _ = fmt.Fprintln(stdout, "revoked", *id)
		return nil
	})
}
