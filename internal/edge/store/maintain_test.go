package store

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"
)

func TestBackupAndRestore(t *testing.T) {
	dir := t.TempDir()
	path, copied := filepath.Join(dir, "x.db"), filepath.Join(dir, "copy.db")
	s := open(t, path)
	u := addUser(t, s, "a@example.com")
	k, _, err := s.CreateSocket(Socket{UserID: u.ID, Name: "n"}, "edge.test", 1)
	if err != nil {
		t.Fatal(err)
	}
	secret := func(s *Store) string {
		got, err := s.Secret("a", func() ([]byte, error) { return []byte(time.Now().String()), nil })
		if err != nil {
			t.Fatal(err)
		}
		return string(got)
	}
	key := secret(s)
	if err := SaveBackup(copied, false, s.Backup); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(copied); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the copy: %v, %v", info, err)
	}
	if err := SaveBackup(copied, false, s.Backup); err == nil || !strings.Contains(err.Error(), "--force") {
		t.Errorf("over a copy: %v", err)
	}
	if err := SaveBackup(copied, true, s.Backup); err != nil {
		t.Errorf("by force: %v", err)
	}
	if err := SaveBackup(path, true, s.Backup); !errors.Is(err, ErrInUse) {
		t.Errorf("over the state that it is of: %v", err)
	}
	// What comes after the copy is not in it.
	if _, err := s.DeleteSocket(k.ID); err != nil {
		t.Fatal(err)
	}
	addUser(t, s, "later@example.com")
	if err := Restore(copied, path, true); !errors.Is(err, ErrInUse) {
		t.Errorf("over a state that is in use: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := Restore(copied, path, false); err == nil || !strings.Contains(err.Error(), "--force") {
		t.Errorf("over a state: %v", err)
	}
	if err := Restore(path, path, true); err == nil || !strings.Contains(err.Error(), "one file") {
		t.Errorf("a state in its own place: %v", err)
	}
	if err := Restore(copied, path, true); err != nil {
		t.Fatal(err)
	}
	other := filepath.Join(dir, "other.db")
	if err := Restore(copied, other, false); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{path, other} {
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", path, info, err)
		}
		s := open(t, path)
		if got, err := s.Socket(k.ID); err != nil || got.DNSName != k.DNSName || len(s.Tunnels(k.ID)) != 1 {
			t.Errorf("the socket is %+v, %v", got, err)
		}
		if users := s.Users(); len(users) != 1 || users[0].ID != u.ID {
			t.Errorf("the users are %+v", users)
		}
		if got := secret(s); got != key {
			t.Errorf("the key is %q, was %q", got, key)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(dir, ".*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestBrokenCopiesAreRefused(t *testing.T) {
	dir := t.TempDir()
	s := open(t, filepath.Join(dir, "x.db"))
	u := addUser(t, s, "a@example.com")
	for range 200 {
		if _, _, err := s.CreateSocket(Socket{UserID: u.ID, Name: "n"}, "edge.test", 1); err != nil {
			t.Fatal(err)
		}
	}
	var whole bytes.Buffer
	if err := s.Backup(&whole); err != nil {
		t.Fatal(err)
	}
	foreign := open(t, filepath.Join(dir, "foreign.db"))
	if err := foreign.backend.(*file).db.Update(func(tx *bolt.Tx) error { return tx.DeleteBucket([]byte(bucketUsers)) }); err != nil {
		t.Fatal(err)
	}
	var other bytes.Buffer
	if err := foreign.Backup(&other); err != nil {
		t.Fatal(err)
	}
	damaged := func(from, to int) []byte {
		b := bytes.Clone(whole.Bytes())
		for i := from; i < to; i++ {
			b[i] ^= 0xff
		}
		return b
	}
	size := whole.Len()
	for name, content := range map[string][]byte{
		"empty": {}, "text": []byte("some text"), "half": whole.Bytes()[:size/2], "all but a page": whole.Bytes()[:size-4096],
		"both beginnings": damaged(0, 8192), "the middle": damaged(16384, size-16384), "of something else": other.Bytes(),
	} {
		t.Run(name, func(t *testing.T) {
			from, path := filepath.Join(t.TempDir(), "copy.db"), filepath.Join(t.TempDir(), "state.db")
			if err := os.WriteFile(from, content, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := Restore(from, path, false); err == nil {
				t.Error("restored")
			} else {
				t.Log(err)
			}
			if left, _ := os.ReadDir(filepath.Dir(path)); len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
	broken := errors.New("broke off")
	err := SaveBackup(filepath.Join(dir, "copy.db"), false, func(w io.Writer) error {
		_, _ = w.Write(whole.Bytes()[:size/2])
		return broken
	})
	if !errors.Is(err, broken) {
		t.Errorf("got %v", err)
	}
}

// TestOpenSeesThatTheFileWasReplaced has a store wait for a file that is replaced before it gets the lock.
func TestOpenSeesThatTheFileWasReplaced(t *testing.T) {
	dir := t.TempDir()
	path, copied := filepath.Join(dir, "x.db"), filepath.Join(dir, "copy.db")
	s := open(t, path)
	addUser(t, s, "a@example.com")
	if err := SaveBackup(copied, false, s.Backup); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	release, err := takeOver(path, true)
	if err != nil {
		t.Fatal(err)
	}
	opened := make(chan *Store)
	go func() {
		s, err := Open(path, nil)
		if err != nil {
			t.Error(err)
		}
		opened <- s
	}()
	for deadline := time.Now().Add(lockTimeout / 2); holders(path) < 2; {
		if time.Now().After(deadline) {
			t.Fatal("nobody waits for the old file")
		}
	}
	if err := os.Rename(copied, path); err != nil {
		t.Fatal(err)
	}
	release()
	again := <-opened
	if again == nil {
		return
	}
	addUser(t, again, "b@example.com")
	if err := again.Close(); err != nil {
		t.Fatal(err)
	}
	if users := open(t, path).Users(); len(users) != 2 {
		t.Errorf("what was written is lost: %+v", users)
	}
}

// holders counts the descriptors of this process that lead to a file.
func holders(path string) int {
	n := 0
	fds, _ := os.ReadDir("/proc/self/fd")
	for _, fd := range fds {
		if to, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil && to == path {
			n++
		}
	}
	return n
}

func TestUpdateUser(t *testing.T) { overBoth(t, updateUser) }

func updateUser(t *testing.T, open func() *Store) {
	s := open()
	u := addUser(t, s, "a@example.com")
	changed, err := s.UpdateUser(u.ID, func(u *User) { u.PasswordHash, u.Email, u.ID = []byte("other"), "b@example.com", "x" })
	if err != nil || changed.Email != "a@example.com" || changed.ID != u.ID || changed.PasswordChanged.IsZero() {
		t.Errorf("changed %+v, %v", changed, err)
	}
	at := changed.PasswordChanged
	if changed, err = s.UpdateUser(u.ID, func(u *User) { u.Name = "new" }); err != nil || !changed.PasswordChanged.Equal(at) {
		t.Errorf("changed %+v, %v", changed, err)
	}
	if _, err := s.UpdateUser("none", func(*User) {}); !errors.Is(err, ErrNotFound) {
		t.Errorf("got %v", err)
	}
	_ = s.Close()
	if got, err := open().UserByEmail("a@example.com"); err != nil || string(got.PasswordHash) != "other" || got.Name != "new" || !got.PasswordChanged.Equal(at) {
		t.Errorf("kept %+v, %v", got, err)
	}
}
