package sidecar

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mysocketio/mysocket-injector/internal/gatewayapi"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/tunnel"
)

// away makes a supervisor whose connection has gone to another address of two, because its own could not be reached.
func away(t *testing.T) *bench {
	b := newBench(t)
	b.addresses, b.unreachable = 2, errors.New("refused")
	b.start()
	pass(t, time.Minute)
	b.last().lose(lost())
	pass(t, 2*time.Second)
	b.expectState(gatewayapi.StateConnected)
	if b.last().Home() {
		t.Fatal("the connection is at its own address after a detour")
	}
	return b
}

func (b *bench) homeIsBack(t *testing.T, err error) {
	t.Helper()
	b.mu.Lock()
	b.unreachable = err
	b.mu.Unlock()
	pass(t, backoffMax)
}

func TestAConnectionGoesHome(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := away(t)
		pass(t, 10*time.Minute)
		if n := len(b.reaches); n < 15 || n > 60 {
			t.Errorf("the own address was tried %d times in ten minutes", n)
		}
		expect(t, "tunnels meanwhile", len(b.attempted()), 2)
		old := b.last()
		old.visit(1)
		calls := len(b.gateway.seen())
		b.homeIsBack(t, nil)
		if !b.last().Home() {
			t.Fatal("the connection is not back")
		}
		b.expectState(gatewayapi.StateConnected)
		expect(t, "spread", b.configs[2].Spread, tunnel.Spread{Detour: 1, Home: true, Away: fakeAddress})
		expect(t, "withdrawals at the other address", old.count().withdrawals, 1)
		// The certificate was of ten minutes ago.
		expect(t, "calls for it", b.gateway.seen()[calls:], []string{"renew"})
		pass(t, time.Minute)
		if old.isClosed() {
			t.Error("the visitor who was there was cut off")
		}
		old.visit(0)
		pass(t, time.Second)
		if !old.isClosed() {
			t.Error("the connection to the other address stays, though nobody needs it")
		}
		tries := len(b.reaches)
		pass(t, time.Hour)
		expect(t, "tries when it is home", len(b.reaches), tries)

		// The next failure is a first one: to the other address, not two further.
		b.last().lose(lost())
		pass(t, 2*time.Second)
		expect(t, "spread", b.configs[3].Spread, tunnel.Spread{Detour: 1})
	})
}

func TestHomeThatDoesNotTakeTheTunnel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := away(t)
		b.connect = func(int) error {
			return &tunnel.StepError{Step: tunnel.StepHandshake, Err: errors.New("nonsense")}
		}
		old := b.last()
		b.homeIsBack(t, nil)
		pass(t, 10*time.Minute)
		if n := len(b.attempted()); n < 15 || n > 60 {
			t.Errorf("%d tunnels were tried in ten minutes", n)
		}
		expect(t, "withdrawals at the other address", old.count().withdrawals, 0)
		if old.isClosed() {
			t.Error("the connection that works was closed")
		}
		b.expectState(gatewayapi.StateConnected)
	})
}

func TestAWithdrawalThatFailsOnTheWayHome(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := away(t)
		old := b.last()
		old.with(func() { old.withdrawError = errors.New("no") })
		old.visit(1)
		b.homeIsBack(t, nil)
		if !old.isClosed() || !b.last().Home() {
			t.Error("a tunnel stays in a rotation that nothing would take it out of")
		}
	})
}

// TestAnAppThatIsIllStaysWhereItIs has the own address come back while the tunnel is out of the rotation.
func TestAnAppThatIsIllStaysWhereItIs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := away(t)
		b.setApp(true)
		pass(t, 10*time.Second)
		b.homeIsBack(t, nil)
		if b.last().Home() {
			t.Error("the tunnel of an app that does not answer was put into a rotation")
		}
		b.setApp(false)
		pass(t, backoffMax)
		if !b.last().Home() {
			t.Error("the connection is not back")
		}
		b.expectState(gatewayapi.StateConnected)
	})
}

func TestDrainOnTheWayHome(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := away(t)
		old := b.last()
		old.visit(1)
		b.homeIsBack(t, nil)
		b.sup.drain()
		pass(t, time.Second)
		expect(t, "withdrawals", []int{old.count().withdrawals, b.last().count().withdrawals}, []int{1, 1})
		pass(t, retireLinger)
		if !old.isClosed() {
			t.Error("the connection to the other address outlives the drain")
		}
		b.stop()
	})
}
