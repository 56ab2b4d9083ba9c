package control

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"sync"
)

const (
	maxRequest = 256 << 10
	// MaxPath is how long the path of a control socket may be: an address of the kernel's has 108 bytes, and the socket is made under
	// a longer name.
	MaxPath = 107 - len(newSuffix)

	newSuffix = ".new"
)

// Listen makes the socket, mode 0600. One that an edge which is gone left behind is replaced: the caller must hold the state, so that there is no
// other edge to take it from.
func Listen(path string) (net.Listener, error) {
	// It gets its name only when it has its mode.
	temporary := path + newSuffix
	if err := os.Remove(temporary); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: temporary, Net: "unix"})
	if err != nil {
		return nil, err
	}
	ln.SetUnlinkOnClose(false)
	info, err := os.Lstat(path)
	switch {
	case err == nil && info.Mode().Type() != fs.ModeSocket:
		err = fmt.Errorf("%s is there and no socket", path)
	case err == nil || errors.Is(err, fs.ErrNotExist):
		if err = os.Chmod(temporary, 0o600); err == nil {
			err = os.Rename(temporary, path)
		}
	}
	if err != nil {
		return nil, errors.Join(err, ln.Close(), os.Remove(temporary))
	}
	return &listener{UnixListener: ln, path: path}, nil
}

// listener removes its socket when it is closed.
type listener struct {
	*net.UnixListener
	path string
	once sync.Once
}

func (l *listener) Close() error {
	err := l.UnixListener.Close()
	l.once.Do(func() { err = errors.Join(err, os.Remove(l.path)) })
	return err
}

// Addr is the socket by its final name.
func (l *listener) Addr() net.Addr { return &net.UnixAddr{Name: l.path, Net: "unix"} }

// Handler answers the commands.
func Handler(a Accounts, log *slog.Logger) http.Handler {
	mux := http.NewServeMux()
	handle(mux, log, pathAdd, a.Add)
	handle(mux, log, pathList, func(nothing) ([]User, error) { return a.List() })
	handle(mux, log, pathDelete, func(s subject) (nothing, error) { return nothing{}, a.Delete(s.Email) })
	handle(mux, log, pathPassword, func(s subject) (nothing, error) { return nothing{}, a.SetPassword(s.Email, s.Password) })
	handle(mux, log, pathToken, a.AddToken)
	handle(mux, log, pathTokens, func(nothing) ([]Token, error) { return a.Tokens() })
	handle(mux, log, pathRevoke, func(s subject) (nothing, error) { return nothing{}, a.RevokeToken(s.ID) })
	mux.HandleFunc("GET "+pathBackup, func(w http.ResponseWriter, _ *http.Request) {
		err := a.Backup(w)
		said(log, pathBackup, err)
		if err != nil {
			// What was sent must not look like a whole copy.
			panic(http.ErrAbortHandler)
		}
	})
	return mux
}

func said(log *slog.Logger, path string, err error) {
	if err != nil {
		log.Warn("control command failed", "command", path, "err", err)
		return
	}
	log.Info("control command", "command", path)
}

func handle[In, Out any](mux *http.ServeMux, log *slog.Logger, path string, do func(In) (Out, error)) {
	mux.HandleFunc("POST "+path, func(w http.ResponseWriter, r *http.Request) {
		var in In
		data, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxRequest))
		if err == nil {
			err = json.Unmarshal(data, &in)
		}
		if err != nil {
			answer(w, http.StatusBadRequest, failure{fmt.Sprintf("the request can't be read: %v", err)})
			return
		}
		out, err := do(in)
		said(log, path, err)
		if err != nil {
			answer(w, http.StatusUnprocessableEntity, failure{err.Error()})
			return
		}
		answer(w, http.StatusOK, out)
	})
}

func answer(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(body)
}
