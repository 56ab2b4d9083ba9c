package store

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
)

// Blobs keeps values under keys for parts of the edge that have a format of their own. Keys are paths with slashes. Every
// change is on the disk before it returns. *Store is one.
type Blobs interface {
	// Blob returns the value under a key, or ErrNotFound.
	Blob(ctx context.Context, key string) ([]byte, error)
	PutBlob(ctx context.Context, key string, value []byte) error
	// DeleteBlobs removes a key and all that are below it, key/...; it is no error if there is none.
	DeleteBlobs(ctx context.Context, key string) error
	// BlobKeys returns, in order, a key if it exists and all that are below it; all there are for "".
	BlobKeys(ctx context.Context, key string) ([]string, error)
	// LockBlobs waits for the lock of a name, which is held by nobody else among all that use the state until UnlockBlobs.
	LockBlobs(ctx context.Context, name string) error
	UnlockBlobs(ctx context.Context, name string) error
}

// Blob returns the value under a key, or ErrNotFound.
func (s *Store) Blob(_ context.Context, key string) ([]byte, error) {
	value, err := s.backend.get(bucketBlobs, key)
	if err == nil && value == nil {
		err = ErrNotFound
	}
	if err != nil {
		return nil, fmt.Errorf("blob %s: %w", key, err)
	}
	return value, nil
}

// PutBlob stores a value under a key.
func (s *Store) PutBlob(_ context.Context, key string, value []byte) error {
	stored := record{bucketBlobs, key, append([]byte{}, value...)} // nil would delete it
	return storing(s.transact(func() ([]record, error) { return []record{stored}, nil }), "store blob %s", key)
}

// DeleteBlobs removes a key and all that are below it.
func (s *Store) DeleteBlobs(ctx context.Context, key string) error {
	err := s.transact(func() ([]record, error) {
		keys, err := s.BlobKeys(ctx, key)
		var gone []record
		for _, k := range keys {
			gone = append(gone, remove(bucketBlobs, k))
		}
		return gone, err
	})
	return storing(err, "delete blob %s", key)
}

// BlobKeys returns a key if it exists and all that are below it.
func (s *Store) BlobKeys(_ context.Context, key string) ([]string, error) {
	all, err := s.backend.keys(bucketBlobs, key)
	if err != nil {
		return nil, fmt.Errorf("blobs below %s: %w", key, err)
	}
	var keys []string
	for _, k := range all {
		// a-b is not below a, though it has its letters.
		if rest := k[len(key):]; key == "" || rest == "" || strings.HasPrefix(rest, "/") {
			keys = append(keys, k)
		}
	}
	return keys, nil
}

// blobLocks are the locks that this store holds, by name, each with what releases it.
type blobLocks struct {
	mu   sync.Mutex
	held map[string]func(context.Context) error
}

// LockBlobs waits for the lock of a name.
func (s *Store) LockBlobs(ctx context.Context, name string) error {
	release, err := s.backend.lock(ctx, name)
	if err != nil {
		return fmt.Errorf("lock %s: %w", name, err)
	}
	s.blobLocks.mu.Lock()
	defer s.blobLocks.mu.Unlock()
	if s.blobLocks.held == nil {
		s.blobLocks.held = map[string]func(context.Context) error{}
	}
	s.blobLocks.held[name] = release
	return nil
}

// UnlockBlobs releases the lock of a name.
func (s *Store) UnlockBlobs(ctx context.Context, name string) error {
	s.blobLocks.mu.Lock()
	release := s.blobLocks.held[name]
	delete(s.blobLocks.held, name)
	s.blobLocks.mu.Unlock()
	if release == nil {
		return fmt.Errorf("unlock %s: %w", name, ErrNotFound)
	}
	if err := release(ctx); err != nil {
		return fmt.Errorf("unlock %s: %w", name, err)
	}
	return nil
}

// locks are locks by name among the goroutines of a process.
type locks struct {
	mu   sync.Mutex
	held map[string]chan struct{}
}

// lock waits for the lock of a name, which the function it returns releases.
func (l *locks) lock(ctx context.Context, name string) (release func(context.Context) error, err error) {
	for {
		l.mu.Lock()
		held := l.held[name]
		if held == nil {
			if l.held == nil {
				l.held = map[string]chan struct{}{}
			}
			mine := make(chan struct{})
			l.held[name] = mine
			l.mu.Unlock()
			return func(context.Context) error {
				l.mu.Lock()
				defer l.mu.Unlock()
				if l.held[name] != mine {
					return errors.New("it is not held")
				}
				delete(l.held, name)
				close(mine)
				return nil
			}, nil
		}
		l.mu.Unlock()
		select {
		case <-held:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}
