package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// entry returns the address that the n-th visitor uses.
func entry(entries []string, n int) string { return entries[n%len(entries)] }

func visit(ctx context.Context, address string) (*net.TCPConn, error) {
	conn, err := (&net.Dialer{Timeout: patience}).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		return nil, errors.New("no TCP connection")
	}
	return tcp, nil
}

// echo sends a byte through a connection and waits for it to come back.
func echo(conn net.Conn, first bool) error {
	out := []byte{'x'}
	if first {
		out = []byte{wantEcho, 'x'}
	}
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	if _, err := conn.Write(out); err != nil {
		return err
	}
	_, err := io.ReadFull(conn, make([]byte, 1))
	return err
}

// ready tells whether visitors reach the backend.
func ready(ctx context.Context, address string) error {
	conn, err := visit(ctx, address)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	return echo(conn, true)
}

// bulk moves bytes through some streams at once, from the edge to the app (uploads of visitors) or back, and returns bytes
// per second, counted by the visitors.
func bulk(ctx context.Context, entries []string, streams int, toApp bool, d time.Duration) (float64, error) {
	want := byte(wantDownload)
	if toApp {
		want = wantUpload
	}
	return pump(ctx, func(ctx context.Context, i int) (net.Conn, error) {
		conn, err := visit(ctx, entry(entries, i))
		if err != nil {
			return nil, err
		}
		_ = conn.SetLinger(0)
		_, err = conn.Write([]byte{want})
		return conn, err
	}, streams, toApp, d)
}

// pump opens connections, on each of which bytes flow then for as long as anybody takes them, and returns bytes per second, after a
// warm-up of a quarter of the time or four long round trips.
func pump(ctx context.Context, open func(ctx context.Context, i int) (net.Conn, error), streams int, toApp bool, d time.Duration) (float64, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*d+patience)
	defer cancel()
	var moved atomic.Int64
	var over atomic.Bool
	broken := make(chan error, streams)
	var running sync.WaitGroup
	var conns []net.Conn
	defer func() {
		over.Store(true)
		for _, conn := range conns {
			// What is closed with a farewell (of TLS) may first have to write what nobody reads any more.
			_ = conn.SetDeadline(time.Now())
			_ = conn.Close()
		}
		running.Wait()
	}()
	for i := range streams {
		conn, err := open(ctx, i)
		if conn != nil {
			conns = append(conns, conn)
		}
		if err != nil {
			return 0, err
		}
		running.Go(func() {
			chunk := make([]byte, bulkChunk)
			for {
				var n int
				var err error
				if toApp {
					n, err = conn.Write(chunk)
				} else {
					n, err = conn.Read(chunk)
				}
				moved.Add(int64(n))
				if err != nil {
					if !over.Load() {
						broken <- err
					}
					return
				}
			}
		})
	}
	pause(ctx, max(d/4, 4*roundTrip)) // with a long way the first bytes take a while
	before, began := moved.Load(), time.Now()
	pause(ctx, d)
	rate := float64(moved.Load()-before) / time.Since(began).Seconds()
	select {
	case err := <-broken:
		return 0, fmt.Errorf("a stream ended: %w", err)
	default:
	}
	if ctx.Err() != nil {
		return 0, ctx.Err()
	}
	if rate == 0 {
		return 0, errors.New("nothing moved")
	}
	return rate, nil
}

// pause lets a measurement run.
func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// keepAlive is one visitor's HTTP connection.
type keepAlive struct {
	conn    net.Conn
	in      *bufio.Reader
	request []byte
}

func newKeepAlive(conn net.Conn, host, path string) *keepAlive {
	return &keepAlive{conn, bufio.NewReader(conn), fmt.Appendf(nil, "GET %s HTTP/1.1\r\nHost: %s\r\n\r\n", path, host)}
}

func (k *keepAlive) ask() error {
	if _, err := k.conn.Write(k.request); err != nil {
		return err
	}
	res, err := http.ReadResponse(k.in, nil)
	if err != nil {
		return err
	}
	defer func() { _ = res.Body.Close() }()
	n, err := io.Copy(io.Discard, res.Body)
	if err == nil && (n != 1024 || res.StatusCode != http.StatusOK) {
		err = fmt.Errorf("an answer %s of %d bytes", res.Status, n)
	}
	return err
}

// small asks for 1 KiB again and again over kept connections, as demand says. It returns the requests per second and the 99th
// percentile.
func small(ctx context.Context, entries []string, connections int, rate float64, d time.Duration) (float64, time.Duration, error) {
	r, err := visitAll(ctx, func(i int) (*keepAlive, error) {
		conn, err := visit(ctx, entry(entries, i))
		if err != nil {
			return nil, err
		}
		return newKeepAlive(conn, "bench", "/"), nil
	}, connections, demand{rate: rate}, d)
	return r.rate, r.p99, err
}

// demand is how visitors ask. With a rate (requests per second over all), requests are due at times that do not depend on the answers,
// and a late one counts from when it was due: at even times, or at random ones, as many independent visitors come. Without a rate, each
// connection asks as fast as it can.
type demand struct {
	rate   float64
	random bool
}

// outcome is what visitors saw. Of all requests, those of the warm-up have no part in rate and percentiles.
type outcome struct {
	rate     float64
	p50, p99 time.Duration
	all      int
}

// visitAll asks over so many connections, which are open and have been answered once before it begins.
func visitAll(ctx context.Context, open func(i int) (*keepAlive, error), connections int, of demand, d time.Duration) (outcome, error) {
	conns := make([]*keepAlive, connections)
	failures := make([]error, connections)
	defer func() {
		for _, k := range conns {
			if k != nil {
				_ = k.conn.Close()
			}
		}
	}()
	var opening sync.WaitGroup
	lanes := make(chan struct{}, 16)
	for i := range conns {
		lanes <- struct{}{}
		opening.Go(func() {
			defer func() { <-lanes }()
			if conns[i], failures[i] = open(i); failures[i] == nil {
				failures[i] = errors.Join(conns[i].conn.SetDeadline(time.Now().Add(2*d+patience)), conns[i].ask())
			}
		})
	}
	opening.Wait()
	if err := errors.Join(failures...); err != nil {
		return outcome{}, err
	}
	latencies := make([][]time.Duration, connections)
	var asked atomic.Int64
	began := time.Now()
	warm, end := began.Add(d/4), began.Add(d+d/4)
	var running sync.WaitGroup
	for i, k := range conns {
		running.Go(func() {
			every := time.Duration(0)
			due := began
			if of.rate > 0 {
				every = time.Duration(float64(connections) / of.rate * float64(time.Second))
				due = began.Add(every * time.Duration(i) / time.Duration(connections))
			}
			for ctx.Err() == nil {
				if of.rate == 0 {
					due = time.Now()
				}
				if due.After(end) {
					return
				}
				pause(ctx, time.Until(due))
				if failures[i] = k.ask(); failures[i] != nil {
					return
				}
				asked.Add(1)
				if due.After(warm) {
					latencies[i] = append(latencies[i], time.Since(due))
				}
				if of.random {
					due = due.Add(time.Duration(rand.ExpFloat64() * float64(every))) //nolint:gosec // arrivals, no secret
				} else {
					due = due.Add(every)
				}
			}
		})
	}
	running.Wait()
	if err := errors.Join(append(failures, ctx.Err())...); err != nil {
		return outcome{}, err
	}
	all := slices.Concat(latencies...)
	if len(all) == 0 {
		return outcome{}, errors.New("no request was answered")
	}
	slices.Sort(all)
	return outcome{rate: float64(len(all)) / d.Seconds(), p50: all[len(all)/2], p99: all[len(all)*99/100], all: int(asked.Load())}, nil
}

// fresh opens connections one after the other on 16 lanes, and returns how many per second carried a byte there and back.
func fresh(ctx context.Context, entries []string, d time.Duration) (float64, error) {
	var done atomic.Int64
	const lanes = 16
	failures := make([]error, lanes)
	began := time.Now()
	var running sync.WaitGroup
	for lane := range lanes {
		running.Go(func() {
			for time.Since(began) < d && ctx.Err() == nil {
				conn, err := visit(ctx, entry(entries, lane))
				if err == nil {
					err = echo(conn, true)
					_ = conn.SetLinger(0) // no ports in TIME_WAIT: the next measurement needs them
					_ = conn.Close()
				}
				if err != nil {
					failures[lane] = err
					return
				}
				done.Add(1)
			}
		})
	}
	running.Wait()
	return float64(done.Load()) / time.Since(began).Seconds(), errors.Join(append(failures, ctx.Err())...)
}

// hold opens n connections that each have carried a byte, calls measure, and closes them.
func hold(ctx context.Context, entries []string, n int, measure func() error) error {
	conns := make([]*net.TCPConn, 0, n)
	defer func() {
		for _, conn := range conns {
			_ = conn.SetLinger(0)
			_ = conn.Close()
		}
	}()
	for i := range n {
		conn, err := visit(ctx, entry(entries, i))
		if err != nil {
			return fmt.Errorf("connection %d: %w", i, err)
		}
		conns = append(conns, conn)
		if err := echo(conn, true); err != nil {
			return fmt.Errorf("connection %d: %w", i, err)
		}
	}
	for i, conn := range conns {
		if err := echo(conn, false); err != nil {
			return fmt.Errorf("connection %d of %d open ones is dead: %w", i, n, err)
		}
	}
	return measure()
}

// procTimes returns the processor time that a process has used.
func procTimes(pid int) (time.Duration, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	var user, system int64
	_, after, _ := bytes.Cut(data, []byte(") ")) // the name may have blanks
	fields := bytes.Fields(after)
	if len(fields) < 13 {
		return 0, fmt.Errorf("/proc/%d/stat has %d fields", pid, len(fields))
	}
	if _, err := fmt.Sscan(string(fields[11])+" "+string(fields[12]), &user, &system); err != nil {
		return 0, err
	}
	return time.Duration(user+system) * time.Second / 100, nil // in USER_HZ, which is 100 on all Linux
}

// residentKiB returns a process's resident memory.
func residentKiB(pid int) (int, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range bytes.Lines(data) {
		if rest, ok := bytes.CutPrefix(line, []byte("VmRSS:")); ok {
			var kib int
			_, err := fmt.Sscan(string(rest), &kib)
			return kib, err
		}
	}
	return 0, fmt.Errorf("/proc/%d/status has no VmRSS", pid)
}
