package tunnel

import (
	"bufio"
	"net"
)

// readBufferBytes holds four of the largest SSH packets.
const readBufferBytes = 128 << 10

// bufferedConn is a connection of which much is read at once. x/crypto/ssh reads through a buffer of 4 KiB, which costs at
// least two system calls for each large packet; system calls are more than half of the time that bulk costs.
//
// It reads only when it is asked to and holds no more than its buffer, so a sender is held up as without it.
type bufferedConn struct {
	net.Conn
	in *bufio.Reader
}

func newBufferedConn(conn net.Conn) *bufferedConn {
	return &bufferedConn{conn, bufio.NewReaderSize(conn, readBufferBytes)}
}

// Read returns what is buffered, and reads from the connection only when that is nothing.
func (c *bufferedConn) Read(p []byte) (int, error) { return c.in.Read(p) }
