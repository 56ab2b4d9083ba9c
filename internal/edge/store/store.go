// Package store keeps what the edge must remember: accounts, sockets, tunnels and keys, in one bbolt file, or in an etcd that
// several edges share.
//
// Every change is committed and fsynced before it is acknowledged. Reads come from memory, since the fronts look a socket
// up for every request; what another edge changed comes into it within moments. The package must not know who is connected, nor
// anything of HTTP or SSH; who must act on a change follows the store.
package store

import (
	"errors"
	"fmt"
	"sort"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
)

// Errors that a caller decides on.
var (
	ErrNotFound = errors.New("not found")
	ErrExists   = errors.New("already exists")
	// ErrLimit means that an account has as many objects as it may have.
	ErrLimit = errors.New("limit reached")
	// ErrPortTaken means that another socket has the public port of a new one. It is an ErrExists, too.
	ErrPortTaken = fmt.Errorf("the public port %w", ErrExists)
	// ErrUnavailable means that what the state is kept in does not answer, so that nothing can be changed now.
	ErrUnavailable = errors.New("the state can't be changed at the moment")
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

// Store is safe for concurrent use.
type Store struct {
	backend backend
	now     func() time.Time

	// change is held during a whole change of this store's, the backend's part of it included. applying is held while a change, of
	// whatever origin, goes into the maps and to the followers, so that all see one order. mu guards the maps and is held for
	// moments only, so that a slow disk does not stop the fronts.
	change    sync.Mutex
	applying  sync.Mutex
	followers []func(Changes)
	blobLocks blobLocks

	mu sync.RWMutex
	// at is the state that the maps have; moved is closed, and made anew, when it changes.
	at      state
	moved   chan struct{}
	users   map[string]*User
	byEmail map[string]string
	sockets map[string]*Socket
	byDNS   map[string]string
	byPort  map[int]string
	// perUser and perSocket index the ids of what belongs to an account or a socket.
	perUser   map[string]map[string]struct{}
	tunnels   map[string]*Tunnel
	perSocket map[string]map[string]struct{}
	tokens    map[string]*AccessToken
	// ports maps the local ports of an account to its tunnels.
	ports map[string]map[int]string
}

// newStore makes an empty store. now may be nil.
func newStore(b backend, now func() time.Time) *Store {
	if now == nil {
		now = time.Now
	}
	return &Store{
		backend: b, now: now, moved: make(chan struct{}),
		users: map[string]*User{}, byEmail: map[string]string{},
		sockets: map[string]*Socket{}, byDNS: map[string]string{}, byPort: map[int]string{}, perUser: map[string]map[string]struct{}{},
		tunnels: map[string]*Tunnel{}, perSocket: map[string]map[string]struct{}{}, ports: map[string]map[int]string{},
		tokens: map[string]*AccessToken{},
	}
}

// Close releases what the state is kept in.
func (s *Store) Close() error { return s.backend.close() }

func (s *Store) load() error {
	all, at, err := s.backend.load()
	if err != nil {
		return err
	}
	return s.apply(at, all)
}

func emailKey(email string) string { return strings.ToLower(strings.TrimSpace(email)) }

// Secret returns the named secret; if there is none yet, it stores what create returns and returns that.
func (s *Store) Secret(name string, create func() ([]byte, error)) ([]byte, error) {
	var secret []byte
	err := s.transact(func() ([]record, error) {
		var err error
		if secret, err = s.backend.get(bucketSecrets, name); err != nil || secret != nil {
			return nil, err
		}
		if secret, err = create(); err != nil {
			return nil, err
		}
		return []record{{bucketSecrets, name, secret}}, nil
	})
	if err != nil {
		return nil, fmt.Errorf("secret %s: %w", name, err)
	}
	return secret, nil
}

// AddUser stores a new account and gives it an id. Email addresses are unique, whatever their case.
func (s *Store) AddUser(u User) (User, error) {
	u.ID, u.Created = uuid.NewString(), s.now().UTC()
	u.Email = strings.TrimSpace(u.Email)
	err := s.transact(func() ([]record, error) {
		s.mu.RLock()
		defer s.mu.RUnlock()
		if _, taken := s.byEmail[emailKey(u.Email)]; taken {
			return nil, fmt.Errorf("user %s: %w", u.Email, ErrExists)
		}
		made, err := put(bucketUsers, u.ID, &u)
		return []record{made}, err
	})
	if err != nil {
		return User{}, storing(err, "store user %s", u.Email)
	}
	return u, nil
}

// User returns an account by id.
func (s *Store) User(id string) (User, error) {
	u, ok := lookUp(s, func() (User, bool) {
		if u, ok := s.users[id]; ok {
			return u.clone(), true
		}
		return User{}, false
	})
	if !ok {
		return User{}, fmt.Errorf("user %s: %w", id, ErrNotFound)
	}
	return u, nil
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
	err := s.transact(func() ([]record, error) {
		s.mu.RLock()
		defer s.mu.RUnlock()
		if _, ok := s.users[id]; !ok {
			return nil, fmt.Errorf("user %s: %w", id, ErrNotFound)
		}
		// What belongs to something goes before it: see transact.
		var gone []record
		for sid := range s.perUser[id] {
			gone = append(gone, s.removalOfSocket(sid)...)
		}
		for _, t := range s.tokensOf(id) {
			gone = append(gone, remove(bucketTokens, t.ID))
		}
		return append(gone, remove(bucketUsers, id)), nil
	})
	return storing(err, "delete user %s", id)
}
