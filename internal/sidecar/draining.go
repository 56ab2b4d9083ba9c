package sidecar

import (
	"context"
	"fmt"
	"time"
)

const progressEvery = time.Second

// drain takes the pod out of the edge's rotation and waits until open connections have ended, at most for the
// configured time. It ends nothing: that is SIGTERM's part.
func (a *Agent) drain(ctx context.Context, progress func(string)) {
	began := a.cfg.Clock.Now()
	answer := make(chan []*supervisor, 1)
	select {
	case a.drains <- answer:
	case <-a.finished:
		progress("the sidecar is ending already")
		return
	case <-ctx.Done():
		return
	}
	supervisors := <-answer
	if len(supervisors) == 0 {
		progress("nothing to drain: no socket is assigned")
		return
	}
	progress(fmt.Sprintf("draining %d tunnels", len(supervisors)))
	timeout := a.cfg.Clock.NewTimer(a.cfg.DrainTimeout)
	defer timeout.Stop()
	tick := a.cfg.Clock.NewTimer(progressEvery)
	defer tick.Stop()
	for i := 0; i < len(supervisors); {
		select {
		case <-supervisors[i].drained:
			i++
		case <-tick.C():
			inRotation, open := count(supervisors)
			progress(fmt.Sprintf("%d tunnels wait for the edge's acknowledgement, %d connections are open", inRotation, open))
			tick.Reset(progressEvery)
		case <-timeout.C():
			_, open := count(supervisors)
			progress(fmt.Sprintf("after %s %d connections are still open; they end with the sidecar", a.cfg.DrainTimeout, open))
			a.metrics.drainSeconds.Observe(a.cfg.Clock.Now().Sub(began).Seconds())
			a.logger.Warn("drain timed out", "timeout", a.cfg.DrainTimeout, "open", open)
			return
		case <-ctx.Done():
			return
		}
	}
	lasted := a.cfg.Clock.Now().Sub(began)
	a.metrics.drainSeconds.Observe(lasted.Seconds())
	took := lasted.Round(time.Millisecond)
	a.logger.Info("drained", "took", took)
	progress(fmt.Sprintf("drained in %s", took))
}

// count returns how many tunnels are still in the edge's rotation, and how many connections are open.
func count(supervisors []*supervisor) (inRotation, open int) {
	for _, s := range supervisors {
		if !isClosed(s.withdrawn) {
			inRotation++
		}
		open += s.openConnections()
	}
	return inRotation, open
}
