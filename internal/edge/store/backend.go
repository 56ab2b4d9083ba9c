package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
)

// The buckets that records are in.
const (
	bucketUsers   = "users"
	bucketSockets = "sockets"
	bucketTunnels = "tunnels"
	bucketSecrets = "secrets"
	bucketTokens  = "tokens"
	bucketBlobs   = "blobs" // not kept in memory
)

// buckets are all of them.
var buckets = []string{bucketUsers, bucketSockets, bucketTunnels, bucketSecrets, bucketTokens, bucketBlobs}

// record is a value under an id in a bucket. As a change, a nil value deletes what is there.
type record struct {
	bucket, id string
	value      []byte
}

// state is how far a backend's changes have come. The zero state is before any.
type state struct {
	// revision grows with each change.
	revision int64
	// guard is the revision of the last change that an edge made. A change is made only while it is still that.
	guard int64
}

// backend keeps records. It knows nothing of what is in them.
type backend interface {
	// load returns all records.
	load() ([]record, state, error)
	// commit makes the changes, all or none, if guard is still that of the state. It returns errBehind if it isn't, and then the state that
	// the caller must know before it tries again.
	commit(guard int64, changes []record) (state, error)
	// get returns the value of one record, nil if there is none.
	get(bucket, id string) ([]byte, error)
	// keys returns the ids of a bucket that begin so, in order.
	keys(bucket, beginning string) ([]string, error)
	// lock waits for a lock that nobody else among all that use the state holds until release.
	lock(ctx context.Context, name string) (release func(context.Context) error, err error)
	// latest returns a state that holds all changes that were acknowledged before the call. ok is false when the store knows them
	// anyway, or there is no way to find out.
	latest() (at state, ok bool)
	// maxChanges is how many changes one commit may have.
	maxChanges() int
	close() error
}

// errBehind means that the state has changed since the store last heard of it.
var errBehind = errors.New("the state has changed")

// put is the change that stores a value.
func put(bucket, id string, value any) (record, error) {
	data, err := json.Marshal(value)
	if err != nil {
		return record{}, fmt.Errorf("%s %s: %w", bucket, id, err)
	}
	return record{bucket, id, data}, nil
}

// remove is the change that deletes a record.
func remove(bucket, id string) record { return record{bucket: bucket, id: id} }
