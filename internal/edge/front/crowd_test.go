package front

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strconv"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/mysocketio/mysocket-injector/internal/edge/feed"
	"github.com/mysocketio/mysocket-injector/internal/edge/metrics"
	"github.com/mysocketio/mysocket-injector/internal/edge/registry"
	"github.com/mysocketio/mysocket-injector/internal/edge/store"
)

func TestCrowd(t *testing.T) {
	c := newCrowd(3, 2)
	one, other := netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("192.0.2.7")
	for range 3 {
		if !c.arrive() {
			t.Fatal("there was room for three")
		}
	}
	if c.arrive() {
		t.Error("there was room for a fourth")
	}
	leave, ok := c.enter(one)
	if _, second := c.enter(one.Next()); !ok || !second {
		t.Fatal("there was room for two of a host")
	}
	if _, third := c.enter(one.Next().Next()); third {
		t.Error("there was room for a third of a host, whose addresses are many")
	}
	if _, ok := c.enter(other); !ok {
		t.Error("another host had no room")
	}
	leave()
	c.leave()
	if _, ok := c.enter(one); !ok || !c.arrive() {
		t.Error("there is no room after one has left")
	}
	if len(c.byHost) != 2 {
		t.Errorf("%d hosts are known, want 2", len(c.byHost))
	}
}

// origin is an app that says nothing, and hangs up when its visitor has no more to say.
type origin struct {
	net.Conn
	done chan struct{}
}

func (o *origin) CloseWrite() error     { return o.Close() }
func (o *origin) Done() <-chan struct{} { return o.done }

// The third visitor of a host to a tcp socket is one too many, until one has left.
func TestCrowdAtATCPSocket(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	tunnels := registry.New(registry.Config{})
	defer tunnels.Close()
	m := metrics.New(tunnels.Count)
	opened := make(chan struct{}, 10)
	tunnels.Add(registry.Info{SocketID: "s", TunnelID: "t"}, func(context.Context, netip.AddrPort) (registry.Conn, error) {
		ours, _ := net.Pipe()
		opened <- struct{}{}
		return &origin{Conn: ours, done: make(chan struct{})}, nil
	})
	f := NewTCP(TCPConfig{
		Dispatcher: &Dispatcher{Registry: tunnels, Metrics: m, OpenTimeout: time.Minute}, Metrics: m, Feed: &feed.Hub{}, Log: slog.New(slog.DiscardHandler),
		Host: "127.0.0.1", MinPort: 1, MaxPort: 65535,
	})
	defer f.Close()
	f.crowd = newCrowd(3, 2)
	n, err := f.Reserve()
	if err != nil {
		t.Fatal(err)
	}
	f.Serve(store.Socket{ID: "s", TCPPort: n})
	visit := func() net.Conn {
		conn, err := net.Dial("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(n)))
		if err != nil {
			t.Fatal(err)
		}
		return conn
	}
	first, second := visit(), visit()
	defer func() { _ = second.Close() }()
	<-opened
	<-opened
	third := visit()
	_ = third.SetReadDeadline(time.Now().Add(time.Minute))
	if _, err := third.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the third visitor read %v, want to be hung up on", err)
	}
	_ = third.Close()
	_ = first.Close()
	for again := false; !again; {
		conn := visit()
		select {
		case <-opened:
			again = true
		case <-hungUp(conn):
		}
		_ = conn.Close()
	}
}

// hungUp is closed when the other end has closed the connection.
func hungUp(conn net.Conn) <-chan struct{} {
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = conn.Read(make([]byte, 1))
	}()
	return done
}
