package sidecar

import (
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
)

// gate is a TCP proxy before an edge, which fails as networks and machines do.
type gate struct {
	t       testing.TB
	address string
	target  atomic.Pointer[string]

	mu       sync.Mutex
	listener net.Listener
	paths    map[*path]struct{}
	running  sync.WaitGroup
}

// path is one connection through a gate.
type path struct {
	near, far *net.TCPConn
	hole      atomic.Bool
}

func newGate(t testing.TB, target string) *gate {
	t.Helper()
	g := &gate{t: t, address: "127.0.0.1:0", paths: map[*path]struct{}{}}
	g.lead(target)
	g.open()
	t.Cleanup(func() {
		g.kill()
		g.running.Wait()
	})
	return g
}

// lead says where new connections go.
func (g *gate) lead(target string) { g.target.Store(&target) }

// open begins to listen, always at the same address.
func (g *gate) open() {
	g.t.Helper()
	listener, err := net.Listen("tcp", g.address)
	if err != nil {
		g.t.Fatal(err)
	}
	g.address = listener.Addr().String()
	g.mu.Lock()
	g.listener = listener
	g.mu.Unlock()
	g.running.Go(func() {
		for {
			near, err := listener.Accept()
			if err != nil {
				return
			}
			g.running.Go(func() { g.pass(near.(*net.TCPConn)) })
		}
	})
}

// kill closes the listener and resets all connections, as the death of a machine's process does.
func (g *gate) kill() {
	g.mu.Lock()
	defer g.mu.Unlock()
	_ = g.listener.Close()
	for p := range g.paths {
		_ = p.near.SetLinger(0)
		_ = errors.Join(p.near.Close(), p.far.Close())
	}
}

// swallow drops all that is sent over the connections there are, in both directions, and closes none. It returns how many.
func (g *gate) swallow() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	for p := range g.paths {
		p.hole.Store(true)
	}
	return len(g.paths)
}

func (g *gate) pass(near *net.TCPConn) {
	defer func() { _ = near.Close() }()
	conn, err := net.Dial("tcp", *g.target.Load())
	if err != nil {
		return
	}
	p := &path{near: near, far: conn.(*net.TCPConn)}
	defer func() { _ = p.far.Close() }()
	g.mu.Lock()
	g.paths[p] = struct{}{}
	g.mu.Unlock()
	defer func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		delete(g.paths, p)
	}()
	var copying sync.WaitGroup
	for _, way := range [][2]*net.TCPConn{{p.near, p.far}, {p.far, p.near}} {
		copying.Go(func() {
			_, _ = io.Copy(holed{way[1], &p.hole}, way[0])
			if !p.hole.Load() {
				_ = errors.Join(way[0].Close(), way[1].Close())
			}
		})
	}
	copying.Wait()
}

// holed writes nothing once there is a hole.
type holed struct {
	to   io.Writer
	hole *atomic.Bool
}

func (h holed) Write(p []byte) (int, error) {
	if h.hole.Load() {
		return len(p), nil
	}
	return h.to.Write(p)
}
