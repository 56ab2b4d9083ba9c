package certs

import (
	"context"
	"errors"
	"log/slog"
	"sync"
)

// reporter logs what is looked at every few seconds only when it changes.
type reporter struct {
	log *slog.Logger

	mu   sync.Mutex
	last map[string]string // the error, by subject
}

// report logs that the subject has a problem, or that it has none any more. Cancelled requests say nothing about it.
func (r *reporter) report(subject string, err error, attrs ...any) {
	if errors.Is(err, context.Canceled) {
		return
	}
	said := ""
	if err != nil {
		said = err.Error()
	}
	r.mu.Lock()
	same := r.last[subject] == said
	r.last[subject] = said
	r.mu.Unlock()
	switch {
	case same:
	case err != nil:
		r.log.Warn(subject+": not in order", append(attrs, "err", err)...)
	default:
		r.log.Info(subject+": in order again", attrs...)
	}
}
