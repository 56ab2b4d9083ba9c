package sshd

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
	// pacePause is what the library is given to look at them. Each part costs a login as much.
	pacePause = 3 * time.Millisecond
	// keysWrite is the number of the server's write with its part of the keys, after its version and its proposals. Without it
	// nobody can send what goes into the library's queue.
	keysWrite = 3
)

// pacedConn gives what a client sends before its login is over to x/crypto/ssh in small parts, with a pause between them.
//
// The library reads ahead into a queue of 16 packets. When a login ends in an error while the queue is full, the goroutine
// that fills it waits for ever, and another one for that: anybody could leave two of them behind with each connection. With
// fewer packets at a time the error comes first, and the connection is closed by the time the next ones are asked for.
type pacedConn struct {
	net.Conn
	over   atomic.Bool // the login
	writes atomic.Int32

	given  int // bytes since the last pause; of the reader
	closed chan struct{}
	once   sync.Once
}

func newPacedConn(conn net.Conn) *pacedConn {
	return &pacedConn{Conn: conn, closed: make(chan struct{})}
}

// Read has one caller at a time, the library's reader.
func (c *pacedConn) Read(p []byte) (int, error) {
	if c.over.Load() || c.writes.Load() < keysWrite {
		return c.Conn.Read(p)
	}
	if c.given >= paceBytes {
		pause := time.NewTimer(pacePause)
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
	return n, err
}

// Write counts what is written before the login is over.
func (c *pacedConn) Write(p []byte) (int, error) {
	if !c.over.Load() {
		c.writes.Add(1)
	}
	return c.Conn.Write(p)
}

// Close ends a pause, too.
func (c *pacedConn) Close() error {
	c.once.Do(func() { close(c.closed) })
	return c.Conn.Close()
}
