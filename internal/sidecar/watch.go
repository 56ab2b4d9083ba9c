package sidecar

import (
	"context"
	"errors"
	"sync"
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
	// failuresToWithdraw is how many connections in a row an app must refuse before its tunnel leaves the rotation.
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

// waitForApp returns true when the app is well, or need not be, and false when ctx ends first.
func (s *supervisor) waitForApp(ctx context.Context) bool {
	wait, waiting := firstCheckEvery, false
	for {
		assignment := s.assignment.Load()
		err := s.health.check(ctx, assignment, true, false)
		if ctx.Err() != nil {
			return false
		}
		if s.health.ready() {
			if waiting {
				s.message = "" // what is said of the app is over, and not to be said of the next states
				s.logger.Info("the app is ready", "port", assignment.Port)
			}
			return true
		}
		s.waitsFor(err)
		if !waiting {
			waiting = true
			s.logger.Info("waiting for the app", "port", assignment.Port, "err", err)
		}
		if retry.Sleep(ctx, s.around.clock, wait) != nil {
			return false
		}
		wait = min(wait*5/4, checkEvery)
	}
}

// waitsFor enters the state of waiting. It says why when it enters it, and again when there is a reason of another kind.
func (s *supervisor) waitsFor(err error) {
	if news := s.health.news(err); news || s.state != gatewayapi.StateWaitingForApp {
		s.enter(gatewayapi.StateWaitingForApp, errorMessage(err))
	}
}

// watch looks after a connected tunnel until it ends or is to end, and says why. An app that is no longer well takes its
// tunnel out of the edge's rotation, and puts it back when it is well again; the connection stays, and with it whoever
// is still being served.
func (s *supervisor) watch(work context.Context, t edgeTunnel) end {
	began := s.around.clock.Now()
	home, stopLooking := s.lookForHome(work, t)
	defer func() {
		stopLooking()
		worked := s.around.clock.Now().Sub(began)
		s.backoff.Worked(worked)
		if t.Home() {
			s.homeward.Worked(worked)
		}
	}()
	timer := s.around.clock.NewTimer(checkEvery)
	defer timer.Stop()
	withdrawn := false
	for {
		select {
		case <-work.Done():
			return endAsked
		case <-t.Done():
			return lostReason(t.Err())
		case <-t.ReconnectAsked():
			return endSession
		case <-unless(withdrawn, home): // while the app is ill it stays where it is
			return endHome
		case <-timer.C():
		}
		err := s.checkConnected(work, t, withdrawn)
		select { // a check that was broken off says nothing of the app
		case <-work.Done():
			return endAsked
		case <-t.Done():
			return lostReason(t.Err())
		case <-t.ReconnectAsked():
			return endSession
		default:
		}
		port := s.assignment.Load().Port
		if err != nil {
			s.around.metrics.appCheckFailures.Inc()
		}
		switch {
		case !withdrawn && s.health.gone():
			withdrawn = true
			s.waitsFor(err)
			s.logger.Warn("the app is not ready any more; leaving the edge's rotation", "port", port, "err", err, "open", t.Open())
			if err := s.withdraw(work, t, withdrawTimeout); work.Err() != nil {
				return endAsked
			} else if err != nil {
				s.logger.Warn("withdrawal failed", "err", err)
				return endForward
			}
		case withdrawn && !s.health.ready():
			s.waitsFor(err)
		case withdrawn:
			if err := t.Forward(work); work.Err() != nil {
				return endAsked
			} else if err != nil {
				s.logger.Warn("the edge does not forward again", "err", err)
				return endForward
			}
			withdrawn = false
			s.enter(gatewayapi.StateConnected, "")
			s.logger.Info("the app is ready again; back in the edge's rotation", "port", port)
		}
		timer.Reset(checkEvery)
	}
}

// checkConnected checks the app of a connected tunnel, until that ends. A visitor whom the app just took has been check
// enough of whether it takes connections.
func (s *supervisor) checkConnected(work context.Context, t edgeTunnel, withdrawn bool) error {
	ctx, cancel := context.WithCancel(work)
	checked := make(chan struct{})
	var watching sync.WaitGroup
	watching.Go(func() { // a probe may take many seconds
		select {
		case <-t.Done():
		case <-t.ReconnectAsked():
		case <-checked:
		}
		cancel()
	})
	defer watching.Wait()
	defer close(checked)
	served := !withdrawn && s.around.clock.Now().Sub(t.LastDial()) < checkEvery
	return s.health.check(ctx, s.assignment.Load(), false, served)
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
