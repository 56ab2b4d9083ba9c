package main

import (
	"context"
	"net/http"
	"time"
)

// lingering returns a context that ends so long after ctx. A pod that is told to end is still asked for admissions until the
// API server's node has heard that it is no endpoint any more; one that closed its port at once would make pods without a
// sidecar. With no time to wait, it is ctx.
func lingering(ctx context.Context, wait time.Duration) (later context.Context, cancel context.CancelFunc) {
	if wait <= 0 {
		return context.WithCancel(ctx)
	}
	later, end := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() { time.AfterFunc(wait, end) })
	return later, func() {
		stop()
		end()
	}
}

// closing has every connection closed with its next answer once ctx has ended, so that the API server has none left to ask on
// when the listener closes.
func closing(ctx context.Context, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if ctx.Err() != nil {
			w.Header().Set("Connection", "close")
		}
		next.ServeHTTP(w, r)
	})
}
