package tunnel

import (
	"context"
	"errors"
	"fmt"
	"net"
	"syscall"

	"golang.org/x/crypto/ssh"

	"github.com/mysocketio/mysocket-injector/internal/sshguard"
)

// The reasons why the app did not take a visitor, also labels of metrics.
const (
	DialRefused     = "refused"
	DialTimeout     = "timeout"
	DialUnreachable = "unreachable"
	DialBusy        = "busy"
	DialOther       = "other"
)

// The reasons why a visitor was turned away before the app was asked, also labels of metrics.
const (
	RejectMalformed    = "malformed"
	RejectNotForwarded = "not_forwarded"
	RejectLimit        = "limit"
	RejectType         = "channel_type"
)

// probeChannel is a type that no client has. Our edge opens one now and then, to see from the refusal that channels are
// handled here, and not only keepalives. It is no visitor, but it counts as a message of no use, as others do.
const probeChannel = "probe@mysocket.io"

// acceptChannels takes the channels that the edge opens. It never waits for the app, since everything else in the
// connection would wait behind it. It does wait for an edge that doesn't read our refusals: one that floods us is held up itself.
func (t *Tunnel) acceptChannels(channels <-chan ssh.NewChannel) {
	for channel := range channels {
		if reason, code, err := t.admit(channel); err != nil {
			if channel.ChannelType() != probeChannel {
				t.cfg.Observer.Rejected(reason)
			}
			t.logger.Debug("visitor turned away", "reason", reason, "err", err)
			if reason == RejectMalformed || reason == RejectType {
				t.useless() // the other reasons are those of an honest edge, too
			}
			_ = channel.Reject(code, err.Error())
			continue
		}
		if !t.spawn(func() { t.serve(channel) }) {
			t.open.remove()
			_ = channel.Reject(ssh.ConnectionFailed, errClosed.Error())
		}
	}
}

// admit decides about a channel before the app is asked. One that it lets in counts as open.
func (t *Tunnel) admit(channel ssh.NewChannel) (string, ssh.RejectionReason, error) {
	if channel.ChannelType() != "forwarded-tcpip" {
		return RejectType, ssh.UnknownChannelType, errors.New("only forwarded-tcpip channels are accepted")
	}
	v, err := parseVisitor(channel.ExtraData())
	if err != nil {
		return RejectMalformed, ssh.ConnectionFailed, err
	}
	if !t.forward.matches(t.cfg.ForwardHost, v, t.cfg.Clock.Now()) {
		return RejectNotForwarded, ssh.Prohibited, fmt.Errorf("%q port %d is not forwarded here now", v.Host, v.Port)
	}
	if !t.open.add(MaxChannels) {
		return RejectLimit, ssh.ResourceShortage, fmt.Errorf("%d connections are open, which is the most for one tunnel", MaxChannels)
	}
	return "", 0, nil
}

// serve connects one visitor with the app. The app is asked first and the channel accepted after, so that an app that
// is down is an honest refusal, which the edge can answer by asking another pod.
func (t *Tunnel) serve(channel ssh.NewChannel) {
	defer t.open.remove()
	app, err := t.dialApp()
	if err != nil {
		reason := dialFailure(err)
		t.cfg.Observer.DialFailed(reason)
		t.logger.Debug("the app did not take a visitor", "reason", reason, "err", err)
		code := ssh.ConnectionFailed
		if reason == DialBusy {
			code = ssh.ResourceShortage
		}
		_ = channel.Reject(code, err.Error())
		return
	}
	defer func() { _ = app.Close() }()
	if t.cfg.Preface != nil {
		if err := t.sendPreface(channel.ExtraData(), app); err != nil {
			t.cfg.Observer.DialFailed(DialOther)
			t.logger.Debug("the app did not take a visitor", "reason", DialOther, "err", err)
			_ = channel.Reject(ssh.ConnectionFailed, err.Error())
			return
		}
	}
	t.lastDial.Store(t.cfg.Clock.Now().UnixNano())
	accepted, requests, err := channel.Accept()
	if err != nil {
		sshguard.DiscardRequests(channel) // the connection is gone
		return
	}
	t.cfg.Observer.ConnectionOpened()
	defer t.cfg.Observer.ConnectionClosed()
	(&relay{
		channel:  accepted,
		requests: requests,
		app:      app,
		clock:    t.cfg.Clock,
		observer: t.cfg.Observer,
		buffers:  &t.buffers,
	}).run(t.ctx)
}

// sendPreface sends what the app is to read before the visitor's own bytes.
func (t *Tunnel) sendPreface(payload []byte, app *net.TCPConn) error {
	v, err := parseVisitor(payload)
	if err != nil {
		return err // it was read once already
	}
	if _, err := app.Write(t.cfg.Preface(v.origin(), app)); err != nil {
		return fmt.Errorf("the app hung up at once: %w", err)
	}
	return nil
}

var errBusy = fmt.Errorf("%d other visitors wait for the app already", maxDials)

func (t *Tunnel) dialApp() (*net.TCPConn, error) {
	ctx, cancel := context.WithTimeout(t.ctx, t.cfg.DialTimeout)
	defer cancel()
	select {
	case t.dials <- struct{}{}:
		defer func() { <-t.dials }()
	case <-ctx.Done():
		return nil, errBusy
	}
	return t.cfg.DialApp(ctx)
}

// dialFailure returns the reason of a failed dial of the app.
func dialFailure(err error) string {
	switch {
	case errors.Is(err, errBusy):
		return DialBusy
	case errors.Is(err, syscall.ECONNREFUSED):
		return DialRefused
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH):
		return DialUnreachable
	case errors.Is(err, context.DeadlineExceeded), isTimeout(err):
		return DialTimeout
	}
	return DialOther
}
