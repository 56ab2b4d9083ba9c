package store

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	// guardKey is changed by every change that an edge makes, and only while it is as that edge knows it. So a change is made with all
	// others known, and what it was checked against (names, ports, limits) holds. Its value is the format of the records.
	guardKey = "changes"
	format   = "1"

	// etcdTimeout bounds one request to etcd; a client of the API waits for it.
	etcdTimeout = 3 * time.Second
	// openTimeout bounds the first reading of everything.
	openTimeout = 15 * time.Second
	// checkInterval is how often etcd is asked for the last change, to see that it is there and that the watch has told us. A watch that lags behind
	// at two checks, with the same last change, is begun anew.
	checkInterval = 2 * time.Second
	// lockTTL is after what time the locks of an edge that died are free.
	lockTTL = 30 * time.Second
	// etcd takes 128 operations in a transaction unless it is told otherwise, and one is the guard's.
	maxEtcdChanges = 100
)

// etcd is the backend that several edges share.
type etcd struct {
	client *clientv3.Client
	prefix string // ends in a slash
	log    *slog.Logger
	store  *Store

	stop context.CancelFunc
	wg   sync.WaitGroup
	up   atomic.Bool
	// asking asks for the latest state, once for all who wait: one account's look-ups of what is not there must not queue up before another's.
	asking *together[asked]
}

// asked is what etcd said, if it did.
type asked struct {
	at state
	ok bool
}

// OpenEtcd opens the state that edges share in an etcd. now may be nil.
func OpenEtcd(ctx context.Context, cfg EtcdConfig, log *slog.Logger, now func() time.Time) (*Store, error) {
	client, err := cfg.client()
	if err != nil {
		return nil, fmt.Errorf("open etcd: %w", err)
	}
	// The watch goes on until close, whatever becomes of the context of opening.
	watching, stop := context.WithCancel(context.Background())
	e := &etcd{client: client, prefix: cfg.prefix() + "/", log: log.With("part", "state"), stop: stop}
	e.asking = newTogether(e.askLatest)
	s := newStore(e, now)
	e.store = s
	ctx, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	all, at, err := e.read(ctx)
	if err == nil {
		err = s.apply(at, all)
	}
	if err != nil {
		stop()
		return nil, errors.Join(fmt.Errorf("read the state in etcd %s below %s: %w", strings.Join(cfg.Endpoints, ", "), cfg.prefix(), err), client.Close())
	}
	e.up.Store(true)
	e.wg.Go(func() { e.keepWatching(watching) })
	return s, nil
}

// Up says whether what the state is kept in answered when it was last asked.
func (s *Store) Up() bool {
	e, ok := s.backend.(*etcd)
	return !ok || e.up.Load()
}

func (e *etcd) key(bucket, id string) string { return e.prefix + bucket + "/" + id }

// recordOf is the record that a key and its value are; ok is false for keys that are none.
func (e *etcd) recordOf(key, value []byte) (r record, ok bool) {
	rest, ok := strings.CutPrefix(string(key), e.prefix)
	if !ok {
		return record{}, false
	}
	r.bucket, r.id, ok = strings.Cut(rest, "/")
	r.value = value
	return r, ok
}

func (e *etcd) load() ([]record, state, error) {
	ctx, cancel := context.WithTimeout(context.Background(), openTimeout)
	defer cancel()
	return e.read(ctx)
}

// read returns all records at one revision.
func (e *etcd) read(ctx context.Context) ([]record, state, error) {
	resp, err := e.client.Get(ctx, e.prefix, clientv3.WithPrefix())
	if err != nil {
		return nil, state{}, away(err)
	}
	at := state{revision: resp.Header.Revision}
	all := make([]record, 0, len(resp.Kvs))
	for _, kv := range resp.Kvs {
		if string(kv.Key) == e.prefix+guardKey {
			if string(kv.Value) != format {
				return nil, state{}, fmt.Errorf("%s says %q where this edge knows format %s: it was written by another version of mysocket-edge", kv.Key, truncated(kv.Value), format)
			}
			at.guard = kv.ModRevision
			continue
		}
		if r, ok := e.recordOf(kv.Key, kv.Value); ok {
			all = append(all, r)
		}
	}
	return all, at, nil
}

func truncated(b []byte) []byte { return b[:min(len(b), 40)] }

// errSilent is an etcd that did not answer in time, or is known not to.
var errSilent = fmt.Errorf("%w: etcd does not answer", ErrUnavailable)

// isSilence says of a failed change that etcd did not answer. An answer that refuses it (no room, no permission, too large) is none, and
// must not have other changes refused unasked.
func isSilence(err error) bool {
	code := status.Code(err)
	if answer, ok := errors.AsType[rpctypes.EtcdError](err); ok {
		code = answer.Code()
	}
	switch code {
	case codes.ResourceExhausted, codes.PermissionDenied, codes.InvalidArgument, codes.FailedPrecondition, codes.OutOfRange:
		return false
	}
	return true
}

// away says of a failed request that it may succeed later.
func away(err error) error {
	if errors.Is(err, context.DeadlineExceeded) {
		return errSilent
	}
	return fmt.Errorf("%w: etcd: %w", ErrUnavailable, err)
}

func (e *etcd) commit(guard int64, changes []record) (state, error) {
	if !e.up.Load() {
		// Changes are made one at a time: each that waits for its own time to be over would wait for those before, too.
		return state{}, errSilent
	}
	ops := make([]clientv3.Op, 0, len(changes)+1)
	for _, c := range changes {
		if c.value == nil {
			ops = append(ops, clientv3.OpDelete(e.key(c.bucket, c.id)))
		} else {
			ops = append(ops, clientv3.OpPut(e.key(c.bucket, c.id), string(c.value)))
		}
	}
	key := e.prefix + guardKey
	ctx, cancel := context.WithTimeout(context.Background(), etcdTimeout)
	defer cancel()
	// A key that is not there has the revision 0.
	resp, err := e.client.Txn(ctx).If(clientv3.Compare(clientv3.ModRevision(key), "=", guard)).
		Then(append(ops, clientv3.OpPut(key, format))...).Else(clientv3.OpGet(key)).Commit()
	if err != nil {
		if isSilence(err) {
			e.noteUp(false, err)
		}
		return state{}, away(err)
	}
	e.noteUp(true, nil)
	if !resp.Succeeded {
		at := state{revision: resp.Header.Revision}
		if kvs := resp.Responses[0].GetResponseRange().GetKvs(); len(kvs) > 0 {
			at.guard = kvs[0].ModRevision
		}
		return at, errBehind
	}
	return state{revision: resp.Header.Revision, guard: resp.Header.Revision}, nil
}

func (e *etcd) get(bucket, id string) ([]byte, error) {
	if !e.up.Load() {
		return nil, errSilent
	}
	ctx, cancel := context.WithTimeout(context.Background(), etcdTimeout)
	defer cancel()
	resp, err := e.client.Get(ctx, e.key(bucket, id))
	if err != nil {
		return nil, away(err)
	}
	if len(resp.Kvs) == 0 {
		return nil, nil
	}
	return append([]byte{}, resp.Kvs[0].Value...), nil // never nil
}

func (e *etcd) keys(bucket, beginning string) ([]string, error) {
	if !e.up.Load() {
		return nil, errSilent
	}
	ctx, cancel := context.WithTimeout(context.Background(), etcdTimeout)
	defer cancel()
	resp, err := e.client.Get(ctx, e.key(bucket, beginning), clientv3.WithPrefix(), clientv3.WithKeysOnly())
	if err != nil {
		return nil, away(err)
	}
	keys := make([]string, 0, len(resp.Kvs))
	for _, kv := range resp.Kvs {
		keys = append(keys, strings.TrimPrefix(string(kv.Key), e.key(bucket, "")))
	}
	return keys, nil
}

// lock holds a lock by a lease: should this edge die, it is free within lockTTL.
func (e *etcd) lock(ctx context.Context, name string) (func(context.Context) error, error) {
	granting, cancel := context.WithTimeout(ctx, etcdTimeout)
	lease, err := e.client.Grant(granting, int64(lockTTL.Seconds()))
	cancel()
	if err != nil {
		return nil, away(err)
	}
	session, err := concurrency.NewSession(e.client, concurrency.WithLease(lease.ID))
	if err != nil {
		return nil, away(err)
	}
	release := func(ctx context.Context) error {
		session.Orphan()
		// With the lease goes the lock. An edge that stops must not wait for an etcd that is silent: the lease ends by itself.
		ctx, cancel := context.WithTimeout(ctx, etcdTimeout)
		defer cancel()
		if _, err := e.client.Revoke(ctx, lease.ID); err != nil {
			return away(err)
		}
		return nil
	}
	if err := concurrency.NewMutex(session, e.key("locks", name)).Lock(ctx); err != nil {
		return nil, errors.Join(err, release(context.WithoutCancel(ctx)))
	}
	return release, nil
}

// latest asks etcd, unless it is known to be away: then memory has to do.
func (e *etcd) latest() (state, bool) {
	answer := e.asking.do()
	return answer.at, answer.ok
}

func (e *etcd) askLatest() asked {
	if !e.up.Load() {
		return asked{}
	}
	ctx, cancel := context.WithTimeout(context.Background(), etcdTimeout)
	defer cancel()
	at, err := e.ask(ctx)
	if err != nil {
		e.noteUp(false, err)
	}
	return asked{at, err == nil}
}

// ask returns etcd's revision, and that of the last change.
func (e *etcd) ask(ctx context.Context) (state, error) {
	resp, err := e.client.Get(ctx, e.prefix+guardKey)
	if err != nil {
		return state{}, err
	}
	at := state{revision: resp.Header.Revision}
	if len(resp.Kvs) > 0 {
		at.guard = resp.Kvs[0].ModRevision
	}
	return at, nil
}

func (e *etcd) maxChanges() int { return maxEtcdChanges }

func (e *etcd) close() error {
	e.stop()
	e.wg.Wait()
	err := e.client.Close()
	if errors.Is(err, context.Canceled) {
		return nil // The client's own word for having been closed.
	}
	return err
}

// noteUp notes whether etcd answers, and logs when that changes.
func (e *etcd) noteUp(up bool, err error) {
	if e.up.Swap(up) == up {
		return
	}
	if up {
		e.log.Info("etcd answers again")
	} else {
		e.log.Error("etcd does not answer: visitors and tunnels go on with what is known, changes are refused", "err", err)
	}
}

// keepWatching takes what is changed in etcd into the store until ctx ends.
func (e *etcd) keepWatching(ctx context.Context) {
	for ctx.Err() == nil {
		err := e.watch(ctx)
		if ctx.Err() != nil {
			return
		}
		e.log.Warn("the state in etcd is read anew", "err", err)
		for ctx.Err() == nil {
			again, err := e.reread(ctx)
			if err == nil && !again {
				break
			}
			if err != nil {
				e.noteUp(false, err)
			}
			select {
			case <-ctx.Done():
			case <-time.After(checkInterval / 2):
			}
		}
	}
}

// reread makes the store what etcd has. again means that it must be done once more.
func (e *etcd) reread(ctx context.Context) (again bool, err error) {
	before := e.store.state()
	ctx, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	all, at, err := e.read(ctx)
	if err != nil {
		return true, err
	}
	backwards := at.revision < before.revision
	if backwards {
		e.log.Warn("etcd has gone back to an older state; it was restored, probably", "revision", at.revision, "known", before.revision)
	}
	done, err := e.store.replace(at, all, backwards)
	if err != nil {
		e.log.Error("the state in etcd has records that can't be read; they are left out", "err", err)
	}
	e.noteUp(true, nil)
	return !done, nil
}

// watch follows etcd from the state that the store has. It returns when it can't go on, with the reason.
func (e *etcd) watch(ctx context.Context) error {
	// Without a leader there is nothing to hear; then the watch ends, rather than being silent.
	ctx, cancel := context.WithCancelCause(clientv3.WithRequireLeader(ctx))
	defer cancel(nil)
	var checking sync.WaitGroup
	defer checking.Wait()
	defer cancel(nil)
	checking.Go(func() { e.check(ctx, cancel) })
	for resp := range e.client.Watch(ctx, e.prefix, clientv3.WithPrefix(), clientv3.WithRev(e.store.state().revision+1)) {
		if err := resp.Err(); err != nil {
			return err
		}
		e.take(resp.Events)
	}
	if err := context.Cause(ctx); err != nil {
		return err
	}
	return errors.New("the watch ended")
}

// take hands events to the store, those of a revision together: they were one change.
func (e *etcd) take(events []*clientv3.Event) {
	for len(events) > 0 {
		at := state{revision: events[0].Kv.ModRevision}
		var changes []record
		for len(events) > 0 && events[0].Kv.ModRevision == at.revision {
			kv := events[0].Kv
			if string(kv.Key) == e.prefix+guardKey {
				at.guard = kv.ModRevision
			} else if r, ok := e.recordOf(kv.Key, kv.Value); ok {
				if events[0].Type == clientv3.EventTypeDelete {
					r.value = nil
				}
				changes = append(changes, r)
			}
			events = events[1:]
		}
		if err := e.store.apply(at, changes); err != nil {
			e.log.Error("a record in etcd can't be read; it is left out", "err", err)
		}
	}
}

// check looks every few seconds whether etcd answers and the watch keeps up, and ends the watch if it doesn't.
func (e *etcd) check(ctx context.Context, end context.CancelCauseFunc) {
	ticker := time.NewTicker(checkInterval)
	defer ticker.Stop()
	missing := int64(-1)
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		limited, cancel := context.WithTimeout(ctx, etcdTimeout)
		before := e.store.state()
		at, err := e.ask(limited)
		cancel()
		if ctx.Err() != nil {
			return
		}
		e.noteUp(err == nil, err)
		known := e.store.state()
		switch {
		case err != nil:
		case at.revision < before.revision:
			end(errors.New("etcd has gone back to an older state"))
			return
		case at.guard == known.guard:
			missing = -1
		case missing != at.guard: // It may be on its way, or have come since.
			missing = at.guard
		default:
			end(errors.New("the watch does not tell what has changed"))
			return
		}
	}
}
