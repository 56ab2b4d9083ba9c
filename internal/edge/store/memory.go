package store

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"time"
)

// Changes are what happened to the objects that others than the store must act on, at once or all together.
type Changes struct {
	SocketsMade    []Socket
	SocketsDeleted []Socket
	TunnelsDeleted []Tunnel
	UsersDeleted   []User
}

func (c *Changes) empty() bool {
	return len(c.SocketsMade)+len(c.SocketsDeleted)+len(c.TunnelsDeleted)+len(c.UsersDeleted) == 0
}

// Follow calls f with all sockets there are, and from then on with all changes, one after the other, whoever made them. A
// change of this store is acknowledged to its caller when f has returned. f may read the store, and must neither change it nor wait for
// strangers.
func (s *Store) Follow(f func(Changes)) {
	s.applying.Lock()
	defer s.applying.Unlock()
	s.followers = append(s.followers, f)
	if sockets := s.AllSockets(); len(sockets) > 0 {
		f(Changes{SocketsMade: sockets})
	}
}

const (
	// catchUpTimeout bounds the waiting for a change that is known to have been made.
	catchUpTimeout = 3 * time.Second
	// maxConflicts bounds how often a change is tried anew because another edge was faster.
	maxConflicts = 100
)

// commitError is a change that could not be made, although nothing is wrong with it.
type commitError struct{ err error }

func (e *commitError) Error() string { return e.err.Error() }
func (e *commitError) Unwrap() error { return e.err }

// storing says of a change that could not be made what it was. Other errors, which say that already, are left as they are.
func storing(err error, format string, args ...any) error {
	if failed, ok := errors.AsType[*commitError](err); ok {
		return fmt.Errorf(format+": %w", append(args, failed.err)...)
	}
	return err
}

// transact makes a change. plan reads the maps and returns what is to be changed; it is called again when another edge changed
// anything meanwhile, so what it found out always holds when its changes are made. A plan of more changes than one commit may have is made in parts,
// with a new plan for each: it must return first what may go alone.
func (s *Store) transact(plan func() ([]record, error)) error {
	s.change.Lock()
	defer s.change.Unlock()
	for conflicts := 0; ; {
		guard := s.state().guard // before the maps are read
		changes, err := plan()
		if err != nil || len(changes) == 0 {
			return err
		}
		last := len(changes) <= s.backend.maxChanges()
		if !last {
			changes = changes[:s.backend.maxChanges()]
		}
		at, err := s.backend.commit(guard, changes)
		switch {
		case errors.Is(err, errBehind):
			if conflicts++; conflicts > maxConflicts {
				return &commitError{fmt.Errorf("%w: other edges change it all the time", ErrUnavailable)}
			}
			if !s.await(at.guard, catchUpTimeout) {
				return &commitError{fmt.Errorf("%w: what other edges changed does not arrive", ErrUnavailable)}
			}
			continue
		case err != nil:
			return &commitError{err}
		}
		if err := s.apply(at, changes); err != nil || last {
			return err
		}
	}
}

func (s *Store) state() state {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.at
}

// await waits until the maps have the change that an edge made last, and says whether they do.
func (s *Store) await(guard int64, limit time.Duration) bool {
	timer := time.NewTimer(limit)
	defer timer.Stop()
	for {
		s.mu.RLock()
		now, moved := s.at, s.moved
		s.mu.RUnlock()
		if now.guard >= guard {
			return true
		}
		select {
		case <-moved:
		case <-timer.C:
			return false
		}
	}
}

// lookUp finds something in the maps. What is not there is looked for once more when all is known that was acknowledged, here or at
// another edge, before the call: whoever made an object at one edge may ask for it at the next.
func lookUp[T any](s *Store, find func() (T, bool)) (T, bool) {
	locked := func() (T, bool) {
		s.mu.RLock()
		defer s.mu.RUnlock()
		return find()
	}
	found, ok := locked()
	if ok {
		return found, true
	}
	at, behind := s.backend.latest()
	if !behind {
		return found, false
	}
	s.await(at.guard, catchUpTimeout)
	return locked()
}

// apply takes changes into the maps and tells the followers, unless the maps have them already.
func (s *Store) apply(at state, changes []record) error {
	s.applying.Lock()
	defer s.applying.Unlock()
	known := s.state()
	if at.revision <= known.revision && known.revision != 0 {
		return nil
	}
	if at.guard == 0 {
		at.guard = known.guard // a change by hand
	}
	return s.take(at, changes)
}

// replace makes the maps what all records say, and tells the followers the difference. It does nothing, and returns false, if the maps have
// come further than the records, unless the backend itself has gone back: an etcd that was restored, say.
func (s *Store) replace(at state, all []record, backwards bool) (bool, error) {
	s.applying.Lock()
	defer s.applying.Unlock()
	if at.revision < s.state().revision && !backwards {
		return false, nil
	}
	return true, s.take(at, s.difference(all))
}

// difference are the changes that make the maps what all records say. Deletions come first: what was made may have the e-mail address, the name
// or the port of what is gone. The caller holds applying.
func (s *Store) difference(all []record) []record {
	s.mu.RLock()
	defer s.mu.RUnlock()
	here := map[[2]string]any{}
	for id, v := range s.users {
		here[[2]string{bucketUsers, id}] = v
	}
	for id, v := range s.sockets {
		here[[2]string{bucketSockets, id}] = v
	}
	for id, v := range s.tunnels {
		here[[2]string{bucketTunnels, id}] = v
	}
	for id, v := range s.tokens {
		here[[2]string{bucketTokens, id}] = v
	}
	var gone, changed []record
	for _, r := range all {
		key := [2]string{r.bucket, r.id}
		if v, ok := here[key]; ok {
			delete(here, key)
			if data, err := json.Marshal(v); err == nil && bytes.Equal(data, r.value) {
				continue
			}
		}
		changed = append(changed, r)
	}
	for key := range here {
		gone = append(gone, remove(key[0], key[1]))
	}
	return append(gone, changed...)
}

// take does the work of apply. A record that can't be read is left out and is the error, after everything else was taken.
func (s *Store) take(at state, changes []record) error {
	var happened Changes
	var errs []error
	s.mu.Lock()
	for _, c := range changes {
		if err := s.takeOne(c, &happened); err != nil {
			errs = append(errs, err)
		}
	}
	s.at = at
	close(s.moved)
	s.moved = make(chan struct{})
	s.mu.Unlock()
	if !happened.empty() {
		for _, f := range s.followers {
			f(happened)
		}
	}
	return errors.Join(errs...)
}

// takeOne takes one change into the maps. The caller holds mu.
func (s *Store) takeOne(c record, happened *Changes) error {
	switch c.bucket {
	case bucketUsers:
		u, err := decode[User](c)
		if old := s.users[c.id]; old != nil && err == nil {
			s.forgetUser(old)
			if u == nil {
				happened.UsersDeleted = append(happened.UsersDeleted, *old)
			}
		}
		if u != nil {
			s.users[u.ID], s.byEmail[emailKey(u.Email)] = u, u.ID
		}
		return err
	case bucketSockets:
		k, err := decode[Socket](c)
		old := s.sockets[c.id]
		if old != nil && err == nil {
			s.forgetSocket(old)
			if k == nil {
				happened.SocketsDeleted = append(happened.SocketsDeleted, *old)
			}
		}
		if k != nil {
			s.indexSocket(k)
			if old == nil {
				happened.SocketsMade = append(happened.SocketsMade, k.clone())
			}
		}
		return err
	case bucketTunnels:
		t, err := decode[Tunnel](c)
		if old := s.tunnels[c.id]; old != nil && err == nil {
			s.forgetTunnel(old)
			if t == nil {
				happened.TunnelsDeleted = append(happened.TunnelsDeleted, *old)
			}
		}
		if t != nil {
			s.indexTunnel(t)
		}
		return err
	case bucketTokens:
		t, err := decode[AccessToken](c)
		if err != nil {
			return err
		}
		delete(s.tokens, c.id)
		if t != nil {
			s.tokens[t.ID] = t
		}
	}
	return nil // Other buckets are not kept in memory.
}

// decode reads a record's value; nil if the record is a deletion.
func decode[T any](c record) (*T, error) {
	if c.value == nil {
		return nil, nil //nolint:nilnil // a deletion has no value
	}
	value := new(T)
	if err := json.Unmarshal(c.value, value); err != nil {
		return nil, fmt.Errorf("%s %s: %w", c.bucket, c.id, err)
	}
	return value, nil
}

func (s *Store) indexSocket(k *Socket) {
	s.sockets[k.ID] = k
	s.byDNS[k.DNSName] = k.ID
	if k.TCPPort != 0 {
		s.byPort[k.TCPPort] = k.ID
	}
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

func (s *Store) forgetUser(u *User) {
	delete(s.users, u.ID)
	delete(s.byEmail, emailKey(u.Email))
}

func (s *Store) forgetSocket(k *Socket) {
	delete(s.sockets, k.ID)
	delete(s.byDNS, k.DNSName)
	delete(s.byPort, k.TCPPort)
	removeFrom(s.perUser, k.UserID, k.ID)
}

func (s *Store) forgetTunnel(t *Tunnel) {
	delete(s.tunnels, t.ID)
	removeFrom(s.perSocket, t.SocketID, t.ID)
	if delete(s.ports[t.UserID], t.LocalPort); len(s.ports[t.UserID]) == 0 {
		delete(s.ports, t.UserID)
	}
}

// addTo and removeFrom keep the ids of what belongs to an owner. The order in which owner and owned come and go does not matter.
func addTo(index map[string]map[string]struct{}, owner, id string) {
	if index[owner] == nil {
		index[owner] = map[string]struct{}{}
	}
	index[owner][id] = struct{}{}
}

func removeFrom(index map[string]map[string]struct{}, owner, id string) {
	if delete(index[owner], id); len(index[owner]) == 0 {
		delete(index, owner)
	}
}
