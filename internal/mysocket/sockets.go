package mysocket

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"sync"
	"time"
)

// listCache keeps the last list of sockets, so that many reconciles cost one request.
type listCache struct {
	fetching lock // held during the request: whoever comes meanwhile would ask the same

	mu      sync.Mutex
	sockets []Socket
	asked   time.Time // when; zero for never
	changes int       // how often the list was forgotten
}

// Sockets lists the account's sockets. An answer at most maxAge old is reused; zero always asks. The caller must not
// change what is returned.
func (c *Client) Sockets(ctx context.Context, maxAge time.Duration) ([]Socket, error) {
	l := &c.list
	if err := l.fetching.acquire(ctx); err != nil {
		return nil, fmt.Errorf("GET /socket: wait for the request that is under way: %w", err)
	}
	defer l.fetching.release()
	asked := c.now()
	l.mu.Lock()
	sockets, age, changes := l.sockets, asked.Sub(l.asked), l.changes
	l.mu.Unlock()
	if maxAge > 0 && age <= maxAge {
		return sockets, nil
	}
	var out []Socket
	if err := c.do(ctx, http.MethodGet, "/socket", "/socket", nil, &out); err != nil {
		return nil, err
	}
	if slices.ContainsFunc(out, func(s Socket) bool { return s.ID == "" }) {
		return nil, errors.New("GET /socket: the Mysocket API answered with a socket that lacks socket_id")
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.changes == changes { // else it may be of before the change
		l.sockets, l.asked = out, asked
	}
	return out, nil
}

func (c *Client) forgetList() {
	c.list.mu.Lock()
	defer c.list.mu.Unlock()
	c.list.sockets, c.list.asked = nil, time.Time{}
	c.list.changes++
}

// CreateSocket makes a new socket. The API makes a second one of the same name without a word: list first.
func (c *Client) CreateSocket(ctx context.Context, s Socket) (Socket, error) {
	defer c.forgetList()
	var out Socket
	if err := c.do(ctx, http.MethodPost, "/socket", "/socket", s, &out); err != nil {
		return Socket{}, err
	}
	if out.ID == "" || out.DNSName == "" {
		return Socket{}, errors.New("POST /socket: the Mysocket API answered with a socket that lacks socket_id or dnsname")
	}
	return out, nil
}

// UpdateSocket replaces the socket's settings and returns the socket as it then is.
func (c *Client) UpdateSocket(ctx context.Context, s Socket) (Socket, error) {
	defer c.forgetList()
	var out Socket
	if err := c.do(ctx, http.MethodPut, "/socket/{id}", "/socket/"+url.PathEscape(s.ID), s, &out); err != nil {
		return Socket{}, err
	}
	if out.ID != s.ID || out.DNSName == "" {
		return Socket{}, errors.New("PUT /socket/{id}: the Mysocket API answered with another socket, or one that lacks dnsname")
	}
	return out, nil
}

// DeleteSocket deletes a socket with its tunnels. Deleting one that is gone is no error.
func (c *Client) DeleteSocket(ctx context.Context, id string) error {
	defer c.forgetList()
	err := c.do(ctx, http.MethodDelete, "/socket/{id}", "/socket/"+url.PathEscape(id), nil, nil)
	if IsNotFound(err) {
		return nil
	}
	return err
}

// Tunnels lists the tunnels of a socket.
func (c *Client) Tunnels(ctx context.Context, socketID string) ([]Tunnel, error) {
	var out []Tunnel
	err := c.do(ctx, http.MethodGet, "/socket/{id}/tunnel", "/socket/"+url.PathEscape(socketID)+"/tunnel", nil, &out)
	return out, err
}

// CreateTunnel makes one more tunnel of a socket.
func (c *Client) CreateTunnel(ctx context.Context, socketID string) (Tunnel, error) {
	var out Tunnel
	if err := c.do(ctx, http.MethodPost, "/socket/{id}/tunnel", "/socket/"+url.PathEscape(socketID)+"/tunnel", struct{}{}, &out); err != nil {
		return Tunnel{}, err
	}
	if out.ID == "" || out.LocalPort < 0 || out.LocalPort > 65535 {
		return Tunnel{}, errors.New("POST /socket/{id}/tunnel: the Mysocket API answered with a tunnel that lacks tunnel_id or has no valid local_port")
	}
	return out, nil
}

// DeleteTunnel deletes a tunnel; its connection, if any, ends. Deleting one that is gone is no error.
func (c *Client) DeleteTunnel(ctx context.Context, socketID, tunnelID string) error {
	err := c.do(ctx, http.MethodDelete, "/socket/{id}/tunnel/{tid}", "/socket/"+url.PathEscape(socketID)+"/tunnel/"+url.PathEscape(tunnelID), nil, nil)
	if IsNotFound(err) {
		return nil
	}
	return err
}

// SignKey has the edge's CA sign an SSH public key (one line in authorized_keys form) for one tunnel.
func (c *Client) SignKey(ctx context.Context, socketID, tunnelID, publicKey string) (SignedKey, error) {
	var out SignedKey
	err := c.do(ctx, http.MethodPost, "/socket/{id}/tunnel/{tid}/signkey",
		"/socket/"+url.PathEscape(socketID)+"/tunnel/"+url.PathEscape(tunnelID)+"/signkey", map[string]string{"ssh_public_key": publicKey}, &out)
	if err == nil && out.Certificate == "" {
		err = errors.New("POST /socket/{id}/tunnel/{tid}/signkey: the Mysocket API answered without signed_ssh_cert")
	}
	return out, err
}
