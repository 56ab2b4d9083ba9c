package sidecar

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/mysocketio/mysocket-injector/internal/gatewayapi"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/gatewayclient"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/retry"
)

// statusAttempts is how often one report is tried, unless a newer one replaces it first.
const statusAttempts = 5

// statusReporter tells the gateway where a tunnel is, on its own goroutine: a gateway that is slow or away must not hold
// up the tunnel. Of several reports that wait only the newest is sent.
type statusReporter struct {
	around     *surroundings
	logger     *slog.Logger
	connection gatewayclient.Connection
	wake       chan struct{}

	mu     sync.Mutex
	latest status
}

// status is a report, and which registration it is of: a new one has a new object at the gateway, which knows nothing yet.
type status struct {
	gatewayapi.StatusReport
	registration int
}

func newStatusReporter(around *surroundings, logger *slog.Logger, connection gatewayclient.Connection) *statusReporter {
	return &statusReporter{around: around, logger: logger, connection: connection, wake: make(chan struct{}, 1)}
}

// start begins to report. The function that it returns ends that and may be called more than once.
func (r *statusReporter) start(ctx context.Context) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		r.run(ctx)
	}()
	return func() { cancel(); <-done }
}

func (r *statusReporter) report(report gatewayapi.StatusReport) {
	r.mu.Lock()
	r.latest.StatusReport = report
	r.mu.Unlock()
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// registered makes the next report one to send, even when the last one that was sent said the same.
func (r *statusReporter) registered() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.latest.registration++
}

func (r *statusReporter) current() status {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.latest
}

func (r *statusReporter) run(ctx context.Context) {
	var sent status
	for {
		select {
		case <-r.wake:
		case <-ctx.Done():
			return
		}
		backoff := retry.Backoff{Min: time.Second, Max: 16 * time.Second, Random: r.around.random}
		for range statusAttempts {
			now := r.current()
			if now == sent {
				break
			}
			err := r.around.gateway.Report(ctx, r.connection, now.StatusReport)
			if err == nil {
				sent = now
				break
			}
			if ctx.Err() != nil {
				return
			}
			r.logger.Debug("the status could not be reported", "state", now.State, "err", err)
			if refused, ok := errors.AsType[*gatewayclient.RefusedError](err); ok && refused.Status < 500 && refused.RetryAfter == 0 {
				break
			}
			if retry.Sleep(ctx, r.around.clock, backoff.Next(gatewayclient.RetryAfter(err))) != nil {
				return
			}
		}
	}
}
