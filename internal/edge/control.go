package edge

import (
	"fmt"
	"log/slog"
	"net/http"
	"time"

	"github.com/mysocketio/mysocket-injector/internal/edge/control"
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
	return &Accounts{store: e.store, passwordCost: e.cfg.PasswordCost}
}
