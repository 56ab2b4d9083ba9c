package store

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	bolt "go.etcd.io/bbolt"
)

// What an operator does with a state file, whether an edge holds it or not.

// UpdateUser stores what change makes of an account. Its id, e-mail address and time of creation cannot change. change may be called several times.
func (s *Store) UpdateUser(id string, change func(*User)) (User, error) {
	var u User
	err := s.transact(func() ([]record, error) {
		old, err := s.User(id)
		if err != nil {
			return nil, err
		}
		u = old.clone()
		change(&u)
		u.ID, u.Email, u.Created = old.ID, old.Email, old.Created
		if !bytes.Equal(u.PasswordHash, old.PasswordHash) {
			u.PasswordChanged = s.now().UTC()
		}
		stored, err := put(bucketUsers, id, &u)
		return []record{stored}, err
	})
	if err != nil {
		return User{}, storing(err, "store user %s", id)
	}
	return u, nil
}

// Backup writes a copy of the state file as it is at one moment. Changes go on meanwhile.
func (s *Store) Backup(w io.Writer) error {
	f, ok := s.backend.(*file)
	if !ok {
		return errors.New("the state is in etcd, which makes copies of its own: etcdctl snapshot save")
	}
	return f.db.View(func(tx *bolt.Tx) error {
		_, err := tx.WriteTo(w)
		return err
	})
}

// SaveBackup has write make a copy of a state, and puts it at path, mode 0600, once it is whole, on the disk, and found to be in
// order. An existing file is replaced only by force, and never one that is in use, which is ErrInUse: a copy in the place of its own state
// would have the edge go on with a file that has no name, and all changes from then on lost.
func SaveBackup(path string, force bool, write func(io.Writer) error) error {
	release, err := takeOver(path, force)
	if err != nil {
		return err
	}
	defer release()
	return place(path, force, write)
}

// Restore puts a copy of a state file in its place, once it has been found to be in order. An existing file is replaced only by force, and never
// while an edge holds it, which is ErrInUse.
func Restore(from, path string, force bool) error {
	source, err := os.Open(from) // #nosec G304 -- the operator names the file
	if err != nil {
		return err
	}
	defer func() { _ = source.Close() }()
	release, err := takeOver(path, force)
	if err != nil {
		return err
	}
	defer release()
	return place(path, force, func(w io.Writer) error {
		if same, err := sameFile(source, path); err != nil {
			return err
		} else if same {
			return fmt.Errorf("%s and %s are one file", from, path)
		}
		_, err := io.Copy(w, source)
		return err
	})
}

func sameFile(f *os.File, path string) (bool, error) {
	a, err := f.Stat()
	if err != nil {
		return false, err
	}
	b, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil && os.SameFile(a, b), err
}

func mustNotExist(path string) error {
	_, err := os.Lstat(path)
	switch {
	case err == nil:
		return fmt.Errorf("%s is there already; --force replaces it", path)
	case errors.Is(err, fs.ErrNotExist):
		return nil
	}
	return err
}

// takeOver locks the file that is to be replaced, as an edge does that uses it. An edge that starts now waits for the lock, and then
// sees that the file is another.
func takeOver(path string, force bool) (release func(), err error) {
	if !force {
		return func() {}, mustNotExist(path)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0) // #nosec G304 -- the operator names the file
	if errors.Is(err, fs.ErrNotExist) {
		return func() {}, nil
	}
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		_ = f.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			err = ErrInUse
		}
		return nil, fmt.Errorf("replace %s: %w", path, err)
	}
	return func() { _ = f.Close() }, nil
}

// place writes a state file under another name, looks it over, and gives it its name.
func place(path string, force bool, write func(io.Writer) error) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*") // mode 0600
	if err != nil {
		return err
	}
	defer func() {
		_ = f.Close()
		_ = os.Remove(f.Name()) // It has gone if all went well.
	}()
	if err := write(f); err != nil {
		return err
	}
	if err := verify(f.Name()); err != nil {
		return fmt.Errorf("the copy is not in order: %w", err)
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	if force {
		err = os.Rename(f.Name(), path)
	} else {
		err = os.Link(f.Name(), path) // fails if there is one meanwhile
	}
	if err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer func() { _ = dir.Close() }()
	return dir.Sync()
}

// openFile opens and locks a state file. Should another file have come into its place while it waited for the lock, by Restore, it opens that one:
// what is written into a file without a name is lost.
func openFile(path string) (*bolt.DB, error) {
	for {
		var f *os.File
		db, err := bolt.Open(path, 0o600, &bolt.Options{Timeout: lockTimeout, OpenFile: func(name string, flags int, mode os.FileMode) (*os.File, error) {
			var err error
			f, err = os.OpenFile(name, flags, mode) // #nosec G304 -- the operator names the file
			return f, err
		}})
		if err != nil {
			return nil, err
		}
		same, err := sameFile(f, path)
		if err == nil && same {
			return db, nil
		}
		if err = errors.Join(err, db.Close()); err != nil {
			return nil, err
		}
	}
}

// verify says whether a state file is whole, consistent, and one that an edge can start with.
func verify(path string) (err error) {
	defer func() {
		if broken := recover(); broken != nil { // as bbolt does at pages that make no sense
			err = fmt.Errorf("%v", broken)
		}
	}()
	if info, err := os.Stat(path); err != nil || info.Size() == 0 {
		return errors.Join(err, errors.New("it is empty"))
	}
	db, err := bolt.Open(path, 0o600, &bolt.Options{ReadOnly: true, Timeout: lockTimeout})
	if err != nil {
		return err
	}
	err = db.View(func(tx *bolt.Tx) error {
		info, err := os.Stat(path)
		if err != nil {
			return err
		}
		// Beyond the end of the file there is nothing that could be read without a fault.
		if info.Size() < tx.Size() {
			return fmt.Errorf("it has %d bytes of %d", info.Size(), tx.Size())
		}
		if tx.Bucket([]byte(bucketUsers)) == nil {
			return errors.New("it is not the state of an edge")
		}
		var first error
		for err := range tx.Check() {
			if first == nil {
				first = err
			}
		}
		return first
	})
	if err = errors.Join(err, db.Close()); err != nil {
		return err
	}
	s, err := Open(path, nil)
	if err != nil {
		return err
	}
	return s.Close()
}
