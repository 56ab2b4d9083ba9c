package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/mysocketio/mysocket-injector/internal/edge"
	"github.com/mysocketio/mysocket-injector/internal/edge/control"
)

const maxSecretFile = 64 << 10

func user(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	if len(args) == 0 {
		_, _ = io.WriteString(stderr, usage)
		return 2
	}
	switch args[0] {
	case "add":
		return userAdd(ctx, args[1:], stdin, stdout, stderr)
	case "list":
		return userList(ctx, args[1:], stdout, stderr)
	case "password":
		return userPassword(ctx, args[1:], stdin, stdout, stderr)
	case "help", "--help", "-help", "-h":
		_, _ = io.WriteString(stdout, usage)
		return 0
	case "delete":
		return userDelete(ctx, args[1:], stdout, stderr)
	}
	_, _ = fmt.Fprintf(stderr, "mysocket-edge user: there is no command %q; there are add, list, delete and password\n", args[0])
	return 2
}

func userAdd(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	fs := newFlags("mysocket-edge user add", "Makes an account and prints its id. The password is never an argument: the first line of stdin is it, or of a file.", stderr)
	where := stateFlags(fs)
	where.makes = true
	email := fs.String("email", "", "e-mail `address` to log in with; required")
	name := fs.String("name", "", "`name` of the account's owner")
	passwordFile := fs.String("password-file", "", "`file` whose first line is the password; stdin if empty")
	ifMissing := fs.Bool("if-missing", false, "leave an account that has this e-mail address already as it is, its password too, and print its id")
	keyFile := fs.String("ssh-key-file", "", "`file` with a public key that may log in without a certificate")
	if code, ok := parse(fs, args, stderr); !ok {
		return code
	}
	if *email == "" {
		_, _ = fmt.Fprintln(stderr, "mysocket-edge user add: --email is required")
		return 2
	}
	password, err := readPassword(*passwordFile, stdin)
	if err != nil {
		return fail(stderr, "user add", err)
	}
	key := ""
	if *keyFile != "" {
		data, err := readBounded(*keyFile)
		if err != nil {
			return fail(stderr, "user add", err)
		}
		key = string(data)
	}
	return withAccounts(ctx, where, "user add", stderr, func(a control.Accounts) error {
		if *ifMissing {
			users, err := a.List()
			if err != nil {
				return err
			}
			if i := slices.IndexFunc(users, func(u edge.User) bool { return strings.EqualFold(u.Email, strings.TrimSpace(*email)) }); i >= 0 {
				_, _ = fmt.Fprintln(stdout, users[i].ID)
				return nil
			}
		}
		u, err := a.Add(edge.NewUser{Name: *name, Email: *email, Password: password, SSHKey: key})
		if err == nil {
			_, _ = fmt.Fprintln(stdout, u.ID)
		}
		return err
	})
}

func userList(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	fs := newFlags("mysocket-edge user list", "Lists the accounts, oldest first.", stderr)
	where := stateFlags(fs)
	if code, ok := parse(fs, args, stderr); !ok {
		return code
	}
	return withAccounts(ctx, where, "user list", stderr, func(a control.Accounts) error {
		w := tabwriter.NewWriter(stdout, 0, 8, 2, ' ', 0)
		_, _ = fmt.Fprintln(w, "ID\tE-MAIL\tNAME\tSOCKETS\tCREATED")
		users, err := a.List()
		if err != nil {
			return err
		}
		for _, u := range users {
			_, _ = fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%s\n", u.ID, u.Email, u.Name, u.Sockets, u.Created.Format(time.RFC3339))
		}
		return w.Flush()
	})
}

func userDelete(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	fs := newFlags("mysocket-edge user delete", "Deletes an account with all its sockets and tunnels.", stderr)
	where := stateFlags(fs)
	email := fs.String("email", "", "e-mail `address` of the account; required")
	if code, ok := parse(fs, args, stderr); !ok {
		return code
	}
	if *email == "" {
		_, _ = fmt.Fprintln(stderr, "mysocket-edge user delete: --email is required")
		return 2
	}
	return withAccounts(ctx, where, "user delete", stderr, func(a control.Accounts) error {
		if err := a.Delete(*email); err != nil {
			return err
		}
		_, _ = fmt.Fprintln(stdout, "deleted", *email)
		return nil
	})
}

func userPassword(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	fs := newFlags("mysocket-edge user password", "Changes the password of an account. The password is never an argument: the first line of stdin is it, or of a file.\nTokens from a login with the earlier one are good no longer; access tokens and tunnels stay.", stderr)
	where := stateFlags(fs)
	email := fs.String("email", "", "e-mail `address` of the account; required")
	passwordFile := fs.String("password-file", "", "`file` whose first line is the new password; stdin if empty")
	if code, ok := parse(fs, args, stderr); !ok {
		return code
	}
	if *email == "" {
		_, _ = fmt.Fprintln(stderr, "mysocket-edge user password: --email is required")
		return 2
	}
	password, err := readPassword(*passwordFile, stdin)
	if err != nil {
		return fail(stderr, "user password", err)
	}
	return withAccounts(ctx, where, "user password", stderr, func(a control.Accounts) error {
		if err := a.SetPassword(*email, password); err != nil {
			return err
		}
		_, _ = fmt.Fprintln(stdout, "changed the password of", *email)
		return nil
	})
}

func fail(stderr io.Writer, command string, err error) int {
	_, _ = fmt.Fprintf(stderr, "mysocket-edge %s: %v\n", command, err)
	return 1
}

// readPassword reads the first line of the file, or of stdin if there is none.
func readPassword(path string, stdin io.Reader) (string, error) {
	source := "stdin"
	if path != "" {
		data, err := readBounded(path)
		if err != nil {
			return "", err
		}
		source, stdin = path, strings.NewReader(string(data))
	}
	line, err := bufio.NewReader(io.LimitReader(stdin, maxSecretFile)).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return "", fmt.Errorf("read password from %s: %w", source, err)
	}
	line = strings.TrimRight(line, "\r\n")
	if line == "" {
		return "", fmt.Errorf("there is no password on %s", source)
	}
	return line, nil
}

func readBounded(path string) ([]byte, error) {
	f, err := os.Open(path) // #nosec G304 -- the operator names the file
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	return io.ReadAll(io.LimitReader(f, maxSecretFile))
}
