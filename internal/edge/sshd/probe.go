package sshd

import (
	"slices"
	"time"

	"golang.org/x/crypto/ssh"
)

// probeChannel is a type of channel that no client knows. Each must refuse it (RFC 4254, 5.1), which is the proof that it
// handles channels: an SSH connection whose keepalives are answered, and whose openings are not, would hang each request that
// chooses it. No app is touched.
const probeChannel = "probe@mysocket.io"

// probe sends a data-path probe at once and then at each interval. While the client leaves one without answer, its tunnels
// are ejected; the registry finds out when they work again.
func (c *connection) probe() {
	ticker := time.NewTicker(c.server.cfg.KeepaliveInterval)
	defer ticker.Stop()
	for {
		answered := make(chan struct{})
		c.wg.Add(1)
		go func() {
			defer c.wg.Done()
			defer close(answered)
			// A client that accepts it instead has answered too.
			if ch, reqs, err := c.ssh.OpenChannel(probeChannel, nil); err == nil {
				go ssh.DiscardRequests(reqs)
				_ = ch.Close()
			}
		}()
		if !c.await(answered) {
			return
		}
		select {
		case <-ticker.C:
		case <-c.done:
			return
		}
	}
}

// await waits for the answer to a probe, and ejects the connection's tunnels when there is none in time. It returns false
// when the connection is over.
func (c *connection) await(answered <-chan struct{}) bool {
	timer := time.NewTimer(c.server.cfg.ProbeTimeout)
	defer timer.Stop()
	select {
	case <-answered:
		return true
	case <-c.done:
		return false
	case <-timer.C:
	}
	c.mu.Lock()
	forwards := slices.Clone(c.forwards)
	c.mu.Unlock()
	for _, f := range forwards {
		f.tunnel.Stuck()
	}
	select {
	case <-answered:
		return true
	case <-c.done:
		return false
	}
}
