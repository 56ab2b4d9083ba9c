package front

import (
	"bufio"
	"errors"
	"io"
	"net"
	"net/http"
	"sync/atomic"
	"time"
)

// recorder is the answer to one request on its way to the visitor: it remembers what the log tells of it.
type recorder struct {
	http.ResponseWriter
	patience Patience
	watch    *watch
	start    time.Time
	status   int
	in, out  atomic.Int64
	// first is when the first byte of the answer went out, in nanoseconds after start; 0 if none did.
	first atomic.Int64
	body  *visitorBody
	// last says that the connection ends with this answer. It is said with the final header: those of informational answers that
	// come before are ReverseProxy's, which empties them.
	last bool
	// whole says that the answer is a header that is the trailer as well, as gRPC's are that have no message. To clients it is
	// only that if it ends the stream, so it must not be sent before its end.
	whole bool
}

func newRecorder(rw http.ResponseWriter, p Patience, start time.Time) *recorder {
	return &recorder{ResponseWriter: rw, patience: p, watch: newWatch(p, rw), start: start, last: rw.Header().Get("Connection") == "close"}
}

// Unwrap lets http.ResponseController flush.
func (r *recorder) Unwrap() http.ResponseWriter { return r.ResponseWriter }

func (r *recorder) firstByte() {
	if r.first.Load() == 0 {
		r.first.CompareAndSwap(0, int64(max(time.Since(r.start), 1)))
	}
}

// WriteHeader notes the final status, and an upgrade, but not other informational ones, which the server sends at once.
func (r *recorder) WriteHeader(code int) {
	if code < 200 && code != http.StatusSwitchingProtocols {
		r.watch.beginTaking()
		r.ResponseWriter.WriteHeader(code)
		r.watch.endTaking(0)
		return
	}
	if r.status == 0 {
		r.status = code
		r.firstByte()
		r.watch.stream()
		if r.last && code >= 200 {
			r.Header().Set("Connection", "close")
		}
	}
	r.ResponseWriter.WriteHeader(code)
}

// Write gives the visitor a part of the answer, and waits for it to be taken as long as Patience says.
func (r *recorder) Write(p []byte) (int, error) {
	if r.status == 0 {
		r.WriteHeader(http.StatusOK)
	}
	r.watch.beginTaking()
	n, err := r.ResponseWriter.Write(p)
	r.watch.endTaking(n)
	r.out.Add(int64(n))
	return n, err
}

// FlushError has what was written sent.
func (r *recorder) FlushError() error {
	if r.whole {
		return nil
	}
	r.watch.beginTaking()
	err := http.NewResponseController(r.ResponseWriter).Flush()
	r.watch.endTaking(0)
	return err
}

// Hijack takes the connection over, for an upgrade.
func (r *recorder) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, buf, err := http.NewResponseController(r.ResponseWriter).Hijack()
	if err != nil {
		return nil, nil, err
	}
	if r.status == 0 {
		r.status = http.StatusSwitchingProtocols
		r.firstByte()
	}
	// What the visitor sent right behind its request is in the buffer: it belongs to the upgraded connection.
	var early []byte
	if n := buf.Reader.Buffered(); n > 0 {
		early, _ = buf.Peek(n)
		early = append([]byte(nil), early...)
	}
	up := newUpgradedConn(&earlyConn{Conn: conn, early: early}, r, r.patience)
	return up, bufio.NewReadWriter(bufio.NewReader(up), bufio.NewWriter(conn)), nil
}

// earlyConn gives first what was read too early.
type earlyConn struct {
	net.Conn
	early []byte
}

// Read reads what came early, and then from the connection.
func (c *earlyConn) Read(p []byte) (int, error) {
	if len(c.early) > 0 {
		n := copy(p, c.early)
		c.early = c.early[n:]
		return n, nil
	}
	return c.Conn.Read(p)
}

// CloseWrite ends the direction to the visitor.
func (c *earlyConn) CloseWrite() error {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return c.Close()
}

func (r *recorder) code() int {
	if r.status == 0 {
		return http.StatusOK
	}
	return r.status
}

// visitorBody is the body of a visitor's request.
type visitorBody struct {
	io.ReadCloser
	rec *recorder
	// failed is the error by which it ended early, which is the visitor's fault or absence.
	failed atomic.Pointer[error]
	// trailers has the trailers passed on, when the body has ended.
	trailers func()
}

// err is why the body ended early, nil if it did not. b may be nil.
func (b *visitorBody) err() error {
	if b == nil {
		return nil
	}
	if err := b.failed.Load(); err != nil {
		return *err
	}
	return nil
}

// Read reads what the visitor sends, and waits for it as long as Patience says.
func (b *visitorBody) Read(p []byte) (int, error) {
	b.rec.watch.beginSending()
	n, err := b.ReadCloser.Read(p)
	b.rec.watch.endSending(n)
	b.rec.in.Add(int64(n))
	switch {
	case errors.Is(err, io.EOF):
		if b.trailers != nil {
			b.trailers()
		}
	case err != nil:
		b.failed.CompareAndSwap(nil, &err)
	}
	return n, err
}

// watchBody returns the request with a body that is counted and waited for.
func (r *recorder) watchBody(req *http.Request) *http.Request {
	if req.Body == nil || req.Body == http.NoBody {
		return req
	}
	out := *req
	r.body = &visitorBody{ReadCloser: req.Body, rec: r}
	out.Body = r.body
	return &out
}
