package main

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"runtime/pprof"
	"strings"
	"syscall"
	"time"

	edgeserver "github.com/mysocketio/mysocket-injector/internal/edge"
)

// bulkStreams is how many downloads or uploads there are at once.
const bulkStreams = 8

// part is one process on the way of a request.
type part struct {
	name string
	pid  int
}

// way is one way from visitors to the app over HTTP.
type way struct {
	name    string
	address string
	host    string
	tls     bool
	parts   []part
	// rival is haproxy's way, if this is not it.
	rival *way

	samples samples
}

// open connects a visitor.
func (w *way) open(ctx context.Context) (net.Conn, error) {
	conn, err := visit(ctx, w.address)
	if err != nil {
		return nil, err
	}
	if !w.tls {
		_ = conn.SetLinger(0)
		return conn, nil
	}
	// HTTP/1.1 for both, which is what is offered without ALPN. Whose certificate it is makes no difference to the measurement.
	secure := tls.Client(conn, &tls.Config{ServerName: w.host, InsecureSkipVerify: true, MinVersion: tls.VersionTLS13}) //nolint:gosec // our own servers
	if err := secure.HandshakeContext(ctx); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return secure, nil
}

// small asks for 1 KiB.
func (w *way) small(ctx context.Context, rate float64, d time.Duration) (outcome, error) {
	r, err := visitAll(ctx, func(int) (*keepAlive, error) {
		conn, err := w.open(ctx)
		if err != nil {
			return nil, err
		}
		return newKeepAlive(conn, w.host, "/"), nil
	}, smallConnections, demand{rate: rate}, d)
	if err != nil {
		return r, fmt.Errorf("%s, 1 KiB: %w", w.name, err)
	}
	return r, nil
}

// bulk moves bodies that have no end.
func (w *way) bulk(ctx context.Context, toApp bool, d time.Duration) (float64, error) {
	rate, err := pump(ctx, func(ctx context.Context, _ int) (net.Conn, error) {
		conn, err := w.open(ctx)
		if err != nil {
			return nil, err
		}
		request := fmt.Sprintf("GET %s HTTP/1.1\r\nHost: %s\r\n\r\n", downloadPath, w.host)
		if toApp {
			request = fmt.Sprintf("POST %s HTTP/1.1\r\nHost: %s\r\nContent-Length: %d\r\n\r\n", uploadPath, w.host, int64(1)<<50)
		}
		if _, err := io.WriteString(conn, request); err != nil || toApp {
			return conn, err
		}
		// One byte at a time, so that nothing of the body is taken with it.
		head := make([]byte, 0, 1024)
		for !strings.HasSuffix(string(head), "\r\n\r\n") && len(head) < cap(head) {
			if _, err := io.ReadFull(conn, head[len(head):len(head)+1]); err != nil {
				return conn, err
			}
			head = head[:len(head)+1]
		}
		if !strings.HasPrefix(string(head), "HTTP/1.1 200 ") {
			return conn, fmt.Errorf("the answer begins with %q", head)
		}
		return conn, nil
	}, bulkStreams, toApp, d)
	if err != nil {
		return 0, fmt.Errorf("%s, bulk: %w", w.name, err)
	}
	return rate, nil
}

// cpu returns the processor time of all parts until now.
func (w *way) cpu() ([]time.Duration, error) {
	out := make([]time.Duration, len(w.parts))
	for i, p := range w.parts {
		var err error
		if out[i], err = procTimes(p.pid); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// startHTTPEdge starts our edge with an http socket and a sidecar's tunnel, and returns it with the socket.
func startHTTPEdge(ctx context.Context, program []string, p place, all *children) (*edge, edgeSocket, *process, error) {
	e, err := runEdge(ctx, program, p)
	if err != nil {
		return nil, edgeSocket{}, nil, err
	}
	all.keep(e.process)
	k, err := e.socket(ctx, "http", 1)
	if err != nil {
		return nil, k, nil, err
	}
	sidecar, err := startOurs(ctx, e.login(k))
	all.keep(sidecar)
	return e, k, sidecar, err
}

// measureProxies compares ways to one app.
func measureProxies(ctx context.Context, s edgeSettings, dir string, all *children) error {
	app, backend, err := self(ctx, "backend")
	if err != nil {
		return err
	}
	all.keep(app)
	p, err := newPlace(dir, backend)
	if err != nil {
		return err
	}
	haproxy, fronts, err := startHAProxy(ctx, p, haproxyFront{balance: "roundrobin", backends: []string{backend}},
		haproxyFront{balance: "roundrobin", backends: []string{backend}, tls: true})
	all.keep(haproxy)
	if err != nil {
		return err
	}
	e, k, sidecar, err := startHTTPEdge(ctx, []string{s.edge}, p, all)
	if err != nil {
		return err
	}
	ends := []part{{"app", app.pid()}, {"visitors", os.Getpid()}}
	direct := &way{name: "no proxy", address: backend, host: k.DNSName, parts: ends, samples: samples{}}
	ways := []*way{direct}
	for i, secure := range []bool{false, true} {
		suffix := ""
		if secure {
			suffix = ", TLS"
		}
		rival := &way{name: "haproxy" + suffix, address: fronts[i], host: k.DNSName, tls: secure, samples: samples{},
			parts: append([]part{{"haproxy", haproxy.pid()}}, ends...)}
		ours := &way{name: "edge and sidecar" + suffix, address: e.addrs[edgeHTTP+i], host: k.DNSName, tls: secure, samples: samples{},
			parts: append([]part{{"edge", e.process.pid()}, {"sidecar", sidecar.pid()}}, ends...), rival: rival}
		ways = append(ways, rival, ours)
	}
	for round := range s.rounds {
		fmt.Fprintf(os.Stderr, "proxy, round %d of %d\n", round+1, s.rounds)
		for i := range ways {
			if err := measureWay(ctx, s, ways[(i+round)%len(ways)]); err != nil { // nobody is always the first
				return err
			}
		}
		if err := measureLateness(ctx, s, ways); err != nil {
			return err
		}
	}
	reportProxies(ways)
	return nil
}

// measureWay measures what one way carries, and what it costs.
func measureWay(ctx context.Context, s edgeSettings, w *way) error {
	before, err := w.cpu()
	if err != nil {
		return err
	}
	r, err := w.small(ctx, 0, s.duration())
	if err != nil {
		return err
	}
	after, err := w.cpu()
	if err != nil {
		return err
	}
	w.samples.add("requests", r.rate)
	for i, p := range w.parts {
		w.samples.add("cpu "+p.name, float64((after[i]-before[i]).Microseconds())/float64(r.all))
	}
	for _, toApp := range []bool{true, false} {
		if before, err = w.cpu(); err != nil {
			return err
		}
		began := time.Now()
		rate, err := w.bulk(ctx, toApp, s.duration())
		if err != nil {
			return err
		}
		moved := rate * time.Since(began).Seconds()
		if after, err = w.cpu(); err != nil {
			return err
		}
		w.samples.add(bulkDirection(toApp), rate/1e6)
		for i, p := range w.parts {
			w.samples.add(bulkDirection(toApp)+" cpu "+p.name, (after[i]-before[i]).Seconds()/(moved/1e9))
		}
	}
	return nil
}

func bulkDirection(toApp bool) string {
	if toApp {
		return "upload"
	}
	return "download"
}

// measureLateness asks at half the pace that each way had in this round, and at the pace of the slower one of two rivals.
func measureLateness(ctx context.Context, s edgeSettings, ways []*way) error {
	for _, w := range ways {
		all := w.samples["requests"]
		half := all[len(all)-1] / 2
		r, err := w.small(ctx, half, s.duration())
		if err != nil {
			return err
		}
		w.samples.add("p99", milliseconds(r.p99))
		if w.rival == nil {
			continue
		}
		w.samples.add("same pace", milliseconds(r.p99))
		if r, err = w.rival.small(ctx, half, s.duration()); err != nil {
			return err
		}
		w.rival.samples.add("same pace", milliseconds(r.p99))
	}
	return nil
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

func reportProxies(ways []*way) {
	var speed, cost, bulkCost [][]string
	parts := []string{"haproxy", "edge", "sidecar", "app", "visitors"}
	for _, w := range ways {
		rival := samples{}
		if w.rival != nil {
			rival = w.rival.samples
		}
		speed = append(speed, []string{w.name, w.samples.show("requests", "%.0f", rival), w.samples.show("p99", "%.2f", rival),
			w.samples.show("same pace", "%.2f", rival), w.samples.show("upload", "%.0f", rival), w.samples.show("download", "%.0f", rival)})
		line, bulkLine := []string{w.name}, []string{w.name}
		for _, p := range parts {
			line = append(line, w.samples.show("cpu "+p, "%.0f", samples{}))
			up, down := median(w.samples[bulkDirection(true)+" cpu "+p]), median(w.samples[bulkDirection(false)+" cpu "+p])
			if up == 0 && down == 0 {
				bulkLine = append(bulkLine, "-")
				continue
			}
			bulkLine = append(bulkLine, fmt.Sprintf("%.2f, %.2f", up, down))
		}
		cost, bulkCost = append(cost, line), append(bulkCost, bulkLine)
	}
	rows(fmt.Sprintf("One app: HTTP/1.1 over %d kept connections, 1 KiB; bulk over %d", smallConnections, bulkStreams),
		[]string{"way", "requests/s", "p99 at half of that, ms", "p99 at half of the edge's, ms", "upload, MB/s", "download, MB/s"}, speed)
	rows("Processor time of each process for one request of 1 KiB, microseconds, at full load", append([]string{"way"}, parts...), cost)
	rows("Processor time of each process for one GB of bulk, seconds: upload, download", append([]string{"way"}, parts...), bulkCost)
}

// profileEdge has the edge in a process that profiles itself, under one load.
func profileEdge(ctx context.Context, s edgeSettings, dir string, all *children) error {
	app, backend, err := self(ctx, "backend")
	if err != nil {
		return err
	}
	all.keep(app)
	p, err := newPlace(dir, backend)
	if err != nil {
		return err
	}
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	arg, err := json.Marshal(profiled{Edge: s.edge, File: s.profile})
	if err != nil {
		return err
	}
	e, k, _, err := startHTTPEdge(ctx, []string{exe, "profiled", string(arg)}, p, all)
	if err != nil {
		return err
	}
	w := &way{name: "edge", address: e.addrs[edgeHTTP], host: k.DNSName, samples: samples{}}
	if s.under == "requests" {
		r, err := w.small(ctx, 0, s.duration())
		if err == nil {
			fmt.Printf("%.0f requests/s, p50 %s, p99 %s; the edge's profile is in %s\n", r.rate, r.p50, r.p99, s.profile)
		}
		return err
	}
	rate, err := w.bulk(ctx, s.under == "upload", s.duration())
	if err == nil {
		fmt.Printf("%s: %.0f MB/s; the edge's profile is in %s\n", s.under, rate/1e6, s.profile)
	}
	return err
}

// profiled is what the role of that name is told.
type profiled struct{ Edge, File string }

// serveProfiled is mysocket-edge, but for "serve", which it does itself with a profile of the processor's time.
func serveProfiled(ctx context.Context, args []string) (err error) {
	if len(args) < 2 {
		return errors.New("profiled: give what to do as JSON, and the arguments of mysocket-edge")
	}
	var of profiled
	if err := json.Unmarshal([]byte(args[0]), &of); err != nil {
		return err
	}
	if args[1] != "serve" {
		return syscall.Exec(of.Edge, append([]string{of.Edge}, args[1:]...), os.Environ()) //nolint:gosec // our own program
	}
	cfg := edgeserver.Config{TCPPorts: edgeserver.PortRange{Min: 20000, Max: 29999}, Log: slog.New(slog.DiscardHandler)}
	f := flag.NewFlagSet("profiled", flag.ContinueOnError)
	for name, value := range map[string]*string{
		"state": &cfg.StatePath, "domain": &cfg.Domain, "api-address": &cfg.APIAddress, "ssh-address": &cfg.SSHAddress,
		"http-address": &cfg.HTTPAddress, "https-address": &cfg.HTTPSAddress, "admin-address": &cfg.AdminAddress,
		"ca-out": &cfg.CAOut, "ssh-host-key-out": &cfg.SSHHostKeyOut, "log-level": new(string),
	} {
		f.StringVar(value, name, "", "as of mysocket-edge serve")
	}
	if err := f.Parse(args[2:]); err != nil {
		return err
	}
	e, err := edgeserver.New(cfg)
	if err != nil {
		return err
	}
	file, err := os.Create(of.File)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	if err := pprof.StartCPUProfile(file); err != nil {
		return err
	}
	defer pprof.StopCPUProfile()
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	return e.Run(ctx)
}

// fetch reads a page of the edge's admin server.
func fetch(ctx context.Context, url string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer func() { _ = res.Body.Close() }()
	if res.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: %s", url, res.Status)
	}
	return io.ReadAll(io.LimitReader(res.Body, 16<<20))
}
