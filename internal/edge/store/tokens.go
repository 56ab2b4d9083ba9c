package store

import (
	"fmt"
	"sort"
	"time"

	"github.com/google/uuid"
	bolt "go.etcd.io/bbolt"
)

// AddAccessToken stores a new access token of t.UserID, good for the lifetime, or for ever if that is zero. It fills in
// the id and the times.
func (s *Store) AddAccessToken(t AccessToken, lifetime time.Duration) (AccessToken, error) {
	s.change.Lock()
	defer s.change.Unlock()
	if _, ok := s.users[t.UserID]; !ok {
		return AccessToken{}, fmt.Errorf("user %s: %w", t.UserID, ErrNotFound)
	}
	if len(s.tokensOf(t.UserID)) >= MaxAccessTokensPerUser {
		return AccessToken{}, fmt.Errorf("an account may have %d access tokens: %w", MaxAccessTokensPerUser, ErrLimit)
	}
	t.ID, t.Created, t.Expires = uuid.NewString(), s.now().UTC(), time.Time{}
	if lifetime > 0 {
		t.Expires = t.Created.Add(lifetime)
	}
	if err := s.db.Update(func(tx *bolt.Tx) error { return put(tx, bucketTokens, t.ID, &t) }); err != nil {
		return AccessToken{}, fmt.Errorf("store access token: %w", err)
	}
	stored := t
	s.apply(func() { s.tokens[t.ID] = &stored })
	return t, nil
}

// AccessToken returns an access token by id, expired or not.
func (s *Store) AccessToken(id string) (AccessToken, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	t, ok := s.tokens[id]
	if !ok {
		return AccessToken{}, fmt.Errorf("access token %s: %w", id, ErrNotFound)
	}
	return *t, nil
}

// AccessTokens returns the access tokens of an account, oldest first.
func (s *Store) AccessTokens(userID string) []AccessToken {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.tokensOf(userID)
}

// tokensOf is AccessTokens for callers that may read the maps.
func (s *Store) tokensOf(userID string) []AccessToken {
	var out []AccessToken
	for _, t := range s.tokens {
		if t.UserID == userID {
			out = append(out, *t)
		}
	}
	sort.Slice(out, func(i, j int) bool {
		if !out[i].Created.Equal(out[j].Created) {
			return out[i].Created.Before(out[j].Created)
		}
		return out[i].ID < out[j].ID
	})
	return out
}

// DeleteAccessToken removes an access token, which ends its use.
func (s *Store) DeleteAccessToken(id string) error {
	s.change.Lock()
	defer s.change.Unlock()
	if _, ok := s.tokens[id]; !ok {
		return fmt.Errorf("access token %s: %w", id, ErrNotFound)
	}
	if err := s.db.Update(func(tx *bolt.Tx) error { return tx.Bucket(bucketTokens).Delete([]byte(id)) }); err != nil {
		return fmt.Errorf("delete access token %s: %w", id, err)
	}
	s.apply(func() { delete(s.tokens, id) })
	return nil
}
