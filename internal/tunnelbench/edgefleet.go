package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/mysocketio/mysocket-injector/internal/sidecar/retry"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/tunnel"
)

const (
	// socketTunnels is how many replicas a socket has.
	socketTunnels = 10
	// fleetPatience is how long all tunnels may take to come.
	fleetPatience = 3 * time.Minute
	// certificateMargin is how long before its end a certificate is not used any more, as in the sidecar.
	certificateMargin = 10 * time.Second
)

// fleet are simulated sidecars in this process: each has a key, a certificate and a tunnel of its own, and connects again as the
// sidecar's supervisor does, with the same pauses, and without a new certificate while the one it has is good.
type fleet struct {
	edge    *edge
	calls   atomic.Int64 // of the API
	running sync.WaitGroup
	failed  chan error // the first failure that waiting does not mend
}

// replica is one simulated sidecar.
type replica struct {
	fleet  *fleet
	socket edgeSocket
	tunnel edgeTunnel

	key      ssh.Signer
	hostKey  ssh.PublicKey
	login    ssh.Signer
	expires  time.Time
	attempts retry.Backoff
}

func (f *fleet) call(ctx context.Context, path string, body, answer any) error {
	f.calls.Add(1)
	return f.edge.api.call(ctx, path, body, answer)
}

// make registers all replicas at the API.
func (f *fleet) make(ctx context.Context, tunnels int, hostKey ssh.PublicKey) ([]*replica, error) {
	var all []*replica
	for range tunnels / socketTunnels {
		k, err := f.edge.socket(ctx, "http", socketTunnels)
		if err != nil {
			return nil, err
		}
		for _, t := range k.Tunnels {
			private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			if err != nil {
				return nil, err
			}
			key, err := ssh.NewSignerFromKey(private)
			if err != nil {
				return nil, err
			}
			all = append(all, &replica{fleet: f, socket: k, tunnel: t, key: key, hostKey: hostKey,
				// The sidecar's, but that each restart counts as the first failure for a long time: rounds are to be alike.
				attempts: retry.Backoff{Min: time.Second, Max: 32 * time.Second, Sustained: time.Millisecond, Random: mathrand.Float64}})
		}
	}
	// The certificates are good for five minutes, so they are asked for last, and at once.
	lanes := make(chan struct{}, apiLanes)
	failures := make([]error, len(all))
	var signing sync.WaitGroup
	for i, r := range all {
		lanes <- struct{}{}
		signing.Go(func() {
			failures[i] = r.sign(ctx)
			<-lanes
		})
	}
	signing.Wait()
	return all, errors.Join(failures...)
}

// sign gets a certificate.
func (r *replica) sign(ctx context.Context) error {
	var signed struct {
		Certificate string `json:"signed_ssh_cert"`
	}
	path := "/socket/" + r.socket.ID + "/tunnel/" + r.tunnel.ID + "/signkey"
	if err := r.fleet.call(ctx, path, map[string]string{"ssh_public_key": string(ssh.MarshalAuthorizedKey(r.key.PublicKey()))}, &signed); err != nil {
		return err
	}
	public, _, _, _, err := ssh.ParseAuthorizedKey([]byte(signed.Certificate))
	if err != nil {
		return err
	}
	certificate, ok := public.(*ssh.Certificate)
	if !ok {
		return errors.New("the edge signs no certificate")
	}
	r.expires = time.Unix(int64(certificate.ValidBefore), 0) //nolint:gosec // minutes from now
	r.login, err = ssh.NewCertSigner(certificate, r.key)
	return err
}

// run keeps the replica connected until ctx ends.
func (r *replica) run(ctx context.Context) error {
	clock := retry.System()
	for ctx.Err() == nil {
		if r.login == nil || !time.Now().Before(r.expires.Add(-certificateMargin)) {
			if err := r.sign(ctx); err != nil && ctx.Err() == nil {
				return err
			}
		}
		began := time.Now()
		t, err := tunnel.Connect(ctx, tunnel.Config{
			Address: r.fleet.edge.addrs[edgeSSH], User: r.socket.UserName, Signer: r.login, HostKeys: []ssh.PublicKey{r.hostKey},
			ForwardHost: "localhost", ForwardPort: r.tunnel.Port, ClientVersion: "SSH-2.0-mysocket-sidecar_bench",
			DialApp: dialApp(r.fleet.edge.place.backend), Clock: clock, Logger: slog.New(slog.DiscardHandler), Observer: &counts{},
		})
		var wish time.Duration
		switch tunnel.FailedStep(err) {
		case tunnel.StepAuth, tunnel.StepForward, tunnel.StepHostKey:
			r.login = nil // and a new one is asked for, which is counted
		}
		if err == nil {
			select {
			case <-t.Done():
				wish = t.ComeBack()
			case <-t.ReconnectAsked():
				wish = t.ComeBack()
			case <-ctx.Done():
			}
			r.attempts.Worked(time.Since(began))
			t.Close()
		}
		_ = retry.Sleep(ctx, clock, r.attempts.Next(wish))
	}
	return nil
}

// await waits until the edge has so many tunnels.
func (f *fleet) await(ctx context.Context, n int) error {
	ctx, cancel := context.WithTimeout(ctx, fleetPatience)
	defer cancel()
	for {
		have, err := f.gauge(ctx, "mysocket_edge_tunnels_connected")
		if err == nil && int(have) == n {
			return nil
		}
		select {
		case err := <-f.failed:
			return err
		case <-ctx.Done():
			return fmt.Errorf("%.0f of %d tunnels are connected: %w", have, n, errors.Join(err, ctx.Err()))
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// gauge reads one number of the edge's metrics.
func (f *fleet) gauge(ctx context.Context, name string) (float64, error) {
	text, err := fetch(ctx, "http://"+f.edge.addrs[edgeAdmin]+"/metrics")
	if err != nil {
		return 0, err
	}
	for line := range bytes.Lines(text) {
		if rest, ok := strings.CutPrefix(string(line), name+" "); ok {
			var value float64
			_, err := fmt.Sscan(rest, &value)
			return value, err
		}
	}
	return 0, fmt.Errorf("the edge has no metric %s", name)
}

// memory reads what the edge holds, in MiB.
func (f *fleet) memory(ctx context.Context) (resident, heap float64, err error) {
	kib, err := residentKiB(f.edge.process.pid())
	if err != nil {
		return 0, 0, err
	}
	inUse, err := f.gauge(ctx, "go_memstats_heap_inuse_bytes")
	return float64(kib) / 1024, inUse / (1 << 20), err
}

// measureFleet connects many tunnels, and restarts the edge under them.
func measureFleet(ctx context.Context, s edgeSettings, dir string, all *children) error {
	p, err := newPlace(dir, "127.0.0.1:1") // no visitor comes
	if err != nil {
		return err
	}
	e, err := runEdge(ctx, []string{s.edge}, p)
	if err != nil {
		return err
	}
	defer func() { all.keep(e.process) }() // the last one
	f := &fleet{edge: e, failed: make(chan error, 1)}
	public, err := os.ReadFile(p.file("edge-host.pub"))
	if err != nil {
		return err
	}
	hostKey, _, _, _, err := ssh.ParseAuthorizedKey(public)
	if err != nil {
		return err
	}
	replicas, err := f.make(ctx, s.tunnels, hostKey)
	if err != nil {
		return err
	}
	const before, atOnce, drained, killed = "before", "all at once", "SIGTERM, started again", "SIGKILL, started again"
	seen := map[string]samples{}
	note := func(what string, took time.Duration, calls int64) error {
		resident, heap, err := f.memory(ctx)
		if err != nil {
			return err
		}
		if seen[what] == nil {
			seen[what] = samples{}
		}
		if took > 0 {
			seen[what].add("took", took.Seconds())
		}
		seen[what].add("resident", resident)
		seen[what].add("heap", heap)
		seen[what].add("calls", float64(f.calls.Load()-calls))
		return nil
	}
	if err := note(before, 0, 0); err != nil {
		return err
	}

	sailing, stop := context.WithCancel(ctx)
	defer func() {
		stop()
		f.running.Wait()
	}()
	connected := func(what string, began time.Time, calls int64) error {
		if err := f.await(ctx, s.tunnels); err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		return note(what, time.Since(began), calls)
	}
	began, calls := time.Now(), f.calls.Load()
	for _, r := range replicas {
		f.running.Go(func() {
			if err := r.run(sailing); err != nil {
				select {
				case f.failed <- err:
				default:
				}
			}
		})
	}
	if err := connected(atOnce, began, calls); err != nil {
		return err
	}
	for round := range s.rounds {
		fmt.Fprintf(os.Stderr, "tunnels, round %d of %d\n", round+1, s.rounds)
		for _, end := range []struct {
			what   string
			signal syscall.Signal
		}{{drained, syscall.SIGTERM}, {killed, syscall.SIGKILL}} {
			began, calls = time.Now(), f.calls.Load()
			if err := e.process.cmd.Process.Signal(end.signal); err != nil {
				return err
			}
			_ = e.process.cmd.Wait()
			if err := e.start(ctx); err != nil {
				return err
			}
			if err := connected(end.what, began, calls); err != nil {
				return err
			}
		}
	}
	var lines [][]string
	for _, what := range []string{before, atOnce, drained, killed} {
		of := seen[what]
		lines = append(lines, []string{what, of.show("took", "%.1f", samples{}), of.show("resident", "%.0f", samples{}),
			of.show("heap", "%.0f", samples{}), of.show("calls", "%.0f", samples{})})
	}
	rows(fmt.Sprintf("%d tunnels on as many connections from one address", s.tunnels),
		[]string{"what happened", "all connected after, s", "edge, resident, MiB", "its heap in use, MiB", "API calls meanwhile, without those for sockets"}, lines)
	return nil
}
