package main

import (
	"context"
	"net/http"
	"net/http/httptest"
	"testing"
	"testing/synctest"
	"time"
)

func TestLingering(t *testing.T) {
	type key struct{}
	for _, tc := range []struct {
		name string
		wait time.Duration
	}{{"five seconds", 5 * time.Second}, {"not at all", 0}} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				told, tell := context.WithCancel(context.WithValue(t.Context(), key{}, "kept"))
				ctx, cancel := lingering(told, tc.wait)
				defer cancel()
				if ctx.Value(key{}) != "kept" {
					t.Error("the context's values are lost")
				}
				<-time.After(time.Hour) // it does not end by itself
				if ctx.Err() != nil {
					t.Fatal("it ended before it was told to")
				}
				at := time.Now()
				tell()
				<-ctx.Done()
				if took := time.Since(at); took != tc.wait {
					t.Errorf("it ended %s after it was told to, want %s", took, tc.wait)
				}
			})
		})
	}
	t.Run("cancelled", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			told, tell := context.WithCancel(t.Context())
			defer tell()
			ctx, cancel := lingering(told, time.Hour)
			cancel()
			<-ctx.Done()
			tell()
		})
	})
}

func TestClosing(t *testing.T) {
	told, tell := context.WithCancel(t.Context())
	defer tell()
	server := httptest.NewServer(closing(told, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})))
	defer server.Close()
	for _, want := range []bool{false, true} {
		res, err := server.Client().Get(server.URL)
		if err != nil {
			t.Fatal(err)
		}
		_ = res.Body.Close()
		if res.Close != want {
			t.Errorf("the connection closes: %t, want %t", res.Close, want)
		}
		tell()
	}
}
