package store

import (
	"fmt"
	"slices"
	"sort"

	"github.com/google/uuid"
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
	k = k.clone()
	k.ID, k.Created = uuid.NewString(), s.now().UTC()
	var made []Tunnel
	err := s.transact(func() ([]record, error) {
		s.mu.RLock()
		defer s.mu.RUnlock()
		if _, ok := s.users[k.UserID]; !ok {
			return nil, fmt.Errorf("user %s: %w", k.UserID, ErrNotFound)
		}
		if len(s.perUser[k.UserID]) >= MaxSocketsPerUser {
			return nil, fmt.Errorf("an account may have %d sockets: %w", MaxSocketsPerUser, ErrLimit)
		}
		if _, taken := s.named(k.UserID, k.Name); unique && taken {
			return nil, fmt.Errorf("socket %s: %w", k.Name, ErrExists)
		}
		if _, taken := s.byPort[k.TCPPort]; taken {
			return nil, fmt.Errorf("port %d: %w", k.TCPPort, ErrPortTaken)
		}
		for {
			k.DNSName = randomLabel() + "." + domain
			if _, taken := s.byDNS[k.DNSName]; !taken {
				break
			}
		}
		stored, err := put(bucketSockets, k.ID, &k)
		if err != nil {
			return nil, err
		}
		changes := []record{stored}
		made = make([]Tunnel, 0, tunnels)
		for range tunnels {
			t, err := s.newTunnel(&k, made)
			if err != nil {
				return nil, err
			}
			stored, err := put(bucketTunnels, t.ID, &t)
			if err != nil {
				return nil, err
			}
			made, changes = append(made, t), append(changes, stored)
		}
		return changes, nil
	})
	if err != nil {
		return Socket{}, nil, storing(err, "store socket %s", k.Name)
	}
	return k, made, nil
}

// Socket returns a socket by id.
func (s *Store) Socket(id string) (Socket, error) {
	k, ok := lookUp(s, func() (Socket, bool) {
		if k, ok := s.sockets[id]; ok {
			return k.clone(), true
		}
		return Socket{}, false
	})
	if !ok {
		return Socket{}, fmt.Errorf("socket %s: %w", id, ErrNotFound)
	}
	return k, nil
}

// SocketByName returns a socket of an account by its name; of several, the oldest.
func (s *Store) SocketByName(userID, name string) (Socket, error) {
	k, ok := lookUp(s, func() (Socket, bool) {
		if k, ok := s.named(userID, name); ok {
			return k.clone(), true
		}
		return Socket{}, false
	})
	if !ok {
		return Socket{}, fmt.Errorf("socket %s: %w", name, ErrNotFound)
	}
	return k, nil
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

// SocketByDNSName returns a socket by its public name, in lower case. It never asks outside of memory, since strangers ask it.
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

// UpdateSocket stores what change makes of the socket. Its id, owner, public name and ports cannot change. change may be called
// several times.
func (s *Store) UpdateSocket(id string, change func(*Socket) error) (Socket, error) {
	var k Socket
	err := s.transact(func() ([]record, error) {
		old, err := s.Socket(id)
		if err != nil {
			return nil, err
		}
		k = old.clone()
		if err := change(&k); err != nil {
			return nil, err
		}
		k.ID, k.UserID, k.DNSName, k.TCPPort, k.Created = old.ID, old.UserID, old.DNSName, old.TCPPort, old.Created
		stored, err := put(bucketSockets, id, &k)
		return []record{stored}, err
	})
	if err != nil {
		return Socket{}, storing(err, "store socket %s", id)
	}
	return k, nil
}

// DeleteSocket removes a socket with its tunnels and returns what it was.
func (s *Store) DeleteSocket(id string) (Socket, error) {
	var k Socket
	err := s.transact(func() ([]record, error) {
		s.mu.RLock()
		defer s.mu.RUnlock()
		found, ok := s.sockets[id]
		if !ok {
			return nil, fmt.Errorf("socket %s: %w", id, ErrNotFound)
		}
		k = found.clone()
		return s.removalOfSocket(id), nil
	})
	if err != nil {
		return Socket{}, storing(err, "delete socket %s", id)
	}
	return k, nil
}

// removalOfSocket are the changes that delete a socket, its tunnels first. The caller may read the maps.
func (s *Store) removalOfSocket(id string) []record {
	var gone []record
	for tid := range s.perSocket[id] {
		gone = append(gone, remove(bucketTunnels, tid))
	}
	return append(gone, remove(bucketSockets, id))
}

// newTunnel makes a tunnel with a free local port, which none of the others has either, and does not store it. The caller may read
// the maps.
func (s *Store) newTunnel(k *Socket, others []Tunnel) (Tunnel, error) {
	used := s.ports[k.UserID]
	if len(used)+len(others) >= MaxTunnelsPerUser {
		return Tunnel{}, fmt.Errorf("an account may have %d tunnels: %w", MaxTunnelsPerUser, ErrLimit)
	}
	for {
		port := minLocalPort + randomInt(maxLocalPort-minLocalPort+1)
		_, taken := used[port]
		if !taken && !slices.ContainsFunc(others, func(o Tunnel) bool { return o.LocalPort == port }) {
			return Tunnel{ID: uuid.NewString(), SocketID: k.ID, UserID: k.UserID, LocalPort: port, Created: s.now().UTC()}, nil
		}
	}
}

// CreateTunnel stores a new tunnel of a socket.
func (s *Store) CreateTunnel(socketID string) (Tunnel, error) {
	var t Tunnel
	err := s.transact(func() ([]record, error) {
		s.mu.RLock()
		defer s.mu.RUnlock()
		k, ok := s.sockets[socketID]
		if !ok {
			return nil, fmt.Errorf("socket %s: %w", socketID, ErrNotFound)
		}
		var err error
		if t, err = s.newTunnel(k, nil); err != nil {
			return nil, err
		}
		stored, err := put(bucketTunnels, t.ID, &t)
		return []record{stored}, err
	})
	if err != nil {
		return Tunnel{}, storing(err, "store tunnel of socket %s", socketID)
	}
	return t, nil
}

// Tunnel returns a tunnel by id.
func (s *Store) Tunnel(id string) (Tunnel, error) {
	t, ok := lookUp(s, func() (Tunnel, bool) {
		if t, ok := s.tunnels[id]; ok {
			return *t, true
		}
		return Tunnel{}, false
	})
	if !ok {
		return Tunnel{}, fmt.Errorf("tunnel %s: %w", id, ErrNotFound)
	}
	return t, nil
}

// TunnelByLocalPort returns the tunnel of an account that has the local port.
func (s *Store) TunnelByLocalPort(userID string, port int) (Tunnel, error) {
	t, ok := lookUp(s, func() (Tunnel, bool) {
		if id, ok := s.ports[userID][port]; ok {
			return *s.tunnels[id], true
		}
		return Tunnel{}, false
	})
	if !ok {
		return Tunnel{}, fmt.Errorf("tunnel with local port %d: %w", port, ErrNotFound)
	}
	return t, nil
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
	var t Tunnel
	err := s.transact(func() ([]record, error) {
		s.mu.RLock()
		defer s.mu.RUnlock()
		found, ok := s.tunnels[id]
		if !ok {
			return nil, fmt.Errorf("tunnel %s: %w", id, ErrNotFound)
		}
		t = *found
		return []record{remove(bucketTunnels, id)}, nil
	})
	if err != nil {
		return Tunnel{}, storing(err, "delete tunnel %s", id)
	}
	return t, nil
}
