package sshd

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/google/uuid"
	"golang.org/x/crypto/ssh"

	"github.com/mysocketio/mysocket-injector/internal/edge/pki"
	"github.com/mysocketio/mysocket-injector/internal/edge/store"
)

// login is who a connection is and what it may serve. An empty socketID is a login with the account's registered
// key, which may serve any tunnel of the account; an empty tunnelID with a socketID any tunnel of that socket.
type login struct {
	user     store.User
	socketID string
	tunnelID string
}

// loginKey finds the login in the permissions of an SSH connection.
type loginKey struct{}

func (s *Server) authenticate(conn ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
	l, err := s.login(conn, key)
	if err != nil {
		return nil, err
	}
	return &ssh.Permissions{ExtraData: map[any]any{loginKey{}: l}}, nil
}

func (s *Server) login(conn ssh.ConnMetadata, key ssh.PublicKey) (*login, error) {
	id, err := userID(conn.User())
	if err != nil {
		return nil, err
	}
	user, err := s.cfg.Store.User(id)
	if err != nil {
		return nil, errors.New("no such user")
	}
	cert, isCert := key.(*ssh.Certificate)
	if !isCert {
		return loginWithKey(user, key)
	}
	binding, err := s.cfg.Keys.CheckTunnelCert(conn, cert)
	if err != nil {
		return nil, err
	}
	l := &login{user: user, socketID: binding.SocketID, tunnelID: binding.TunnelID}
	return l, s.stillThere(l)
}

func loginWithKey(user store.User, key ssh.PublicKey) (*login, error) {
	if user.SSHKey == "" {
		return nil, errors.New("the account has no registered key")
	}
	registered, err := pki.ParsePublicKey(user.SSHKey)
	if err != nil {
		return nil, fmt.Errorf("registered key: %w", err)
	}
	if !bytes.Equal(registered.Marshal(), key.Marshal()) {
		return nil, errors.New("not the registered key")
	}
	return &login{user: user}, nil
}

// stillThere refuses a login for what was deleted after its certificate was signed.
func (s *Server) stillThere(l *login) error {
	if _, err := s.cfg.Store.User(l.user.ID); err != nil {
		return err
	}
	if l.socketID == "" {
		return nil
	}
	socket, err := s.cfg.Store.Socket(l.socketID)
	if err != nil {
		return err
	}
	if socket.UserID != l.user.ID {
		return fmt.Errorf("socket %s: %w", l.socketID, store.ErrNotFound)
	}
	if l.tunnelID == "" {
		return nil
	}
	tunnel, err := s.cfg.Store.Tunnel(l.tunnelID)
	if err != nil {
		return err
	}
	if tunnel.SocketID != l.socketID {
		return fmt.Errorf("tunnel %s: %w", l.tunnelID, store.ErrNotFound)
	}
	return nil
}

// userID turns an SSH user name, the account's id without dashes, into the id.
func userID(name string) (string, error) {
	if len(name) != 32 {
		return "", errors.New("the user name is not a user id without dashes")
	}
	id, err := uuid.Parse(name)
	if err != nil {
		return "", errors.New("the user name is not a user id without dashes")
	}
	return id.String(), nil
}
