package tunnel

import (
	"bytes"
	"errors"
	"io"
	"net"
	"testing"
)

// countedConn serves its data and counts how often it is read from.
type countedConn struct {
	net.Conn
	data  *bytes.Reader
	reads int
}

func (c *countedConn) Read(p []byte) (int, error) {
	c.reads++
	return c.data.Read(p)
}

// Packets are read as x/crypto/ssh reads them, a length of 4 bytes and then the rest; what arrives and its order are the same,
// the connection is read from only once for a buffer full, and never before somebody asks.
func TestBufferedConn(t *testing.T) {
	const packets, size = 40, 32<<10 + 20
	data := make([]byte, packets*size)
	for i := range data {
		data[i] = byte(i * 7 >> 3)
	}
	under := &countedConn{data: bytes.NewReader(data)}
	conn := newBufferedConn(under)
	if under.reads != 0 {
		t.Fatalf("read %d times before anybody asked", under.reads)
	}
	var got bytes.Buffer
	for range packets {
		for _, n := range []int64{4, size - 4} {
			if _, err := io.CopyN(&got, conn, n); err != nil {
				t.Fatal(err)
			}
		}
		if ahead := int(under.data.Size()) - under.data.Len() - got.Len(); ahead > readBufferBytes {
			t.Fatalf("%d bytes were read ahead; the buffer has %d", ahead, readBufferBytes)
		}
	}
	if !bytes.Equal(got.Bytes(), data) {
		t.Fatal("what was read is not what was sent")
	}
	if limit := len(data)/readBufferBytes + 1; under.reads > limit {
		t.Errorf("%d reads for %d bytes; %d are enough", under.reads, len(data), limit)
	}
	if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("the end was %v", err)
	}
}
