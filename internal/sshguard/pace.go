// Package sshguard keeps golang.org/x/crypto/ssh from leaving goroutines behind when the other end of a connection does not keep to
// the protocol, at the edge's end and at the sidecar's. It must not know what travels through a connection.
//
// The library reads ahead into a queue of 16 packets, and nobody takes from the queue once a login has failed or a packet was out of
// place. The goroutine that fills it waits for ever then, with what it holds, and so do those that wait for it. Before the login
// is over the queue must not fill up: Conn sees to that. After it, Drain empties it.
package sshguard

import (
	"net"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// paceBytes are 6 SSH packets at most: the smallest, of any cipher, has 28 bytes. So the library has two pauses, and not
	// one, before there can be 16.
	paceBytes = 192
	// Pause is what the library is given to look at them. Each part costs a login as much. On a machine that is so busy that the
	// library does not run for as long, some connection may leave its goroutines behind after all.
	Pause = 3 * time.Millisecond
	// keysWrite is the number of the write with our part of the keys, after our version and our proposals. Without it nobody can
	// send what goes into the library's queue.
	keysWrite = 3
)

// Conn gives what the peer sends before the login is over to x/crypto/ssh in small parts, with a pause between them. With fewer
// packets at a time the error comes first, and the connection is closed by the time the next ones are asked for.
type Conn struct {
	net.Conn
	pause    time.Duration
	over     atomic.Bool
	writes   atomic.Int32
	received atomic.Int64

	given  int // bytes since the last pause; of the reader
	closed chan struct{}
	once   sync.Once
}

// New guards a connection that is given to the library for a login. The pauses take Pause if pause is zero.
func New(conn net.Conn, pause time.Duration) *Conn {
	if pause == 0 {
		pause = Pause
	}
	return &Conn{Conn: conn, pause: pause, closed: make(chan struct{})}
}

// LoginOver ends the pauses.
func (c *Conn) LoginOver() { c.over.Store(true) }

// Received is how many bytes have come so far.
func (c *Conn) Received() int64 { return c.received.Load() }

// Read has one caller at a time, the library's reader. After Close it gives nothing, not even what is in a buffer below: the library
// takes nothing from its queue any more.
func (c *Conn) Read(p []byte) (int, error) {
	select {
	case <-c.closed:
		return 0, net.ErrClosed
	default:
	}
	if c.over.Load() || c.writes.Load() < keysWrite {
		n, err := c.Conn.Read(p)
		c.received.Add(int64(n))
		return n, err
	}
	if c.given >= paceBytes {
		pause := time.NewTimer(c.pause)
		defer pause.Stop()
		select {
		case <-pause.C:
		case <-c.closed:
			return 0, net.ErrClosed
		}
		c.given = 0
	}
	n, err := c.Conn.Read(p[:min(len(p), paceBytes-c.given)])
	c.given += n
	c.received.Add(int64(n))
	return n, err
}

// Write counts what is written before the login is over.
func (c *Conn) Write(p []byte) (int, error) {
	if !c.over.Load() {
		c.writes.Add(1)
	}
	return c.Conn.Write(p)
}

// Close ends a pause, too.
func (c *Conn) Close() error {
	c.once.Do(func() { close(c.closed) })
	return c.Conn.Close()
}
