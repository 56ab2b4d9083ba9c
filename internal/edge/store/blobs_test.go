package store

import (
	"context"
	"errors"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

func TestBlobs(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.db")
	s := open(t, path)
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
	s = open(t, path)
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

func TestBlobLocks(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "x.db"))
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
