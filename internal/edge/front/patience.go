package front

import (
	"errors"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/mysocketio/mysocket-injector/internal/edge/metrics"
)

// Patience is how long a Web front waits for visitors and apps. A zero field waits for ever.
type Patience struct {
	// Body is how long a visitor may take to send the next part of a body, or to take the next part of an answer.
	Body time.Duration
	// Upgraded is how long nothing may pass in either direction of an upgraded connection (WebSocket), and how long a visitor may
	// send nothing of a body while the answer to it is under way (streams, gRPC).
	Upgraded time.Duration
	// Answer is how long an app may take to begin its answer after it has got the whole request. gRPC is not held to it.
	Answer time.Duration
}

// progress is how many bytes make the wait for a visitor start anew: a byte now and then does not.
const progress = 1 << 10

var (
	errStalledSending = errors.New("the visitor stopped sending the body of its request")
	errStalledTaking  = errors.New("the visitor stopped taking the answer")
	errIdleUpgraded   = errors.New("nothing passed through the upgraded connection for too long")
)

// cutReason is the metric's word for an error of the above.
func cutReason(err error) string {
	switch {
	case errors.Is(err, errStalledSending):
		return metrics.CutSending
	case errors.Is(err, errStalledTaking):
		return metrics.CutTaking
	default:
		return metrics.CutIdle
	}
}

// stall watches how long one direction of a request waits for the visitor. Time in which the edge waits for the app, or
// the app has nothing to send, does not count.
type stall struct {
	timer *time.Timer
	// waiting says that the visitor is waited for now: the timer may tell just after that.
	waiting bool
	began   time.Time
	left    time.Duration
	bytes   int
}

// watch ends a request whose visitor stalls. It uses the server's deadlines, which work for HTTP/1.1 and HTTP/2 alike.
type watch struct {
	patience Patience
	control  *http.ResponseController

	mu sync.Mutex
	// over is set when the request is done: its controller must not be used any more.
	over bool
	// streaming is set when the answer has begun, and for gRPC: from then on a visitor may take long to send more.
	streaming     bool
	cut           error
	sending, take stall
}

func newWatch(p Patience, rw http.ResponseWriter) *watch {
	return &watch{patience: p, control: http.NewResponseController(rw)}
}

func (w *watch) stream() {
	w.mu.Lock()
	w.streaming = true
	w.mu.Unlock()
}

// beginSending is called before a wait for a part of the body, endSending after it, with the number of its bytes.
func (w *watch) beginSending() { w.begin(&w.sending, w.sendingStalled) }

func (w *watch) endSending(n int) { w.end(&w.sending, n) }

// beginTaking is called before a part of the answer is written, endTaking after it.
func (w *watch) beginTaking() { w.begin(&w.take, w.takingStalled) }

func (w *watch) endTaking(n int) { w.end(&w.take, n) }

func (w *watch) begin(s *stall, stalled func()) {
	if w.patience.Body == 0 {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	s.waiting, s.began = true, time.Now()
	if s.timer == nil {
		s.left = w.patience.Body
		s.timer = time.AfterFunc(s.left, stalled)
		return
	}
	s.timer.Reset(s.left)
}

func (w *watch) end(s *stall, n int) {
	if s.timer == nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	s.timer.Stop()
	s.waiting = false
	s.left -= time.Since(s.began)
	if s.bytes += n; s.bytes >= progress {
		s.bytes, s.left = 0, w.patience.Body
	}
}

func (w *watch) sendingStalled() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.over || !w.sending.waiting {
		return
	}
	if w.streaming {
		switch left := w.patience.Upgraded - time.Since(w.sending.began); {
		case w.patience.Upgraded == 0:
			return
		case left > 0:
			w.sending.timer.Reset(left)
			return
		}
	}
	w.cut = errStalledSending
	_ = w.control.SetReadDeadline(time.Unix(1, 0))
	// The server may be telling the visitor to continue; then there is the page that says why.
	_ = w.control.SetWriteDeadline(time.Now().Add(w.patience.Body))
}

func (w *watch) takingStalled() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.over || !w.take.waiting {
		return
	}
	w.cut = errStalledTaking
	_ = w.control.SetWriteDeadline(time.Unix(1, 0))
	// Over HTTP/1.1 the server may be reading what is left of the body before it writes.
	_ = w.control.SetReadDeadline(time.Unix(1, 0))
}

// stalled is why the visitor's request was ended, nil if it was not.
func (w *watch) stalled() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.cut
}

// finish ends the watch, and returns why the request was ended, if it was. Over HTTP/1.1 the server has by itself what is left of
// the answer sent, and before that what is left of the body read, and would wait for ever. When it has, it takes the deadlines back.
func (w *watch) finish(r *http.Request) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.over = true
	if w.cut == nil && w.patience.Body > 0 && r.ProtoMajor == 1 {
		limit := time.Now().Add(w.patience.Body)
		if r.Body != http.NoBody {
			_ = w.control.SetReadDeadline(limit)
			limit = limit.Add(w.patience.Body) // one after the other
		}
		_ = w.control.SetWriteDeadline(limit)
	}
	for _, s := range []*stall{&w.sending, &w.take} {
		if s.timer != nil {
			s.timer.Stop()
		}
	}
	return w.cut
}

// upgradedConn is the visitor's side of an upgraded connection. It ends when nothing passes, or the visitor takes nothing.
type upgradedConn struct {
	net.Conn
	rec   *recorder
	limit Patience

	mu   sync.Mutex
	idle *time.Timer
	last time.Time
}

func newUpgradedConn(conn net.Conn, rec *recorder, limit Patience) *upgradedConn {
	c := &upgradedConn{Conn: conn, rec: rec, limit: limit, last: time.Now()}
	if limit.Upgraded > 0 {
		c.mu.Lock()
		c.idle = time.AfterFunc(limit.Upgraded, c.check)
		c.mu.Unlock()
	}
	return c
}

// check ends the connection if it has been idle for long enough.
func (c *upgradedConn) check() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if left := c.limit.Upgraded - time.Since(c.last); left > 0 {
		c.idle.Reset(left)
		return
	}
	c.rec.watch.fail(errIdleUpgraded)
	_ = c.SetDeadline(time.Unix(1, 0))
}

func (w *watch) fail(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.cut == nil {
		w.cut = err
	}
}

func (c *upgradedConn) passed() {
	c.mu.Lock()
	c.last = time.Now()
	c.mu.Unlock()
}

// Read reads what the visitor sends.
func (c *upgradedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if n > 0 {
		c.passed()
		c.rec.in.Add(int64(n))
	}
	return n, err
}

// Write gives the visitor a part of what the app sends.
func (c *upgradedConn) Write(p []byte) (int, error) {
	var stalled *time.Timer
	if c.limit.Body > 0 {
		// Not a write deadline: that would undo the deadline by which an idle connection is ended.
		stalled = time.AfterFunc(c.limit.Body, func() {
			c.rec.watch.fail(errStalledTaking)
			_ = c.SetDeadline(time.Unix(1, 0))
		})
	}
	n, err := c.Conn.Write(p)
	if stalled != nil {
		stalled.Stop()
	}
	if n > 0 {
		c.passed()
		c.rec.out.Add(int64(n))
		c.rec.firstByte()
	}
	return n, err
}

// Close ends the connection.
func (c *upgradedConn) Close() error {
	c.mu.Lock()
	if c.idle != nil {
		c.idle.Stop()
	}
	c.mu.Unlock()
	return c.Conn.Close()
}

// CloseWrite tells the visitor that no more is coming.
func (c *upgradedConn) CloseWrite() error {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return c.Close()
}
