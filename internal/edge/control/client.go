package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"syscall"
	"time"
)

const (
	dialTimeout = 5 * time.Second
	// patience bounds one command; deleting an account of 10,000 sockets is the longest.
	patience = 5 * time.Minute
	// maxAnswer bounds the lists. An account or a token takes less than 2 KiB.
	maxAnswer = 256 << 20
)

// Client has a running edge do the operations. Make it with Dial.
type Client struct {
	ctx  context.Context //nolint:containedctx // the life of one command
	path string
	http *http.Client
}

var _ Accounts = (*Client)(nil)

// Dial connects to the edge at a control socket. It returns ErrNotRunning if there is none. All that the client does ends with ctx.
func Dial(ctx context.Context, path string) (*Client, error) {
	dialer := net.Dialer{Timeout: dialTimeout}
	conn, err := dialer.DialContext(ctx, "unix", path)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return nil, fmt.Errorf("%w %s", ErrNotRunning, path)
	case err != nil:
		return nil, fmt.Errorf("control socket: %w", err)
	}
	_ = conn.Close()
	transport := &http.Transport{
		DisableKeepAlives: true,
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return dialer.DialContext(ctx, "unix", path) },
	}
	return &Client{ctx: ctx, path: path, http: &http.Client{Transport: transport, Timeout: patience}}, nil
}

func (c *Client) send(method, path string, in any) (*http.Response, error) {
	body, err := json.Marshal(in)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(c.ctx, method, "http://edge"+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, fmt.Errorf("ask the running edge: %w", err)
	}
	if resp.StatusCode == http.StatusOK {
		return resp, nil
	}
	defer func() { _ = resp.Body.Close() }()
	var failed failure
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxRequest)).Decode(&failed); err != nil || failed.Error == "" {
		return nil, fmt.Errorf("the running edge answers %s to %s; is it of another version?", resp.Status, path)
	}
	return nil, errors.New(failed.Error)
}

func call[Out any](c *Client, path string, in any) (out Out, err error) {
	resp, err := c.send(http.MethodPost, path, in)
	if err != nil {
		return out, err
	}
	defer func() { _ = resp.Body.Close() }()
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxAnswer)).Decode(&out); err != nil {
		return out, fmt.Errorf("the running edge's answer to %s can't be read: %w", path, err)
	}
	return out, nil
}

// Add makes an account.
func (c *Client) Add(n NewUser) (User, error) { return call[User](c, pathAdd, n) }

// List returns all accounts.
func (c *Client) List() ([]User, error) { return call[[]User](c, pathList, nothing{}) }

// Delete removes an account.
func (c *Client) Delete(email string) error {
	_, err := call[nothing](c, pathDelete, subject{Email: email})
	return err
}

// SetPassword changes a password.
func (c *Client) SetPassword(email, password string) error {
	_, err := call[nothing](c, pathPassword, subject{Email: email, Password: password})
	return err
}

// AddToken makes an access token.
func (c *Client) AddToken(n NewToken) (string, error) { return call[string](c, pathToken, n) }

// Tokens returns the access tokens.
func (c *Client) Tokens() ([]Token, error) { return call[[]Token](c, pathTokens, nothing{}) }

// RevokeToken ends the use of an access token.
func (c *Client) RevokeToken(id string) error {
	_, err := call[nothing](c, pathRevoke, subject{ID: id})
	return err
}

// Backup writes a copy of the state.
func (c *Client) Backup(w io.Writer) error {
	resp, err := c.send(http.MethodGet, pathBackup, nothing{})
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	if _, err := io.Copy(w, resp.Body); err != nil {
		return fmt.Errorf("the running edge broke the copy off; its log says why: %w", err)
	}
	return nil
}

// Close releases the connection.
func (c *Client) Close() error {
	c.http.CloseIdleConnections()
	return nil
}
