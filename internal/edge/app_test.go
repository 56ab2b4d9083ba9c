package edge_test

import (
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"sync/atomic"
	"testing"
)

// countingApp is an app that knows how many connections it has.
type countingApp struct {
	address     string
	connections atomic.Int64
}

func newCountingApp(t testing.TB, handler http.HandlerFunc) *countingApp {
	app := &countingApp{}
	server := httptest.NewUnstartedServer(handler)
	server.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		switch state {
		case http.StateNew:
			app.connections.Add(1)
		case http.StateClosed, http.StateHijacked:
			app.connections.Add(-1)
		}
	}
	server.Start()
	t.Cleanup(server.Close)
	app.address = appAddress(server)
	return app
}

// newEventsApp sends three events, each after the first when the visitor's test says so.
func newEventsApp(t testing.TB, next <-chan struct{}) *httptest.Server {
	t.Helper()
	app := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		for i := range 3 {
			_, _ = fmt.Fprintf(w, "data: %d\n\n", i)
			_ = http.NewResponseController(w).Flush()
			select {
			case <-next:
			case <-r.Context().Done():
				return
			}
		}
	}))
	t.Cleanup(app.Close)
	return app
}

// newTCPApp gives each connection to serve, and closes it after. It returns the app's address.
func newTCPApp(t testing.TB, serve func(net.Conn)) string {
	t.Helper()
	app, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = app.Close() })
	go func() {
		for {
			conn, err := app.Accept()
			if err != nil {
				return
			}
			go func() {
				defer func() { _ = conn.Close() }()
				serve(conn)
			}()
		}
	}()
	return app.Addr().String()
}
