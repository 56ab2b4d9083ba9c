package sidecar

import (
	"cmp"
	"fmt"
	"io"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mysocketio/mysocket-injector/internal/sidecar/gatewaytest"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/retry"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/tunnel/sshtest"
)

// held is what a process holds on to.
type held struct {
	goroutines, files int
	heap              uint64
}

// settled returns what the process holds once that stays the same: the other ends of connections close a moment later.
func settled(t *testing.T) held {
	t.Helper()
	last, same := holds(t), 0
	gatewaytest.Eventually(t, "files and goroutines settle", func() bool {
		now := holds(t)
		if same++; now.goroutines != last.goroutines || now.files != last.files {
			same = 0
		}
		last = now
		return same >= 10
	})
	return last
}

func holds(t *testing.T) held {
	t.Helper()
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	runtime.GC()
	runtime.GC() // what pools hold is dropped by the second
	var stats runtime.MemStats
	runtime.ReadMemStats(&stats)
	return held{runtime.NumGoroutine(), len(files), stats.HeapAlloc}
}

// leakVariable holds "CONNECTIONS,RECONNECTS" for a long run.
const leakVariable = "MYSOCKET_LEAKS"

// A day in short: many connections, and many reconnects in between, leave nothing behind. `make bench-leaks` makes it a long day.
func TestADayLeavesNothingBehind(t *testing.T) {
	connections, reconnects, within := 2000, 30, time.Minute
	if long := os.Getenv(leakVariable); long != "" {
		c, r, _ := strings.Cut(long, ",")
		var failed [2]error
		connections, failed[0] = strconv.Atoi(c)
		reconnects, failed[1] = strconv.Atoi(r)
		if err := cmp.Or(failed[0], failed[1]); err != nil || reconnects < 2 || connections < reconnects {
			t.Fatalf("%s is %q; it must be CONNECTIONS,RECONNECTS, at least 2 reconnects and a connection for each", leakVariable, long)
		}
		within = 15 * time.Minute
	}
	server := sshtest.Start(t)
	gateway := newFakeGateway(t)
	gateway.address, gateway.hostKey, gateway.lifetime = server.Address, server.HostKey, 24*time.Hour
	port, _ := (&world{t: t}).listen("app")
	// As quick as back-off gets.
	s := startSidecar(t, gateway, retry.System(), func() float64 { return 0 }, "s1", port)

	const at = 8 // visitors at once
	round := func(visitors int) {
		s.awaitConnected(t, sshtest.Patience)
		edge := server.Await(t)
		forward := edge.AwaitForward(t)
		var visiting sync.WaitGroup
		for n := range at {
			visiting.Go(func() {
				for range visitors/at + min(1, max(0, visitors%at-n)) {
					if err := visitOnce(edge, forward); err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
		visiting.Wait()
		gatewaytest.Eventually(t, "all visitors are gone", func() bool { return s.sup.openConnections() == 0 })
	}
	began := time.Now()
	each := connections / reconnects
	round(each)
	first := settled(t)
	for range reconnects - 1 {
		server.CloseConnections()
		round(each)
		if t.Failed() || time.Since(began) > within {
			t.Fatalf("it failed, or is not over after %s", time.Since(began))
		}
	}
	server.CloseConnections()
	round(connections - each*reconnects)

	last := settled(t)
	const few = 5 // far fewer than one for each reconnect
	if last.goroutines > first.goroutines+few || last.files > first.files+few {
		t.Errorf("after the first round there were %d goroutines and %d files, at the end %d and %d", first.goroutines, first.files, last.goroutines, last.files)
	}
	// What the test's own gateway remembers grows a little.
	const slack = 2 << 20
	if last.heap > first.heap+slack {
		t.Errorf("the heap grew from %d to %d KiB", first.heap>>10, last.heap>>10)
	}
	t.Logf("%d connections and %d reconnects in %s: goroutines %d, then %d; files %d, then %d; heap %d KiB, then %d", int(s.metrics.value(t, "connections_total")),
		server.Logins()-1, time.Since(began).Round(time.Second), first.goroutines, last.goroutines, first.files, last.files, first.heap>>10, last.heap>>10)
}

// visitOnce reads the app's name, has something echoed, and leaves.
func visitOnce(edge *sshtest.Conn, forward sshtest.Forward) error {
	channel, err := edge.Visit(forward)
	if err != nil {
		return err
	}
	defer func() { _ = channel.Close() }()
	if _, err := io.ReadFull(channel, make([]byte, len("app\n"))); err != nil {
		return err
	}
	if _, err := io.WriteString(channel, "hello"); err != nil {
		return err
	}
	got := make([]byte, len("hello"))
	if _, err := io.ReadFull(channel, got); err != nil || string(got) != "hello" {
		return fmt.Errorf("got %q, %w", got, err)
	}
	return nil
}
