// Package control is how the operator's commands reach a running edge: HTTP over a Unix socket that only the edge's own account and
// root may connect to. It has the same operations as the state that no edge holds, so that a command need not know which it talks
// to. It must not know how they are done, nor ask who calls: the socket's mode has said that.
package control

import (
	"errors"
	"io"
	"time"
)

// NewUser is what it takes to make an account. The SSH key is optional.
type NewUser struct {
	Name     string `json:"name"`
	Email    string `json:"email"`
	Password string `json:"password"`
	SSHKey   string `json:"sshKey"`
}

// User is an account.
type User struct {
	ID      string    `json:"id"`
	Name    string    `json:"name"`
	Email   string    `json:"email"`
	Created time.Time `json:"created"`
	// Sockets counts what it has.
	Sockets int `json:"sockets"`
}

// NewToken is what it takes to make an access token.
type NewToken struct {
	// Email is that of the account.
	Email string `json:"email"`
	Name  string `json:"name"`
	// Lifetime is how long it is good; for ever if zero.
	Lifetime time.Duration `json:"lifetime"`
}

// Token is an access token without what makes it one.
type Token struct {
	ID      string    `json:"id"`
	Email   string    `json:"email"`
	Name    string    `json:"name"`
	Created time.Time `json:"created"`
	// Expires is zero when it never does.
	Expires time.Time `json:"expires,omitzero"`
}

// Accounts are the operations. Their errors are sentences for whoever asked.
type Accounts interface {
	// Add makes an account.
	Add(NewUser) (User, error)
	// List returns all accounts, oldest first.
	List() ([]User, error)
	// Delete removes an account with all its sockets, tunnels and access tokens, and ends its tunnels.
	Delete(email string) error
	// SetPassword changes a password. Tokens that a login with an earlier one gave are good no longer.
	SetPassword(email, password string) error
	// AddToken makes an access token and returns it. It is kept nowhere.
	AddToken(NewToken) (string, error)
	// Tokens returns the access tokens of all accounts, by account and then oldest first.
	Tokens() ([]Token, error)
	// RevokeToken ends the use of an access token.
	RevokeToken(id string) error
	// Backup writes a copy of the state as it is at one moment.
	Backup(io.Writer) error
}

// ErrNotRunning means that nobody listens on the control socket.
var ErrNotRunning = errors.New("no edge listens on the control socket")

// The paths of the operations.
const (
	pathAdd      = "/v1/user/add"
	pathList     = "/v1/user/list"
	pathDelete   = "/v1/user/delete"
	pathPassword = "/v1/user/password" // #nosec G101 -- a path
	pathToken    = "/v1/token/create"  // #nosec G101 -- a path
	pathTokens   = "/v1/token/list"    // #nosec G101 -- a path
	pathRevoke   = "/v1/token/revoke"  // #nosec G101 -- a path
	pathBackup   = "/v1/backup"
)

// subject names an account or a token, and for a new password also that.
type subject struct {
	Email    string `json:"email,omitempty"`
	Password string `json:"password,omitempty"`
	ID       string `json:"id,omitempty"`
}

// nothing is asked or answered where there is nothing to say.
type nothing struct{}

// failure is the body of an answer that is no success.
type failure struct {
	Error string `json:"error"`
}
