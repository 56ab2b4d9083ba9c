package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"runtime"
	"runtime/debug"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/mysocketio/mysocket-injector/internal/sidecar/retry"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/tunnel"
)

// login is what both clients need to log in to a server.
type login struct {
	// Address is the SSH server's, User who logs in with the private key of KeyFile; the server has the key of HostKeyFile.
	Address, User, KeyFile, HostKeyFile string
	// Ports are what to ask for with tcpip-forward: one connection for each.
	Ports []uint32
	// Backend is where visitors go. Backends, if given, has one for each port instead.
	Backend  string
	Backends []string
}

// serveTunnel is a replica: the sidecar's own tunnels, without the supervisor around them. It prints "connected" and runs
// until ctx ends or a connection is lost.
func serveTunnel(ctx context.Context, args []string) error {
	if len(args) != 1 {
		return errors.New("tunnel: give the login as JSON")
	}
	var l login
	if err := json.Unmarshal([]byte(args[0]), &l); err != nil {
		return err
	}
	// As in the injected container, which has 256 MiB and uses a processor for each tunnel.
	runtime.GOMAXPROCS(min(len(l.Ports), runtime.GOMAXPROCS(0)))
	debug.SetGCPercent(tunnel.GCPercent)
	debug.SetMemoryLimit(256 << 20 / 10 * 9)
	private, err := os.ReadFile(l.KeyFile)
	if err != nil {
		return err
	}
	signer, err := ssh.ParsePrivateKey(private)
	if err != nil {
		return err
	}
	public, err := os.ReadFile(l.HostKeyFile)
	if err != nil {
		return err
	}
	hostKey, _, _, _, err := ssh.ParseAuthorizedKey(public)
	if err != nil {
		return err
	}
	if len(l.Backends) > 0 && len(l.Backends) != len(l.Ports) {
		return fmt.Errorf("tunnel: %d backends for %d ports", len(l.Backends), len(l.Ports))
	}
	for i, port := range l.Ports {
		backend := l.Backend
		if len(l.Backends) > 0 {
			backend = l.Backends[i]
		}
		t, err := tunnel.Connect(ctx, tunnel.Config{
			Address: l.Address, User: l.User, Signer: signer, HostKeys: []ssh.PublicKey{hostKey},
			ForwardHost: "localhost", ForwardPort: port, ClientVersion: "SSH-2.0-mysocket-sidecar_bench",
			DialApp: dialApp(backend),
			Clock:   retry.System(), Logger: slog.New(slog.NewTextHandler(os.Stderr, nil)), Observer: &counts{},
		})
		if err != nil {
			return err
		}
		defer t.Close()
		defer context.AfterFunc(ctx, t.Close)()
	}
	fmt.Println("connected")
	<-ctx.Done()
	return nil
}

// counts observes a tunnel as cheaply as the sidecar's metrics do.
type counts struct{ opened, closed, toApp, toEdge, failed, rejected atomic.Int64 }

func (c *counts) ConnectionOpened() { c.opened.Add(1) }
func (c *counts) ConnectionClosed() { c.closed.Add(1) }
func (c *counts) BytesToApp(n int)  { c.toApp.Add(int64(n)) }
func (c *counts) BytesToEdge(n int) { c.toEdge.Add(int64(n)) }
func (c *counts) DialFailed(string) { c.failed.Add(1) }
func (c *counts) Rejected(string)   { c.rejected.Add(1) }

func (c *counts) HandshakeTook(time.Duration) {}
func (c *counts) RoundTrip(time.Duration)     {}

func dialApp(address string) func(context.Context) (*net.TCPConn, error) {
	return func(ctx context.Context) (*net.TCPConn, error) {
		conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
		if err != nil {
			return nil, err
		}
		tcp, ok := conn.(*net.TCPConn)
		if !ok {
			return nil, errors.New("the backend is not TCP")
		}
		return tcp, nil
	}
}
