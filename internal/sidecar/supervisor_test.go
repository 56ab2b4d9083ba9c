package sidecar

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mysocketio/mysocket-injector/internal/gatewayapi"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/gatewayclient"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/retry"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/tunnel"
)

// pass lets d go by in the bubble, and everything happen that is due by then.
func pass(t *testing.T, d time.Duration) {
	t.Helper()
	if err := retry.Sleep(t.Context(), retry.System(), d); err != nil {
		t.Fatal(err)
	}
	synctest.Wait()
}

func expect[T any](t *testing.T, what string, got, want T) {
	t.Helper()
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("%s: got %v, want %v", what, got, want)
	}
}

func (b *bench) expectState(want gatewayapi.State) {
	b.t.Helper()
	synctest.Wait()
	for _, state := range []gatewayapi.State{
		gatewayapi.StateWaitingForApp, gatewayapi.StateRegistering, gatewayapi.StateConnecting, gatewayapi.StateConnected, gatewayapi.StateDraining,
	} {
		n := b.metrics.value(b.t, "tunnels", string(state))
		if (n == 1) != (state == want) {
			b.t.Errorf("%v tunnels are %s; the only state should be %s", n, state, want)
		}
	}
}

func lost() error { return &tunnel.LostError{Reason: tunnel.LostClosed, Err: errors.New("reset")} }

func refusedWith(status int, after time.Duration) error {
	return &gatewayclient.RefusedError{Operation: "register the tunnel", Status: status, RetryAfter: after, Message: "no"}
}

func TestSupervisorConnectsAnAppThatAnswers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.start()
		b.expectState(gatewayapi.StateConnected)
		expect(t, "calls", b.gateway.seen(), []string{"register"})
		expect(t, "reports", b.gateway.reported(), []gatewayapi.State{gatewayapi.StateConnected})
		expect(t, "client version", b.configs[0].ClientVersion, "SSH-2.0-mysocket-sidecar_test")
		b.stop()
		expect(t, "calls after the end", b.gateway.seen(), []string{"register", "delete"})
		if !b.last().isClosed() {
			t.Error("the tunnel was not closed")
		}
	})
}

func TestSupervisorWaitsForTheApp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.setApp(true)
		b.start()
		pass(t, 10*time.Second)
		b.expectState(gatewayapi.StateWaitingForApp)
		expect(t, "calls", b.gateway.seen(), []string(nil))
		checks := b.checked()
		if len(checks) < 3 || checks[1]-checks[0] != 250*time.Millisecond {
			t.Errorf("checks began %v; the first wait should be 250ms", checks)
		}
		for i := 1; i < len(checks); i++ {
			if wait := checks[i] - checks[i-1]; wait > time.Second {
				t.Errorf("waited %s between checks, allowed is 1s", wait)
			}
		}
		b.setApp(false)
		pass(t, time.Second)
		b.expectState(gatewayapi.StateConnected)
		for _, report := range b.gateway.allReports() {
			if report.State != gatewayapi.StateWaitingForApp && report.Message != "" {
				t.Errorf("%s is reported with the message %q, which was about the time before", report.State, report.Message)
			}
		}
	})
}

func TestSupervisorDoesNotWaitWhenNotReadyIsPublished(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.setApp(true)
		b.sup.update(gatewayapi.Assignment{SocketID: "s1", Port: 8000, PublishNotReady: true})
		b.start()
		pass(t, 30*time.Second)
		b.expectState(gatewayapi.StateConnected)
		expect(t, "withdrawals", b.last().count().withdrawals, 0)
	})
}

func TestAPlainReconnectAsksNoGateway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.start()
		pass(t, 40*time.Second)
		for range 3 {
			b.last().lose(lost())
			pass(t, 40*time.Second)
			b.expectState(gatewayapi.StateConnected)
		}
		expect(t, "calls", b.gateway.seen(), []string{"register"})
		expect(t, "reconnects", b.metrics.value(t, "reconnects_total", tunnel.LostClosed), 3)
	})
}

// Ten minutes without a gateway: a tunnel that is connected is not touched, and one that is lost comes back without being asked
// for, as long as its certificate is valid; after that, as soon as the gateway is there again.
func TestTenMinutesWithoutTheGateway(t *testing.T) {
	outage := func(t *testing.T, lifetime time.Duration) *bench {
		b := newBench(t)
		b.gateway.lifetime = lifetime
		b.start()
		pass(t, time.Minute)
		b.gateway.mu.Lock()
		b.gateway.fail = func(string, int) error {
			if at := time.Since(b.began); at < 11*time.Minute {
				return errors.New("the gateway can't be reached")
			}
			return nil
		}
		b.gateway.mu.Unlock()
		return b
	}
	t.Run("connected", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			b := outage(t, 5*time.Minute)
			pass(t, 11*time.Minute)
			b.expectState(gatewayapi.StateConnected)
			expect(t, "connections", b.connections(), 1)
			expect(t, "withdrawals", b.last().count().withdrawals, 0)
			expect(t, "calls", b.gateway.seen(), []string{"register"})
		})
	})
	t.Run("lost while the certificate is valid", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			b := outage(t, 20*time.Minute)
			for range 5 {
				pass(t, time.Minute)
				b.last().lose(lost())
				pass(t, time.Second)
				b.expectState(gatewayapi.StateConnected)
			}
			expect(t, "connections", b.connections(), 6)
			expect(t, "calls", b.gateway.seen(), []string{"register"})
		})
	})
	t.Run("lost after its end", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			b := outage(t, 5*time.Minute)
			pass(t, 5*time.Minute)
			b.last().lose(lost())
			pass(t, time.Minute)
			b.expectState(gatewayapi.StateRegistering)
			pass(t, 4*time.Minute+backoffMax)
			b.expectState(gatewayapi.StateConnected)
			calls := b.gateway.seen()
			expect(t, "the last call", calls[len(calls)-1], "renew")
			if len(calls) > 30 {
				t.Errorf("%d calls in five minutes", len(calls))
			}
		})
	})
}

func TestAFailedEdgeIsGoneToAtItsNextAddress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.sup.around.spread = tunnel.Spread{Turn: 5, IPv6: true}
		b.sup.connection.Number = 2
		b.connect = func(n int) error {
			if n <= 2 {
				return &tunnel.StepError{Step: tunnel.StepHandshake, Err: errors.New("nonsense")}
			}
			return nil
		}
		b.start()
		pass(t, time.Minute)
		b.last().lose(lost())
		pass(t, time.Minute)
		var spreads []tunnel.Spread
		for _, cfg := range b.configs {
			spreads = append(spreads, cfg.Spread)
		}
		expect(t, "spreads", spreads, []tunnel.Spread{
			{Turn: 7, IPv6: true}, {Turn: 7, Detour: 1, IPv6: true}, {Turn: 7, Detour: 2, IPv6: true}, {Turn: 7, Detour: 3, IPv6: true},
		})
	})
}

func TestAnExpiredCertificateIsRenewed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.start()
		pass(t, 6*time.Minute)
		b.last().lose(lost())
		pass(t, 2*time.Second)
		b.expectState(gatewayapi.StateConnected)
		expect(t, "calls", b.gateway.seen(), []string{"register", "renew"})
	})
}

// TestAnEdgeThatMoved has the gateway name another address while the old one can't be reached. The certificate is valid
// for minutes yet.
func TestAnEdgeThatMoved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.connect = func(n int) error {
			if b.configs[n-1].Address == "edge.test:22" {
				return &tunnel.StepError{Step: tunnel.StepTCP, Err: errors.New("refused")}
			}
			return nil
		}
		b.start()
		pass(t, time.Minute)
		expect(t, "calls while the gateway knows nothing better", b.gateway.seen(), []string{"register"})
		b.gateway.moveTo("edge2.test:22")
		b.sup.update(gatewayapi.Assignment{SocketID: "s1", Port: 8000, EdgeAddress: "edge2.test:22"})
		pass(t, backoffMax)
		b.expectState(gatewayapi.StateConnected)
		expect(t, "calls", b.gateway.seen(), []string{"register", "renew"})
	})
}

func TestATunnelThatTheGatewayForgotIsRegisteredAnew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.gateway.fail = func(call string, _ int) error {
			if call == "renew" {
				return refusedWith(http.StatusNotFound, 0)
			}
			return nil
		}
		b.start()
		pass(t, 6*time.Minute)
		b.last().lose(lost())
		pass(t, 2*time.Second)
		b.expectState(gatewayapi.StateConnected)
		expect(t, "calls", b.gateway.seen(), []string{"register", "renew", "register"})
		expect(t, "tunnel", b.sup.login.tunnelID, "tunnel-2")
	})
}

// The gateway loses its object of the tunnel while no report reaches it, and the sidecar is in the end where it was before:
// the new object must hear of that.
func TestANewRegistrationIsToldTheStateAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.start()
		pass(t, 2*time.Second)
		b.expectState(gatewayapi.StateConnected)
		b.gateway.fail = func(call string, _ int) error {
			if call == "renew" {
				return refusedWith(http.StatusNotFound, 0)
			}
			return nil
		}
		b.gateway.loseReportsUntilTunnel(2)
		pass(t, 6*time.Minute)
		before := len(b.gateway.allReports())
		b.last().lose(lost())
		pass(t, time.Minute)
		expect(t, "tunnel", b.sup.login.tunnelID, "tunnel-2")
		// States that last for no time at all are reported or not, by chance.
		if reports := b.gateway.allReports(); len(reports) == before || reports[len(reports)-1].State != gatewayapi.StateConnected {
			t.Errorf("after the new registration the gateway got %+v; the last should be Connected", reports[before:])
		}
	})
}

func TestARefusedLoginIsRenewedAndThenRegisteredAnew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.connect = func(n int) error {
			if n <= 4 {
				return &tunnel.StepError{Step: tunnel.StepAuth, Err: errors.New("refused")}
			}
			return nil
		}
		b.start()
		pass(t, time.Minute)
		b.expectState(gatewayapi.StateConnected)
		expect(t, "calls", b.gateway.seen(), []string{"register", "renew", "renew", "register", "renew"})
	})
}

// A clock that is wrong by an hour sees every certificate as expired; each is tried once all the same.
func TestAFreshCertificateIsTriedWhateverTheClockSays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.gateway.lifetime = -time.Hour
		b.start()
		b.expectState(gatewayapi.StateConnected)
	})
}

func TestBackoffOfASupervisor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		down := true
		b.connect = func(int) error {
			if down {
				return &tunnel.StepError{Step: tunnel.StepTCP, Err: errors.New("refused")}
			}
			return nil
		}
		b.start()
		pass(t, 60*time.Second)
		attempts := b.attempted()
		want := []time.Duration{0, 500, 1000, 2000, 4000, 8000, 16000, 32000, 48000}
		for i, at := range want {
			if i >= len(attempts) || attempts[i] != at*time.Millisecond {
				t.Fatalf("attempts began %v, want %v ms", attempts, want)
			}
		}
		expect(t, "calls", b.gateway.seen(), []string{"register"})
		expect(t, "failures", b.metrics.value(t, "connect_failures_total", "tcp"), float64(len(attempts)))
		if message := b.gateway.lastReport().Message; message != "tcp: refused" {
			t.Errorf("the last message is %q", message)
		}

		b.mu.Lock()
		down = false
		b.mu.Unlock()
		pass(t, 16*time.Second)
		b.expectState(gatewayapi.StateConnected)
		// Lost after a moment: one more of the same. Lost after a while: a first failure.
		lostAt := time.Since(b.began)
		b.last().lose(lost())
		pass(t, 40*time.Second)
		attempts = b.attempted()
		expect(t, "wait after a short success", attempts[len(attempts)-1]-lostAt, 16*time.Second)
		pass(t, 30*time.Second)
		lostAt = time.Since(b.began)
		b.last().lose(lost())
		pass(t, 40*time.Second)
		attempts = b.attempted()
		expect(t, "wait after a sustained success", attempts[len(attempts)-1]-lostAt, 500*time.Millisecond)
	})
}

// An edge that floods each connection that it gets is gone to less and less often.
func TestAnEdgeThatFloodsIsLeftAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.start()
		for i, want := range []time.Duration{500 * time.Millisecond, 500 * time.Millisecond, time.Second, 2 * time.Second, 4 * time.Second, 8 * time.Second, 16 * time.Second, 16 * time.Second} {
			pass(t, 100*time.Millisecond)
			b.expectState(gatewayapi.StateConnected)
			lostAt := time.Since(b.began)
			b.last().lose(&tunnel.LostError{Reason: tunnel.LostFlood, Err: errors.New("too much")})
			pass(t, want)
			attempts := b.attempted()
			expect(t, "wait", attempts[len(attempts)-1]-lostAt, want)
			expect(t, "reconnects", b.metrics.value(t, "reconnects_total", "flood"), float64(i+1))
		}
		expect(t, "calls", b.gateway.seen(), []string{"register"})
	})
}

func TestRetryAfterOfTheGatewayIsHonoured(t *testing.T) {
	for _, status := range []int{http.StatusTooManyRequests, http.StatusServiceUnavailable} {
		synctest.Test(t, func(t *testing.T) {
			b := newBench(t)
			b.gateway.fail = func(call string, n int) error {
				if call == "register" && n == 1 {
					return refusedWith(status, 20*time.Second)
				}
				return nil
			}
			b.start()
			pass(t, 20*time.Second)
			expect(t, "calls before the time", b.gateway.seen(), []string{"register"})
			pass(t, 5*time.Second) // half of what the spread adds at most
			b.expectState(gatewayapi.StateConnected)
		})
	}
}

func TestAForbiddenPodTriesSlowlyAndSaysSo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.gateway.fail = func(call string, _ int) error { return refusedWith(http.StatusForbidden, 0) }
		b.start()
		pass(t, 10*time.Minute)
		b.expectState(gatewayapi.StateRegistering)
		if n := len(b.gateway.seen()); n < 10 || n > 60 {
			t.Errorf("%d calls in 10 minutes", n)
		}
		if report := b.gateway.lastReport(); !strings.Contains(report.Message, "403") {
			t.Errorf("reported %+v", report)
		}
		if n := len(b.gateway.reported()); n > 2 {
			t.Errorf("%d reports of one and the same", n)
		}
	})
}

func TestAnAppThatStopsAnsweringLeavesTheRotation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.start()
		pass(t, 5*time.Second)
		b.setApp(true)
		pass(t, 2*time.Second)
		expect(t, "withdrawals after two failures", b.last().count().withdrawals, 0)
		pass(t, 2*time.Second)
		expect(t, "withdrawals after three", b.last().count().withdrawals, 1)
		b.expectState(gatewayapi.StateWaitingForApp)
		b.setApp(false)
		pass(t, 2*time.Second)
		b.expectState(gatewayapi.StateConnected)
		expect(t, "forwards", b.last().count().forwards, 1)
		expect(t, "connections to the edge", b.connections(), 1)
		expect(t, "reports", b.gateway.reported(), []gatewayapi.State{gatewayapi.StateConnected, gatewayapi.StateWaitingForApp, gatewayapi.StateConnected})
	})
}

func TestAnEdgeThatDoesNotTakeTheTunnelOutIsLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.start()
		pass(t, 5*time.Second)
		first := b.last()
		first.with(func() { first.withdrawError = errors.New("refused") })
		b.setApp(true)
		pass(t, 10*time.Second)
		if !first.isClosed() {
			t.Error("the tunnel of a dead app stayed in the rotation")
		}
		b.expectState(gatewayapi.StateWaitingForApp)
	})
}

func TestTheEdgeAsksToReconnect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.start()
		pass(t, 40*time.Second)
		first := b.last()
		first.visit(1)
		close(first.leave)
		pass(t, time.Second)
		b.expectState(gatewayapi.StateConnected)
		expect(t, "tunnels", b.connections(), 2)
		if first.isClosed() {
			t.Error("the old tunnel was closed under its visitor")
		}
		first.visit(0)
		pass(t, time.Second)
		if !first.isClosed() {
			t.Error("the old tunnel was not closed after its visitor had left")
		}
	})
}

// The sidecars that an edge sends away together are kept apart when they come back, and none comes before its time.
func TestTheEdgeSaysWhenToComeBack(t *testing.T) {
	const never = time.Duration(0)
	for _, c := range []struct {
		name     string
		comeBack time.Duration
		random   float64
		want     time.Duration
	}{
		{"the earliest", 20 * time.Second, 0, 20*time.Second + 50*time.Millisecond},
		{"in the middle", 20 * time.Second, 0.5, 25 * time.Second},
		{"the latest", 20 * time.Second, 0.999, 29990 * time.Millisecond},
		{"a second", time.Second, 0.5, 1500 * time.Millisecond},
		{"nothing", never, 0.5, 500 * time.Millisecond},
		{"a day is five minutes", 24 * time.Hour, 0.5, 375 * time.Second},
	} {
		for _, how := range []string{"session", "connection"} {
			t.Run(c.name+", by its "+how, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					b := newBench(t)
					b.random = func() float64 { return c.random }
					b.start()
					pass(t, 40*time.Second)
					b.last().with(func() { b.last().comeBack = c.comeBack })
					at := time.Since(b.began)
					if how == "session" {
						close(b.last().leave)
					} else {
						b.last().lose(lost())
					}
					pass(t, 10*time.Minute)
					attempts := b.attempted()
					expect(t, "attempts", len(attempts), 2)
					expect(t, "wait", attempts[1]-at, c.want)
				})
			})
		}
	}
}

func TestDrainWaitsForVisitorsAndEndsNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.start()
		pass(t, time.Second)
		b.last().visit(2)
		b.sup.drain()
		b.expectState(gatewayapi.StateDraining)
		if !isClosed(b.sup.withdrawn) || isClosed(b.sup.drained) {
			t.Error("the tunnel should be out of the rotation and not yet drained")
		}
		pass(t, time.Minute)
		if isClosed(b.sup.drained) || b.last().isClosed() {
			t.Error("a visitor was cut off")
		}
		b.last().visit(0)
		synctest.Wait()
		if !isClosed(b.sup.drained) {
			t.Error("not drained after the visitors had left")
		}
		pass(t, time.Minute)
		if b.last().isClosed() {
			t.Error("draining closed the tunnel, which is SIGTERM's part")
		}
		b.stop()
		expect(t, "calls", b.gateway.seen(), []string{"register", "delete"})
	})
}

func TestDrainWhileThereIsNoTunnel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.setApp(true)
		b.start()
		pass(t, time.Second)
		b.sup.drain()
		synctest.Wait()
		if !isClosed(b.sup.drained) {
			t.Error("not drained")
		}
		b.setApp(false)
		pass(t, time.Minute)
		expect(t, "calls", b.gateway.seen(), []string(nil))
	})
}

func TestRetireClosesWithinItsTime(t *testing.T) {
	for _, test := range []struct {
		name     string
		visitors int
		drain    bool
		after    time.Duration // when it is closed; 0 is at once
	}{
		{"nobody there", 0, false, 0},
		{"a visitor who stays", 1, false, 10 * time.Second},
		{"the pod ends meanwhile", 1, true, time.Hour},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBench(t)
				b.start()
				pass(t, time.Second)
				b.last().visit(test.visitors)
				b.sup.retire()
				synctest.Wait()
				if test.drain {
					b.sup.drain()
				}
				if test.after > 0 {
					pass(t, min(test.after, time.Minute)-time.Second)
					if b.last().isClosed() {
						t.Fatal("closed early")
					}
					if test.drain {
						return
					}
					pass(t, time.Second)
				}
				if !b.last().isClosed() {
					t.Error("not closed in time")
				}
				expect(t, "calls", b.gateway.seen(), []string{"register", "delete"})
			})
		})
	}
}

func TestTheEndIsBoundedWhateverHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.start()
		pass(t, time.Second)
		current := b.last()
		current.with(func() { current.hangWithdraw = true })
		b.gateway.mu.Lock()
		b.gateway.hang = true
		b.gateway.mu.Unlock()
		began := time.Now()
		b.stop()
		if took := time.Since(began); took > 3*time.Second {
			t.Errorf("ending took %s, allowed are 3s", took)
		}
	})
}

func TestAChangedPortIsUsedAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.start()
		pass(t, time.Second)
		_, err := b.configs[0].DialApp(t.Context())
		expect(t, "dial", err, errors.New("dialled port 8000"))
		b.sup.update(gatewayapi.Assignment{SocketID: "s1", Port: 9000})
		_, err = b.configs[0].DialApp(t.Context())
		expect(t, "dial", err, errors.New("dialled port 9000"))
		expect(t, "tunnels", b.connections(), 1)
	})
}

func TestRegistrationsThatCannotBeUsed(t *testing.T) {
	g, key := newFakeGateway(t), newKey(t)
	good := g.registration("t1", authorizedKey(key.PublicKey()))
	if _, err := newLogin(good, key); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*gatewayapi.Registration){
		"no tunnel id":           func(r *gatewayapi.Registration) { r.TunnelID = "" },
		"a path as id":           func(r *gatewayapi.Registration) { r.TunnelID = "../x" },
		"no user":                func(r *gatewayapi.Registration) { r.User = "" },
		"no address":             func(r *gatewayapi.Registration) { r.EdgeAddress = "" },
		"an address and no port": func(r *gatewayapi.Registration) { r.EdgeAddress = "edge" },
		"port 0":                 func(r *gatewayapi.Registration) { r.EdgeAddress = "edge:0" },
		"no host keys":           func(r *gatewayapi.Registration) { r.HostKeys = nil },
		"a broken host key":      func(r *gatewayapi.Registration) { r.HostKeys = []string{"ssh-ed25519 AAAA"} },
		"two lines":              func(r *gatewayapi.Registration) { r.HostKeys = []string{r.HostKeys[0] + "\n" + r.HostKeys[0]} },
		"a large port":           func(r *gatewayapi.Registration) { r.ForwardPort = 65536 },
		"no certificate":         func(r *gatewayapi.Registration) { r.Certificate = "" },
		"a plain key":            func(r *gatewayapi.Registration) { r.Certificate = authorizedKey(key.PublicKey()) },
		"another's": func(r *gatewayapi.Registration) {
			r.Certificate = g.registration("t1", authorizedKey(newKey(t).PublicKey())).Certificate
		},
	} {
		registration := good
		registration.HostKeys = slices.Clone(good.HostKeys)
		change(&registration)
		if _, err := newLogin(registration, key); err == nil {
			t.Errorf("%s was let through", name)
		}
	}
}

func TestMessagesFitIntoAReport(t *testing.T) {
	message := errorMessage(errors.New(strings.Repeat("ü", 400)))
	if len(message) > gatewayapi.MaxMessageBytes || strings.ToValidUTF8(message, "?") != message {
		t.Errorf("%d bytes, valid %t", len(message), strings.ToValidUTF8(message, "?") == message)
	}
}
