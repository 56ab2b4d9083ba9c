package edge

import (
	"errors"
	"fmt"
	"io"

	"github.com/mysocketio/mysocket-injector/internal/edge/api"
	"github.com/mysocketio/mysocket-injector/internal/edge/control"
	"github.com/mysocketio/mysocket-injector/internal/edge/pki"
	"github.com/mysocketio/mysocket-injector/internal/edge/store"
)

// The operator's view of accounts and access tokens.
type (
	// NewUser is what it takes to make an account.
	NewUser = control.NewUser
	// User is an account.
	User = control.User
	// NewToken is what it takes to make an access token.
	NewToken = control.NewToken
	// Token is an access token without what makes it one.
	Token = control.Token
)

// Accounts manages the accounts of a state: of a file that no edge is using, of an etcd that edges share, or a running edge's own.
type Accounts struct {
	store *store.Store
	// passwordCost is bcrypt's; its default if 0.
	passwordCost int
}

var _ control.Accounts = (*Accounts)(nil)

// OpenAccounts opens a state file. It fails with a sentence when a running edge holds it.
func OpenAccounts(path string) (*Accounts, error) {
	st, err := store.Open(path, nil)
	if err != nil {
		return nil, err
	}
	return &Accounts{store: st}, nil
}

// Close releases the file.
func (a *Accounts) Close() error { return a.store.Close() }

// Add makes an account. Errors are sentences for whoever asked for it.
func (a *Accounts) Add(n NewUser) (User, error) { return addUser(a.store, n, a.passwordCost) }

// List returns all accounts, oldest first.
func (a *Accounts) List() ([]User, error) { return a.users(), nil }

func (a *Accounts) users() []User {
	var out []User
	for _, u := range a.store.Users() {
		out = append(out, userOf(a.store, u))
	}
	return out
}

// SetPassword changes a password. Tokens that a login with an earlier one gave are good no longer.
func (a *Accounts) SetPassword(email, password string) error {
	u, err := a.store.UserByEmail(email)
	if err != nil {
		return fmt.Errorf("there is no account for %q: %w", email, err)
	}
	return api.SetPassword(a.store, u.ID, password, a.passwordCost)
}

// Backup writes a copy of the state file as it is at one moment.
func (a *Accounts) Backup(w io.Writer) error { return a.store.Backup(w) }

// AddToken makes an access token and returns it. It is kept nowhere. Errors are sentences for whoever asked for it.
func (a *Accounts) AddToken(n NewToken) (string, error) {
	key, err := pki.LoadTokenKey(a.store)
	if err != nil {
		return "", err
	}
	return addToken(a.store, key, n)
}

// Tokens returns the access tokens of all accounts, by account and then oldest first.
func (a *Accounts) Tokens() ([]Token, error) { return a.tokens(), nil }

func (a *Accounts) tokens() []Token {
	var out []Token
	for _, u := range a.store.Users() {
		for _, t := range a.store.AccessTokens(u.ID) {
			out = append(out, Token{ID: t.ID, Email: u.Email, Name: t.Name, Created: t.Created, Expires: t.Expires})
		}
	}
	return out
}

// RevokeToken ends the use of an access token.
func (a *Accounts) RevokeToken(id string) error {
	if err := a.store.DeleteAccessToken(id); errors.Is(err, store.ErrNotFound) {
		return fmt.Errorf("there is no access token with the id %q: %w", id, err)
	} else if err != nil {
		return err
	}
	return nil
}

func addToken(st *store.Store, tokenKey []byte, n NewToken) (string, error) {
	u, err := st.UserByEmail(n.Email)
	if err != nil {
		return "", fmt.Errorf("there is no account for %q: %w", n.Email, err)
	}
	token, _, err := api.AddAccessToken(st, tokenKey, u.ID, n.Name, n.Lifetime)
	return token, err
}

// Delete removes the account with the e-mail address, and all its sockets, tunnels and access tokens.
func (a *Accounts) Delete(email string) error {
	u, err := a.store.UserByEmail(email)
	if err != nil {
		return fmt.Errorf("there is no account for %q: %w", email, err)
	}
	return a.store.DeleteUser(u.ID)
}

func addUser(st *store.Store, n NewUser, cost int) (User, error) {
	u, err := api.AddUser(st, api.NewUser{Name: n.Name, Email: n.Email, Password: n.Password, SSHKey: n.SSHKey}, cost)
	if err != nil {
		return User{}, err
	}
	return userOf(st, u), nil
}

func userOf(st *store.Store, u store.User) User {
	return User{ID: u.ID, Name: u.Name, Email: u.Email, Created: u.Created, Sockets: len(st.Sockets(u.ID))}
}
