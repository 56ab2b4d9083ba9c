package mysocket

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"time"
)

// classic is the dialect of 2021 and 2022: one logs in with e-mail and password for a token of some hours, and each way
// to an origin is a tunnel object. Names of sockets are not unique.
type classic struct{}

// loginForm is what one logs in with.
type loginForm struct {
	Email    string `json:"email"`
	Password string `json:"password"`
}

func (classic) base(configured *url.URL) string { return configured.String() }

func (classic) authorize(h http.Header, token string) { h.Set("x-access-token", token) }

func (d *classic) login(ctx context.Context, c *Client, a Account, _ refusedToken) (session, error) {
	var answer struct {
		Token      string `json:"token"`
		RequireMFA bool   `json:"require_mfa"`
	}
	err := c.send(ctx, d, "", call{http.MethodPost, "/login", "/login", loginForm{a.Email, a.Password}, &answer})
	var refused *APIError
	switch {
	case errors.As(err, &refused) && (refused.Status == http.StatusUnauthorized || refused.Status == http.StatusForbidden):
		return session{}, fmt.Errorf("%w: check the e-mail and password in the account's Secret (%w)", ErrCredentials, err)
	case err != nil:
		return session{}, fmt.Errorf("log in: %w", err)
	case answer.RequireMFA:
		return session{}, fmt.Errorf("%w: it asks for a second factor, which only a person has; use an account without one", ErrCredentials)
	}
	t, err := readToken(answer.Token)
	switch {
	case err != nil:
		return session{}, fmt.Errorf("log in: the Mysocket API answered with a token that is %w", err)
	case t.user == "" || t.expires.IsZero():
		return session{}, errors.New("log in: the Mysocket API answered with a token that lacks user_id or exp")
	}
	now := c.now()
	expires := t.expires.Add(-refreshBefore)
	if expires.Before(now) {
		// A token that lives shorter than the margin is used for half of its life; one that seems to have expired is not
		// asked for again before every request, since it may be that the clocks differ.
		expires = now.Add(max(time.Minute, t.expires.Sub(now)/2))
	}
	return session{dialect: d, account: a, token: answer.Token, user: t.user, expires: expires}, nil
}

func (classic) sockets(ctx context.Context, a asker) ([]Socket, error) {
	var out []Socket
	if err := a.ask(ctx, call{http.MethodGet, "/socket", "/socket", nil, &out}); err != nil {
		return nil, err
	}
	return out, checkIDs("GET /socket", out)
}

func (classic) createSocket(ctx context.Context, a asker, s Socket) (Socket, error) {
	var out Socket
	if err := a.ask(ctx, call{http.MethodPost, "/socket", "/socket", s, &out}); err != nil {
		return Socket{}, err
	}
	return out, checkCreated("POST /socket", out)
}

func (classic) updateSocket(ctx context.Context, a asker, s Socket) (Socket, error) {
	var out Socket
	if err := a.ask(ctx, call{http.MethodPut, "/socket/{id}", socketPath(s.ID), s, &out}); err != nil {
		return Socket{}, err
	}
	return out, checkUpdated("PUT /socket/{id}", s.ID, out)
}

func (classic) deleteSocket(ctx context.Context, a asker, id string) error {
	return a.ask(ctx, call{http.MethodDelete, "/socket/{id}", socketPath(id), nil, nil})
}

func (classic) tunnels(ctx context.Context, a asker, socketID string) ([]Tunnel, error) {
	var out []Tunnel
	err := a.ask(ctx, call{http.MethodGet, "/socket/{id}/tunnel", socketPath(socketID) + "/tunnel", nil, &out})
	return out, err
}

func (classic) createTunnel(ctx context.Context, a asker, socketID string) (Tunnel, error) {
	var out Tunnel
	if err := a.ask(ctx, call{http.MethodPost, "/socket/{id}/tunnel", socketPath(socketID) + "/tunnel", struct{}{}, &out}); err != nil {
		return Tunnel{}, err
	}
	if out.ID == "" || out.LocalPort < 0 || out.LocalPort > 65535 {
		return Tunnel{}, errors.New("POST /socket/{id}/tunnel: the Mysocket API answered with a tunnel that lacks tunnel_id or has no valid local_port")
	}
	return out, nil
}

func (classic) deleteTunnel(ctx context.Context, a asker, socketID, tunnelID string) error {
	return a.ask(ctx, call{http.MethodDelete, "/socket/{id}/tunnel/{tid}", tunnelPath(socketID, tunnelID), nil, nil})
}

func (classic) signKey(ctx context.Context, a asker, socketID, tunnelID, publicKey string) (SignedKey, error) {
	const endpoint = "/socket/{id}/tunnel/{tid}/signkey"
	var out SignedKey
	if err := a.ask(ctx, call{http.MethodPost, endpoint, tunnelPath(socketID, tunnelID) + "/signkey", signForm{publicKey}, &out}); err != nil {
		return SignedKey{}, err
	}
	return out, checkSigned("POST "+endpoint, out)
}

func socketPath(id string) string { return "/socket/" + url.PathEscape(id) }

func tunnelPath(socketID, tunnelID string) string {
	return socketPath(socketID) + "/tunnel/" + url.PathEscape(tunnelID)
}
