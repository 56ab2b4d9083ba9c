package mysocket

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"strconv"
	"sync"
	"time"

	"github.com/google/uuid"
)

const (
	// border0Path is where the dialect's paths begin, when the API's address says nothing else.
	border0Path = "/api/v1"

	pageSize = 100
	// maxPages bounds the list of an API that never ends it.
	maxPages = 200

	// What was just made may be unknown for a moment to the machine that is asked next. The API says for how long; these
	// are the bounds of what is believed.
	minLag, maxLag = 500 * time.Millisecond, time.Second
)

// border0 is the dialect of the live successor: an access token that somebody made once, names that are unique, and no
// tunnel objects. Each login with a signed key is one more way to an origin, until its connection ends.
type border0 struct {
	wait func(context.Context, time.Duration) error

	mu  sync.Mutex
	lag time.Duration // zero until the API was asked
}

// border0Socket is a socket in the dialect's form. Of what is not ours to set, an update sends back what there is.
type border0Socket struct {
	Socket
	DisplayName   string `json:"display_name,omitempty"`
	Recording     bool   `json:"recording_enabled"`
	ConnectorAuth bool   `json:"connector_authentication_enabled"`
}

// ours is the socket under the name that we know it by.
func (s border0Socket) ours() Socket {
	out := s.Socket
	out.Name, out.Tunnels = decodeName(s.Name, s.DisplayName), nil
	return out
}

func (*border0) base(configured *url.URL) string {
	if configured.Path == "" {
		return configured.String() + border0Path
	}
	return configured.String()
}

func (*border0) authorize(h http.Header, token string) { h.Set("Authorization", "Bearer "+token) }

// login takes the access token as it is: whether it is good is seen when it is used. One that was refused is not used
// again at once.
func (d *border0) login(_ context.Context, c *Client, a Account, stale refusedToken) (session, error) {
	t, err := readToken(a.Token)
	switch {
	case err != nil:
		return session{}, fmt.Errorf("%w: the access token in the account's Secret is %w", ErrCredentials, err)
	case t.user == "":
		return session{}, fmt.Errorf("%w: the access token in the account's Secret lacks user_id, which is needed to log in over SSH; it must be one of a user", ErrCredentials)
	}
	if stale.token == a.Token {
		why := "it is not known there, or was revoked"
		if now := c.now(); !t.expires.IsZero() && now.After(t.expires) {
			why = "it expired at " + t.expires.UTC().Format(time.RFC3339)
		}
		return session{}, fmt.Errorf("%w: check the access token in the account's Secret: %s (%w)", ErrCredentials, why, stale.err)
	}
	// No expiry of ours: nothing can renew it, and the API knows best.
	return session{dialect: d, account: a, token: a.Token, user: t.user, expires: c.now().AddDate(100, 0, 0)}, nil
}

func (d *border0) sockets(ctx context.Context, a asker) ([]Socket, error) {
	var out []Socket
	seen := map[string]bool{}
	for page := 1; page <= maxPages; {
		var answer struct {
			List       []border0Socket `json:"list"`
			Pagination struct {
				Next int `json:"next_page"`
			} `json:"pagination"`
		}
		query := url.Values{"page": {strconv.Itoa(page)}, "page_size": {strconv.Itoa(pageSize)}}
		if err := a.ask(ctx, call{http.MethodGet, "/sockets", "/sockets?" + query.Encode(), nil, &answer}); err != nil {
			return nil, err
		}
		for _, s := range answer.List {
			if s.ID == "" || !seen[s.ID] { // one that moved to the next page while we read is on both
				seen[s.ID] = true
				out = append(out, s.ours())
			}
		}
		next := answer.Pagination.Next
		if next <= 0 {
			return out, checkIDs("GET /sockets", out)
		}
		if next <= page {
			return nil, fmt.Errorf("GET /sockets: the Mysocket API answered page %d of the list with next_page %d", page, next)
		}
		page = next
	}
	return nil, fmt.Errorf("GET /sockets: the list has more than %d pages", maxPages)
}

// createSocket makes a socket. One that has the name already is the same: it was made when the list did not show it yet,
// or its display_name was changed.
func (d *border0) createSocket(ctx context.Context, a asker, s Socket) (Socket, error) {
	made := border0Socket{Socket: s, DisplayName: s.Name}
	made.Name = encodeName(s.Name)
	var out border0Socket
	err := a.ask(ctx, call{http.MethodPost, "/socket", "/socket", made, &out})
	if err == nil {
		return d.named(s.Name, out), checkCreated("POST /socket", out.Socket)
	}
	if !IsRefused(err) {
		return Socket{}, err
	}
	var there border0Socket
	if d.patiently(ctx, a, call{http.MethodGet, "/socket/{id}", socketPath(made.Name), nil, &there}) != nil || there.Name != made.Name || there.ID == "" {
		return Socket{}, err
	}
	s.ID = there.ID
	s.Tags = withTags(there.Tags, s.Tags) // whose it is already, and who wants it now
	return d.update(ctx, a, there, s)
}

func (d *border0) updateSocket(ctx context.Context, a asker, s Socket) (Socket, error) {
	var there border0Socket
	if err := d.patiently(ctx, a, call{http.MethodGet, "/socket/{id}", socketPath(s.ID), nil, &there}); err != nil {
		return Socket{}, err
	}
	if err := checkUpdated("GET /socket/{id}", s.ID, there.Socket); err != nil {
		return Socket{}, err
	}
	return d.update(ctx, a, there, s)
}

// update gives a socket the settings of s, and leaves it its name.
func (d *border0) update(ctx context.Context, a asker, there border0Socket, s Socket) (Socket, error) {
	changed := there
	changed.Socket = s
	changed.Name, changed.Tunnels = there.Name, nil
	if encodeName(s.Name) == there.Name {
		changed.DisplayName = s.Name
	}
	if changed.Description == "" {
		changed.Description = there.Description
	}
	if changed.Tags == nil {
		changed.Tags = there.Tags
	}
	if changed.Upstream == nil {
		changed.Upstream = there.Upstream
	}
	if changed.Access == nil {
		changed.Access = there.Access
	}
	var out border0Socket
	if err := d.patiently(ctx, a, call{http.MethodPut, "/socket/{id}", socketPath(s.ID), changed, &out}); err != nil {
		return Socket{}, err
	}
	return d.named(s.Name, out), checkUpdated("PUT /socket/{id}", s.ID, out.Socket)
}

// withTags returns tags with those of more among them, which count where both say something.
func withTags(tags, more map[string]string) map[string]string {
	out := maps.Clone(tags)
	if out == nil {
		return more
	}
	maps.Copy(out, more)
	return out
}

// named is an answer under the name that was asked for; an API may leave display_name out of it.
func (*border0) named(name string, s border0Socket) Socket {
	out := s.ours()
	if s.Name == encodeName(name) {
		out.Name = name
	}
	return out
}

func (d *border0) deleteSocket(ctx context.Context, a asker, id string) error {
	return d.patiently(ctx, a, call{http.MethodDelete, "/socket/{id}", socketPath(id), nil, nil})
}

func (*border0) tunnels(context.Context, asker, string) ([]Tunnel, error) { return nil, nil }

// createTunnel makes an id, so that callers have one; port 0 leaves the choice to the edge.
func (*border0) createTunnel(context.Context, asker, string) (Tunnel, error) {
	id, err := uuid.NewRandom()
	if err != nil {
		return Tunnel{}, err
	}
	return Tunnel{ID: id.String()}, nil
}

func (*border0) deleteTunnel(context.Context, asker, string, string) error { return nil }

func (d *border0) signKey(ctx context.Context, a asker, socketID, _, publicKey string) (SignedKey, error) {
	const endpoint = "/socket/{id}/signkey"
	var out SignedKey
	if err := d.patiently(ctx, a, call{http.MethodPost, endpoint, socketPath(socketID) + "/signkey", signForm{publicKey}, &out}); err != nil {
		return SignedKey{}, err
	}
	return out, checkSigned("POST "+endpoint, out)
}

// patiently asks about one socket. When the API does not know it, it is asked three times more: the socket may be new, made
// by us or by another replica.
func (d *border0) patiently(ctx context.Context, a asker, r call) error {
	err := a.ask(ctx, r)
	for share := time.Duration(1); IsNotFound(err) && share <= 4; share *= 2 {
		if waitErr := d.wait(ctx, d.lagOf(ctx, a)*share/7); waitErr != nil {
			return err
		}
		err = a.ask(ctx, r)
	}
	return err
}

// lagOf is how long the API may take to know of what was just made. It is asked once.
func (d *border0) lagOf(ctx context.Context, a asker) time.Duration {
	d.mu.Lock()
	lag := d.lag
	d.mu.Unlock()
	if lag > 0 {
		return lag
	}
	var info struct {
		Consistency struct {
			Delay int64 `json:"rx_after_tx_delay_ms"`
		} `json:"data_consistency"`
	}
	if err := a.ask(ctx, call{http.MethodGet, "/serverinfo", "/serverinfo", nil, &info}); err != nil {
		return minLag // asked again another time
	}
	lag = min(max(time.Duration(min(max(info.Consistency.Delay, 0), maxLag.Milliseconds()))*time.Millisecond, minLag), maxLag)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.lag = lag
	return lag
}
