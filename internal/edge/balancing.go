package edge

import (
	"github.com/mysocketio/mysocket-injector/internal/edge/metrics"
	"github.com/mysocketio/mysocket-injector/internal/edge/registry"
)

// balancing is how tunnels are chosen, ejected and taken back. The metrics are asked for when something happens: they are
// made after the registry, which they count.
func (e *Edge) balancing(m func() *metrics.Metrics) registry.Config {
	log := e.log.With("part", "balancer")
	return registry.Config{
		Penalty: e.cfg.Timings.Penalty, SlowStart: e.cfg.SlowStart, OpenTimeout: e.cfg.Timings.OpenTimeout,
		Ejected: func(t *registry.Tunnel, cause error) {
			m().Ejected()
			log.Warn("tunnel ejected from the rotation", "socket", t.SocketID, "tunnel", t.TunnelID, "err", cause)
		},
		Probed: func(t *registry.Tunnel, err error) {
			if err != nil {
				m().Probed(metrics.ProbeFailed)
				log.Debug("ejected tunnel still fails", "socket", t.SocketID, "tunnel", t.TunnelID, "err", err)
				return
			}
			m().Probed(metrics.ProbeOpened)
		},
		Returned: func(t *registry.Tunnel) {
			log.Info("ejected tunnel is back in the rotation", "socket", t.SocketID, "tunnel", t.TunnelID)
		},
	}
}
