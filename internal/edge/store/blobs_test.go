package store

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mysocketio/mysocket-injector/internal/edge/etcdtest"
)

func TestBlobs(t *testing.T) { overBoth(t, blobs) }

func blobs(t *testing.T, open func() *Store) {
	s := open()
	var blobs Blobs = s
	ctx := t.Context()
	if _, err := blobs.Blob(ctx, "a"); !errors.Is(err, ErrNotFound) {
		t.Errorf("in an empty store: %v", err)
	}
	if keys, err := blobs.BlobKeys(ctx, ""); err != nil || len(keys) != 0 {
		t.Errorf("keys of an empty store: %v, %v", keys, err)
	}
	for _, key := range []string{"a/x", "a/y/z", "a-b", "a", "b"} {
		if err := blobs.PutBlob(ctx, key, []byte("of "+key)); err != nil {
			t.Fatal(err)
		}
	}
	if err := blobs.PutBlob(ctx, "b", []byte("anew")); err != nil {
		t.Fatal(err)
	}
	for below, want := range map[string]string{"": "a a-b a/x a/y/z b", "a": "a a/x a/y/z", "a/y": "a/y/z", "a/": "", "c": ""} {
		if keys, err := blobs.BlobKeys(ctx, below); err != nil || strings.Join(keys, " ") != want {
			t.Errorf("below %q: %v, %v, want %s", below, keys, err, want)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open()
	if got, err := s.Blob(ctx, "a/x"); err != nil || string(got) != "of a/x" {
		t.Errorf("after a restart: %q, %v", got, err)
	}
	for range 2 {
		if err := s.DeleteBlobs(ctx, "a"); err != nil {
			t.Fatal(err)
		}
	}
	if keys, err := s.BlobKeys(ctx, ""); err != nil || !slices.Equal(keys, []string{"a-b", "b"}) {
		t.Errorf("left: %v, %v", keys, err)
	}
	if got, err := s.Blob(ctx, "b"); err != nil || string(got) != "anew" {
		t.Errorf("overwritten: %q, %v", got, err)
	}
}

func TestBlobLocks(t *testing.T) { overBoth(t, blobLocksOf) }

// TestBlobLocksOfEdges has two edges want one lock, and one of them end while it holds it.
func TestBlobLocksOfEdges(t *testing.T) {
	server := etcdtest.Start(t)
	a, b := openEtcd(t, server), openEtcd(t, server)
	if err := a.LockBlobs(t.Context(), "name"); err != nil {
		t.Fatal(err)
	}
	ended, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := b.LockBlobs(ended, "name"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a second holder: %v", err)
	}
	got := make(chan error, 1)
	go func() { got <- b.LockBlobs(t.Context(), "name") }()
	if err := a.UnlockBlobs(t.Context(), "name"); err != nil {
		t.Fatal(err)
	}
	if err := <-got; err != nil {
		t.Errorf("the next holder: %v", err)
	}
}

func blobLocksOf(t *testing.T, open func() *Store) {
	s := open()
	ctx := t.Context()
	var holders sync.WaitGroup
	counter := 0 // The race detector watches it.
	for range 20 {
		holders.Go(func() {
			if err := s.LockBlobs(ctx, "name"); err != nil {
				t.Error(err)
				return
			}
			counter++
			if err := s.UnlockBlobs(ctx, "name"); err != nil {
				t.Error(err)
			}
		})
	}
	holders.Wait()
	if counter != 20 {
		t.Errorf("%d held the lock, want 20", counter)
	}
	if err := s.LockBlobs(ctx, "name"); err != nil {
		t.Fatal(err)
	}
	if err := s.LockBlobs(ctx, "other"); err != nil {
		t.Errorf("another name: %v", err)
	}
	ended, cancel := context.WithCancel(ctx)
	cancel()
	if err := s.LockBlobs(ended, "name"); !errors.Is(err, context.Canceled) {
		t.Errorf("a second holder: %v", err)
	}
	if err := s.UnlockBlobs(ctx, "nobody's"); !errors.Is(err, ErrNotFound) {
		t.Errorf("unlocked what nobody holds: %v", err)
	}
}
