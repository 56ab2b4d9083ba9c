package main

import (
	"fmt"
	"io"
	"net/http"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/mysocketio/mysocket-injector/internal/mysocket"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/gatewaytest"
)

// TestARolledPodLosesNoRequest ends one of two replicas under load as the kubelet does: the preStop hook and the app's
// SIGTERM at the same moment, and the sidecar's SIGTERM when both are done. No visitor may notice.
//
// A connection that the kernel took for the app, and the app had not accepted when it closed its listener, is reset. What
// was sent on it may be sent again elsewhere only if it is safe to repeat. Apps that get other requests need a preStop
// hook of their own, so that their SIGTERM comes after the withdrawal.
func TestARolledPodLosesNoRequest(t *testing.T) {
	program := build(t)
	t.Run("app ends at once", func(t *testing.T) { rollUnderLoad(t, program, false, false, http.MethodGet) })
	t.Run("app ends after the withdrawal", func(t *testing.T) { rollUnderLoad(t, program, true, false, http.MethodGet, http.MethodPost) })
	t.Run("without tunnel objects", func(t *testing.T) { rollUnderLoad(t, program, true, true, http.MethodGet, http.MethodPost) })
}

func rollUnderLoad(t *testing.T, program string, appWaits, border0 bool, methods ...string) {
	edge, api, socket := startEdge(t, border0)
	type replica struct {
		app     *http.Server
		sidecar *process
		served  atomic.Int64
	}
	startReplica := func() *replica {
		r := &replica{}
		var port int32
		r.app, port = serveApp(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			r.served.Add(1)
			_, _ = io.WriteString(w, "hello")
		}))
		gateway := gatewaytest.Start(t, &edgeBackend{api: api, edge: edge, tunnels: map[string]mysocket.Tunnel{}})
		gateway.Assign(assign(socket, port))
		r.sidecar = startProcess(t, program, gateway)
		gatewaytest.Eventually(t, "a replica is connected", func() bool { return strings.Contains(r.sidecar.out.String(), "tunnel connected") })
		return r
	}
	replicas := []*replica{startReplica(), startReplica()}

	var stop atomic.Bool
	var done, failed atomic.Int64
	var firstFailure sync.Once
	var load sync.WaitGroup
	for worker := range 8 {
		client := edge.VisitorClient(t)
		load.Go(func() {
			for !stop.Load() {
				var body io.Reader
				method := methods[worker%len(methods)]
				if method == http.MethodPost {
					body = strings.NewReader("a body")
				}
				request, err := http.NewRequestWithContext(t.Context(), method, "http://"+socket.DNSName+"/", body)
				if err != nil {
					t.Error(err)
					return
				}
				what := ""
				response, err := client.Do(request)
				if err != nil {
					what = request.Method + ": " + err.Error()
				} else {
					body, err := io.ReadAll(response.Body)
					_ = response.Body.Close()
					if response.StatusCode != http.StatusOK || err != nil {
						what = fmt.Sprint(request.Method, ": ", response.StatusCode, " ", err, " ", string(body))
					}
				}
				done.Add(1)
				if what != "" {
					failed.Add(1)
					firstFailure.Do(func() { t.Errorf("the first failure: %s", what) })
				}
			}
		})
	}
	for round := range 3 {
		old := replicas[0]
		gatewaytest.Eventually(t, "the old replica takes part", func() bool { return old.served.Load() > 50 })
		replicas = append(replicas[1:], startReplica())

		var ending sync.WaitGroup
		drained := make(chan struct{})
		ending.Go(func() {
			defer close(drained)
			out, err := exec.Command(program, "drain", "--drain-socket="+old.sidecar.socket).CombinedOutput()
			if err != nil || !strings.Contains(string(out), "drained in") {
				t.Errorf("drain in round %d: %v\n%s", round, err, out)
			}
		})
		ending.Go(func() {
			if appWaits {
				<-drained
			}
			if err := old.app.Shutdown(t.Context()); err != nil {
				t.Error(err)
			}
		})
		ending.Wait()
		if err := old.sidecar.command.Process.Signal(syscall.SIGTERM); err != nil {
			t.Error(err)
		}
		old.sidecar.end(t)
	}
	before := done.Load()
	gatewaytest.Eventually(t, "the load goes on", func() bool { return done.Load() > before+200 })
	stop.Store(true)
	load.Wait()
	t.Logf("%d requests, %d failed", done.Load(), failed.Load())
	if failed.Load() > 0 {
		t.Errorf("%d of %d requests failed", failed.Load(), done.Load())
	}
}
