package store

import (
	"bytes"
	"context"
	"fmt"
	"strings"

	bolt "go.etcd.io/bbolt"
)

var bucketBlobs = []byte("blobs")

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

// blobLocks are locks by name. One process has the state file, so they need not be in it.
type blobLocks map[string]chan struct{}

// Blob returns the value under a key, or ErrNotFound.
func (s *Store) Blob(_ context.Context, key string) ([]byte, error) {
	var value []byte
	err := s.db.View(func(tx *bolt.Tx) error {
		b := tx.Bucket(bucketBlobs)
		if b == nil {
			return ErrNotFound
		}
		v := b.Get([]byte(key))
		if v == nil {
			return ErrNotFound
		}
		value = bytes.Clone(v)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("blob %s: %w", key, err)
	}
	return value, nil
}

// PutBlob stores a value under a key.
func (s *Store) PutBlob(_ context.Context, key string, value []byte) error {
	return s.changeBlobs(key, func(b *bolt.Bucket) error { return b.Put([]byte(key), value) })
}

// DeleteBlobs removes a key and all that are below it.
func (s *Store) DeleteBlobs(_ context.Context, key string) error {
	return s.changeBlobs(key, func(b *bolt.Bucket) error {
		for _, k := range keysBelow(b, key) {
			if err := b.Delete([]byte(k)); err != nil {
				return err
			}
		}
		return nil
	})
}

func (s *Store) changeBlobs(key string, change func(*bolt.Bucket) error) error {
	s.change.Lock()
	defer s.change.Unlock()
	err := s.db.Update(func(tx *bolt.Tx) error {
		b, err := tx.CreateBucketIfNotExists(bucketBlobs)
		if err != nil {
			return err
		}
		return change(b)
	})
	if err != nil {
		return fmt.Errorf("store blob %s: %w", key, err)
	}
	return nil
}

// BlobKeys returns a key if it exists and all that are below it.
func (s *Store) BlobKeys(_ context.Context, key string) ([]string, error) {
	var keys []string
	err := s.db.View(func(tx *bolt.Tx) error {
		if b := tx.Bucket(bucketBlobs); b != nil {
			keys = keysBelow(b, key)
		}
		return nil
	})
	return keys, err
}

func keysBelow(b *bolt.Bucket, key string) []string {
	var keys []string
	c := b.Cursor()
	for k, _ := c.Seek([]byte(key)); k != nil && strings.HasPrefix(string(k), key); k, _ = c.Next() {
		// a-b is not below a, though it has its letters.
		if rest := string(k[len(key):]); key == "" || rest == "" || rest[0] == '/' {
			keys = append(keys, string(k))
		}
	}
	return keys
}

// LockBlobs waits for the lock of a name.
func (s *Store) LockBlobs(ctx context.Context, name string) error {
	for {
		s.mu.Lock()
		held := s.blobLocks[name]
		if held == nil {
			if s.blobLocks == nil {
				s.blobLocks = blobLocks{}
			}
			s.blobLocks[name] = make(chan struct{})
			s.mu.Unlock()
			return nil
		}
		s.mu.Unlock()
		select {
		case <-held:
		case <-ctx.Done():
			return fmt.Errorf("lock %s: %w", name, ctx.Err())
		}
	}
}

// UnlockBlobs releases the lock of a name.
func (s *Store) UnlockBlobs(_ context.Context, name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	held := s.blobLocks[name]
	if held == nil {
		return fmt.Errorf("unlock %s: %w", name, ErrNotFound)
	}
	delete(s.blobLocks, name)
	close(held)
	return nil
}
