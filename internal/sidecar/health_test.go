package sidecar

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mysocketio/mysocket-injector/internal/gatewayapi"
)

func probed(period, success, failure int32) gatewayapi.Assignment {
	return gatewayapi.Assignment{
		SocketID: "s1", SocketName: "k8s shop.web", Service: "web", Port: 8000,
		Probe: &gatewayapi.Probe{Kind: gatewayapi.ProbeHTTP, Port: 8000, Path: "/ready", PeriodSeconds: period, TimeoutSeconds: 1, SuccessThreshold: success, FailureThreshold: failure},
	}
}

func TestAnAppIsRegisteredWhenItsProbeSucceeds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.sup.update(probed(10, 1, 3))
		b.setUnready(true)
		b.start()
		pass(t, 10*time.Second)
		b.expectState(gatewayapi.StateWaitingForApp)
		expect(t, "calls", b.gateway.seen(), []string(nil))
		if report := b.gateway.lastReport(); !strings.Contains(report.Message, "readiness probe fails: status 503") {
			t.Errorf("reported %+v", report)
		}
		expect(t, "reports", len(b.gateway.allReports()), 1)
		b.setUnready(false)
		pass(t, time.Second) // and not its period
		b.expectState(gatewayapi.StateConnected)
	})
}

func TestTheProbesThresholdsAndPeriodAreKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.sup.update(probed(5, 2, 3))
		b.start()
		pass(t, 2*time.Second)
		b.expectState(gatewayapi.StateConnected)
		first := b.probed()
		expect(t, "probes until the first tunnel", len(first), 2)
		pass(t, 30*time.Second)
		later := b.probed()[2:]
		if len(later) < 5 || len(later) > 6 {
			t.Errorf("probed %d times in 30 s, with a period of 5 s", len(later))
		}

		b.setUnready(true)
		pass(t, 9*time.Second)
		expect(t, "withdrawals after at most two failures", b.last().count().withdrawals, 0)
		b.setUnready(false)
		pass(t, 6*time.Second)
		b.setUnready(true)
		pass(t, 9*time.Second)
		expect(t, "withdrawals after two failures, a success, and two failures", b.last().count().withdrawals, 0)
		pass(t, 7*time.Second)
		expect(t, "withdrawals after three", b.last().count().withdrawals, 1)
		b.expectState(gatewayapi.StateWaitingForApp)

		b.setUnready(false)
		pass(t, 4*time.Second)
		expect(t, "forwards after at most one success", b.last().count().forwards, 0)
		pass(t, 8*time.Second)
		expect(t, "forwards after two", b.last().count().forwards, 1)
		b.expectState(gatewayapi.StateConnected)
		expect(t, "connections to the edge", b.connections(), 1)
	})
}

// An app that is gone is seen by its port, whatever its probe's period is, and so is its return.
func TestARefusedConnectionNeedsNoProbe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.sup.update(probed(60, 1, 3))
		b.start()
		pass(t, 2*time.Second)
		b.setApp(true)
		pass(t, 4*time.Second)
		b.expectState(gatewayapi.StateWaitingForApp)
		expect(t, "withdrawals", b.last().count().withdrawals, 1)
		if report := b.gateway.lastReport(); !strings.Contains(report.Message, "does not answer on port 8000") {
			t.Errorf("reported %+v", report)
		}
		b.setApp(false)
		pass(t, 2*time.Second)
		b.expectState(gatewayapi.StateConnected)
		expect(t, "probes", len(b.probed()), 2)
	})
}

// A tunnel that is lost while a slow probe runs is replaced at once.
func TestASlowProbeHidesNoLostTunnel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.sup.update(probed(5, 1, 3))
		b.start()
		pass(t, 2*time.Second)
		b.mu.Lock()
		b.probeTakes = time.Minute
		b.mu.Unlock()
		pass(t, 5*time.Second)
		b.last().lose(lost())
		b.mu.Lock()
		b.probeTakes = 0
		b.mu.Unlock()
		pass(t, 3*time.Second)
		expect(t, "connections to the edge", b.connections(), 2)
		b.expectState(gatewayapi.StateConnected)
		expect(t, "withdrawals", b.last().count().withdrawals, 0)
	})
}

func TestAPlainReconnectNeedsNoProbe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.sup.update(probed(60, 1, 3))
		b.start()
		pass(t, 10*time.Second)
		b.last().lose(lost())
		pass(t, 3*time.Second)
		b.expectState(gatewayapi.StateConnected)
		expect(t, "probes", len(b.probed()), 1)
	})
}
