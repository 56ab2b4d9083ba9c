package store

import (
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
)

// file is the backend of a single edge: one bbolt file. Nobody else changes it.
type file struct {
	db      *bolt.DB
	changes atomic.Int64
	locks   // One process has the file, so they need not be in it.
}

// Open opens the state file, and makes it (mode 0600) if there is none. now may be nil.
func Open(path string, now func() time.Time) (*Store, error) {
	if info, err := os.Stat(filepath.Dir(path)); err != nil || !info.IsDir() {
		return nil, fmt.Errorf("open state file %s: the directory %s does not exist", path, filepath.Dir(path))
	}
	db, err := openFile(path)
	if errors.Is(err, bolterrors.ErrTimeout) {
		return nil, fmt.Errorf("open state file %s: %w", path, ErrInUse)
	}
	if err != nil {
		return nil, fmt.Errorf("open state file %s: %w", path, err)
	}
	s := newStore(&file{db: db}, now)
	if err := s.load(); err != nil {
		_ = db.Close()
		return nil, fmt.Errorf("read state file %s: %w", path, err)
	}
	return s, nil
}

func (f *file) load() ([]record, state, error) {
	if err := f.db.Update(func(tx *bolt.Tx) error {
		for _, name := range buckets {
			if _, err := tx.CreateBucketIfNotExists([]byte(name)); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		return nil, state{}, err
	}
	var all []record
	err := f.db.View(func(tx *bolt.Tx) error {
		for _, name := range buckets {
			if err := tx.Bucket([]byte(name)).ForEach(func(k, v []byte) error {
				all = append(all, record{name, string(k), slices.Clone(v)})
				return nil
			}); err != nil {
				return err
			}
		}
		return nil
	})
	return all, state{}, err
}

func (f *file) commit(_ int64, changes []record) (state, error) {
	err := f.db.Update(func(tx *bolt.Tx) error {
		for _, c := range changes {
			b := tx.Bucket([]byte(c.bucket))
			if c.value == nil {
				if err := b.Delete([]byte(c.id)); err != nil {
					return err
				}
			} else if err := b.Put([]byte(c.id), c.value); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return state{}, err
	}
	n := f.changes.Add(1)
	return state{revision: n, guard: n}, nil
}

func (f *file) get(bucket, id string) (value []byte, err error) {
	err = f.db.View(func(tx *bolt.Tx) error {
		value = slices.Clone(tx.Bucket([]byte(bucket)).Get([]byte(id)))
		return nil
	})
	return value, err
}

func (f *file) keys(bucket, beginning string) (keys []string, err error) {
	err = f.db.View(func(tx *bolt.Tx) error {
		c := tx.Bucket([]byte(bucket)).Cursor()
		for k, _ := c.Seek([]byte(beginning)); k != nil && strings.HasPrefix(string(k), beginning); k, _ = c.Next() {
			keys = append(keys, string(k))
		}
		return nil
	})
	return keys, err
}

func (f *file) latest() (state, bool) { return state{}, false }

func (f *file) maxChanges() int { return math.MaxInt }

func (f *file) close() error { return f.db.Close() }
