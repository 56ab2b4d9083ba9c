package store

import (
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"regexp"
	"testing"

	"github.com/mysocketio/mysocket-injector/internal/edge/etcdtest"
)

func open(t *testing.T, path string) *Store {
	t.Helper()
	s, err := Open(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func openEtcd(t *testing.T, server *etcdtest.Etcd) *Store {
	t.Helper()
	s, err := OpenEtcd(t.Context(), EtcdConfig{Endpoints: []string{server.URL}}, slog.New(slog.DiscardHandler), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// overBoth runs a test over both backends. open opens the state of the test once more.
func overBoth(t *testing.T, test func(t *testing.T, open func() *Store)) {
	t.Run("file", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "x.db")
		test(t, func() *Store { return open(t, path) })
	})
	t.Run("etcd", func(t *testing.T) {
		server := etcdtest.Start(t)
		test(t, func() *Store { return openEtcd(t, server) })
	})
}

func addUser(t *testing.T, s *Store, email string) User {
	t.Helper()
	u, err := s.AddUser(User{Email: email, PasswordHash: []byte("hash")})
	if err != nil {
		t.Fatal(err)
	}
	return u
}

func TestReopenedStoreIsTheSame(t *testing.T) { overBoth(t, reopenedStoreIsTheSame) }

func reopenedStoreIsTheSame(t *testing.T, open func() *Store) {
	s := open()
	u := addUser(t, s, "A@example.com")
	kept, tunnels, err := s.CreateSocket(Socket{UserID: u.ID, Name: "kept", Type: TypeHTTP, Tags: map[string]string{"a": "b"},
		Protection: &Protection{Username: "u", Salt: []byte{1}, Hash: []byte{2}}}, "edge.test", 2)
	if err != nil {
		t.Fatal(err)
	}
	gone, _, err := s.CreateSocket(Socket{UserID: u.ID, Name: "gone", Type: TypeTCP, TCPPort: 20000}, "edge.test", 1)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.DeleteSocket(gone.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := s.DeleteTunnel(tunnels[0].ID); err != nil {
		t.Fatal(err)
	}
	if _, err := s.UpdateSocket(kept.ID, func(k *Socket) error {
		k.Description, k.DNSName, k.UserID = "new", "stolen.edge.test", "x"
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}

	s = open()
	if got, err := s.UserByEmail(" a@EXAMPLE.com "); err != nil || got.ID != u.ID || string(got.PasswordHash) != "hash" {
		t.Errorf("the user is %+v, %v", got, err)
	}
	all := s.AllSockets()
	if len(all) != 1 || all[0].Description != "new" || all[0].DNSName != kept.DNSName || all[0].UserID != u.ID ||
		all[0].Tags["a"] != "b" || all[0].Protection == nil || all[0].Protection.Username != "u" {
		t.Errorf("the sockets are %+v", all)
	}
	if got, err := s.SocketByDNSName(kept.DNSName); err != nil || got.ID != kept.ID {
		t.Errorf("by name: %+v, %v", got, err)
	}
	left := s.Tunnels(kept.ID)
	if len(left) != 1 || left[0].ID != tunnels[1].ID || left[0].LocalPort != tunnels[1].LocalPort {
		t.Errorf("the tunnels are %+v", left)
	}
	if got, err := s.TunnelByLocalPort(u.ID, tunnels[1].LocalPort); err != nil || got.ID != tunnels[1].ID {
		t.Errorf("by port: %+v, %v", got, err)
	}
	for _, id := range []string{gone.ID, tunnels[0].ID} {
		if _, err := s.Socket(id); !errors.Is(err, ErrNotFound) {
			t.Errorf("deleted: %v", err)
		}
		if _, err := s.Tunnel(id); !errors.Is(err, ErrNotFound) {
			t.Errorf("deleted: %v", err)
		}
	}
}

func TestSecretIsMadeOnce(t *testing.T) { overBoth(t, secretIsMadeOnce) }

func secretIsMadeOnce(t *testing.T, open func() *Store) {
	s := open()
	calls := 0
	create := func() ([]byte, error) {
		calls++
		return fmt.Append(nil, "secret ", calls), nil
	}
	for range 2 {
		if got, err := s.Secret("a", create); err != nil || string(got) != "secret 1" {
			t.Errorf("got %q, %v", got, err)
		}
	}
	failure := errors.New("no")
	if _, err := s.Secret("b", func() ([]byte, error) { return nil, failure }); !errors.Is(err, failure) {
		t.Errorf("got %v", err)
	}
	if got, err := s.Secret("b", create); err != nil || string(got) != "secret 2" {
		t.Errorf("after a failure: %q, %v", got, err)
	}
}

func TestDeleteUserTakesAllWithIt(t *testing.T) { overBoth(t, deleteUserTakesAllWithIt) }

func deleteUserTakesAllWithIt(t *testing.T, open func() *Store) {
	s := open()
	u, other := addUser(t, s, "a@example.com"), addUser(t, s, "b@example.com")
	if _, err := s.AddUser(User{Email: "A@example.com"}); !errors.Is(err, ErrExists) {
		t.Errorf("a second account with the address: %v", err)
	}
	k, tunnels, err := s.CreateSocket(Socket{UserID: u.ID, Name: "n"}, "edge.test", 1)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.CreateSocket(Socket{UserID: other.ID, Name: "n"}, "edge.test", 0); err != nil {
		t.Fatal(err)
	}
	if err := s.DeleteUser(u.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Socket(k.ID); !errors.Is(err, ErrNotFound) {
		t.Error("the socket is still there")
	}
	if _, err := s.Tunnel(tunnels[0].ID); !errors.Is(err, ErrNotFound) {
		t.Error("the tunnel is still there")
	}
	if n := len(s.AllSockets()); n != 1 {
		t.Errorf("%d sockets are left, want the other's", n)
	}
	if _, _, err := s.CreateSocket(Socket{UserID: u.ID, Name: "n"}, "edge.test", 0); !errors.Is(err, ErrNotFound) {
		t.Errorf("a socket for a deleted account: %v", err)
	}
	if _, err := s.CreateTunnel(k.ID); !errors.Is(err, ErrNotFound) {
		t.Errorf("a tunnel for a deleted socket: %v", err)
	}
}

func TestCallersCannotChangeWhatIsStored(t *testing.T) { overBoth(t, callersCannotChangeWhatIsStored) }

func callersCannotChangeWhatIsStored(t *testing.T, open func() *Store) {
	s := open()
	u := addUser(t, s, "a@example.com")
	k, _, err := s.CreateSocket(Socket{UserID: u.ID, Name: "n", Tags: map[string]string{"a": "b"}}, "edge.test", 0)
	if err != nil {
		t.Fatal(err)
	}
	k.Tags["a"] = "changed"
	got, err := s.Socket(k.ID)
	if err != nil || got.Tags["a"] != "b" {
		t.Errorf("tags are %v, %v", got.Tags, err)
	}
	failure := errors.New("no")
	if _, err := s.UpdateSocket(k.ID, func(k *Socket) error {
		k.Tags["a"] = "half done"
		return failure
	}); !errors.Is(err, failure) {
		t.Error(err)
	}
	if got, _ := s.Socket(k.ID); got.Tags["a"] != "b" {
		t.Errorf("a failed update left %v", got.Tags)
	}
}

func TestPublicNames(t *testing.T) {
	pattern := regexp.MustCompile(`^[a-z]+-[a-z]+-[0-9]{4}$`)
	seen := map[string]bool{}
	for range 200 {
		name := randomLabel()
		if !pattern.MatchString(name) || seen[name] {
			t.Errorf("name %q", name)
		}
		seen[name] = true
	}
}

func TestAFileIsOpenedOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.db")
	open(t, path)
	if _, err := Open(path, nil); !errors.Is(err, ErrInUse) {
		t.Errorf("a second Open: %v", err)
	}
}

func TestNoDirectory(t *testing.T) {
	if _, err := Open(filepath.Join(t.TempDir(), "missing", "x.db"), nil); err == nil {
		t.Error("opened a file in a directory that does not exist")
	}
}
