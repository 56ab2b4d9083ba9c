package front

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"
)

var (
	errVisitorLeft = errors.New("the visitor left before the end of the answer")
	errBrokenOff   = errors.New("the app broke off its answer")
)

// finish runs when the answer is over, however it ended: it counts the request and writes its line.
func (w *Web) finish(v *visit, rec *recorder, r *http.Request, start time.Time) {
	cut := rec.watch.finish(r)
	tunnel, name := "", ""
	if v.release != nil {
		v.release()
		tunnel, name = v.tunnel.TunnelID, v.tunnel.Name()
		if v.tunnel.Withdrawn() {
			// The channel of this request became idle after the tunnel's idle channels were closed.
			v.upstream.closeIdle()
		}
	}
	took := time.Since(start)
	switch {
	case !v.broken || cut != nil || v.err != nil:
	case r.Context().Err() != nil:
		v.err = errVisitorLeft
	default:
		v.err = errBrokenOff
	}
	if cut != nil {
		w.cfg.Metrics.Cut(cutReason(cut))
		v.err = cut
	}
	status := rec.code()
	if rec.status == 0 && v.err != nil && r.Context().Err() != nil {
		status = statusClientGone
	}
	first := time.Duration(rec.first.Load())
	in, out := rec.in.Load(), rec.out.Load()
	w.cfg.Metrics.RequestDone(status, took.Seconds())
	w.cfg.Metrics.Moved(in, out)
	if first > 0 {
		w.cfg.Metrics.FirstByte(first.Seconds())
	}
	log := w.cfg.Access
	if log == nil && v.failed {
		log = w.cfg.Log // Somebody who asks about the page that they got must be found.
	}
	if log != nil {
		args := []any{"request", v.id, "host", truncate(r.Host), "method", truncate(r.Method), "path", truncate(r.URL.Path),
			"protocol", r.Proto, "socket", v.socket.ID, "tunnel", tunnel, "name", name, "visitor", v.visitor.Addr().String(), "status", status,
			"bytes_in", in, "bytes_out", out, "first_byte_ms", first.Milliseconds(), "ms", took.Milliseconds(),
			"attempts", v.attempts, "agent", truncate(r.UserAgent())}
		if v.err != nil {
			args = append(args, "err", truncate(v.err.Error())) // It may have what the app sent.
		}
		log.Info("request", args...)
	}
	if v.socket.ID != "" {
		if first == 0 {
			first = -1 // There was no answer.
		}
		w.cfg.Stats.Record(v.socket.ID, status >= http.StatusInternalServerError, first)
		w.cfg.Feed.Publish(v.socket.ID, func() string {
			// A terminal shows this: nothing of the visitor's may reach it unquoted.
			return fmt.Sprintf("%s  %-15s %s %s -> %d, %d ms", start.Format(time.TimeOnly), v.visitor.Addr(),
				asciiOnly(r.Method), asciiOnly(r.URL.RequestURI()), status, took.Milliseconds())
		})
	}
}

// isTimeout says whether an app was waited for in vain.
func isTimeout(err error) bool {
	var timeout net.Error
	return errors.Is(err, context.DeadlineExceeded) || errors.As(err, &timeout) && timeout.Timeout()
}

// proxyFailed answers a request that got no answer of an app.
func (w *Web) proxyFailed(rw http.ResponseWriter, r *http.Request, err error) {
	v := visitOf(r.Context())
	v.err = err
	if cut := v.rec.watch.stalled(); cut != nil {
		w.page(rw, r, v, http.StatusRequestTimeout, "The body of the request did not arrive in time.")
		return
	}
	if r.Context().Err() != nil {
		return
	}
	if failed := v.rec.body.err(); failed != nil {
		v.err = fmt.Errorf("read the request's body: %w", failed)
		w.page(rw, r, v, http.StatusBadRequest, "The body of the request cannot be read.")
		return
	}
	v.failed = true
	status, text := http.StatusBadGateway, "The app behind this socket did not answer."
	switch {
	case errors.Is(err, errNoTunnel):
		text = "No tunnel of this socket is connected."
	case isTimeout(err):
		status, text = http.StatusGatewayTimeout, "The app behind this socket did not answer in time."
	}
	rw.Header().Set("Retry-After", "1")
	w.page(rw, r, v, status, text)
}
