package main

import (
	"context"
	"errors"
	"net"
	"sync"
	"time"
)

// roundTrip is how far away the SSH server seems in the measurement "rtt".
const roundTrip = 50 * time.Millisecond

// underWay bounds what one direction of a delayed connection holds, in pieces of bulkChunk at most: 64 MiB.
const underWay = 256

// serveDelay passes connections on to an address, each way after half of roundTrip. It delays streams, not packets: what the
// windows of SSH make of a long way is seen, what TCP's congestion control makes of it is not.
func serveDelay(ctx context.Context, args []string) error {
	if len(args) != 1 {
		return errors.New("delay: give the address to pass on to")
	}
	l, err := listen()
	if err != nil {
		return err
	}
	return acceptAll(ctx, l, func(near *net.TCPConn) {
		defer func() { _ = near.Close() }()
		far, err := visit(ctx, args[0])
		if err != nil {
			return
		}
		defer func() { _ = far.Close() }()
		var both sync.WaitGroup
		both.Go(func() { delayed(far, near) })
		both.Go(func() { delayed(near, far) })
		both.Wait()
	})
}

// piece is what one read brought, and when it is to arrive.
type piece struct {
	data []byte
	due  time.Time
}

// delayed passes bytes on until from has no more or to takes no more, and then says so to the other side.
func delayed(to, from *net.TCPConn) {
	pieces := make(chan piece, underWay)
	var reading sync.WaitGroup
	reading.Go(func() {
		defer close(pieces)
		buffer := make([]byte, bulkChunk)
		for {
			n, err := from.Read(buffer)
			if n > 0 {
				pieces <- piece{append([]byte(nil), buffer[:n]...), time.Now().Add(roundTrip / 2)}
			}
			if err != nil {
				return
			}
		}
	})
	defer reading.Wait()
	for p := range pieces {
		time.Sleep(time.Until(p.due))
		if _, err := to.Write(p.data); err != nil {
			_ = from.Close()
			for range pieces { // so that the reader ends
			}
			return
		}
	}
	_ = to.CloseWrite()
}
