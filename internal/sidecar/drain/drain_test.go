package drain_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"testing"

	"go.uber.org/goleak"

	"github.com/mysocketio/mysocket-injector/internal/sidecar/drain"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func serve(t *testing.T, do func(context.Context, func(string))) string {
	t.Helper()
	name := fmt.Sprintf("drain-test-%d-%s", os.Getpid(), t.Name())
	listener, err := drain.Listen(name)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { drain.Serve(ctx, listener, slog.New(slog.DiscardHandler), do) })
	t.Cleanup(func() { cancel(); running.Wait() })
	return name
}

func TestAskCopiesWhatTheSidecarSays(t *testing.T) {
	name := serve(t, func(_ context.Context, progress func(string)) {
		progress("one")
		progress("two")
	})
	var out bytes.Buffer
	for range 2 { // as often as one likes
		out.Reset()
		if err := drain.Ask(t.Context(), name, &out); err != nil || out.String() != "one\ntwo\n" {
			t.Errorf("got %q, %v", out.String(), err)
		}
	}
}

func TestAskWithoutASidecar(t *testing.T) {
	if err := drain.Ask(t.Context(), "nobody-listens-here", io.Discard); !errors.Is(err, drain.ErrNotRunning) {
		t.Errorf("got %v, want ErrNotRunning", err)
	}
}

func TestAWrongOrderDrainsNothing(t *testing.T) {
	name := serve(t, func(context.Context, func(string)) { t.Error("drained") })
	conn, err := net.Dial("unix", "@"+name)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if _, err := io.WriteString(conn, "reboot"); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(conn); err != nil || len(got) > 0 {
		t.Errorf("got %q, %v, want an end without words", got, err)
	}
}

func TestDrainingGoesOnWhenWhoAskedIsGone(t *testing.T) {
	asked, gone, done := make(chan struct{}), make(chan struct{}), make(chan struct{})
	name := serve(t, func(_ context.Context, progress func(string)) {
		close(asked)
		<-gone
		progress("nobody hears this")
		progress("nor this")
		close(done)
	})
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = drain.Ask(ctx, name, io.Discard)
	}()
	<-asked
	cancel()
	<-ended
	close(gone)
	<-done
}

func TestListenTwice(t *testing.T) {
	name := serve(t, func(context.Context, func(string)) {})
	if _, err := drain.Listen(name); err == nil {
		t.Error("two sidecars listen on one socket")
	}
}
