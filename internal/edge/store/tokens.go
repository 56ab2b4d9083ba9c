package store

import (
	"fmt"
	"sort"
	"time"

	"github.com/google/uuid"
)

// AddAccessToken stores a new access token of t.UserID, good for the lifetime, or for ever if that is zero. It fills in
// the id and the times.
func (s *Store) AddAccessToken(t AccessToken, lifetime time.Duration) (AccessToken, error) {
	t.ID, t.Created, t.Expires = uuid.NewString(), s.now().UTC(), time.Time{}
	if lifetime > 0 {
		t.Expires = t.Created.Add(lifetime)
	}
	err := s.transact(func() ([]record, error) {
		s.mu.RLock()
		defer s.mu.RUnlock()
		if _, ok := s.users[t.UserID]; !ok {
			return nil, fmt.Errorf("user %s: %w", t.UserID, ErrNotFound)
		}
		if len(s.tokensOf(t.UserID)) >= MaxAccessTokensPerUser {
			return nil, fmt.Errorf("an account may have %d access tokens: %w", MaxAccessTokensPerUser, ErrLimit)
		}
		stored, err := put(bucketTokens, t.ID, &t)
		return []record{stored}, err
	})
	if err != nil {
		return AccessToken{}, storing(err, "store access token")
	}
	return t, nil
}

// AccessToken returns an access token by id, expired or not.
func (s *Store) AccessToken(id string) (AccessToken, error) {
	t, ok := lookUp(s, func() (AccessToken, bool) {
		if t, ok := s.tokens[id]; ok {
			return *t, true
		}
		return AccessToken{}, false
	})
	if !ok {
		return AccessToken{}, fmt.Errorf("access token %s: %w", id, ErrNotFound)
	}
	return t, nil
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
	err := s.transact(func() ([]record, error) {
		s.mu.RLock()
		defer s.mu.RUnlock()
		if _, ok := s.tokens[id]; !ok {
			return nil, fmt.Errorf("access token %s: %w", id, ErrNotFound)
		}
		return []record{remove(bucketTokens, id)}, nil
	})
	return storing(err, "delete access token %s", id)
}
