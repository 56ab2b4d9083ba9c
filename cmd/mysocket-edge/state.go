package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/mysocketio/mysocket-injector/internal/edge"
	"github.com/mysocketio/mysocket-injector/internal/edge/control"
	"github.com/mysocketio/mysocket-injector/internal/edge/store"
)

const (
	defaultState = "./mysocket-edge.db"
	// noControlSocket is the value of --control-socket for none.
	noControlSocket = "off"
)

// stateOf says which state a command is about, and where the edge that may hold it listens.
type stateOf struct {
	state, control *string
	etcd           *etcdFlags
	// makes says that the command may begin a state. All others would take a wrong path for an empty state: a backup of nothing looks like one.
	makes bool
}

// stateFlags adds the flags that say so. Where the edge has them from the environment, as in a container, its commands have, too.
func stateFlags(fs *flag.FlagSet) stateOf {
	return stateOf{
		state:   fs.String("state", cmp.Or(os.Getenv(envPrefix+"STATE"), defaultState), "state `file`"),
		control: fs.String("control-socket", os.Getenv(envPrefix+"CONTROL_SOCKET"), "Unix `socket` of the running edge; that of its state file, STATE.sock, if empty"),
		etcd:    addEtcdFlags(fs, func(name string) string { return os.Getenv(envPrefix + name) }),
	}
}

func stateFlag(fs *flag.FlagSet) *string {
	return fs.String("state", cmp.Or(os.Getenv(envPrefix+"STATE"), defaultState), "state `file`")
}

// controlSocket is the path of the socket; none if empty.
func controlSocket(value, state string) string {
	switch value {
	case "":
		return state + ".sock"
	case noControlSocket:
		return ""
	}
	return value
}

// withAccounts has the running edge do something, or does it on the state file if there is no edge.
func withAccounts(ctx context.Context, where stateOf, command string, stderr io.Writer, do func(control.Accounts) error) int {
	accounts, err := openAccounts(ctx, where, stderr)
	if err != nil {
		return fail(stderr, command, err)
	}
	err = do(accounts)
	if err = errors.Join(err, accounts.Close()); err != nil {
		return fail(stderr, command, err)
	}
	return 0
}

type closingAccounts interface {
	control.Accounts
	io.Closer
}

func openAccounts(ctx context.Context, where stateOf, stderr io.Writer) (closingAccounts, error) {
	etcd, shared := where.etcd.take(where.state)
	switch err := etcd.Validate(); {
	case err != nil:
		return nil, err
	case shared && *where.state != "":
		return nil, errors.New("--state and --etcd-endpoints are two places for one state: give one")
	case shared:
		log, err := newLogger("warn", "text", stderr)
		if err != nil {
			return nil, err
		}
		return edge.OpenSharedAccounts(etcd, log)
	}
	socket := controlSocket(*where.control, *where.state)
	if socket == "" {
		return where.openFile()
	}
	// The second round is for an edge that began between the two steps of the first.
	for again := true; ; again = false {
		client, err := control.Dial(ctx, socket)
		if err == nil {
			return client, nil
		}
		if !errors.Is(err, control.ErrNotRunning) {
			return nil, err
		}
		accounts, fileErr := where.openFile()
		switch {
		case fileErr == nil:
			return accounts, nil
		case !errors.Is(fileErr, store.ErrInUse):
			return nil, fileErr
		case !again:
			return nil, fmt.Errorf("%w, and %w", fileErr, err)
		}
	}
}

// openFile opens the state file, which must not be in use.
func (where stateOf) openFile() (*edge.Accounts, error) {
	if !where.makes {
		if _, err := os.Stat(*where.state); errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("there is no state file %s; --state says where it is", *where.state)
		}
	}
	return edge.OpenAccounts(*where.state)
}
