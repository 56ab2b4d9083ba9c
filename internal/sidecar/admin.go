package sidecar

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// adminHandler serves metrics and health.
func (a *Agent) adminHandler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(a.metrics.registry, promhttp.HandlerOpts{MaxRequestsInFlight: 4}))
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) {
		late := a.cfg.Clock.Now().Sub(time.Unix(0, a.lastBeat.Load())) > beatLate
		answer(w, !late, "the main loop runs", "the main loop is stuck")
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		why := *a.readyWhy.Load()
		answer(w, a.ready.Load(), why, why)
	})
	return mux
}

func answer(w http.ResponseWriter, ok bool, good, bad string) {
	text := good
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	if !ok {
		text = bad
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	_, _ = io.WriteString(w, text+"\n")
}

func (a *Agent) serveAdmin(ctx context.Context, listener net.Listener) {
	server := &http.Server{
		Handler:           a.adminHandler(),
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      10 * time.Second,
		IdleTimeout:       30 * time.Second,
		MaxHeaderBytes:    8 << 10,
		ErrorLog:          slog.NewLogLogger(a.logger.Handler(), slog.LevelDebug),
	}
	stop := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer stop()
	if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
		a.logger.Error("the admin endpoint is down", "err", err)
	}
}
