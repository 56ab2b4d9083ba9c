package edge

import (
	"fmt"
	"math"
	"net/http"
	"time"

	"github.com/mysocketio/mysocket-injector/internal/edge/front"
)

// Forever is a time-out that never ends.
const Forever = time.Duration(math.MaxInt64)

// maxWebTimeout is the longest time-out that ends.
const maxWebTimeout = 24 * time.Hour

// Bounds on what one HTTP/2 connection of a visitor makes the edge hold of its requests' bodies: a stream, and all together.
const (
	maxReceivePerStream     = 256 << 10
	maxReceivePerConnection = 1 << 20
	// A visitor's HTTP/2 connection that is silent for pingAfter is asked whether it is still there.
	pingAfter   = 30 * time.Second
	pingTimeout = 15 * time.Second
)

// WebTimeouts are how long the HTTP and HTTPS fronts wait. A zero field has its default; Body, Upgraded and Answer may be
// Forever.
type WebTimeouts struct {
	// Header is how long a visitor may take to send the header of a request.
	Header time.Duration
	// Idle is how long a visitor's connection may be without a request.
	Idle time.Duration
	// Body, Upgraded and Answer are those of front.Patience.
	Body     time.Duration
	Upgraded time.Duration
	Answer   time.Duration
}

// DefaultWebTimeouts are what a zero WebTimeouts means.
func DefaultWebTimeouts() WebTimeouts {
	return WebTimeouts{Header: 10 * time.Second, Idle: 2 * time.Minute, Body: time.Minute, Upgraded: time.Hour, Answer: 10 * time.Minute}
}

// each calls do for each field, with that of the defaults.
func (t *WebTimeouts) each(do func(flag string, mayBeForever bool, value *time.Duration, fallback time.Duration)) {
	d := DefaultWebTimeouts()
	do("header-timeout", false, &t.Header, d.Header)
	do("idle-timeout", false, &t.Idle, d.Idle)
	do("body-timeout", true, &t.Body, d.Body)
	do("upgraded-idle-timeout", true, &t.Upgraded, d.Upgraded)
	do("answer-timeout", true, &t.Answer, d.Answer)
}

func (t *WebTimeouts) setDefaults() {
	t.each(func(_ string, _ bool, value *time.Duration, fallback time.Duration) {
		if *value == 0 {
			*value = fallback
		}
	})
}

func (t *WebTimeouts) validate() []error {
	var errs []error
	t.each(func(flag string, mayBeForever bool, value *time.Duration, _ time.Duration) {
		switch {
		case mayBeForever && *value == Forever:
		case mayBeForever && (*value < 0 || *value > maxWebTimeout):
			errs = append(errs, fmt.Errorf("%s is %s; allowed are up to %s, and 0s, which is for ever", flag, *value, maxWebTimeout))
		case *value < 0 || *value > maxWebTimeout:
			errs = append(errs, fmt.Errorf("%s is %s; allowed are more than 0s, up to %s", flag, *value, maxWebTimeout))
		}
	})
	return errs
}

// patience is what the fronts take of the time-outs; there, zero is for ever.
func (t *WebTimeouts) patience() front.Patience {
	p := front.Patience{Body: t.Body, Upgraded: t.Upgraded, Answer: t.Answer}
	for _, d := range []*time.Duration{&p.Body, &p.Upgraded, &p.Answer} {
		if *d == Forever {
			*d = 0
		}
	}
	return p
}

// completeWeb fills in what the configuration says of how requests are served.
func (e *Edge) completeWeb(c *front.WebConfig) {
	c.StickyKey = e.keys.StickyKey()
	c.Patience = e.cfg.Web.patience()
	if e.cfg.AccessLog != nil {
		c.Access = e.cfg.AccessLog.With("part", "web")
	}
}

// boundVisitors sets the bounds of a front's server.
func (e *Edge) boundVisitors(s *http.Server) {
	s.ReadHeaderTimeout, s.IdleTimeout = e.cfg.Web.Header, e.cfg.Web.Idle
	s.HTTP2.MaxReceiveBufferPerStream = maxReceivePerStream
	s.HTTP2.MaxReceiveBufferPerConnection = maxReceivePerConnection
	s.HTTP2.SendPingTimeout, s.HTTP2.PingTimeout = pingAfter, pingTimeout
	// A visitor who takes nothing at all can't even be told that a stream is over.
	s.HTTP2.WriteByteTimeout = e.cfg.Web.patience().Body
}
