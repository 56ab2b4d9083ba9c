package edge

import (
	"fmt"
	"time"

	"github.com/mysocketio/mysocket-injector/internal/edge/api"
	"github.com/mysocketio/mysocket-injector/internal/edge/store"
)

// NewUser is what it takes to make an account. The SSH key is optional.
type NewUser struct {
	Name, Email, Password, SSHKey string
}

// User is an account.
type User struct {
	ID, Name, Email string
	Created         time.Time
	// Sockets counts what it has.
	Sockets int
}

// Accounts manages the accounts in a state file that no edge is using.
type Accounts struct{ store *store.Store }

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
func (a *Accounts) Add(n NewUser) (User, error) { return addUser(a.store, n, 0) }

// List returns all accounts, oldest first.
func (a *Accounts) List() []User {
	var out []User
	for _, u := range a.store.Users() {
		out = append(out, userOf(a.store, u))
	}
	return out
}

// Delete removes the account with the e-mail address, and all its sockets and tunnels.
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
