package api

import (
	"errors"
	"fmt"
	"net/http"
	"net/mail"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/golang-jwt/jwt/v5"
	"golang.org/x/crypto/bcrypt"

	"github.com/mysocketio/mysocket-injector/internal/edge/pki"
	"github.com/mysocketio/mysocket-injector/internal/edge/store"
)

const (
	// TokenLifetime is how long a token is good for.
	TokenLifetime = 300 * time.Minute

	maxNameLength  = 256
	maxEmailLength = 254
	minPassword    = 8
	maxPassword    = 72 // bcrypt takes no more
	maxTokenLength = 4096
)

// NewUser is what it takes to make an account.
type NewUser struct {
	Name     string `json:"name"`
	Email    string `json:"email"`
	Password string `json:"password"`
	// SSHKey is optional: a key that may log in without a certificate.
	SSHKey string `json:"sshkey"`
}

// AddUser checks and stores a new account. cost is that of bcrypt, its default if 0. Errors are sentences for whoever
// asked for it.
func AddUser(st *store.Store, n NewUser, cost int) (store.User, error) {
	if err := checkText("name", n.Name, maxNameLength); err != nil {
		return store.User{}, err
	}
	email := strings.TrimSpace(n.Email)
	if addr, err := mail.ParseAddress(email); err != nil || addr.Address != email || len(email) > maxEmailLength {
		return store.User{}, badRequest("email %q is not an address such as you@example.com", truncate(email, 100))
	}
	key := strings.TrimSpace(n.SSHKey)
	if key != "" {
		if _, err := pki.ParsePublicKey(key); err != nil {
			return store.User{}, badRequest("sshkey: %s", err)
		}
	}
	hash, err := hashPassword(n.Password, cost)
	if err != nil {
		return store.User{}, err
	}
	u, err := st.AddUser(store.User{Name: n.Name, Email: email, PasswordHash: hash, SSHKey: key})
	if errors.Is(err, store.ErrExists) {
		return store.User{}, refuse(http.StatusConflict, "there is an account for %s already", email)
	}
	return u, err
}

// checkText accepts printable text, which may be empty, of bounded length.
func checkText(field, s string, limit int) error {
	if utf8.RuneCountInString(s) > limit {
		return badRequest("%s is longer than %d characters", field, limit)
	}
	if !utf8.ValidString(s) || strings.ContainsFunc(s, unicode.IsControl) {
		return badRequest("%s must not hold control characters", field)
	}
	return nil
}

type userAnswer struct {
	Name         string             `json:"name"`
	Email        string             `json:"email"`
	UserID       string             `json:"user_id"`
	UserName     string             `json:"user_name"`
	SSHKey       string             `json:"sshkey"`
	Organization organizationAnswer `json:"primary_organization"`
}

type organizationAnswer struct {
	ID           string            `json:"id"`
	Name         string            `json:"name"`
	Certificates map[string]string `json:"certificate,omitempty"`
}

func answerUser(u store.User) userAnswer {
	return userAnswer{Name: u.Name, Email: u.Email, UserID: u.ID, UserName: sshUser(u.ID), SSHKey: u.SSHKey, Organization: organizationOf(u)}
}

// organizationOf is the organization of an account. Each account is one of its own here.
func organizationOf(u store.User) organizationAnswer {
	return organizationAnswer{ID: u.ID, Name: u.Email}
}

func (a *API) register(r *http.Request, _ store.User) (any, error) {
	if !a.cfg.AllowRegistration {
		return nil, refuse(http.StatusForbidden, "this edge takes no registrations; its operator makes accounts with \"mysocket-edge user add\"")
	}
	var n NewUser
	if err := decode(r, &n); err != nil {
		return nil, err
	}
	attempt, err := a.logins.addresses.begin(hostOf(r.RemoteAddr).String())
	if err != nil {
		return nil, err
	}
	defer attempt.failed() // An account costs as much as a wrong password.
	release, err := a.hashSlot(r)
	if err != nil {
		return nil, err
	}
	defer release()
	u, err := AddUser(a.cfg.Store, n, a.cfg.PasswordCost)
	if err != nil {
		return nil, err
	}
	return answerUser(u), nil
}

func (a *API) hashSlot(r *http.Request) (release func(), err error) {
	select {
	case a.hashing <- struct{}{}:
		return func() { <-a.hashing }, nil
	case <-r.Context().Done():
		return nil, r.Context().Err()
	}
}

// noSuchUserHash has bcrypt's default cost, and nobody knows its password.
var noSuchUserHash = []byte("$2a$10$JQprG2JK.qoY3pvxdRu5pusvgeyfJ0meT3ARa.OHshSKtRtx4qyXK")

func (a *API) login(r *http.Request, _ store.User) (any, error) {
	var form struct {
		Email    string `json:"email"`
		Password string `json:"password"`
	}
	if err := decode(r, &form); err != nil {
		return nil, err
	}
	address, err := a.logins.addresses.begin(hostOf(r.RemoteAddr).String())
	if err != nil {
		return nil, err
	}
	u, unknown := a.cfg.Store.UserByEmail(form.Email)
	hash := u.PasswordHash
	var account *attempt
	if unknown != nil {
		hash = a.noSuchUser
		account, err = a.logins.noAccount(form.Email)
	} else {
		account, err = a.logins.account(u.ID, r.RemoteAddr)
	}
	if err != nil {
		address.succeeded() // It is not this address that failed too often.
		return nil, err
	}
	release, err := a.hashSlot(r)
	if err != nil {
		address.failed()
		account.failed()
		return nil, err
	}
	defer release()
	if bcrypt.CompareHashAndPassword(hash, []byte(form.Password)) != nil || unknown != nil {
		address.failed()
		account.failed()
		a.cfg.Log.Warn("login failed", "remote", r.RemoteAddr)
		return nil, refuse(http.StatusUnauthorized, "wrong e-mail address or password")
	}
	address.succeeded()
	account.succeeded()
	a.logins.welcome(u.ID, r.RemoteAddr)
	return a.token(u)
}

type tokenAnswer struct {
	Token      string `json:"token"`
	RequireMFA bool   `json:"require_mfa"`
}

type claims struct {
	UserID string `json:"user_id"`
	Email  string `json:"user_email"`
	jwt.RegisteredClaims
}

func (a *API) token(u store.User) (any, error) {
	now := a.cfg.Now()
	token, err := jwt.NewWithClaims(jwt.SigningMethodHS256, claims{
		UserID: u.ID, Email: u.Email,
		RegisteredClaims: jwt.RegisteredClaims{IssuedAt: jwt.NewNumericDate(now), ExpiresAt: jwt.NewNumericDate(now.Add(TokenLifetime))},
	}).SignedString(a.cfg.Keys.TokenKey)
	if err != nil {
		return nil, fmt.Errorf("sign token: %w", err)
	}
	return tokenAnswer{Token: token}, nil
}

func tokenOf(r *http.Request) string {
	token := r.Header.Get("X-Access-Token")
	if token == "" {
		token, _ = strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	}
	return token
}

// authenticate finds the account of a request's token.
func (a *API) authenticate(r *http.Request) (store.User, error) {
	token := tokenOf(r)
	unauthorized := refuse(http.StatusUnauthorized, "no valid token; log in first")
	if token == "" || len(token) > maxTokenLength {
		return store.User{}, unauthorized
	}
	var c claims
	_, err := jwt.ParseWithClaims(token, &c, func(*jwt.Token) (any, error) { return a.cfg.Keys.TokenKey, nil },
		jwt.WithValidMethods([]string{jwt.SigningMethodHS256.Alg()}), jwt.WithExpirationRequired(), jwt.WithTimeFunc(a.cfg.Now))
	if err != nil {
		return store.User{}, unauthorized
	}
	u, err := a.cfg.Store.User(c.UserID)
	if err != nil || outdated(c.IssuedAt, u) {
		return store.User{}, unauthorized
	}
	return u, nil
}

func (a *API) refresh(_ *http.Request, user store.User) (any, error) { return a.token(user) }

func (a *API) getUser(r *http.Request, user store.User) (any, error) {
	if r.PathValue("id") != user.ID {
		return nil, store.ErrNotFound
	}
	return answerUser(user), nil
}

func (a *API) getOrganization(_ *http.Request, user store.User) (any, error) {
	org := organizationOf(user)
	org.Certificates = map[string]string{
		"mtls_certificate": string(a.cfg.Keys.CAPEM),
		"ssh_public_key":   a.cfg.Keys.SSHCALine(),
	}
	return org, nil
}
