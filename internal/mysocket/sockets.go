package mysocket

import (
	"context"
	"fmt"
	"sync"
	"time"
)

// listCache keeps the last list of sockets, so that many reconciles cost one request.
type listCache struct {
	fetching lock // held during the request: whoever comes meanwhile would ask the same

	mu      sync.Mutex
	sockets []Socket
	account Account   // whose they are
	asked   time.Time // when; zero for never
	changes int       // how often the list was forgotten
}

// Sockets lists the account's sockets. An answer at most maxAge old is reused; zero always asks. The caller must not
// change what is returned.
func (c *Client) Sockets(ctx context.Context, maxAge time.Duration) ([]Socket, error) {
	l := &c.list
	if err := l.fetching.acquire(ctx); err != nil {
		return nil, fmt.Errorf("list the sockets: wait for the request that is under way: %w", err)
	}
	defer l.fetching.release()
	asked := c.now()
	l.mu.Lock()
	sockets, account, age, changes := l.sockets, l.account, asked.Sub(l.asked), l.changes
	l.mu.Unlock()
	if maxAge > 0 && age <= maxAge {
		if now, err := c.cfg.Credentials(); err != nil || now == account {
			return sockets, nil
		}
	}
	var out []Socket
	if err := c.in(ctx, func(d dialect, a asker) (err error) {
		account = a.session.account
		out, err = d.sockets(ctx, a)
		return err
	}); err != nil {
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.changes == changes { // else it may be of before the change
		l.sockets, l.account, l.asked = out, account, asked
	}
	return out, nil
}

func (c *Client) forgetList() {
	c.list.mu.Lock()
	defer c.list.mu.Unlock()
	c.list.sockets, c.list.account, c.list.asked = nil, Account{}, time.Time{}
	c.list.changes++
}

// CreateSocket makes a new socket. An API of the classic dialect makes a second one of the same name without a word: list
// first. One of the border0 dialect, where names are unique, has the socket of that name brought in line and returned.
func (c *Client) CreateSocket(ctx context.Context, s Socket) (Socket, error) {
	defer c.forgetList()
	return result(ctx, c, func(d dialect, a asker) (Socket, error) { return d.createSocket(ctx, a, s) })
}

// UpdateSocket replaces the socket's settings and returns the socket as it then is.
func (c *Client) UpdateSocket(ctx context.Context, s Socket) (Socket, error) {
	defer c.forgetList()
	return result(ctx, c, func(d dialect, a asker) (Socket, error) { return d.updateSocket(ctx, a, s) })
}

// DeleteSocket deletes a socket with its tunnels. Deleting one that is gone is no error.
func (c *Client) DeleteSocket(ctx context.Context, id string) error {
	defer c.forgetList()
	return unlessNotFound(c.in(ctx, func(d dialect, a asker) error { return d.deleteSocket(ctx, a, id) }))
}

// Tunnels lists the tunnels of a socket; none in the border0 dialect, which has no such objects.
func (c *Client) Tunnels(ctx context.Context, socketID string) ([]Tunnel, error) {
	return result(ctx, c, func(d dialect, a asker) ([]Tunnel, error) { return d.tunnels(ctx, a, socketID) })
}

// CreateTunnel makes one more tunnel of a socket. In the border0 dialect that is an id and nothing more: what registers an
// origin is its login with a signed key.
func (c *Client) CreateTunnel(ctx context.Context, socketID string) (Tunnel, error) {
	return result(ctx, c, func(d dialect, a asker) (Tunnel, error) { return d.createTunnel(ctx, a, socketID) })
}

// DeleteTunnel deletes a tunnel; its connection, if any, ends. Deleting one that is gone is no error. In the border0
// dialect there is nothing to delete, and a connection is ended only by its client or with the socket.
func (c *Client) DeleteTunnel(ctx context.Context, socketID, tunnelID string) error {
	return unlessNotFound(c.in(ctx, func(d dialect, a asker) error { return d.deleteTunnel(ctx, a, socketID, tunnelID) }))
}

// SignKey has the edge's CA sign an SSH public key (one line in authorized_keys form) for one tunnel; in the border0
// dialect for the socket as a whole.
func (c *Client) SignKey(ctx context.Context, socketID, tunnelID, publicKey string) (SignedKey, error) {
	return result(ctx, c, func(d dialect, a asker) (SignedKey, error) { return d.signKey(ctx, a, socketID, tunnelID, publicKey) })
}

// result is in, for what returns something. With an error there is nothing.
func result[T any](ctx context.Context, c *Client, do func(dialect, asker) (T, error)) (T, error) {
	var out, none T
	err := c.in(ctx, func(d dialect, a asker) (err error) {
		out, err = do(d, a)
		return err
	})
	if err != nil {
		return none, err
	}
	return out, nil
}

func unlessNotFound(err error) error {
	if IsNotFound(err) {
		return nil
	}
	return err
}
