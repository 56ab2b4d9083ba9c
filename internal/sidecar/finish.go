package sidecar

import (
	"context"
	"time"

	"github.com/mysocketio/mysocket-injector/internal/gatewayapi"
)

// finish ends a supervisor in order: leave the edge's rotation, let visitors finish, close, delete. t is nil when no
// tunnel is connected. ctx ends when nothing is to be waited for any more, ending when all must be over.
func (s *supervisor) finish(ctx, ending context.Context, t edgeTunnel, stopReporting func()) {
	if t != nil {
		s.enter(gatewayapi.StateDraining, "")
		s.leaveRotation(ctx, ending, t)
	}
	close(s.withdrawn)
	if t != nil {
		s.awaitVisitors(ctx, t)
	}
	close(s.drained)
	if s.draining() {
		// The drained tunnel stays until the app has ended too, so that whatever comes late is refused in order.
		<-ctx.Done()
	}
	stopReporting()
	if t != nil {
		if cut := t.Open(); cut > 0 {
			s.around.metrics.connectionsCut.Add(float64(cut))
			s.logger.Warn("connections cut", "count", cut)
		}
		t.Close()
		s.tunnel.Store(nil)
	}
	s.deleteTunnel(ending)
}

func (s *supervisor) draining() bool { return isClosed(s.drainAsked) }

func (s *supervisor) retiring() bool { return isClosed(s.retireAsked) }

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

func (s *supervisor) leaveRotation(ctx, ending context.Context, t edgeTunnel) {
	timeout := withdrawTimeout
	if ctx.Err() != nil {
		ctx, timeout = ending, hurriedWithdraw
	}
	began := s.around.clock.Now()
	if err := s.withdraw(ctx, t, timeout); err != nil {
		s.logger.Warn("leaving the edge's rotation failed", "tunnel", s.login.tunnelID, "err", err, "open", t.Open())
		return
	}
	s.logger.Info("left the edge's rotation", "tunnel", s.login.tunnelID, "open", t.Open(), "took", s.around.clock.Now().Sub(began).Round(time.Millisecond))
}

// awaitVisitors waits until no visitor is left. A retired tunnel waits only for a while, a draining one until the process is to end.
func (s *supervisor) awaitVisitors(ctx context.Context, t edgeTunnel) {
	idleCtx, cancel := context.WithCancel(ctx)
	defer cancel()
	idle := make(chan struct{})
	go func() {
		defer close(idle)
		_ = t.WaitIdle(idleCtx)
	}()
	defer func() { cancel(); <-idle }()

	timer := s.around.clock.NewTimer(retireLinger)
	defer timer.Stop()
	drain := s.drainAsked
	expired := timer.C()
	for {
		select {
		case <-idle:
			return
		case <-drain:
			drain, expired = nil, nil
		case <-expired:
			return
		}
	}
}

func (s *supervisor) deleteTunnel(ctx context.Context) {
	if s.login == nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, deleteTimeout)
	defer cancel()
	if err := s.around.gateway.Delete(ctx, s.connection, s.login.tunnelID); err != nil {
		s.logger.Warn("the tunnel could not be deleted; the control plane does it when the pod is gone", "tunnel", s.login.tunnelID, "err", err)
		return
	}
	s.logger.Info("tunnel closed and deleted", "tunnel", s.login.tunnelID)
}
