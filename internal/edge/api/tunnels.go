package api

import (
	"net/http"
	"strings"

	"golang.org/x/crypto/ssh"

	"github.com/mysocketio/mysocket-injector/internal/edge/pki"
	"github.com/mysocketio/mysocket-injector/internal/edge/store"
)

type tunnelAnswer struct {
	TunnelID  string `json:"tunnel_id"`
	LocalPort int    `json:"local_port"`
	Server    string `json:"tunnel_server"`
}

func (a *API) answerTunnel(t store.Tunnel) tunnelAnswer {
	return tunnelAnswer{TunnelID: t.ID, LocalPort: t.LocalPort, Server: "ssh." + a.cfg.Domain}
}

func (a *API) answerTunnels(tunnels []store.Tunnel) []tunnelAnswer {
	answers := make([]tunnelAnswer, 0, len(tunnels))
	for _, t := range tunnels {
		answers = append(answers, a.answerTunnel(t))
	}
	return answers
}

// tunnelOf finds the tunnel of the request's path, if it is one of the path's socket and that is the user's.
func (a *API) tunnelOf(r *http.Request, user store.User) (store.Tunnel, error) {
	k, err := a.socketOf(r, user)
	if err != nil {
		return store.Tunnel{}, err
	}
	id := r.PathValue("tunnel")
	if !validID(id) {
		return store.Tunnel{}, store.ErrNotFound
	}
	t, err := a.cfg.Store.Tunnel(id)
	if err != nil {
		return store.Tunnel{}, err
	}
	if t.SocketID != k.ID {
		return store.Tunnel{}, store.ErrNotFound
	}
	return t, nil
}

func (a *API) listTunnels(r *http.Request, user store.User) (any, error) {
	k, err := a.socketOf(r, user)
	if err != nil {
		return nil, err
	}
	return a.answerTunnels(a.cfg.Store.Tunnels(k.ID)), nil
}

func (a *API) createTunnel(r *http.Request, user store.User) (any, error) {
	k, err := a.socketOf(r, user)
	if err != nil {
		return nil, err
	}
	var nothing struct{}
	if err := decode(r, &nothing); err != nil {
		return nil, err
	}
	t, err := a.cfg.Store.CreateTunnel(k.ID)
	if err != nil {
		return nil, err
	}
	return a.answerTunnel(t), nil
}

func (a *API) getTunnel(r *http.Request, user store.User) (any, error) {
	t, err := a.tunnelOf(r, user)
	if err != nil {
		return nil, err
	}
	return a.answerTunnel(t), nil
}

func (a *API) deleteTunnel(r *http.Request, user store.User) (any, error) {
	t, err := a.tunnelOf(r, user)
	if err != nil {
		return nil, err
	}
	_, err = a.cfg.Store.DeleteTunnel(t.ID)
	return nil, err
}

type signAnswer struct {
	Certificate string `json:"signed_ssh_cert"`
	HostKey     string `json:"host_key"`
}

func (a *API) signTunnelKey(r *http.Request, user store.User) (any, error) {
	t, err := a.tunnelOf(r, user)
	if err != nil {
		return nil, err
	}
	return a.sign(r, user, pki.Binding{SocketID: t.SocketID, TunnelID: t.ID})
}

// signSocketKey signs for the socket as a whole, as clients do since late 2022.
func (a *API) signSocketKey(r *http.Request, user store.User) (any, error) {
	k, err := a.socketOf(r, user)
	if err != nil {
		return nil, err
	}
	return a.sign(r, user, pki.Binding{SocketID: k.ID})
}

func (a *API) sign(r *http.Request, user store.User, binding pki.Binding) (any, error) {
	var form struct {
		Key string `json:"ssh_public_key"`
	}
	if err := decode(r, &form); err != nil {
		return nil, err
	}
	key, err := pki.ParsePublicKey(form.Key)
	if err != nil {
		return nil, badRequest("ssh_public_key: %s", err)
	}
	cert, err := a.cfg.Keys.SignTunnel(key, sshUser(user.ID), binding)
	if err != nil {
		return nil, err
	}
	return signAnswer{
		Certificate: strings.TrimSpace(string(ssh.MarshalAuthorizedKey(cert))),
		HostKey:     a.cfg.Keys.HostKeyWire(),
	}, nil
}
