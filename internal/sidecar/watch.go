package sidecar

import (
	"context"
	"errors"
	"strconv"
	"time"

	"github.com/mysocketio/mysocket-injector/internal/gatewayapi"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/retry"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/tunnel"
)

const (
	// While waiting for the app it is asked often at first: the sooner it is found, the sooner the public name works.
	firstCheckEvery = 250 * time.Millisecond
	checkEvery      = time.Second
	checkTimeout    = time.Second
	// failuresToWithdraw is how many checks in a row an app must fail before its tunnel leaves the rotation.
	failuresToWithdraw = 3
)

// end says why the watching of a tunnel ended; it is also a label of metrics.
type end string

const (
	endAsked   end = "asked"          // draining, retired, or the process ends
	endSession end = "edge_asked"     // the edge asked for a reconnect
	endForward end = "forward_failed" // the edge did not take the tunnel out of its rotation, or back into it
	endLost    end = "lost"           // the connection ended for a reason without a name of its own
)

// waitForApp returns true when the app takes connections, or need not, and false when ctx ends first.
func (s *supervisor) waitForApp(ctx context.Context) bool {
	wait, waiting := firstCheckEvery, false
	for {
		assignment := s.assignment.Load()
		if assignment.PublishNotReady {
			return ctx.Err() == nil
		}
		err := s.checkApp(ctx)
		if err == nil {
			if waiting {
				s.message = "" // what is said of the app is over, and not to be said of the next states
				s.logger.Info("the app answers", "port", assignment.Port)
			}
			return true
		}
		if ctx.Err() != nil {
			return false
		}
		if !waiting {
			waiting = true
			s.enter(gatewayapi.StateWaitingForApp, "the app does not answer on port "+strconv.Itoa(int(assignment.Port)))
			s.logger.Info("waiting for the app", "port", assignment.Port, "err", err)
		}
		if retry.Sleep(ctx, s.around.clock, wait) != nil {
			return false
		}
		wait = min(wait*5/4, checkEvery)
	}
}

func (s *supervisor) checkApp(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	assignment := s.assignment.Load()
	return s.around.checkApp(ctx, assignment.Port, assignment.ProxyProtocol)
}

// watch looks after a connected tunnel until it ends or is to end, and says why. An app that stops answering takes its
// tunnel out of the edge's rotation, and puts it back when it answers again; the connection stays, and with it whoever
// is still being served.
func (s *supervisor) watch(work context.Context, t edgeTunnel) end {
	began := s.around.clock.Now()
	defer func() { s.backoff.Worked(s.around.clock.Now().Sub(began)) }()
	timer := s.around.clock.NewTimer(checkEvery)
	defer timer.Stop()
	failures, withdrawn := 0, false
	for {
		select {
		case <-work.Done():
			return endAsked
		case <-t.Done():
			return lostReason(t.Err())
		case <-t.ReconnectAsked():
			return endSession
		case <-timer.C():
		}
		err := s.checkConnected(work, t, withdrawn)
		if work.Err() != nil {
			return endAsked
		}
		port := s.assignment.Load().Port
		switch {
		case err != nil:
			failures++
			s.around.metrics.appCheckFailures.Inc()
			if withdrawn || failures < failuresToWithdraw {
				break
			}
			withdrawn = true
			s.enter(gatewayapi.StateWaitingForApp, "the app stopped answering on port "+strconv.Itoa(int(port)))
			s.logger.Warn("the app stopped answering; leaving the edge's rotation", "port", port, "err", err, "open", t.Open())
			if err := s.withdraw(work, t, withdrawTimeout); work.Err() != nil {
				return endAsked
			} else if err != nil {
				s.logger.Warn("withdrawal failed", "err", err)
				return endForward
			}
		case withdrawn:
			if err := t.Forward(work); work.Err() != nil {
				return endAsked
			} else if err != nil {
				s.logger.Warn("the edge does not forward again", "err", err)
				return endForward
			}
			failures, withdrawn = 0, false
			s.enter(gatewayapi.StateConnected, "")
			s.logger.Info("the app answers again; back in the edge's rotation", "port", port)
		default:
			failures = 0
		}
		timer.Reset(checkEvery)
	}
}

// checkConnected checks the app of a connected tunnel. A visitor whom the app just took has been check enough.
func (s *supervisor) checkConnected(ctx context.Context, t edgeTunnel, withdrawn bool) error {
	if s.assignment.Load().PublishNotReady {
		return nil
	}
	if !withdrawn && s.around.clock.Now().Sub(t.LastDial()) < checkEvery {
		return nil
	}
	return s.checkApp(ctx)
}

func (s *supervisor) withdraw(ctx context.Context, t edgeTunnel, timeout time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	return t.Withdraw(ctx)
}

func lostReason(err error) end {
	if lost, ok := errors.AsType[*tunnel.LostError](err); ok {
		return end(lost.Reason)
	}
	return endLost
}
