package sidecar

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"time"

	"github.com/mysocketio/mysocket-injector/internal/gatewayapi"
)

// health is what one supervisor knows of its app. Two things make an app unwell: it takes no connections, which is asked
// every second and more often while waiting; and its pod's own readiness probe fails, which is run as its author says:
//
//	                     asked                      ready after        gone after
//	connection           every second at most       1                  3 failures
//	readiness probe      every periodSeconds        successThreshold   failureThreshold
//
// While an app has not been ready yet, its probe is run each time that it takes a connection: the sooner it is found, the
// sooner the public name works.
type health struct {
	around *surroundings

	probe               *gatewayapi.Probe // of which the rest is
	probed              time.Time         // zero: to be run at once
	probeErr            error
	well                bool
	said                *unwellError // what was last said of it
	successes, failures int32        // of the probe, in a row
	refused             int          // connections, in a row
}

// unwellError is why an app gets no visitors.
type unwellError struct {
	what  string
	probe bool
	err   error
}

func (e *unwellError) Error() string { return e.what + ": " + e.err.Error() }

func (e *unwellError) Unwrap() error { return e.err }

// check asks the app what is due. hurry runs the probe whenever it is not ready; served tells that the app has just taken a
// visitor's connection. It returns why the app is not well, as of now or as of when its probe last ran.
func (h *health) check(ctx context.Context, a *gatewayapi.Assignment, hurry, served bool) error {
	if a.PublishNotReady {
		*h = health{around: h.around, well: true}
		return nil
	}
	if !reflect.DeepEqual(h.probe, a.Probe) {
		*h = health{around: h.around, probe: a.Probe, refused: h.refused, well: h.well}
	}
	err := h.ask(ctx, a, hurry, served)
	switch {
	case h.refused >= failuresToWithdraw || h.probe != nil && h.failures >= h.probe.FailureThreshold:
		h.well = false
	case h.refused == 0 && (h.probe == nil || h.successes >= h.probe.SuccessThreshold):
		h.well = true
	}
	return err
}

func (h *health) ask(ctx context.Context, a *gatewayapi.Assignment, hurry, served bool) error {
	if !served {
		err := h.connect(ctx, a)
		if ctx.Err() != nil {
			return ctx.Err() // broken off, which says nothing of the app
		}
		if err != nil {
			h.refused++
			h.probed, h.successes = time.Time{}, 0 // what comes back is asked at once
			return &unwellError{what: fmt.Sprintf("the app does not answer on port %d", a.Port), err: err}
		}
	}
	h.refused = 0
	if h.probe == nil {
		return nil
	}
	now := h.around.clock.Now()
	period := time.Duration(h.probe.PeriodSeconds) * time.Second
	if due := h.probed.IsZero() || now.Sub(h.probed) >= period || hurry && !h.ready(); !due {
		return h.probeErr
	}
	err := h.around.probeApp(ctx, h.probe)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	h.probed = now
	if err != nil {
		h.successes = 0
		h.failures = min(h.failures+1, h.probe.FailureThreshold)
		h.probeErr = &unwellError{what: "the app's readiness probe fails", probe: true, err: err}
	} else {
		h.failures = 0
		h.successes = min(h.successes+1, h.probe.SuccessThreshold)
		h.probeErr = nil
	}
	return h.probeErr
}

func (h *health) connect(ctx context.Context, a *gatewayapi.Assignment) error {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	return h.around.checkApp(ctx, a.Port, a.ProxyProtocol)
}

// ready tells whether the app may begin to get visitors, and gone whether it must get no more.
func (h *health) ready() bool { return h.well && h.refused == 0 }

func (h *health) gone() bool { return !h.well }

// news tells whether an error is of another kind than the one that was last said, and so worth saying. Errors of one kind
// may differ at every check.
func (h *health) news(err error) bool {
	e, ok := errors.AsType[*unwellError](err)
	if !ok {
		return false
	}
	old := h.said
	h.said = e
	return old == nil || old.probe != e.probe
}
