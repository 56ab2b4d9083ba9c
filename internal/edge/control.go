package edge

import (
	"fmt"
	"log/slog"
	"net/http"
	"time"

	"github.com/mysocketio/mysocket-injector/internal/edge/control"
	"github.com/mysocketio/mysocket-injector/internal/edge/store"
)

// controlTimeout bounds one command, so that a backup which nobody reads does not keep the state file from reusing its pages.
const controlTimeout = 5 * time.Minute

// addControl serves the operator's commands on the control socket, if there is to be one.
func (e *Edge) addControl() error {
	if e.cfg.ControlSocket == "" {
		return nil
	}
	ln, err := control.Listen(e.cfg.ControlSocket)
	if err != nil {
		return fmt.Errorf("listen on control-socket %s: %w", e.cfg.ControlSocket, err)
	}
	log := e.log.With("part", "control")
	e.servers = append(e.servers, &server{name: "control", ln: ln, http: &http.Server{
		Handler:           control.Handler(e.accounts(), log),
		ReadHeaderTimeout: readHeaderTimeout,
		ReadTimeout:       readHeaderTimeout,
		WriteTimeout:      controlTimeout,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}})
	return nil
}

// accounts are the operations on this edge's state.
func (e *Edge) accounts() *Accounts {
	return &Accounts{store: e.store, passwordCost: e.cfg.PasswordCost, deleted: e.userDeleted}
}

// userDeleted ends what a deleted account has open: the ports and tunnels of its sockets, and whoever is logged in with its key.
func (e *Edge) userDeleted(u store.User, sockets []store.Socket) {
	for _, k := range sockets {
		hooks{e}.SocketDeleted(k)
	}
	e.sshd.CloseUser(u.ID)
}
