package sshguard

import (
	"errors"
	"io"
	"net"
	"testing"
)

func TestConn(t *testing.T) {
	ours, theirs := net.Pipe()
	c := New(ours, 0)
	go func() { _, _ = io.CopyN(io.Discard, theirs, keysWrite) }()
	for range keysWrite {
		if _, err := c.Write([]byte{1}); err != nil {
			t.Fatal(err)
		}
	}
	sent := make(chan error, 1)
	go func() {
		_, err := theirs.Write(make([]byte, 10*paceBytes))
		sent <- err
	}()
	buf := make([]byte, 4096)
	total := 0
	for total < 3*paceBytes {
		n, err := c.Read(buf)
		if err != nil || n > paceBytes {
			t.Fatalf("%d bytes at once, %v", n, err)
		}
		total += n
	}
	c.LoginOver()
	if _, err := io.ReadFull(c, buf[:10*paceBytes-total]); err != nil {
		t.Fatal(err)
	}
	if err := <-sent; err != nil {
		t.Fatal(err)
	}

	c.over.Store(false)
	c.given = paceBytes
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(buf); err == nil || !errors.Is(err, net.ErrClosed) && !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("a read after the end: %v", err)
	}
	if err := c.Close(); err != nil {
		t.Errorf("the second Close: %v", err)
	}
}

// endless has bytes to read, closed or not, as a buffer has.
type endless struct{ net.Conn }

func (endless) Read(p []byte) (int, error) { return len(p), nil }
func (endless) Close() error               { return nil }

func TestNothingIsReadAfterClose(t *testing.T) {
	c := New(endless{}, 0)
	buf := make([]byte, 16)
	if _, err := c.Read(buf); err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	c.LoginOver() // which is also said after a login that failed
	if n, err := c.Read(buf); n != 0 || !errors.Is(err, net.ErrClosed) {
		t.Errorf("a read after the end gave %d bytes, %v", n, err)
	}
}
