package sidecar

import (
	"context"
	"time"

	"github.com/mysocketio/mysocket-injector/internal/gatewayapi"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/retry"
)

// A connection that has gone on to another address of the edge goes back to its own when that takes connections again. Otherwise all
// connections would be at one edge of several when each has been away once, and visitors of the others would find no tunnel there.

// homeLinger is how long visitors who came by way of the other address may stay. They are on a connection of their own.
const homeLinger = time.Hour

// endHome is why the watching of a tunnel ends whose own address takes connections again.
const endHome end = "home"

// lookForHome tells, until ctx ends, when the own address of a connected tunnel takes connections. The channel never tells if the tunnel is
// there already.
func (s *supervisor) lookForHome(ctx context.Context, t edgeTunnel) (<-chan struct{}, func()) {
	found := make(chan struct{})
	if t.Home() {
		return found, func() {}
	}
	cfg, err := s.tunnelConfig()
	if err != nil {
		return found, func() {}
	}
	cfg.Spread.Away = t.Address()
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for retry.Sleep(ctx, s.around.clock, s.homeward.Next(0)) == nil {
			err := s.around.reach(ctx, cfg)
			if err == nil {
				close(found)
				return
			}
			s.logger.Debug("the connection's own address of the edge can't be reached yet", "err", err)
		}
	}()
	return found, func() { cancel(); <-ended }
}

// goHome connects to the own address, while the tunnel there is goes on serving, and returns the tunnel that is connected then: the new one, or
// the old if that failed.
func (s *supervisor) goHome(work context.Context, old edgeTunnel) edgeTunnel {
	err := s.ensureLogin(work)
	var t edgeTunnel
	if err == nil {
		s.login.used = true
		cfg, configErr := s.tunnelConfig()
		if err = configErr; err == nil {
			cfg.Spread.Home, cfg.Spread.Away = true, old.Address()
			t, err = s.around.connect(work, cfg)
		}
	}
	s.enter(gatewayapi.StateConnected, "") // asking for a login is another state
	if err != nil {
		if work.Err() == nil {
			s.logger.Info("the connection stays where it is: its own address of the edge takes connections, but not the tunnel", "err", err)
		}
		return old
	}
	s.detours = 0
	s.tunnel.Store(&t)
	s.logger.Info("back at the connection's own address of the edge", "tunnel", s.login.tunnelID, "edge", s.login.address)
	s.around.connected()
	// What was asked for meanwhile, an end even, finds the new tunnel only: the old must be out of its edge's rotation.
	if err := s.withdraw(context.WithoutCancel(work), old, hurriedWithdraw); err != nil {
		s.logger.Info("leaving the rotation at the other address failed; the connection there is closed", "err", err, "open", old.Open())
		old.Close()
		return t
	}
	s.lingering.Go(func() {
		ctx, cancel := context.WithTimeout(work, homeLinger)
		defer cancel()
		if old.WaitIdle(ctx) != nil {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(work), retireLinger)
			defer cancel()
			_ = old.WaitIdle(ctx)
		}
		old.Close()
	})
	return t
}

// unless returns the channel, or one that never tells.
func unless(not bool, c <-chan struct{}) <-chan struct{} {
	if not {
		return nil
	}
	return c
}
