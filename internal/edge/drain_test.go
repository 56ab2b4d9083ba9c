package edge_test

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/mysocketio/mysocket-injector/internal/edge/edgetest"
)

// TestRollingReplicasLosesNoRequest replaces replicas under load, again and again, as a rolling update does: a new one
// connects, an old one cancels its forward, its app stops gracefully, its client leaves.
func TestRollingReplicasLosesNoRequest(t *testing.T) {
	t.Run("the app stops after the drain", func(t *testing.T) { rollReplicas(t, false) })
	// Kubernetes sends SIGTERM to the app while the sidecar still drains: the app refuses, and closes what is idle, before
	// the edge knows. What can be sent again is.
	t.Run("the app stops at the same moment", func(t *testing.T) { rollReplicas(t, true) })
}

func rollReplicas(t *testing.T, appStopsAtOnce bool) {
	e := edgetest.Start(t)
	a := login(t, e)
	s := a.newSocket("http")
	type pod struct {
		app     *httptest.Server
		replica *replica
	}
	start := func(i int) pod {
		app := newApp(t, fmt.Sprint("pod-", i))
		return pod{app, a.connect(s, appAddress(app))}
	}
	pods := []pod{start(0), start(1)}

	ctx, stop := context.WithCancel(t.Context())
	visitor := e.VisitorClient(t)
	var total, failed atomic.Int64
	var load sync.WaitGroup
	for worker := range 8 {
		load.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				var resp *http.Response
				var err error
				if (worker+i)%4 == 0 && !appStopsAtOnce {
					resp, err = visitor.Post("http://"+s.DNSName+"/echo", "text/plain", strings.NewReader("a body"))
				} else {
					resp, err = visitor.Get("http://" + s.DNSName + "/")
				}
				total.Add(1)
				if err != nil {
					failed.Add(1)
					t.Error(err)
					return
				}
				if resp.StatusCode != 200 {
					failed.Add(1)
					t.Errorf("status %d", resp.StatusCode)
				}
				_ = resp.Body.Close()
			}
		})
	}
	for i := range 10 {
		pods = append(pods, start(i+2))
		before := total.Load()
		eventually(t, "requests to flow", func() bool { return total.Load() > before+40 || failed.Load() > 0 })
		old := pods[0]
		pods = pods[1:]
		var stopping sync.WaitGroup
		stopApp := func() {
			if err := old.app.Config.Shutdown(context.Background()); err != nil {
				t.Error(err)
			}
		}
		if appStopsAtOnce {
			stopping.Go(stopApp)
		}
		if !old.replica.cancel() {
			t.Error("the cancel was refused")
		}
		// The library may hand over channels that came before the acknowledgement a moment after it.
		flow := func() {
			before := total.Load()
			eventually(t, "requests to flow after the cancel", func() bool { return total.Load() > before+40 || failed.Load() > 0 })
		}
		flow()
		opened := old.replica.opened.Load()
		flow()
		if now := old.replica.opened.Load(); now != opened {
			t.Errorf("%d channels were opened well after the cancel was acknowledged", now-opened)
		}
		stopping.Go(stopApp)
		stopping.Wait()
		old.replica.close()
	}
	stop()
	load.Wait()
	t.Logf("%d requests, %d failed", total.Load(), failed.Load())
}

// TestCancelClosesIdleChannelsOnly shows what a draining replica waits for: idle channels close by themselves, one
// with a request stays until its answer is out.
func TestCancelClosesIdleChannelsOnly(t *testing.T) {
	e := edgetest.Start(t)
	a := login(t, e)
	s := a.newSocket("http")
	entered, release := make(chan struct{}), make(chan struct{})
	open := newCountingApp(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/wait" {
			close(entered)
			<-release
		}
	})
	r := a.connect(s, open.address)
	visitor := e.VisitorClient(t)
	get(t, visitor, "http://"+s.DNSName+"/")
	if n := open.connections.Load(); n != 1 {
		t.Fatalf("%d connections to the app, want one idle", n)
	}
	waiting := make(chan int, 1)
	go func() {
		status, _, _ := tryGet(context.Background(), visitor, "http://"+s.DNSName+"/wait")
		waiting <- status
	}()
	<-entered
	if !r.cancel() {
		t.Fatal("the cancel was refused")
	}
	if a.connected(s, r.tunnel.ID) {
		t.Error("the tunnel is in the rotation after the answer to its cancel")
	}
	select {
	case status := <-waiting:
		t.Fatalf("the open request ended with %d at the cancel", status)
	default:
	}
	close(release)
	if status := <-waiting; status != 200 {
		t.Errorf("the open request ended with %d", status)
	}
	eventually(t, "all channels to close", func() bool { return open.connections.Load() == 0 })

	// The same connection may come back.
	r.forward("localhost", uint32(r.tunnel.LocalPort))
	if status, _ := get(t, visitor, "http://"+s.DNSName+"/"); status != 200 {
		t.Errorf("status %d after forwarding again", status)
	}
}

// TestIdleChannelThatTheAppClosed shows that a keep-alive connection which died while idle costs no request.
func TestIdleChannelThatTheAppClosed(t *testing.T) {
	e := edgetest.Start(t)
	a := login(t, e)
	s := a.newSocket("http")
	app := newApp(t, "app")
	a.connect(s, appAddress(app))
	visitor := e.VisitorClient(t)
	for range 30 {
		if status, body := get(t, visitor, "http://"+s.DNSName+"/"); status != 200 {
			t.Fatalf("status %d: %s", status, body)
		}
		app.CloseClientConnections()
	}
}

// TestKilledConnection shows that a replica that vanishes is out of the rotation at once.
func TestKilledConnection(t *testing.T) {
	e := edgetest.Start(t)
	a := login(t, e)
	s := a.newSocket("http")
	dying := a.connect(s, appAddress(newApp(t, "dying")))
	a.connect(s, appAddress(newApp(t, "living")))
	visitor := e.VisitorClient(t)
	get(t, visitor, "http://"+s.DNSName+"/")
	get(t, visitor, "http://"+s.DNSName+"/")
	_ = dying.client.Close()
	for range 10 {
		if status, body := get(t, visitor, "http://"+s.DNSName+"/"); status != 200 || body != "Server: living\n" && body != "Server: dying\n" {
			t.Fatalf("got %d %s", status, body)
		}
	}
	eventually(t, "the dead tunnel to leave", func() bool { return !a.connected(s, dying.tunnel.ID) })
}
