package gateway

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mysocketio/mysocket-injector/internal/gatewayapi"
)

// streams are the open assignment streams. They have taken their connections over from net/http, which keeps twice as
// much for an open request as a stream needs (BenchmarkStreams).
type streams struct {
	metrics *metrics
	ending  chan struct{} // closed when they are to end

	mu    sync.Mutex
	ended bool
	open  sync.WaitGroup
}

func newStreams(m *metrics) *streams { return &streams{metrics: m, ending: make(chan struct{})} }

// begin counts a stream, unless they are ending.
func (s *streams) begin() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return false
	}
	s.open.Add(1)
	s.metrics.streams.Inc()
	return true
}

func (s *streams) done(why string) {
	s.metrics.streams.Dec()
	s.metrics.streamsEnded.WithLabelValues(why).Inc()
	s.open.Done()
}

// tell tells all streams to end and lets no new one begin.
func (s *streams) tell() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.ended {
		s.ended = true
		close(s.ending)
	}
}

// end is tell, and waits until they have ended.
func (s *streams) end() {
	s.tell()
	s.open.Wait()
}

// assignments streams snapshots: the present one at once, then a new one whenever it differs.
func (s *Server) assignments(w http.ResponseWriter, r *http.Request, caller identity) {
	changed, stop := s.Changes.subscribe(caller)
	if stop == nil {
		s.metrics.limited.WithLabelValues("streams_of_pod").Inc()
		s.fail(w, r, caller, &refusal{http.StatusTooManyRequests, gatewayapi.ReasonTooMany, fmt.Sprintf("pod %s has %d assignment streams open already", caller, maxStreams), gatewayapi.Heartbeat})
		return
	}
	// Only now: what changes from here on wakes us.
	line, err := s.snapshot(r.Context(), caller)
	if err != nil {
		stop()
		s.fail(w, r, caller, err)
		return
	}
	if !s.streams.begin() {
		stop()
		s.fail(w, r, caller, unavailable("the gateway is stopping"))
		return
	}
	c, socket, err := takeOver(w)
	if err != nil {
		stop()
		s.streams.done("protocol")
		s.fail(w, r, caller, err)
		return
	}
	head := "HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nConnection: close\r\nDate: " + time.Now().UTC().Format(http.TimeFormat) + "\r\n\r\n"
	if !s.writeTo(c, slices.Concat([]byte(head), line, []byte{'\n'})) {
		_ = c.Close()
		stop()
		s.streams.done("write")
		return
	}
	sent := sha256.Sum256(line) // and not the line: there are many streams
	// Out of the request, so that nothing of it is kept while the stream is open.
	go func() {
		why := s.stream(c, socket, caller, sent, changed)
		stop()
		s.streams.done(why)
	}()
}

// takeOver takes a request's connection out of net/http's hands.
func takeOver(w http.ResponseWriter) (net.Conn, syscall.RawConn, error) {
	c, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return nil, nil, refuse(http.StatusHTTPVersionNotSupported, gatewayapi.ReasonInvalid, "assignments are streamed over HTTP/1.1 only")
	}
	socket, err := socketOf(c)
	if err != nil {
		_ = c.Close()
		return nil, nil, err
	}
	return c, socket, nil
}

func (s *Server) writeTo(c net.Conn, text []byte) bool {
	_ = c.SetWriteDeadline(time.Now().Add(s.limits.write))
	_, err := c.Write(text)
	return err == nil
}

// stream writes to a connection until something ends it, and returns what. sent is the hash of what was written last. The
// answer has no length: its end is that of the connection.
func (s *Server) stream(c net.Conn, socket syscall.RawConn, caller identity, sent [sha256.Size]byte, changed <-chan struct{}) string {
	hungUp := make(chan struct{})
	go func() {
		defer close(hungUp)
		waitForPeer(socket)
	}()
	defer func() {
		_ = c.Close()
		<-hungUp
	}()
	// One timer for both, since there are many streams.
	end := time.Now().Add(s.limits.streamAge - rand.N(s.limits.streamAge/4)) //nolint:gosec // jitter, no secret
	beat := time.Now().Add(s.limits.heartbeat)
	next := time.NewTimer(min(time.Until(end), time.Until(beat)))
	defer next.Stop()
	for {
		why := ""
		select {
		case <-s.streams.ending:
			return "stopping"
		case <-hungUp:
			return "peer"
		case <-next.C:
			if !time.Now().Before(end) {
				return "age"
			}
			if !time.Now().Before(beat) {
				beat = time.Now().Add(s.limits.heartbeat)
				why = aside(func() string { return s.beat(c) })
			}
			next.Reset(min(time.Until(end), time.Until(beat)))
		case <-changed:
			why = aside(func() string { return s.update(c, caller, &sent) })
		}
		if why != "" {
			return why
		}
	}
}

// aside runs do on a goroutine of its own and waits for it. Looking at assignments and writing with TLS need a stack that
// Go does not make small again at once; a stream's own goroutine, of which there are many, need not have it.
func aside(do func() string) string {
	done := make(chan string, 1)
	go func() { done <- do() }()
	return <-done
}

// beat writes a heartbeat, and returns what ends the stream, if anything does.
func (s *Server) beat(c net.Conn) string {
	if !s.writeTo(c, []byte{'\n'}) {
		return "write"
	}
	return ""
}

// update writes a fresh snapshot if it is another than the one whose hash was sent, and returns what ends the stream, if
// anything does.
func (s *Server) update(c net.Conn, caller identity, sent *[sha256.Size]byte) string {
	fresh, err := s.freshSnapshot(caller)
	if err != nil {
		s.Log.Debug("assignment stream ends", "pod", caller.String(), "err", err)
		if e, ok := errors.AsType[*refusal](err); ok && e.status == http.StatusUnauthorized {
			return "pod_gone"
		}
		return "error"
	}
	if sum := sha256.Sum256(fresh); sum != *sent {
		if !s.writeTo(c, append(fresh, '\n')) {
			return "write"
		}
		*sent = sum
	}
	return ""
}

// freshSnapshot is snapshot for a stream, whose request is long over.
func (s *Server) freshSnapshot(caller identity) ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), s.limits.request)
	defer cancel()
	return s.snapshot(ctx, caller)
}

// waitForPeer returns when the peer has sent or closed something, or the connection was closed. A sidecar that has asked
// for its stream has nothing more to say on this connection, so whatever comes is its good-bye. It does not read, since a
// TLS connection that is read from keeps a buffer and a deep stack.
func waitForPeer(socket syscall.RawConn) {
	_ = socket.Read(func(fd uintptr) bool {
		var b [1]byte
		_, _, err := unix.Recvfrom(int(fd), b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
		return !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR)
	})
}
