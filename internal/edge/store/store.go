// Package store keeps what the edge must remember: accounts, sockets, tunnels and keys, in one bbolt file.
//
// Every change is committed and fsynced before it is acknowledged. Reads come from memory, since the fronts look a socket
// up for every request. The package must not know who is connected, nor anything of HTTP or SSH.
package store

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
)

// Errors that a caller decides on.
var (
	ErrNotFound = errors.New("not found")
	ErrExists   = errors.New("already exists")
	// ErrLimit means that an account has as many objects as it may have.
	ErrLimit = errors.New("limit reached")
	// ErrInUse means that another process holds the state file.
	ErrInUse = errors.New("the state file is in use by another process, probably a running mysocket-edge")
)

const (
	// MaxSocketsPerUser bounds what one account can make the edge remember.
	MaxSocketsPerUser = 10_000
	// MaxAccessTokensPerUser bounds the access tokens of one account.
	MaxAccessTokensPerUser = 100
	// MaxTunnelsPerUser bounds them over all sockets of the account.
	MaxTunnelsPerUser = 20_000

	// Local ports are names, not ports that anything listens on; any range that is wide enough will do.
	minLocalPort = 10_000
	maxLocalPort = 59_999

	lockTimeout = 2 * time.Second
)

var (
	bucketUsers   = []byte("users")
	bucketSockets = []byte("sockets")
	bucketTunnels = []byte("tunnels")
	bucketSecrets = []byte("secrets")
	bucketTokens  = []byte("tokens")
)

// Store is safe for concurrent use.
type Store struct {
	db  *bolt.DB
	now func() time.Time

	// change is held during a whole change, the fsync included. mu guards the maps and is held for moments only, so that
	// a slow disk does not stop the fronts; whoever holds change may read the maps without it.
	change  sync.Mutex
	mu      sync.RWMutex
	users   map[string]*User
	byEmail map[string]string
	sockets map[string]*Socket
	byDNS   map[string]string
	// perUser and perSocket index the ids of what belongs to an account or a socket.
	perUser   map[string]map[string]struct{}
	tunnels   map[string]*Tunnel
	perSocket map[string]map[string]struct{}
	tokens    map[string]*AccessToken
	// ports maps the local ports of an account to its tunnels.
	ports map[string]map[int]string

	blobLocks blobLocks
}

// Open opens the state file, and makes it (mode 0600) if there is none. now may be nil.
func Open(path string, now func() time.Time) (*Store, error) {
	if now == nil {
		now = time.Now
	}
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
	s := &Store{
		db: db, now: now,
		users: map[string]*User{}, byEmail: map[string]string{},
		sockets: map[string]*Socket{}, byDNS: map[string]string{}, perUser: map[string]map[string]struct{}{},
		tunnels: map[string]*Tunnel{}, perSocket: map[string]map[string]struct{}{}, ports: map[string]map[int]string{},
		tokens: map[string]*AccessToken{},
	}
	if err := s.load(); err != nil {
		_ = db.Close()
		return nil, fmt.Errorf("read state file %s: %w", path, err)
	}
	return s, nil
}

// Close releases the file.
func (s *Store) Close() error { return s.db.Close() }

func (s *Store) load() error {
	if err := s.db.Update(func(tx *bolt.Tx) error {
		for _, name := range [][]byte{bucketUsers, bucketSockets, bucketTunnels, bucketSecrets, bucketTokens} {
			if _, err := tx.CreateBucketIfNotExists(name); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		return err
	}
	return s.db.View(func(tx *bolt.Tx) error {
		if err := each(tx, bucketUsers, s.indexUser); err != nil {
			return err
		}
		if err := each(tx, bucketSockets, s.indexSocket); err != nil {
			return err
		}
		if err := each(tx, bucketTokens, func(t *AccessToken) { s.tokens[t.ID] = t }); err != nil {
			return err
		}
		return each(tx, bucketTunnels, s.indexTunnel)
	})
}

func each[T any](tx *bolt.Tx, bucket []byte, add func(*T)) error {
	return tx.Bucket(bucket).ForEach(func(k, v []byte) error {
		var value T
		if err := json.Unmarshal(v, &value); err != nil {
			return fmt.Errorf("%s %s: %w", bucket, k, err)
		}
		add(&value)
		return nil
	})
}

func put(tx *bolt.Tx, bucket []byte, id string, value any) error {
	data, err := json.Marshal(value)
	if err != nil {
		return err
	}
	return tx.Bucket(bucket).Put([]byte(id), data)
}

func (s *Store) indexUser(u *User) {
	s.users[u.ID] = u
	s.byEmail[emailKey(u.Email)] = u.ID
}

func (s *Store) indexSocket(k *Socket) {
	s.sockets[k.ID] = k
	s.byDNS[k.DNSName] = k.ID
	addTo(s.perUser, k.UserID, k.ID)
}

func (s *Store) indexTunnel(t *Tunnel) {
	s.tunnels[t.ID] = t
	addTo(s.perSocket, t.SocketID, t.ID)
	if s.ports[t.UserID] == nil {
		s.ports[t.UserID] = map[int]string{}
	}
	s.ports[t.UserID][t.LocalPort] = t.ID
}

func (s *Store) forgetTunnel(t *Tunnel) {
	delete(s.tunnels, t.ID)
	delete(s.perSocket[t.SocketID], t.ID)
	delete(s.ports[t.UserID], t.LocalPort)
}

func (s *Store) forgetSocket(k *Socket) {
	delete(s.sockets, k.ID)
	delete(s.byDNS, k.DNSName)
	delete(s.perUser[k.UserID], k.ID)
	delete(s.perSocket, k.ID)
}

func addTo(index map[string]map[string]struct{}, owner, id string) {
	if index[owner] == nil {
		index[owner] = map[string]struct{}{}
	}
	index[owner][id] = struct{}{}
}

// apply changes the maps after the file has been changed.
func (s *Store) apply(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
}

func emailKey(email string) string { return strings.ToLower(strings.TrimSpace(email)) }

// Secret returns the named secret; if there is none yet, it stores what create returns and returns that.
func (s *Store) Secret(name string, create func() ([]byte, error)) ([]byte, error) {
	s.change.Lock()
	defer s.change.Unlock()
	var secret []byte
	err := s.db.Update(func(tx *bolt.Tx) error {
		b := tx.Bucket(bucketSecrets)
		if v := b.Get([]byte(name)); v != nil {
			secret = append([]byte(nil), v...)
			return nil
		}
		made, err := create()
		if err != nil {
			return err
		}
		secret = made
		return b.Put([]byte(name), made)
	})
	if err != nil {
		return nil, fmt.Errorf("secret %s: %w", name, err)
	}
	return secret, nil
}

// AddUser stores a new account and gives it an id. Email addresses are unique, whatever their case.
func (s *Store) AddUser(u User) (User, error) {
	s.change.Lock()
	defer s.change.Unlock()
	if _, taken := s.byEmail[emailKey(u.Email)]; taken {
		return User{}, fmt.Errorf("user %s: %w", u.Email, ErrExists)
	}
	u.ID, u.Created = uuid.NewString(), s.now().UTC()
	u.Email = strings.TrimSpace(u.Email)
	if err := s.db.Update(func(tx *bolt.Tx) error { return put(tx, bucketUsers, u.ID, &u) }); err != nil {
		return User{}, fmt.Errorf("store user %s: %w", u.Email, err)
	}
	stored := u.clone()
	s.apply(func() { s.indexUser(&stored) })
	return u, nil
}

// User returns an account by id.
func (s *Store) User(id string) (User, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	u, ok := s.users[id]
	if !ok {
		return User{}, fmt.Errorf("user %s: %w", id, ErrNotFound)
	}
	return u.clone(), nil
}

// UserByEmail returns an account by its email address, whatever the case.
func (s *Store) UserByEmail(email string) (User, error) {
	s.mu.RLock()
	id, ok := s.byEmail[emailKey(email)]
	s.mu.RUnlock()
	if !ok {
		return User{}, fmt.Errorf("user %s: %w", email, ErrNotFound)
	}
	return s.User(id)
}

// Users returns all accounts, oldest first.
func (s *Store) Users() []User {
	s.mu.RLock()
	defer s.mu.RUnlock()
	users := make([]User, 0, len(s.users))
	for _, u := range s.users {
		users = append(users, u.clone())
	}
	sort.Slice(users, func(i, j int) bool { return users[i].Created.Before(users[j].Created) })
	return users
}

// DeleteUser removes an account with its sockets, tunnels and access tokens.
func (s *Store) DeleteUser(id string) error {
	s.change.Lock()
	defer s.change.Unlock()
	u, ok := s.users[id]
	if !ok {
		return fmt.Errorf("user %s: %w", id, ErrNotFound)
	}
	sockets := make([]*Socket, 0, len(s.perUser[id]))
	for sid := range s.perUser[id] {
		sockets = append(sockets, s.sockets[sid])
	}
	tokens := s.tokensOf(id)
	err := s.db.Update(func(tx *bolt.Tx) error {
		for _, k := range sockets {
			if err := s.deleteSocketIn(tx, k); err != nil {
				return err
			}
		}
		for _, t := range tokens {
			if err := tx.Bucket(bucketTokens).Delete([]byte(t.ID)); err != nil {
				return err
			}
		}
		return tx.Bucket(bucketUsers).Delete([]byte(id))
	})
	if err != nil {
		return fmt.Errorf("delete user %s: %w", id, err)
	}
	s.apply(func() {
		for _, k := range sockets {
			s.forgetSocketAndTunnels(k)
		}
		for _, t := range tokens {
			delete(s.tokens, t.ID)
		}
		delete(s.users, id)
		delete(s.byEmail, emailKey(u.Email))
		delete(s.perUser, id)
		delete(s.ports, id)
	})
	return nil
}
