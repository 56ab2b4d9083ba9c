package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"
)

const (
	smallConnections = 64
	manyStreams      = 8
)

// contender is one way from the visitors to the backend.
type contender struct {
	client, server string
	entries        []string
	process        *process // the replica's end, of which time and memory are read
	// rival is the contender that this one is compared with; nil for none.
	rival *contender

	samples map[string][]float64
}

func (c *contender) String() string { return c.client + " / " + c.server }

func (c *contender) add(what string, value float64) {
	c.samples[what] = append(c.samples[what], value)
}

func (c *contender) median(what string) float64 {
	s := slices.Sorted(slices.Values(c.samples[what]))
	if len(s) == 0 {
		return 0
	}
	return (s[(len(s)-1)/2] + s[len(s)/2]) / 2
}

// spread returns the smallest and the largest sample.
func (c *contender) spread(what string) (float64, float64) {
	return slices.Min(c.samples[what]), slices.Max(c.samples[what])
}

// measureAll starts everything, measures in rounds, and prints the report.
func measureAll(ctx context.Context, s settings) (err error) {
	dir, err := os.MkdirTemp("", "tunnelbench")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	ctx, cancel := context.WithCancel(ctx)
	var children []*process
	defer func() {
		cancel()
		for _, p := range slices.Backward(children) {
			_ = p.cmd.Wait()
		}
	}()
	app, backend, err := self(ctx, "backend")
	if err != nil {
		return err
	}
	children = append(children, app)

	relay, processes, err := startRelays(ctx, backend)
	children = append(children, processes...)
	if err != nil {
		return err
	}
	all := []*contender{relay}
	if s.wants("rtt") {
		if err := measureDelayed(ctx, s, dir, backend); err != nil {
			return err
		}
	}
	if s.only == "rtt" {
		return nil
	}
	for _, kind := range []string{"sshd", "edge"} {
		var rival *contender
		for _, client := range []struct {
			name        string
			connections int
		}{{"OpenSSH", 1}, {"sidecar", 1}, {"sidecar, 2 connections", 2}} {
			c, processes, err := startContender(ctx, s, filepath.Join(dir, fmt.Sprint(kind, len(all))), backend, kind, client.name, client.connections, false)
			children = append(children, processes...)
			if err != nil {
				return err
			}
			c.rival = rival
			if client.name == "OpenSSH" {
				rival = c
			}
			all = append(all, c)
		}
	}
	if s.wants("memory") { // first: later the processes have grown by what they did
		for _, c := range all {
			if err := measureMemory(ctx, c, s.open); err != nil {
				return fmt.Errorf("memory, %s: %w", c, err)
			}
		}
	}
	for round := range s.rounds {
		fmt.Fprintf(os.Stderr, "round %d of %d\n", round+1, s.rounds)
		for i := range all {
			c := all[(i+round)%len(all)] // nobody is always the first
			if err := measure(ctx, s, c, relay); err != nil {
				return fmt.Errorf("%s: %w", c, err)
			}
		}
	}
	report(s, all)
	return nil
}

// startContender starts a server and a client that is connected with it, by a long way when delayed. It returns the
// processes that it has started also when it fails.
func startContender(ctx context.Context, s settings, dir, backend, kind, client string, connections int, delayed bool) (*contender, []*process, error) {
	place, err := newPlace(dir, backend)
	if err != nil {
		return nil, nil, err
	}
	var to *server
	if kind == "sshd" {
		to, err = startSSHD(ctx, place, connections)
	} else {
		to, err = startEdge(ctx, s.edge, place, connections)
	}
	if err != nil {
		return nil, nil, err
	}
	started := []*process{to.process}
	if delayed {
		way, address, err := self(ctx, "delay", to.login.Address)
		if err != nil {
			return nil, started, err
		}
		started = append(started, way)
		to.login.Address = address
	}
	c := &contender{client: client, server: to.name, entries: to.entries, samples: map[string][]float64{}}
	if client == "OpenSSH" {
		c.process, err = startOpenSSH(ctx, place, to.login)
	} else {
		c.process, err = startOurs(ctx, to.login)
	}
	if err != nil {
		return nil, started, err
	}
	started = append(started, c.process)
	for _, address := range c.entries {
		if err := await(ctx, c.String(), func() error { return ready(ctx, address) }); err != nil {
			return nil, started, fmt.Errorf("%w\n%s", err, c.process.log)
		}
	}
	return c, started, nil
}

// measureDelayed measures bulk with a long way between the tunnel and its server, where the window of SSH bounds it, and
// prints its table.
func measureDelayed(ctx context.Context, s settings, dir, backend string) error {
	ctx, cancel := context.WithCancel(ctx)
	var children []*process
	defer func() {
		cancel()
		for _, p := range slices.Backward(children) {
			_ = p.cmd.Wait()
		}
	}()
	var all []*contender
	for _, kind := range []string{"sshd", "edge"} {
		var rival *contender
		for _, connections := range []int{0, 1, 2, 4} {
			name := fmt.Sprintf("sidecar, connections %d", connections)
			if connections == 0 {
				name = "OpenSSH"
			}
			c, processes, err := startContender(ctx, s, filepath.Join(dir, fmt.Sprint("rtt", kind, connections)), backend, kind, name, max(connections, 1), true)
			children = append(children, processes...)
			if err != nil {
				return fmt.Errorf("%s, %s: %w", name, kind, err)
			}
			if connections == 0 {
				rival = c
			} else {
				c.rival = rival
			}
			all = append(all, c)
		}
	}
	for round := range s.rounds {
		for i := range all {
			if err := measureBulk(ctx, s, all[(i+round)%len(all)]); err != nil {
				return fmt.Errorf("with a long way, %s: %w", all[(i+round)%len(all)], err)
			}
		}
	}
	reportBulk(fmt.Sprintf("Bulk with a round trip of %s, MB/s, by direction and streams", roundTrip), all)
	return nil
}

func startRelays(ctx context.Context, backend string) (*contender, []*process, error) {
	inner, address, err := self(ctx, "relay", backend)
	if err != nil {
		return nil, nil, err
	}
	outer, address, err := self(ctx, "relay", address)
	if err != nil {
		return nil, []*process{inner}, err
	}
	return &contender{client: "TCP relay", server: "TCP relay", entries: []string{address}, process: inner, samples: map[string][]float64{}}, []*process{inner, outer}, nil
}

func bulkName(toApp bool, streams int) string {
	if toApp {
		return fmt.Sprintf("edge to app, %d", streams)
	}
	return fmt.Sprintf("app to edge, %d", streams)
}

// measure does one round with one contender.
func measure(ctx context.Context, s settings, c, relay *contender) error {
	if s.wants("bulk") {
		if err := measureBulk(ctx, s, c); err != nil {
			return err
		}
	}
	if s.wants("small") {
		rate, _, err := small(ctx, c.entries, smallConnections, 0, s.duration())
		if err != nil {
			return fmt.Errorf("small requests: %w", err)
		}
		_, late, err := small(ctx, c.entries, smallConnections, rate/2, s.duration())
		if err != nil {
			return fmt.Errorf("small requests at half the rate: %w", err)
		}
		_, floor, err := small(ctx, relay.entries, smallConnections, rate/2, s.duration())
		if err != nil {
			return fmt.Errorf("small requests through the relay: %w", err)
		}
		c.add("requests", rate)
		c.add("p99", float64(late.Microseconds())/1000)
		c.add("added p99", float64((late-floor).Microseconds())/1000)
	}
	if s.wants("new") {
		rate, err := fresh(ctx, c.entries, s.duration())
		if err != nil {
			return fmt.Errorf("new connections: %w", err)
		}
		c.add("new", rate)
	}
	return nil
}

// measureBulk does one round of bulk with one contender.
func measureBulk(ctx context.Context, s settings, c *contender) error {
	for _, toApp := range []bool{true, false} {
		for _, streams := range []int{1, manyStreams} {
			before, err := procTimes(c.process.pid())
			if err != nil {
				return err
			}
			began := time.Now()
			rate, err := bulk(ctx, c.entries, streams, toApp, s.duration())
			if err != nil {
				return fmt.Errorf("%s: %w", bulkName(toApp, streams), err)
			}
			took := time.Since(began)
			after, err := procTimes(c.process.pid())
			if err != nil {
				return err
			}
			c.add(bulkName(toApp, streams), rate/1e6)
			c.add("cpu "+bulkName(toApp, streams), (after-before).Seconds()/(rate*took.Seconds()/1e9))
		}
	}
	return nil
}

// measureMemory reads the replica's end with no connection and with many. It is done once: the numbers hardly vary.
func measureMemory(ctx context.Context, c *contender, open int) error {
	idle, err := residentKiB(c.process.pid())
	if err != nil {
		return err
	}
	return hold(ctx, c.entries, open, func() error {
		busy, err := residentKiB(c.process.pid())
		c.add("idle", float64(idle)/1024)
		c.add("each", float64(busy-idle)/float64(open))
		return err
	})
}

// report prints tables in Markdown: medians, the spread, and ratios to the OpenSSH client at the same server.
func report(s settings, all []*contender) {
	fmt.Printf("%d CPUs, %s, medians of %d rounds of %g s; in brackets the smallest and the largest; x is the ratio to the OpenSSH client at the same server.\n",
		runtime.NumCPU(), runtime.Version(), s.rounds, s.seconds)
	if s.wants("bulk") {
		reportBulk("Bulk, MB/s, by direction and streams", all)
	}
	if s.wants("small") {
		table(all, fmt.Sprintf("Small requests: HTTP keep-alive, 1 KiB, %d connections", smallConnections), []string{"requests/s"}, []string{"requests"}, cell("%.0f"))
		table(all, "and at half of that rate", []string{"p99, ms", "more than the relay at this rate, ms"}, []string{"p99", "added p99"}, cell("%.2f"))
	}
	if s.wants("new") {
		table(all, "New connections, each with one byte there and back", []string{"per second"}, []string{"new"}, cell("%.0f"))
	}
	if s.wants("memory") {
		table(all, fmt.Sprintf("Memory at the replica's end, resident, with %d connections open", s.open), []string{"idle, MiB", "each connection, KiB"}, []string{"idle", "each"}, cell("%.1f"))
	}
}

func reportBulk(title string, all []*contender) {
	var bulks, cpus []string
	for _, toApp := range []bool{true, false} {
		for _, streams := range []int{1, manyStreams} {
			bulks, cpus = append(bulks, bulkName(toApp, streams)), append(cpus, "cpu "+bulkName(toApp, streams))
		}
	}
	table(all, title, bulks, bulks, cell("%.0f"))
	table(all, "CPU seconds per GB at the replica's end", bulks, cpus, cell("%.2f"))
}

// cell returns what shows a median, the spread, and the ratio to the rival.
func cell(format string) func(c *contender, what string) string {
	return func(c *contender, what string) string {
		low, high := c.spread(what)
		ratio := ""
		if c.rival != nil && c.rival.median(what) != 0 {
			ratio = fmt.Sprintf(" x%.2f", c.median(what)/c.rival.median(what))
		}
		return fmt.Sprintf(format+" ("+format+"-"+format+")%s", c.median(what), low, high, ratio)
	}
}

func table(all []*contender, title string, heads, whats []string, show func(*contender, string) string) {
	fmt.Printf("\n%s\n\n| client | server | %s |\n|---|---|%s\n", title, strings.Join(heads, " | "), strings.Repeat("---|", len(heads)))
	for _, c := range all {
		fmt.Printf("| %s | %s |", c.client, c.server)
		for _, what := range whats {
			fmt.Printf(" %s |", show(c, what))
		}
		fmt.Println()
	}
}
