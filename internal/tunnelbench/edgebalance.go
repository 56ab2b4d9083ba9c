package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"
)

const (
	// unequalApps are ten replicas: the n-th takes n times fastest for a request, and works on appWorkers of them at once. Together they
	// could answer 2,900 a second, the slowest 100.
	unequalApps = 10
	fastest     = 2 * time.Millisecond
	appWorkers  = 2
	// balanceRate leaves the slowest app with eight tenths of what it can do when all apps get the same.
	balanceRate = 800
	// balanceVisitors is so many that a visitor rarely wants something while the last answer is on its way.
	balanceVisitors = 512
	// balanceLonger is how much longer a round is than others: a tail needs numbers.
	balanceLonger = 2
)

// serveApps serves the apps of unequal speed and prints their addresses.
func serveApps(ctx context.Context, args []string) error {
	if len(args) != 1 {
		return errors.New("apps: give their number")
	}
	n, err := strconv.Atoi(args[0])
	if err != nil || n < 1 || n > 100 {
		return fmt.Errorf("apps: %q is not a number from 1 to 100", args[0])
	}
	var addresses []string
	failed := make(chan error, n)
	for i := range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		addresses = append(addresses, l.Addr().String())
		server := &http.Server{Handler: slowApp(fastest * time.Duration(i+1))} //nolint:gosec // no stranger reaches it
		defer func() { _ = server.Close() }()
		go func() { failed <- server.Serve(l) }()
	}
	fmt.Println(strings.Join(addresses, " "))
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
		return nil
	}
}

// slowApp takes some time for a request, has few workers, and lets the others wait.
func slowApp(takes time.Duration) http.Handler {
	workers := make(chan struct{}, appWorkers)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		select {
		case workers <- struct{}{}:
		case <-r.Context().Done():
			return
		}
		pause(r.Context(), takes)
		<-workers
		_, _ = io.WriteString(w, smallBody)
	})
}

// measureBalance compares how long visitors wait when ten apps of unequal speed share the work.
func measureBalance(ctx context.Context, s edgeSettings, dir string, all *children) error {
	apps, line, err := self(ctx, "apps", strconv.Itoa(unequalApps))
	if err != nil {
		return err
	}
	all.keep(apps)
	backends := strings.Fields(line)
	p, err := newPlace(dir, "")
	if err != nil {
		return err
	}
	haproxy, fronts, err := startHAProxy(ctx, p, haproxyFront{balance: "roundrobin", backends: backends}, haproxyFront{balance: "leastconn", backends: backends})
	all.keep(haproxy)
	if err != nil {
		return err
	}
	e, err := runEdge(ctx, []string{s.edge}, p)
	if err != nil {
		return err
	}
	all.keep(e.process)
	k, err := e.socket(ctx, "http", unequalApps)
	if err != nil {
		return err
	}
	l := e.login(k)
	l.Backends = backends
	sidecars, err := startOurs(ctx, l)
	if err != nil {
		return err
	}
	all.keep(sidecars)

	robin := &way{name: "haproxy, round robin", address: fronts[0], host: k.DNSName, samples: samples{}}
	ways := []*way{
		robin,
		{name: "haproxy, leastconn", address: fronts[1], host: k.DNSName, samples: samples{}},
		{name: "edge, least outstanding, over 10 tunnels", address: e.addrs[edgeHTTP], host: k.DNSName, samples: samples{}},
	}
	for round := range s.rounds {
		fmt.Fprintf(os.Stderr, "balance, round %d of %d\n", round+1, s.rounds)
		for i := range ways {
			w := ways[(i+round)%len(ways)]
			r, err := visitAll(ctx, func(int) (*keepAlive, error) {
				conn, err := w.open(ctx)
				if err != nil {
					return nil, err
				}
				return newKeepAlive(conn, w.host, "/"), nil
			}, balanceVisitors, demand{rate: balanceRate, random: true}, balanceLonger*s.duration())
			if err != nil {
				return fmt.Errorf("%s: %w", w.name, err)
			}
			w.samples.add("p50", milliseconds(r.p50))
			w.samples.add("p99", milliseconds(r.p99))
		}
	}
	var lines [][]string
	for _, w := range ways {
		rival := robin.samples
		if w == robin {
			rival = samples{}
		}
		lines = append(lines, []string{w.name, w.samples.show("p50", "%.1f", rival), w.samples.show("p99", "%.1f", rival)})
	}
	rows(fmt.Sprintf("Ten apps of unequal speed: the n-th takes n times %s and has %d workers; %d requests/s at random times; x is the ratio to round robin", fastest, appWorkers, balanceRate),
		[]string{"who balances", "p50, ms", "p99, ms"}, lines)
	return nil
}
