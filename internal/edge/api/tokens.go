package api

import (
	"crypto/hmac"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/golang-jwt/jwt/v5"

	"github.com/mysocketio/mysocket-injector/internal/edge/store"
)

// maxTokenLifetime is about as long as the edge's own authority lives.
const maxTokenLifetime = 10 * 365 * 24 * time.Hour

// AddAccessToken makes an access token of an account, good for the lifetime, or until it is revoked if that is zero.
// tokenKey is the edge's. The token is returned here and kept nowhere. Errors are sentences for whoever asked for it.
func AddAccessToken(st *store.Store, tokenKey []byte, userID, name string, lifetime time.Duration) (token string, t store.AccessToken, err error) {
	if err := checkText("name", name, maxNameLength); err != nil {
		return "", store.AccessToken{}, err
	}
	if lifetime < 0 || lifetime > maxTokenLifetime || lifetime > 0 && lifetime < time.Second {
		return "", store.AccessToken{}, badRequest("the lifetime %s is not within 1s and %s; 0 is for ever", lifetime, maxTokenLifetime)
	}
	u, err := st.User(userID)
	if err != nil {
		return "", store.AccessToken{}, err
	}
	t, err = st.AddAccessToken(store.AccessToken{UserID: userID, Name: name}, lifetime)
	if err != nil {
		return "", store.AccessToken{}, err
	}
	c := claims{UserID: u.ID, Email: u.Email, RegisteredClaims: jwt.RegisteredClaims{ID: t.ID, IssuedAt: jwt.NewNumericDate(t.Created)}}
	if !t.Expires.IsZero() {
		c.ExpiresAt = jwt.NewNumericDate(t.Expires)
	}
	token, err = jwt.NewWithClaims(jwt.SigningMethodHS256, c).SignedString(accessTokenKey(tokenKey))
	if err != nil {
		return "", store.AccessToken{}, errors.Join(fmt.Errorf("sign access token: %w", err), st.DeleteAccessToken(t.ID))
	}
	return token, t, nil
}

// accessTokenKey signs access tokens. It is not the key of the tokens that a login gives, so that neither is good for the
// other's paths: an access token that was revoked must not live on in what it was exchanged for.
func accessTokenKey(tokenKey []byte) []byte {
	mac := hmac.New(sha256.New, tokenKey)
	_, _ = mac.Write([]byte("access tokens"))
	return mac.Sum(nil)
}

// authenticateAccess finds the account of a request's access token.
func (a *API) authenticateAccess(r *http.Request) (store.User, error) {
	token := tokenOf(r)
	unauthorized := refuse(http.StatusUnauthorized, "no valid access token; the edge's operator makes them with \"mysocket-edge token create\"")
	if token == "" || len(token) > maxTokenLength {
		return store.User{}, unauthorized
	}
	var c claims
	_, err := jwt.ParseWithClaims(token, &c, func(*jwt.Token) (any, error) { return accessTokenKey(a.cfg.Keys.TokenKey), nil },
		jwt.WithValidMethods([]string{jwt.SigningMethodHS256.Alg()}), jwt.WithTimeFunc(a.cfg.Now))
	if err != nil {
		return store.User{}, unauthorized
	}
	t, err := a.cfg.Store.AccessToken(c.ID)
	if err != nil || t.UserID != c.UserID || !t.Expires.IsZero() && !a.cfg.Now().Before(t.Expires) {
		return store.User{}, unauthorized
	}
	u, err := a.cfg.Store.User(t.UserID)
	if err != nil {
		return store.User{}, unauthorized
	}
	return u, nil
}
