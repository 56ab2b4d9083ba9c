package mysocket

import (
	"context"
	"errors"
	"net/http"
	"net/url"
	"slices"
)

// dialect is one way to speak to an API: all that differs between accounts of the two kinds. Its methods return sockets
// under the names that they were given, whatever the API makes of them.
type dialect interface {
	// login makes a session of an account. stale is a token that was refused, if one was.
	login(ctx context.Context, c *Client, a Account, stale refusedToken) (session, error)
	// base is where the API's paths begin.
	base(configured *url.URL) string
	// authorize puts the token into a request.
	authorize(h http.Header, token string)

	sockets(ctx context.Context, a asker) ([]Socket, error)
	createSocket(ctx context.Context, a asker, s Socket) (Socket, error)
	updateSocket(ctx context.Context, a asker, s Socket) (Socket, error)
	deleteSocket(ctx context.Context, a asker, id string) error

	tunnels(ctx context.Context, a asker, socketID string) ([]Tunnel, error)
	createTunnel(ctx context.Context, a asker, socketID string) (Tunnel, error)
	deleteTunnel(ctx context.Context, a asker, socketID, tunnelID string) error
	signKey(ctx context.Context, a asker, socketID, tunnelID, publicKey string) (SignedKey, error)
}

func checkIDs(op string, list []Socket) error {
	if slices.ContainsFunc(list, func(s Socket) bool { return s.ID == "" }) {
		return errors.New(op + ": the Mysocket API answered with a socket that lacks socket_id")
	}
	return nil
}

func checkCreated(op string, s Socket) error {
	if s.ID == "" || s.DNSName == "" {
		return errors.New(op + ": the Mysocket API answered with a socket that lacks socket_id or dnsname")
	}
	return nil
}

func checkUpdated(op, id string, s Socket) error {
	if s.ID != id || s.DNSName == "" {
		return errors.New(op + ": the Mysocket API answered with another socket, or one that lacks dnsname")
	}
	return nil
}

// signForm is what both dialects ask to be signed.
type signForm struct {
	PublicKey string `json:"ssh_public_key"`
}

func checkSigned(op string, k SignedKey) error {
	if k.Certificate == "" {
		return errors.New(op + ": the Mysocket API answered without signed_ssh_cert")
	}
	return nil
}
