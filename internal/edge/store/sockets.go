package store

import (
	"fmt"
	"sort"

	"github.com/google/uuid"
	bolt "go.etcd.io/bbolt"
)

// CreateSocket stores a new socket of k.UserID under a free public name of the domain, with as many tunnels as asked.
// It fills in the id, the public name and the time.
func (s *Store) CreateSocket(k Socket, domain string, tunnels int) (Socket, []Tunnel, error) {
	return s.createSocket(k, domain, tunnels, false)
}

// CreateUniqueSocket does the same, without tunnels, if the account has no socket of that name, and returns ErrExists if it has.
func (s *Store) CreateUniqueSocket(k Socket, domain string) (Socket, error) {
	k, _, err := s.createSocket(k, domain, 0, true)
	return k, err
}

func (s *Store) createSocket(k Socket, domain string, tunnels int, unique bool) (Socket, []Tunnel, error) {
	s.change.Lock()
	defer s.change.Unlock()
	if _, ok := s.users[k.UserID]; !ok {
		return Socket{}, nil, fmt.Errorf("user %s: %w", k.UserID, ErrNotFound)
	}
	if len(s.perUser[k.UserID]) >= MaxSocketsPerUser {
		return Socket{}, nil, fmt.Errorf("an account may have %d sockets: %w", MaxSocketsPerUser, ErrLimit)
	}
	if _, taken := s.named(k.UserID, k.Name); unique && taken {
		return Socket{}, nil, fmt.Errorf("socket %s: %w", k.Name, ErrExists)
	}
	k = k.clone()
	k.ID, k.Created = uuid.NewString(), s.now().UTC()
	for {
		k.DNSName = randomLabel() + "." + domain
		if _, taken := s.byDNS[k.DNSName]; !taken {
			break
		}
	}
	made := make([]*Tunnel, 0, tunnels)
	for range tunnels {
		t, err := s.newTunnel(&k)
		if err != nil {
			return Socket{}, nil, err
		}
		made = append(made, t)
	}
	err := s.db.Update(func(tx *bolt.Tx) error {
		for _, t := range made {
			if err := put(tx, bucketTunnels, t.ID, t); err != nil {
				return err
			}
		}
		return put(tx, bucketSockets, k.ID, &k)
	})
	if err != nil {
		return Socket{}, nil, fmt.Errorf("store socket %s: %w", k.Name, err)
	}
	stored := k.clone()
	out := make([]Tunnel, 0, len(made))
	s.apply(func() {
		s.indexSocket(&stored)
		for _, t := range made {
			s.indexTunnel(t)
			out = append(out, *t)
		}
	})
	return k, out, nil
}

// Socket returns a socket by id.
func (s *Store) Socket(id string) (Socket, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	k, ok := s.sockets[id]
	if !ok {
		return Socket{}, fmt.Errorf("socket %s: %w", id, ErrNotFound)
	}
	return k.clone(), nil
}

// SocketByName returns a socket of an account by its name; of several, the oldest.
func (s *Store) SocketByName(userID, name string) (Socket, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	k, ok := s.named(userID, name)
	if !ok {
		return Socket{}, fmt.Errorf("socket %s: %w", name, ErrNotFound)
	}
	return k.clone(), nil
}

// named finds the oldest socket of an account with a name. The caller may read the maps.
func (s *Store) named(userID, name string) (*Socket, bool) {
	var found *Socket
	for id := range s.perUser[userID] {
		if k := s.sockets[id]; k.Name == name && (found == nil || older(k, found)) {
			found = k
		}
	}
	return found, found != nil
}

// SocketByDNSName returns a socket by its public name, in lower case.
func (s *Store) SocketByDNSName(name string) (Socket, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	id, ok := s.byDNS[name]
	if !ok {
		return Socket{}, fmt.Errorf("socket %s: %w", name, ErrNotFound)
	}
	return s.sockets[id].clone(), nil
}

// Sockets returns the sockets of an account, oldest first.
func (s *Store) Sockets(userID string) []Socket {
	s.mu.RLock()
	defer s.mu.RUnlock()
	out := make([]Socket, 0, len(s.perUser[userID]))
	for id := range s.perUser[userID] {
		out = append(out, s.sockets[id].clone())
	}
	sortSockets(out)
	return out
}

// AllSockets returns the sockets of all accounts, oldest first.
func (s *Store) AllSockets() []Socket {
	s.mu.RLock()
	defer s.mu.RUnlock()
	out := make([]Socket, 0, len(s.sockets))
	for _, k := range s.sockets {
		out = append(out, k.clone())
	}
	sortSockets(out)
	return out
}

func sortSockets(sockets []Socket) {
	sort.Slice(sockets, func(i, j int) bool { return older(&sockets[i], &sockets[j]) })
}

func older(a, b *Socket) bool {
	if !a.Created.Equal(b.Created) {
		return a.Created.Before(b.Created)
	}
	return a.ID < b.ID
}

// UpdateSocket stores what change makes of the socket. Its id, owner, public name and ports cannot change.
func (s *Store) UpdateSocket(id string, change func(*Socket) error) (Socket, error) {
	s.change.Lock()
	defer s.change.Unlock()
	old, ok := s.sockets[id]
	if !ok {
		return Socket{}, fmt.Errorf("socket %s: %w", id, ErrNotFound)
	}
	k := old.clone()
	if err := change(&k); err != nil {
		return Socket{}, err
	}
	k.ID, k.UserID, k.DNSName, k.TCPPort, k.Created = old.ID, old.UserID, old.DNSName, old.TCPPort, old.Created
	if err := s.db.Update(func(tx *bolt.Tx) error { return put(tx, bucketSockets, id, &k) }); err != nil {
		return Socket{}, fmt.Errorf("store socket %s: %w", id, err)
	}
	stored := k.clone()
	s.apply(func() { s.sockets[id] = &stored })
	return k, nil
}

// DeleteSocket removes a socket with its tunnels and returns what it was.
func (s *Store) DeleteSocket(id string) (Socket, error) {
	s.change.Lock()
	defer s.change.Unlock()
	k, ok := s.sockets[id]
	if !ok {
		return Socket{}, fmt.Errorf("socket %s: %w", id, ErrNotFound)
	}
	if err := s.db.Update(func(tx *bolt.Tx) error { return s.deleteSocketIn(tx, k) }); err != nil {
		return Socket{}, fmt.Errorf("delete socket %s: %w", id, err)
	}
	s.apply(func() { s.forgetSocketAndTunnels(k) })
	return *k, nil
}

func (s *Store) deleteSocketIn(tx *bolt.Tx, k *Socket) error {
	for tid := range s.perSocket[k.ID] {
		if err := tx.Bucket(bucketTunnels).Delete([]byte(tid)); err != nil {
			return err
		}
	}
	return tx.Bucket(bucketSockets).Delete([]byte(k.ID))
}

func (s *Store) forgetSocketAndTunnels(k *Socket) {
	for tid := range s.perSocket[k.ID] {
		s.forgetTunnel(s.tunnels[tid])
	}
	s.forgetSocket(k)
}

// newTunnel makes a tunnel with a free local port, and does not store it. The caller holds change.
func (s *Store) newTunnel(k *Socket) (*Tunnel, error) {
	used := s.ports[k.UserID]
	if len(used) >= MaxTunnelsPerUser {
		return nil, fmt.Errorf("an account may have %d tunnels: %w", MaxTunnelsPerUser, ErrLimit)
	}
	for {
		port := minLocalPort + randomInt(maxLocalPort-minLocalPort+1)
		if _, taken := used[port]; !taken {
			return &Tunnel{ID: uuid.NewString(), SocketID: k.ID, UserID: k.UserID, LocalPort: port, Created: s.now().UTC()}, nil
		}
	}
}

// CreateTunnel stores a new tunnel of a socket.
func (s *Store) CreateTunnel(socketID string) (Tunnel, error) {
	s.change.Lock()
	defer s.change.Unlock()
	k, ok := s.sockets[socketID]
	if !ok {
		return Tunnel{}, fmt.Errorf("socket %s: %w", socketID, ErrNotFound)
	}
	t, err := s.newTunnel(k)
	if err != nil {
		return Tunnel{}, err
	}
	if err := s.db.Update(func(tx *bolt.Tx) error { return put(tx, bucketTunnels, t.ID, t) }); err != nil {
		return Tunnel{}, fmt.Errorf("store tunnel of socket %s: %w", socketID, err)
	}
	s.apply(func() { s.indexTunnel(t) })
	return *t, nil
}

// Tunnel returns a tunnel by id.
func (s *Store) Tunnel(id string) (Tunnel, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	t, ok := s.tunnels[id]
	if !ok {
		return Tunnel{}, fmt.Errorf("tunnel %s: %w", id, ErrNotFound)
	}
	return *t, nil
}

// TunnelByLocalPort returns the tunnel of an account that has the local port.
func (s *Store) TunnelByLocalPort(userID string, port int) (Tunnel, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	id, ok := s.ports[userID][port]
	if !ok {
		return Tunnel{}, fmt.Errorf("tunnel with local port %d: %w", port, ErrNotFound)
	}
	return *s.tunnels[id], nil
}

// Tunnels returns the tunnels of a socket, oldest first.
func (s *Store) Tunnels(socketID string) []Tunnel {
	s.mu.RLock()
	defer s.mu.RUnlock()
	out := make([]Tunnel, 0, len(s.perSocket[socketID]))
	for id := range s.perSocket[socketID] {
		out = append(out, *s.tunnels[id])
	}
	sort.Slice(out, func(i, j int) bool {
		if !out[i].Created.Equal(out[j].Created) {
			return out[i].Created.Before(out[j].Created)
		}
		return out[i].ID < out[j].ID
	})
	return out
}

// DeleteTunnel removes a tunnel and returns what it was.
func (s *Store) DeleteTunnel(id string) (Tunnel, error) {
	s.change.Lock()
	defer s.change.Unlock()
	t, ok := s.tunnels[id]
	if !ok {
		return Tunnel{}, fmt.Errorf("tunnel %s: %w", id, ErrNotFound)
	}
	if err := s.db.Update(func(tx *bolt.Tx) error { return tx.Bucket(bucketTunnels).Delete([]byte(id)) }); err != nil {
		return Tunnel{}, fmt.Errorf("delete tunnel %s: %w", id, err)
	}
	s.apply(func() { s.forgetTunnel(t) })
	return *t, nil
}
