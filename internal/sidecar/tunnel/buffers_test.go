package tunnel

import (
	"net"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
)

// stalled is a channel whose visitor reads one packet and then nothing more.
type stalled struct {
	ssh.Channel
	first   bool
	waiting chan<- int
	free    <-chan struct{}
}

func (s *stalled) Write(p []byte) (int, error) {
	if !s.first {
		s.first = true
		return len(p), nil
	}
	s.waiting <- len(p)
	<-s.free
	return len(p), nil
}

type uncounted struct{ Observer }

func (uncounted) BytesToEdge(int) {}

// TestSlowVisitorsHoldFewLargeBuffers: however many visitors are slow, only some of them hold a large buffer, and none is
// lost in the end.
func TestSlowVisitorsHoldFewLargeBuffers(t *testing.T) {
	const visitors = 2 * maxBulkToEdge
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = listener.Close() }()
	var buffers bufferPool
	waiting, free := make(chan int, 16*visitors), make(chan struct{})
	var running sync.WaitGroup
	for range visitors {
		app, err := net.Dial("tcp", listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		ours, err := listener.Accept()
		if err != nil {
			t.Fatal(err)
		}
		running.Go(func() {
			_, _ = app.Write(make([]byte, 4*bulkBytes))
			_ = app.Close()
		})
		running.Go(func() {
			defer func() { _ = ours.Close() }()
			r := &relay{channel: &stalled{waiting: waiting, free: free}, app: ours.(*net.TCPConn), observer: uncounted{}, buffers: &buffers}
			if err := r.copyToEdge(); err != nil {
				t.Error(err)
			}
			if got := r.moved.Load(); got != 4*bulkBytes {
				t.Errorf("%d bytes were moved of %d", got, 4*bulkBytes)
			}
		})
	}
	large := 0
	for i := range visitors {
		select {
		case n := <-waiting:
			if n > packetBytes {
				large++
			}
		case <-time.After(30 * time.Second):
			t.Errorf("%d of %d visitors were sent something", i, visitors)
		}
	}
	close(free)
	running.Wait()
	if large > maxBulkToEdge {
		t.Errorf("%d large buffers were held at once; at most %d may be", large, maxBulkToEdge)
	}
	if left := buffers.bulkToEdge.Load(); left != 0 {
		t.Errorf("%d large buffers are counted as held", left)
	}
}
