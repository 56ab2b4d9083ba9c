package api

import (
	"fmt"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"golang.org/x/crypto/bcrypt"

	"github.com/mysocketio/mysocket-injector/internal/edge/store"
)

// hashPassword checks and hashes a password. cost is that of bcrypt, its default if 0.
func hashPassword(password string, cost int) ([]byte, error) {
	if cost == 0 {
		cost = bcrypt.DefaultCost
	}
	if len(password) < minPassword || len(password) > maxPassword {
		return nil, badRequest("the password has %d bytes; it must have %d to %d", len(password), minPassword, maxPassword)
	}
	hash, err := bcrypt.GenerateFromPassword([]byte(password), cost)
	if err != nil {
		return nil, fmt.Errorf("hash password: %w", err)
	}
	return hash, nil
}

// SetPassword changes the password of an account. Errors are sentences for whoever asked for it.
func SetPassword(st *store.Store, userID, password string, cost int) error {
	hash, err := hashPassword(password, cost)
	if err != nil {
		return err
	}
	_, err = st.UpdateUser(userID, func(u *store.User) { u.PasswordHash = hash })
	return err
}

// outdated says whether a token was given for a password that has been changed since. Tokens have their time in whole seconds, so one of the
// very second of the change passes.
func outdated(issued *jwt.NumericDate, u store.User) bool {
	return !u.PasswordChanged.IsZero() && (issued == nil || issued.Before(u.PasswordChanged.Truncate(time.Second)))
}
