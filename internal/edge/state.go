package edge

import (
	"context"
	"log/slog"
	"time"

	"github.com/mysocketio/mysocket-injector/internal/edge/store"
)

// openState opens the state, in whichever of the two places it is. now may be nil.
func openState(path string, etcd store.EtcdConfig, log *slog.Logger, now func() time.Time) (*store.Store, error) {
	if len(etcd.Endpoints) == 0 {
		return store.Open(path, now)
	}
	if etcd.PlainText() {
		log.Warn("the way to etcd is not encrypted, and private keys travel on it; use https:// endpoints")
	}
	return store.OpenEtcd(context.Background(), etcd, log, now)
}

// OpenSharedAccounts opens the state that edges share, which may be running.
func OpenSharedAccounts(etcd store.EtcdConfig, log *slog.Logger) (*Accounts, error) {
	if err := etcd.Validate(); err != nil {
		return nil, err
	}
	st, err := openState("", etcd, log, nil)
	if err != nil {
		return nil, err
	}
	return &Accounts{store: st}, nil
}
