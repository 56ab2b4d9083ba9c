package edge

import (
	"context"
	"fmt"
	"net/http"
	"time"
)

// What an edge does at its start and its end so that whoever sends visitors to several edges, by their /healthz, sends them to one that has
// the tunnels.

// MaxTurn is the longest that StartupWait and ShutdownDelay may be.
const MaxTurn = 10 * time.Minute

// tunnelsCheck is how often it is looked whether all sockets have a tunnel.
const tunnelsCheck = 50 * time.Millisecond

func (c *Config) validateTurn() error {
	for _, d := range []struct {
		name  string
		value time.Duration
	}{{"startup-wait", c.StartupWait}, {"shutdown-delay", c.ShutdownDelay}} {
		if d.value < 0 || d.value > MaxTurn {
			return fmt.Errorf("%s is %s; allowed are 0s to %s", d.name, d.value, MaxTurn)
		}
	}
	return nil
}

// becomeReady returns when visitors may come: when every socket has a tunnel here, or StartupWait or ctx is over.
func (e *Edge) becomeReady(ctx context.Context) {
	if e.cfg.StartupWait > 0 {
		e.log.Info("waiting for tunnels", "limit", e.cfg.StartupWait)
		limit := time.NewTimer(e.cfg.StartupWait)
		defer limit.Stop()
		tick := time.NewTicker(tunnelsCheck)
		defer tick.Stop()
		for waiting := true; waiting && e.socketsWithoutTunnel() > 0; {
			select {
			case <-ctx.Done():
				return
			case <-limit.C:
				e.log.Warn("there are sockets without a tunnel still; not waiting for them any more", "sockets", e.socketsWithoutTunnel())
				waiting = false
			case <-tick.C:
			}
		}
	}
	e.ready.Store(true)
	e.log.Info("ready", "domain", e.cfg.Domain)
}

func (e *Edge) socketsWithoutTunnel() int {
	connected := e.registry.Snapshot()
	n := 0
	for _, k := range e.store.AllSockets() {
		if len(connected[k.ID]) == 0 {
			n++
		}
	}
	return n
}

// sendAway goes on serving for ShutdownDelay, while whoever looks at /healthz finds another edge. Tunnel clients that come now are refused, so that they
// go to another at once.
func (e *Edge) sendAway(failed <-chan error) error {
	_ = e.sshLn.Close()
	if e.cfg.ShutdownDelay <= 0 {
		return nil
	}
	e.leaving.Store(true)
	e.log.Info("sending visitors away", "for", e.cfg.ShutdownDelay)
	timer := time.NewTimer(e.cfg.ShutdownDelay)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case err := <-failed:
		return err
	}
}

// closingConnections has the visitors' connections end with the answer to their next request, once the edge is leaving: a connection that is idle when the
// edge stops may have a request on its way. An HTTP/2 connection is told to end likewise.
func (e *Edge) closingConnections(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if e.leaving.Load() && r.Header.Get("Upgrade") == "" {
			w.Header().Set("Connection", "close")
		}
		next.ServeHTTP(w, r)
	})
}
