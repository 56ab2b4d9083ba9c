package tunnel

import (
	"fmt"
	"io"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/mysocketio/mysocket-injector/internal/sidecar/retry"
)

const (
	// A dead edge is noticed at the latest after keepaliveEvery and keepaliveTimeout together.
	keepaliveEvery   = 10 * time.Second
	keepaliveTimeout = 20 * time.Second

	// minSession is how long a session must have lived for its end to mean something. A server that ends it at once
	// offers none, as OpenSSH does for accounts without a shell.
	minSession = 5 * time.Second
	// lastWord is how long the end of a session's requests is awaited when its output has ended.
	lastWord = time.Second
)

// keepAlive asks the edge every few seconds whether it is there, and ends the connection when it doesn't answer.
func (t *Tunnel) keepAlive() {
	for {
		if retry.Sleep(t.ctx, t.cfg.Clock, keepaliveEvery) != nil {
			return
		}
		asked := t.cfg.Clock.Now()
		answered := make(chan error, 1)
		if !t.spawn(func() {
			// A failure is an answer as good as any: many servers don't know the request.
			_, _, err := t.conn.SendRequest("keepalive@openssh.com", true, nil)
			answered <- err
		}) {
			return
		}
		timer := t.cfg.Clock.NewTimer(keepaliveTimeout)
		select {
		case err := <-answered:
			timer.Stop()
			if err == nil {
				t.cfg.Observer.RoundTrip(t.cfg.Clock.Now().Sub(asked))
			}
		case <-t.ctx.Done():
			timer.Stop()
			return
		case <-timer.C():
			t.fail(&LostError{LostKeepalive, fmt.Errorf("the edge has not answered a keepalive for %s", keepaliveTimeout)})
			return
		}
	}
}

// comeBackRequest is what our edge sends in the session before it ends it: in how many seconds to come back.
const comeBackRequest = "come-back@mysocket.io"

// nameVariable is the environment variable of the session in which the edge is told who serves.
const nameVariable = "MYSOCKET_NAME"

// quietRequest asks our edge to write nothing into the session. It wants no answer, so that others pass over it.
const quietRequest = "quiet@mysocket.io"

// hearSession listens for when to come back, until the session's requests end. Nothing else that may come there matters.
func (t *Tunnel) hearSession(requests <-chan *ssh.Request) {
	for request := range requests {
		t.useless()
		var said struct{ Seconds uint32 }
		if request.Type == comeBackRequest && ssh.Unmarshal(request.Payload, &said) == nil {
			t.comeBack.Store(int64(time.Duration(said.Seconds) * time.Second))
		}
		if request.WantReply {
			_ = request.Reply(false, nil)
		}
	}
}

// holdSession opens a session as the classic clients do. The edge closes it to ask for a reconnect. What it prints there is for people, and discarded; an
// edge that knows how to is asked not to: a line for each request to each replica is a packet more on every tunnel.
func (t *Tunnel) holdSession() {
	defer close(t.session)
	channel, requests, err := t.conn.OpenChannel("session", nil)
	if err != nil {
		t.logger.Debug("the edge offers no session", "err", err)
		return
	}
	opened := t.cfg.Clock.Now()
	heard := make(chan struct{})
	if !t.spawn(func() {
		defer close(heard)
		t.hearSession(requests)
	}) {
		ssh.DiscardRequests(requests) // what nobody reads would hold up the closing
		return
	}
	if !t.spawn(func() { _, _ = io.Copy(io.Discard, channel.Stderr()) }) {
		return
	}
	if t.cfg.Name != "" {
		// As OpenSSH sends a variable: an edge that does not want it need not answer.
		variable := ssh.Marshal(struct{ Name, Value string }{nameVariable, t.cfg.Name})
		_, _ = channel.SendRequest("env", false, variable) // should the connection be lost, the next request tells
	}
	pty := struct {
		Term                         string
		Columns, Rows, Width, Height uint32
		Modes                        string
	}{Term: "xterm-256color", Columns: 80, Rows: 40}
	for _, request := range []struct {
		name    string
		payload []byte
		answer  bool
	}{{quietRequest, nil, false}, {"pty-req", ssh.Marshal(pty), true}, {"shell", nil, true}} {
		ok, err := channel.SendRequest(request.name, request.answer, request.payload)
		if err != nil || request.answer && !ok {
			t.logger.Debug("the edge offers no session", "request", request.name, "err", err)
			_ = channel.Close()
			_, _ = io.Copy(io.Discard, channel)
			return
		}
	}
	_, _ = io.Copy(io.Discard, channel)
	_ = channel.Close()
	// The edge's last word comes before the end of its requests. One that never ends them is not waited for.
	timer := t.cfg.Clock.NewTimer(lastWord)
	select {
	case <-heard:
	case <-timer.C():
	}
	timer.Stop()
	if t.ctx.Err() != nil {
		return // the whole connection has ended, which Done says
	}
	if lived := t.cfg.Clock.Now().Sub(opened); lived < minSession && t.comeBack.Load() == 0 {
		t.logger.Debug("the edge ended the session at once; going on without", "after", lived)
		return
	}
	close(t.leave)
}
