package tlscert

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"github.com/caddyserver/certmagic"

	"github.com/mysocketio/mysocket-injector/internal/edge/store"
)

// blobPrefix is where certmagic's keys are among the edge's blobs.
const blobPrefix = "acme"

// storage is certmagic's storage in the edge's own state, so that a backup has it and edges with one state share it.
type storage struct{ blobs store.Blobs }

// String is what a log shows of it: nothing of what is in it.
func (s storage) String() string { return "the edge's state" }

func blobKey(key string) string {
	if key = strings.Trim(key, "/"); key != "" {
		return blobPrefix + "/" + key
	}
	return blobPrefix
}

// mapError makes what is missing an error that certmagic knows.
func mapError(err error) error {
	if errors.Is(err, store.ErrNotFound) {
		return fmt.Errorf("%w: %w", fs.ErrNotExist, err)
	}
	return err
}

func (s storage) Store(ctx context.Context, key string, value []byte) error {
	return s.blobs.PutBlob(ctx, blobKey(key), value)
}

func (s storage) Load(ctx context.Context, key string) ([]byte, error) {
	value, err := s.blobs.Blob(ctx, blobKey(key))
	return value, mapError(err)
}

func (s storage) Delete(ctx context.Context, key string) error {
	return s.blobs.DeleteBlobs(ctx, blobKey(key))
}

func (s storage) Exists(ctx context.Context, key string) bool {
	keys, err := s.blobs.BlobKeys(ctx, blobKey(key))
	return err == nil && len(keys) > 0
}

// List returns what is below a path: all keys, or only the next step of each.
func (s storage) List(ctx context.Context, path string, recursive bool) ([]string, error) {
	below := blobKey(path) + "/"
	keys, err := s.blobs.BlobKeys(ctx, blobKey(path))
	if err != nil {
		return nil, err
	}
	var list []string
	for _, key := range keys {
		rest, ok := strings.CutPrefix(key, below)
		if !ok {
			continue // the path itself
		}
		if step, _, more := strings.Cut(rest, "/"); more && !recursive {
			rest = step
		}
		item := strings.TrimPrefix(below+rest, blobPrefix+"/")
		if len(list) == 0 || list[len(list)-1] != item { // they are in order
			list = append(list, item)
		}
	}
	if len(list) == 0 {
		return nil, fmt.Errorf("list %s: %w", path, fs.ErrNotExist)
	}
	return list, nil
}

// Stat says whether a key has a value or is only the beginning of others. When it was changed is not known.
func (s storage) Stat(ctx context.Context, key string) (certmagic.KeyInfo, error) {
	info := certmagic.KeyInfo{Key: key}
	value, err := s.blobs.Blob(ctx, blobKey(key))
	switch {
	case err == nil:
		info.Size, info.IsTerminal = int64(len(value)), true
	case !errors.Is(err, store.ErrNotFound):
		return info, err
	case !s.Exists(ctx, key):
		return info, fmt.Errorf("stat %s: %w", key, fs.ErrNotExist)
	}
	return info, nil
}

func (s storage) Lock(ctx context.Context, name string) error {
	return s.blobs.LockBlobs(ctx, blobKey(name))
}

func (s storage) Unlock(ctx context.Context, name string) error {
	return s.blobs.UnlockBlobs(ctx, blobKey(name))
}
