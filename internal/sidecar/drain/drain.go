// Package drain carries the order to drain from "tunnel-sidecar drain", which the kubelet runs as the preStop hook, to
// the running sidecar in the same container.
//
// The way is an abstract unix socket: it needs no file system that can be written, and nothing outside the pod can
// reach it. The pod's other containers share its network namespace and so could; both ends therefore ask the kernel who
// the other is, and speak only with their own user. The package must not know what draining is.
package drain

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

const (
	// DefaultName is the name of the socket, unless a flag says otherwise.
	DefaultName = "mysocket-sidecar-drain"

	order        = "drain\n"
	orderTimeout = 2 * time.Second
	writeTimeout = 2 * time.Second
	// silence is how long the sidecar may say nothing; it reports progress every second.
	silence  = 15 * time.Second
	maxPeers = 4
	maxLine  = 1 << 10
)

// ErrNotRunning says that no sidecar listens.
var ErrNotRunning = errors.New("no sidecar is running")

// Listen opens the socket of the given name.
func Listen(name string) (net.Listener, error) {
	listener, err := net.Listen("unix", "@"+name)
	if err != nil {
		return nil, fmt.Errorf("the socket @%s for the drain command can't be opened: %w", name, err)
	}
	return listener, nil
}

// Serve takes orders until ctx ends, and closes the listener. Each order runs drain, which tells with progress how far
// it is; an order whose sender has gone away goes on.
func Serve(ctx context.Context, listener net.Listener, logger *slog.Logger, drain func(ctx context.Context, progress func(string))) {
	stop := context.AfterFunc(ctx, func() { _ = listener.Close() })
	defer stop()
	var peers sync.WaitGroup
	defer peers.Wait()
	slots := make(chan struct{}, maxPeers)
	for {
		conn, err := listener.Accept()
		if err != nil {
			if ctx.Err() == nil {
				logger.Error("the socket for the drain command is broken; draining happens on SIGTERM only", "err", err)
			}
			return
		}
		select {
		case slots <- struct{}{}:
		default:
			_ = conn.Close()
			continue
		}
		peers.Go(func() {
			defer func() { _ = conn.Close(); <-slots }()
			if err := serve(ctx, conn, drain); err != nil {
				logger.Warn("an order to drain was not taken", "err", err)
			}
		})
	}
}

func serve(ctx context.Context, conn net.Conn, drain func(context.Context, func(string))) error {
	if err := checkPeer(conn); err != nil {
		return err
	}
	if err := conn.SetReadDeadline(time.Now().Add(orderTimeout)); err != nil {
		return err
	}
	got := make([]byte, len(order))
	if _, err := io.ReadFull(conn, got); err != nil {
		return fmt.Errorf("no order came: %w", err)
	}
	if string(got) != order {
		return fmt.Errorf("the order is %q; the only one is %q", got, order)
	}
	drain(ctx, func(line string) {
		// Whoever asked may be gone; draining goes on all the same.
		_ = conn.SetWriteDeadline(time.Now().Add(writeTimeout))
		_, _ = io.WriteString(conn, line+"\n")
	})
	return nil
}

// Ask orders the running sidecar to drain and copies to out what it says. It returns when the draining is over:
// [ErrNotRunning] when there is nobody to ask.
func Ask(ctx context.Context, name string, out io.Writer) error {
	conn, err := (&net.Dialer{Timeout: orderTimeout}).DialContext(ctx, "unix", "@"+name)
	if errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.ENOENT) {
		return ErrNotRunning
	}
	if err != nil {
		return fmt.Errorf("the sidecar can't be asked to drain: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	defer func() { _ = conn.Close() }()
	if err := checkPeer(conn); err != nil {
		return err
	}
	if err := conn.SetDeadline(time.Now().Add(silence)); err != nil {
		return err
	}
	if _, err := io.WriteString(conn, order); err != nil {
		return fmt.Errorf("the order to drain could not be given: %w", err)
	}
	lines := bufio.NewScanner(conn)
	lines.Buffer(nil, maxLine)
	for lines.Scan() {
		if err := conn.SetReadDeadline(time.Now().Add(silence)); err != nil {
			return err
		}
		if _, err := fmt.Fprintln(out, lines.Text()); err != nil {
			return err
		}
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("the sidecar stopped saying how the draining goes: %w", err)
	}
	return nil
}

// checkPeer makes sure that the other end of the socket is a process of our own user.
func checkPeer(conn net.Conn) error {
	unix, ok := conn.(*net.UnixConn)
	if !ok {
		return errors.New("not a unix socket")
	}
	raw, err := unix.SyscallConn()
	if err != nil {
		return err
	}
	var credentials *syscall.Ucred
	var failed error
	err = raw.Control(func(fd uintptr) {
		credentials, failed = syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED)
	})
	if err := errors.Join(err, failed); err != nil {
		return fmt.Errorf("the kernel does not say who is at the other end: %w", err)
	}
	if uid := os.Getuid(); int(credentials.Uid) != uid {
		return fmt.Errorf("user %d is at the other end; only %d may be", credentials.Uid, uid)
	}
	return nil
}
