package sidecar

import (
	"context"
	"errors"
	"io"
	"time"

	"github.com/mysocketio/mysocket-injector/internal/sidecar/gatewayclient"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/retry"
)

// caPoll is how often a CA bundle that is missing is looked for.
const caPoll = 500 * time.Millisecond

// followAssignments hands the gateway's snapshots to the main loop until ctx ends. While the gateway is away the last
// snapshot stays in force.
func (a *Agent) followAssignments(ctx context.Context) {
	backoff := retry.Backoff{Min: backoffMin, Max: backoffMax, Sustained: sustained, Random: a.cfg.Random}
	saidMissing, saidStreaming, lastError := false, false, ""
	for ctx.Err() == nil {
		began, streaming := a.cfg.Clock.Now(), false
		err := a.gateway.Assignments(ctx, func(event gatewayclient.Event) {
			if event.Err != nil {
				a.logger.Error("assignments ignored; the last good ones stay in force", "err", event.Err)
				return
			}
			if !streaming {
				streaming = true
				a.metrics.streamConnected.Set(1)
				if !saidStreaming {
					saidStreaming, lastError = true, ""
					a.logger.Info("assignments are streamed from the gateway", "assigned", len(event.Snapshot.Assignments))
				}
			}
			select {
			case a.snapshots <- event.Snapshot:
			case <-a.finished:
			}
		})
		a.metrics.streamConnected.Set(0)
		if ctx.Err() != nil {
			return
		}
		if _, missing := errors.AsType[*gatewayclient.CAMissingError](err); missing {
			if !saidMissing {
				saidMissing = true
				a.logger.Info("waiting for the gateway's CA bundle", "err", err)
			}
			for !a.gateway.CAAvailable() {
				if retry.Sleep(ctx, a.cfg.Clock, caPoll) != nil {
					return
				}
			}
			continue
		}
		lasted := a.cfg.Clock.Now().Sub(began)
		if streaming {
			backoff.Worked(lasted)
		}
		delay := backoff.Next(gatewayclient.RetryAfter(err))
		// The same failure again says nothing new, and the gateway ends every stream now and then.
		log := a.logger.Debug
		if routine := streaming && lasted >= sustained && errors.Is(err, io.EOF); !routine && err.Error() != lastError {
			saidStreaming, lastError = false, err.Error()
			log = a.logger.Warn
		}
		log("no assignments from the gateway; the last ones stay in force", "err", err, "hint", hint(err), "retry_in", round(delay))
		if retry.Sleep(ctx, a.cfg.Clock, delay) != nil {
			return
		}
	}
}
