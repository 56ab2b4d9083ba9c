package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"
)

// edgeSettings say what is measured of the edge, and for how long.
type edgeSettings struct {
	settings
	tunnels int
	profile string
	under   string
}

// edgeMeasurements are what --only may name.
var edgeMeasurements = []string{"proxy", "tunnels", "balance"}

// profileLoads are what --under may name: requests of 1 KiB, or bulk in one direction.
var profileLoads = []string{"requests", "upload", "download"}

// benchEdge measures what the edge costs:
//
//	proxy    front, tunnel and sidecar against haproxy as a plain reverse proxy before the same app
//	tunnels  the edge's memory with many connected tunnels, and how they come back after its restart
//	balance  ten tunnels to apps of unequal speed against haproxy's round robin, and its leastconn, over the same apps
//
// All of it runs on loopback. Rounds take turns, so that a busy machine is as busy for each.
func benchEdge(ctx context.Context, args []string) error {
	var s edgeSettings
	f := flag.NewFlagSet("tunnelbench edge", flag.ContinueOnError)
	f.IntVar(&s.rounds, "rounds", 3, "how often each measurement is repeated; medians are reported")
	f.Float64Var(&s.seconds, "seconds", 2, "how long one measurement lasts")
	f.IntVar(&s.tunnels, "tunnels", 1000, "how many tunnels are connected at once")
	f.StringVar(&s.only, "only", "", "only these measurements, comma separated: "+strings.Join(edgeMeasurements, ", "))
	f.StringVar(&s.edge, "edge", "", "the mysocket-edge program (required)")
	f.StringVar(&s.profile, "profile", "", "write a CPU profile of the edge under one load to this `file`, and measure nothing else")
	f.StringVar(&s.under, "under", "requests", "the `load` of --profile: "+strings.Join(profileLoads, ", "))
	if err := f.Parse(args); err != nil {
		return err
	}
	if err := checkRuns(f, s.rounds, s.seconds, s.only, edgeMeasurements, s.edge); err != nil {
		return err
	}
	switch {
	case s.tunnels < socketTunnels || s.tunnels > 5000 || s.tunnels%socketTunnels != 0:
		return fmt.Errorf("--tunnels %d: allowed are multiples of %d up to 5000", s.tunnels, socketTunnels)
	case !slices.Contains(profileLoads, s.under):
		return fmt.Errorf("--under %q: allowed are %s", s.under, strings.Join(profileLoads, ", "))
	}
	return measureEdge(ctx, s)
}

func measureEdge(ctx context.Context, s edgeSettings) (err error) {
	dir, err := os.MkdirTemp("", "edgebench")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if s.profile != "" {
		return within(ctx, func(ctx context.Context, all *children) error {
			return profileEdge(ctx, s, filepath.Join(dir, "profile"), all)
		})
	}
	fmt.Printf("%d CPUs, %s, medians of %d rounds of %g s; in brackets the smallest and the largest; x is the ratio to haproxy in the same round, as a median.\n",
		runtime.NumCPU(), runtime.Version(), s.rounds, s.seconds)
	for _, part := range []struct {
		name    string
		measure func(context.Context, edgeSettings, string, *children) error
	}{{"proxy", measureProxies}, {"balance", measureBalance}, {"tunnels", measureFleet}} {
		if !s.wants(part.name) {
			continue
		}
		began := time.Now()
		if err := within(ctx, func(ctx context.Context, all *children) error {
			return part.measure(ctx, s, filepath.Join(dir, part.name), all)
		}); err != nil {
			return fmt.Errorf("%s: %w", part.name, err)
		}
		fmt.Fprintf(os.Stderr, "%s took %s\n", part.name, time.Since(began).Round(time.Second))
	}
	return nil
}

// children are the processes of one part.
type children struct{ all []*process }

// keep remembers a process, unless it could not be started.
func (c *children) keep(p *process) {
	if p != nil {
		c.all = append(c.all, p)
	}
}

// within runs one part and ends all processes that it has started.
func within(ctx context.Context, measure func(context.Context, *children) error) error {
	ctx, cancel := context.WithCancel(ctx)
	var all children
	defer func() {
		cancel()
		for _, p := range slices.Backward(all.all) {
			_ = p.cmd.Wait()
		}
	}()
	return measure(ctx, &all)
}

// samples are what was measured of one thing, a value for each round.
type samples map[string][]float64

func (s samples) add(what string, value float64) { s[what] = append(s[what], value) }

// show returns the median, the spread, and the median of the ratios to a rival's value of the same round.
func (s samples) show(what, format string, rival samples) string {
	if len(s[what]) == 0 {
		return "-"
	}
	text := fmt.Sprintf(format+" ("+format+"-"+format+")", median(s[what]), slices.Min(s[what]), slices.Max(s[what]))
	if len(rival[what]) != len(s[what]) {
		return text
	}
	var ratios []float64
	for i, value := range s[what] {
		if rival[what][i] != 0 {
			ratios = append(ratios, value/rival[what][i])
		}
	}
	if len(ratios) == 0 {
		return text
	}
	return text + fmt.Sprintf(" x%.2f", median(ratios))
}

func median(values []float64) float64 {
	s := slices.Sorted(slices.Values(values))
	if len(s) == 0 {
		return 0
	}
	return (s[(len(s)-1)/2] + s[len(s)/2]) / 2
}

// rows prints a table in Markdown.
func rows(title string, heads []string, lines [][]string) {
	fmt.Printf("\n%s\n\n| %s |\n|%s\n", title, strings.Join(heads, " | "), strings.Repeat("---|", len(heads)))
	for _, line := range lines {
		fmt.Printf("| %s |\n", strings.Join(line, " | "))
	}
}
