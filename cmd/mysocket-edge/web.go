package main

import (
	"errors"
	"flag"
	"io"
	"sync"
	"time"

	"github.com/mysocketio/mysocket-injector/internal/edge"
)

// timeout is a flag of which 0s is for ever, where that is allowed.
type timeout struct {
	value   *time.Duration
	forever bool
}

// String is the value as the flag takes it.
func (t timeout) String() string {
	switch {
	case t.value == nil:
		return ""
	case *t.value == edge.Forever:
		return "0s"
	}
	return t.value.String()
}

// Set reads the value.
func (t timeout) Set(s string) error {
	d, err := time.ParseDuration(s)
	if err != nil {
		return err
	}
	switch {
	case d == 0 && !t.forever:
		return errors.New("allowed are more than 0s, up to 24h")
	case d == 0:
		d = edge.Forever
	}
	*t.value = d
	return nil
}

// webFlags are the flags of how requests are served. access says whether there is an access log.
func webFlags(fs *flag.FlagSet, cfg *edge.Config) (access *bool) {
	cfg.Web = edge.DefaultWebTimeouts()
	for _, f := range []struct {
		value       *time.Duration
		forever     bool
		name, about string
	}{
		{&cfg.Web.Header, false, "header-timeout", "how much `time` a visitor has to send the header of a request, up to 24h"},
		{&cfg.Web.Idle, false, "idle-timeout", "for what `time` a visitor's connection may be without a request, up to 24h"},
		{&cfg.Web.Body, true, "body-timeout", "how much `time` a visitor has to send the next KiB of a body, or to take the next part of an answer, up to 24h;\n0s: for ever"},
		{&cfg.Web.Upgraded, true, "upgraded-idle-timeout", "for what `time` nothing may pass through an upgraded connection (WebSocket), up to 24h; 0s: for ever"},
		{&cfg.Web.Answer, true, "answer-timeout", "how much `time` an app has to begin its answer to a request, up to 24h; 0s: for ever"},
	} {
		fs.Var(timeout{f.value, f.forever}, f.name, f.about)
	}
	return fs.Bool("access-log", true, "log a line for each request and connection, whatever the level of the log")
}

// lockedWriter lets several loggers write to one place.
type lockedWriter struct {
	mu sync.Mutex
	w  io.Writer
}

// Write writes p as a whole.
func (l *lockedWriter) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(p)
}
