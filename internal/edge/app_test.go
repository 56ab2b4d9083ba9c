package edge_test

import (
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
