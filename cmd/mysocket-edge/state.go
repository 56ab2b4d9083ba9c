package main

import (
	"errors"
	"flag"
	"io"

	"github.com/mysocketio/mysocket-injector/internal/edge"
)

// stateOf says which state a command is about.
type stateOf struct {
	state *string
	etcd  *etcdFlags
}

// stateFlags adds the flags that say so.
func stateFlags(fs *flag.FlagSet) stateOf {
	return stateOf{
		state: fs.String("state", "./mysocket-edge.db", "state `file`; no edge may be running on it"),
		etcd:  addEtcdFlags(fs),
	}
}

func withAccounts(where stateOf, command string, stderr io.Writer, do func(*edge.Accounts) error) int {
	accounts, err := openAccounts(where, stderr)
	if err != nil {
		return fail(stderr, command, err)
	}
	err = do(accounts)
	if err = errors.Join(err, accounts.Close()); err != nil {
		return fail(stderr, command, err)
	}
	return 0
}

func openAccounts(where stateOf, stderr io.Writer) (*edge.Accounts, error) {
	cfg, shared := where.etcd.take(where.state)
	if !shared {
		if err := cfg.Validate(); err != nil {
			return nil, err
		}
		return edge.OpenAccounts(*where.state)
	}
	if *where.state != "" {
		return nil, errors.New("--state and --etcd-endpoints are two places for one state: give one")
	}
	log, err := newLogger("warn", "text", stderr)
	if err != nil {
		return nil, err
	}
	return edge.OpenSharedAccounts(cfg, log)
}
