package edge_test

import (
	"net/http"
	"testing"
	"time"

	"github.com/mysocketio/mysocket-injector/internal/edge"
	"github.com/mysocketio/mysocket-injector/internal/edge/edgetest"
)

func healthz(t *testing.T, e *edgetest.Edge) int {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	status, _, err := tryGet(t.Context(), client, e.AdminURL+"/healthz")
	if err != nil {
		return 0
	}
	return status
}

func TestStartupWaitsForTunnels(t *testing.T) {
	first := edgetest.Start(t)
	a := login(t, first)
	s := a.newSocket("http")
	app := appAddress(newApp(t, "app"))
	tun := a.newTunnel(s)
	first.Stop()
	e := edgetest.Start(t, edgetest.SameState(first), func(c *edge.Config) { c.StartupWait = edge.MaxTurn })
	a = login(t, e)
	if status := healthz(t, e); status != 503 {
		t.Errorf("/healthz of an edge whose socket has no tunnel: %d", status)
	}
	a.connectTunnel(s, tun, app)
	eventually(t, "the edge to be ready", func() bool { return healthz(t, e) == 200 })
}

func TestStartupDoesNotWaitForEver(t *testing.T) {
	first := edgetest.Start(t)
	login(t, first).newSocket("http")
	first.Stop()
	e := edgetest.Start(t, edgetest.SameState(first), func(c *edge.Config) { c.StartupWait = 20 * time.Millisecond })
	eventually(t, "the edge to be ready without the tunnel", func() bool { return healthz(t, e) == 200 })
	// And one that is stopped meanwhile stops.
	e.Stop()
	edgetest.Start(t, edgetest.SameState(first), func(c *edge.Config) { c.StartupWait = edge.MaxTurn }).Stop()
}

// TestShutdownDelay shows an edge that goes on serving after it was told to stop, and sends its visitors away.
func TestShutdownDelay(t *testing.T) {
	e := edgetest.Start(t, func(c *edge.Config) { c.ShutdownDelay = 5 * time.Second })
	a := login(t, e)
	s := a.newSocket("http")
	r := a.connect(s, appAddress(newApp(t, "app")))
	visitor := e.VisitorClient(t)
	url := "https://" + s.DNSName + "/"
	for _, u := range []string{url, "http://" + s.DNSName + "/"} {
		resp, err := visitor.Get(u)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		if resp.Close {
			t.Errorf("%s: an edge that stays closes connections", u)
		}
	}
	stopped := make(chan struct{})
	go func() {
		e.Stop()
		close(stopped)
	}()
	eventually(t, "/healthz to say no", func() bool { return healthz(t, e) == 503 })
	resp, err := visitor.Get("http://" + s.DNSName + "/")
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	if resp.StatusCode != 200 || !resp.Close {
		t.Errorf("during the delay: %d, the connection is to be closed: %v", resp.StatusCode, resp.Close)
	}
	if status, _ := get(t, visitor, url); status != 200 {
		t.Errorf("over HTTP/2 during the delay: %d", status)
	}
	if client, err := a.dial(s.UserName, newKey(t)); err == nil {
		_ = client.Close()
		t.Error("a tunnel client was let in")
	}
	select {
	case <-stopped:
		t.Error("the edge stopped at once")
	default:
	}
	_ = r.client.Wait()
	<-stopped
}
