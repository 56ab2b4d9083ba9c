package tunnel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/mysocketio/mysocket-injector/internal/sidecar/retry"
)

const (
	// bulkBytes is what bulk is moved with: four of the largest SSH packets, for a quarter of the system calls and of the
	// window adjustments.
	bulkBytes = 128 << 10
	// packetBytes is the largest SSH packet, and what a read from the app begins with.
	packetBytes = 32 << 10
	// maxBulkToEdge bounds how many buffers of bulkBytes wait for visitors to read: a slow one holds its buffer as long as it
	// is slow. Those beyond make do with packetBytes.
	maxBulkToEdge = 64
	// idleBytes is what a connection without traffic holds on to.
	idleBytes = 4 << 10

	// halfOpenIdle is how long the second direction may rest after the first has ended properly.
	halfOpenIdle = 2 * time.Minute
	// flushIdle is how long what is under way may rest after one side has gone or broken off.
	flushIdle = 10 * time.Second
)

// bufferPool holds the buffers of one tunnel's connections. They are taken when there are bytes to move, not before, so
// thousands of idle connections cost little.
type bufferPool struct {
	bulk, packet, idle sync.Pool

	bulkToEdge atomic.Int32 // how many of bulk are with copyToEdge
}

func (p *bufferPool) takeBulk() *[bulkBytes]byte {
	if b, ok := p.bulk.Get().(*[bulkBytes]byte); ok {
		return b
	}
	return new([bulkBytes]byte)
}

// takeBulkToEdge is takeBulk for copyToEdge; nil when there are too many.
func (p *bufferPool) takeBulkToEdge() *[bulkBytes]byte {
	if p.bulkToEdge.Add(1) > maxBulkToEdge {
		p.bulkToEdge.Add(-1)
		return nil
	}
	return p.takeBulk()
}

func (p *bufferPool) putBulkToEdge(b *[bulkBytes]byte) {
	p.bulk.Put(b)
	p.bulkToEdge.Add(-1)
}

func (p *bufferPool) putPacket(b *[packetBytes]byte) { p.packet.Put(b) }

func (p *bufferPool) takePacket() *[packetBytes]byte {
	if b, ok := p.packet.Get().(*[packetBytes]byte); ok {
		return b
	}
	return new([packetBytes]byte)
}

func (p *bufferPool) takeIdle() *[idleBytes]byte {
	if b, ok := p.idle.Get().(*[idleBytes]byte); ok {
		return b
	}
	return new([idleBytes]byte)
}

// relay moves the bytes of one visitor's connection both ways. The end of one direction is carried to the other side
// while the opposite direction goes on: clients that close their half and wait for the answer are served.
type relay struct {
	channel  ssh.Channel
	requests <-chan *ssh.Request
	app      *net.TCPConn
	clock    retry.Clock
	observer Observer
	buffers  *bufferPool

	moved atomic.Int64 // bytes in both directions
}

// run returns when both directions have ended and the edge has closed the channel. ctx ends with the connection to the edge.
func (r *relay) run(ctx context.Context) {
	toApp, toEdge := make(chan error, 1), make(chan error, 1)
	go func() { toApp <- r.copyToApp() }()
	go func() { toEdge <- r.copyToEdge() }()

	requests, lost := r.requests, ctx.Done()
	var idle retry.Timer
	var wait time.Duration
	var expired <-chan time.Time
	var seen int64
	limit := func(d time.Duration) {
		if idle == nil {
			idle = r.clock.NewTimer(d)
			expired = idle.C()
		} else if d < wait {
			idle.Reset(d)
		}
		if wait == 0 || d < wait {
			wait = d
		}
		seen = r.moved.Load()
	}
	for toApp != nil || toEdge != nil {
		select {
		case request, open := <-requests:
			if open {
				_ = request.Reply(false, nil)
				break
			}
			// The edge has closed the channel: nobody reads any more. What it sent before is still to reach the app.
			requests = nil
			if toApp == nil {
				_ = r.app.Close()
			}
			limit(flushIdle)
		case err := <-toApp:
			toApp = nil
			switch {
			case requests == nil:
				_ = r.app.Close()
			case err == nil:
				_ = r.app.CloseWrite()
				limit(halfOpenIdle)
			default:
				// The app reads no more. It may have answered first, as servers do that refuse a large upload.
				limit(flushIdle)
			}
		case err := <-toEdge:
			toEdge = nil
			switch err {
			case nil:
				_ = r.channel.CloseWrite()
				limit(halfOpenIdle)
			default:
				// The app broke off, or the edge has gone; SSH has no reset, so closing at once is the nearest to it.
				_ = r.channel.Close()
				_ = r.app.Close()
				limit(flushIdle)
			}
		case <-expired:
			if moved := r.moved.Load(); moved != seen {
				seen = moved
				idle.Reset(wait)
				break
			}
			expired = nil
			_ = r.channel.Close()
			_ = r.app.Close()
		case <-lost:
			lost = nil
			_ = r.app.Close()
		}
	}
	if idle != nil {
		idle.Stop()
	}
	_ = r.channel.Close()
	_ = r.app.Close()
	if requests == nil {
		return
	}
	for request := range requests {
		_ = request.Reply(false, nil)
	}
}

// copyToApp returns nil when the edge has no more to send.
func (r *relay) copyToApp() error {
	buffer := r.buffers.takeIdle()
	defer r.buffers.idle.Put(buffer)
	for {
		n, err := r.channel.Read(buffer[:])
		if n > 0 {
			if err := r.writeToApp(buffer[:n]); err != nil {
				return err
			}
		}
		if err != nil {
			return endOf(err)
		}
		if n == len(buffer) {
			if err := r.copyBulkToApp(); err != nil {
				return endOf(err)
			}
		}
	}
}

// copyBulkToApp copies with a large buffer for as long as much comes at once. Its error is io.EOF at the end.
func (r *relay) copyBulkToApp() error {
	buffer := r.buffers.takeBulk()
	defer r.buffers.bulk.Put(buffer)
	for {
		n, err := r.channel.Read(buffer[:])
		if n > 0 {
			if err := r.writeToApp(buffer[:n]); err != nil {
				return err
			}
		}
		if err != nil || n < packetBytes/2 {
			return err
		}
	}
}

func (r *relay) writeToApp(data []byte) error {
	n, err := r.app.Write(data)
	r.moved.Add(int64(n))
	r.observer.BytesToApp(n)
	if err != nil {
		return fmt.Errorf("write to the app: %w", err)
	}
	return nil
}

func endOf(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// copyToEdge returns nil when the app has no more to send.
func (r *relay) copyToEdge() error {
	raw, err := r.app.SyscallConn()
	if err != nil {
		return fmt.Errorf("read from the app: %w", err)
	}
	for n := 0; ; {
		// Bulk fills one buffer after the other; what fills no packet needs no large buffer.
		bulk := n >= packetBytes
		if bulk {
			n, err = moveToEdge(r, raw, r.buffers.takeBulkToEdge, bulkSlice, r.buffers.putBulkToEdge)
			bulk = !errors.Is(err, errNoBuffer)
		}
		if !bulk {
			n, err = moveToEdge(r, raw, r.buffers.takePacket, packetSlice, r.buffers.putPacket)
		}
		if err != nil {
			return fmt.Errorf("from the app to the edge: %w", err)
		}
		if n == 0 {
			return nil
		}
	}
}

func bulkSlice(b *[bulkBytes]byte) []byte     { return b[:] }
func packetSlice(b *[packetBytes]byte) []byte { return b[:] }

// errNoBuffer means that there are as many buffers of this size in use as may be.
var errNoBuffer = errors.New("no buffer is free")

// moveToEdge moves what one read from the app brings, and returns how much that was; 0 at the end. The buffer is taken only
// when the kernel says that there is something to read. When take gives none, nothing is read, and the error is errNoBuffer.
func moveToEdge[B any](r *relay, raw syscall.RawConn, take func() *B, slice func(*B) []byte, put func(*B)) (int, error) {
	var buffer *B
	var n int
	var failed error
	err := raw.Read(func(fd uintptr) bool {
		if buffer = take(); buffer == nil {
			return true
		}
		for {
			n, failed = syscall.Read(int(fd), slice(buffer))
			if !errors.Is(failed, syscall.EINTR) {
				break
			}
		}
		if errors.Is(failed, syscall.EAGAIN) {
			put(buffer)
			buffer, failed = nil, nil
			return false
		}
		return true
	})
	if err == nil && buffer == nil {
		return 0, errNoBuffer
	}
	if buffer != nil {
		defer put(buffer)
	}
	if err == nil && failed != nil {
		err = os.NewSyscallError("read", failed)
	}
	if err != nil || n <= 0 {
		return 0, err
	}
	written, err := r.channel.Write(slice(buffer)[:n])
	r.moved.Add(int64(written))
	r.observer.BytesToEdge(written)
	return n, err
}
