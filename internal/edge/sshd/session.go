package sshd

import (
	"fmt"
	"io"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/mysocketio/mysocket-injector/internal/sshguard"
)

const (
	ctrlC = 0x03
	ctrlD = 0x04

	// forwardSoon is how long a session's welcome waits for the connection's first forward.
	forwardSoon = time.Second
)

// session is a client's session channel: it gets a welcome and then the live request lines. A client takes its end as the
// word to reconnect.
type session struct {
	ch     ssh.Channel
	done   chan struct{}
	finish sync.Once
	shell  bool
	quiet  bool
}

func (s *session) close() {
	s.finish.Do(func() {
		_, _ = s.ch.SendRequest("exit-status", false, ssh.Marshal(struct{ Status uint32 }{0}))
		_ = s.ch.Close()
		close(s.done)
	})
}

// comeBackRequest is a request of a session's channel that says in how many seconds the client is to come back. Clients that
// don't know it pass over it: it asks for no answer.
const comeBackRequest = "come-back@mysocket.io"

// quietRequest is a request of a session's channel, sent before the shell, by clients that would discard what is written: they get no
// lines. Each request of a visitor would be a packet to all tunnels of its socket.
const quietRequest = "quiet@mysocket.io"

// comeBack tells the client when it is welcome again. It goes before close.
func (s *session) comeBack(after time.Duration) {
	seconds := uint32(min((after+time.Second-1)/time.Second, 1<<16)) //nolint:gosec // bounded
	_, _ = s.ch.SendRequest(comeBackRequest, false, ssh.Marshal(struct{ Seconds uint32 }{seconds}))
}

func (c *connection) handleChannels(chans <-chan ssh.NewChannel) {
	for nc := range chans {
		if !c.useless() {
			_ = nc.Reject(ssh.ResourceShortage, flooding)
			continue
		}
		if nc.ChannelType() != "session" {
			_ = nc.Reject(ssh.Prohibited, "this server only takes reverse forwards")
			continue
		}
		c.mu.Lock()
		full := c.closed || len(c.sessions) >= maxSessions
		c.mu.Unlock()
		if full {
			_ = nc.Reject(ssh.ResourceShortage, fmt.Sprintf("a connection may have %d sessions", maxSessions))
			continue
		}
		ch, reqs, err := nc.Accept()
		if err != nil {
			c.wg.Go(func() { sshguard.DiscardRequests(nc) })
			continue
		}
		s := &session{ch: ch, done: make(chan struct{})}
		c.mu.Lock()
		closed := c.closed
		c.sessions[s] = struct{}{}
		c.mu.Unlock()
		if closed {
			s.close()
		}
		c.wg.Add(2)
		go func() {
			defer c.wg.Done()
			c.serveSession(s, reqs)
		}()
		go func() {
			defer c.wg.Done()
			c.readInput(s)
		}()
	}
}

// serveSession answers the session's requests until the client or we close it.
func (c *connection) serveSession(s *session, reqs <-chan *ssh.Request) {
	for req := range reqs {
		if !c.useless() {
			continue
		}
		ok := false
		switch req.Type {
		case "pty-req", "window-change", "signal":
			ok = true
		case quietRequest:
			ok, s.quiet = true, true
		case "shell":
			// One shell a session; exec and subsystem would run something, and there is nothing to run.
			ok = !s.shell
		case "env":
			if name, valid := parseName(req.Payload); valid {
				ok = c.setName(name)
			}
		}
		if req.WantReply {
			_ = req.Reply(ok, nil)
		}
		if ok && req.Type == "shell" {
			s.shell = true
			if s.quiet {
				continue
			}
			c.wg.Add(1)
			go func() {
				defer c.wg.Done()
				c.writeLines(s)
			}()
		}
	}
	s.close()
	c.mu.Lock()
	delete(c.sessions, s)
	c.mu.Unlock()
}

// readInput discards what the client types; Control-C and Control-D end the session, and the tunnels with it: OpenSSH's client
// leaves only when no channel is open, and what idles between us and the app is closed when its tunnel leaves the rotation.
// The end of the input ends nothing: clients without a terminal send it at once.
func (c *connection) readInput(s *session) {
	buf := make([]byte, 256)
	for {
		n, err := s.ch.Read(buf)
		for _, b := range buf[:n] {
			if b == ctrlC || b == ctrlD {
				for _, f := range c.takeForwards() {
					c.withdraw(f)
				}
				s.close()
			}
		}
		if err != nil {
			return
		}
	}
}

// writeLines writes the welcome and then a line for each request. When the client does not read, the write blocks, and
// the feed drops lines.
func (c *connection) writeLines(s *session) {
	// A client with a registered key says with its forward which socket it means, and some send that after the shell.
	soon := time.NewTimer(forwardSoon)
	defer soon.Stop()
	select {
	case <-c.forwarding:
	case <-soon.C:
	case <-s.done:
	}
	sockets := c.sessionSockets()
	sub := c.server.cfg.Feed.Subscribe(sockets...)
	defer sub.Close()
	if _, err := io.WriteString(s.ch, c.welcome(sockets)); err != nil {
		return
	}
	for {
		select {
		case line := <-sub.Lines:
			if _, err := io.WriteString(s.ch, line+"\r\n"); err != nil {
				return
			}
		case <-s.done:
			return
		}
	}
}

// sessionSockets are the sockets that the connection serves: the one it logged in for, or those it forwards now.
func (c *connection) sessionSockets() []string {
	if c.login.socketID != "" {
		return []string{c.login.socketID}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	var ids []string
	for _, f := range c.forwards {
		ids = append(ids, f.socketID)
	}
	return ids
}

func (c *connection) welcome(sockets []string) string {
	text := "\r\nWelcome to the Mysocket edge.\r\n"
	for _, id := range sockets {
		socket, err := c.server.cfg.Store.Socket(id)
		if err != nil {
			continue
		}
		text += fmt.Sprintf("\r\nSocket %q is online:\r\n    %s\r\n", socket.Name, c.server.cfg.URL(socket))
	}
	return text + "\r\nRequests are shown as they come. Press Control-C to end.\r\n\r\n"
}
