package edge_test

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/mysocketio/mysocket-injector/internal/edge"
	"github.com/mysocketio/mysocket-injector/internal/edge/edgetest"
)

// settledGoroutines waits until there are no more goroutines than before, but for a few of the visitor's.
func settledGoroutines(t *testing.T, before int) {
	t.Helper()
	eventually(t, fmt.Sprintf("about %d goroutines, as before", before), func() bool { return runtime.NumGoroutine() <= before+20 })
}

// TestCrowdOfStrangers: thousands of connections that never log in, and hundreds that try with keys nobody knows. They are bounded, a few lines in the
// log, and a tunnel that is connected does not notice.
func TestCrowdOfStrangers(t *testing.T) {
	log := &lockedBuffer{}
	e := edgetest.Start(t, func(c *edge.Config) { c.Log = slog.New(slog.NewTextHandler(log, nil)) })
	a := login(t, e)
	s := a.newSocket("http")
	a.connect(s, appAddress(newApp(t, "app")))
	visitor := e.VisitorClient(t)
	serves := func() {
		t.Helper()
		if status, body := get(t, visitor, "http://"+s.DNSName+"/"); status != 200 || body != "Server: app\n" {
			t.Errorf("the tunnel serves %d %s", status, body)
		}
	}
	serves()
	before := runtime.NumGoroutine()

	const silent = 2000
	var conns []net.Conn
	for range silent {
		conn, err := net.Dial("tcp", e.SSHAddress)
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, conn)
	}
	serves()
	// Each that was let in has a handful; those beyond the bound were hung up on.
	eventually(t, "those beyond the bound to be gone", func() bool { return runtime.NumGoroutine() < before+256*5+100 })
	for _, conn := range conns {
		_ = conn.Close()
	}
	settledGoroutines(t, before)

	var wrong sync.WaitGroup
	var taken atomic.Int64
	for range 8 {
		wrong.Go(func() {
			for range 40 {
				client, err := ssh.Dial("tcp", e.SSHAddress, &ssh.ClientConfig{
					User: s.UserName, Auth: []ssh.AuthMethod{ssh.PublicKeys(newKey(t))}, HostKeyCallback: ssh.FixedHostKey(hostKey(t, e)), Timeout: patience,
				})
				if err == nil {
					taken.Add(1)
					_ = client.Close()
				}
			}
		})
	}
	serves()
	wrong.Wait()
	serves()
	if taken.Load() > 0 {
		t.Error("a key that nobody knows logged in")
	}
	settledGoroutines(t, before)
	if n := strings.Count(log.String(), "part=ssh"); n > 500 {
		t.Errorf("%d strangers are %d lines in the log", silent+320, n)
	}
	_, text := get(t, &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}, e.AdminURL+"/metrics")
	for reason, least := range map[string]int{"address": silent / 2, "login": 320} {
		var n int
		if _, after, found := strings.Cut(text, `mysocket_edge_ssh_refused_total{reason="`+reason+`"} `); !found {
			t.Errorf("/metrics has no refusals for the reason %s", reason)
		} else if _, err := fmt.Sscan(after, &n); err != nil || n < least {
			t.Errorf("%d were refused for the reason %s, want at least %d", n, reason, least)
		}
	}
}

// TestTunnelThatNeverAnswers: a tunnel's client takes channels and says nothing. Only its own visitors wait, and what they held is given back when they go.
func TestTunnelThatNeverAnswers(t *testing.T) {
	e := edgetest.Start(t)
	a := login(t, e)
	bad, good := a.newSocket("http"), a.newSocket("http")
	a.connect(good, appAddress(newApp(t, "good")))
	hung, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = hung.Close() }()
	a.connect(bad, hung.Addr().String())
	visitor := e.VisitorClient(t)
	get(t, visitor, "http://"+good.DNSName+"/")
	before := runtime.NumGoroutine()

	ctx, leave := context.WithCancel(t.Context())
	var waiting sync.WaitGroup
	for range 100 {
		waiting.Go(func() {
			if status, _, err := tryGet(ctx, visitor, "http://"+bad.DNSName+"/"); err == nil && status != 502 && status != 504 {
				t.Errorf("an app that says nothing answered %d", status)
			}
		})
	}
	open := func() (n int) {
		for _, k := range e.Tunnels() {
			for _, tun := range k.Tunnels {
				if k.Socket == bad.ID {
					n += tun.Open
				}
			}
		}
		return n
	}
	eventually(t, "100 requests to wait", func() bool { return open() == 100 })
	for range 20 {
		if status, _ := get(t, visitor, "http://"+good.DNSName+"/"); status != 200 {
			t.Errorf("another socket answers %d meanwhile", status)
		}
	}
	leave()
	waiting.Wait()
	eventually(t, "nothing to wait", func() bool { return open() == 0 })
	_ = hung.Close() // and with it what the replica holds
	settledGoroutines(t, before)
}

// deaf is a connection whose reader can stop reading. What is sent to it fills up the buffers on the way, and then nothing moves.
type deaf struct {
	net.Conn
	stopped chan struct{}
	closed  chan struct{}
	once    sync.Once
}

func (d *deaf) Read(p []byte) (int, error) {
	select {
	case <-d.stopped:
		<-d.closed
		return 0, net.ErrClosed
	default:
		return d.Conn.Read(p)
	}
}

func (d *deaf) Close() error {
	d.once.Do(func() { close(d.closed) })
	return d.Conn.Close()
}

// TestClientThatStopsReading: a tunnel's client reads nothing any more, in the middle of an upload. It is dropped, its visitor is told, and others don't
// notice.
func TestClientThatStopsReading(t *testing.T) {
	e := edgetest.Start(t, func(c *edge.Config) {
		c.Timings.KeepaliveInterval, c.Timings.KeepaliveMisses = 100*time.Millisecond, 15
	})
	a := login(t, e)
	bad, good := a.newSocket("http"), a.newSocket("http")
	a.connect(good, appAddress(newApp(t, "good")))
	before := runtime.NumGoroutine()
	raw, err := net.Dial("tcp", e.SSHAddress)
	if err != nil {
		t.Fatal(err)
	}
	conn := &deaf{Conn: raw, stopped: make(chan struct{}), closed: make(chan struct{})}
	sshConn, chans, reqs, err := ssh.NewClientConn(conn, e.SSHAddress, &ssh.ClientConfig{
		User: bad.UserName, HostKeyCallback: ssh.FixedHostKey(hostKey(t, e)),
		Auth: []ssh.AuthMethod{ssh.PublicKeys(a.certify("/socket/"+bad.ID+"/signkey", newKey(t)))},
	})
	if err != nil {
		t.Fatal(err)
	}
	entered := make(chan struct{})
	app := newCountingApp(t, func(_ http.ResponseWriter, r *http.Request) {
		close(entered)
		_, _ = io.Copy(io.Discard, r.Body)
	})
	r := newReplica(t, ssh.NewClient(sshConn, chans, reqs), app.address)
	r.forward("localhost", 0)
	visitor := e.VisitorClient(t)
	answered := make(chan error, 1)
	go func() {
		req, err := http.NewRequestWithContext(t.Context(), "POST", "http://"+bad.DNSName+"/", io.LimitReader(endlessBody{}, 1<<30))
		if err != nil {
			answered <- err
			return
		}
		resp, err := visitor.Do(req)
		if err == nil {
			_ = resp.Body.Close()
			if resp.StatusCode != 502 {
				err = fmt.Errorf("status %d", resp.StatusCode)
			}
		} else {
			err = nil // The edge hung up in the middle of the upload: that, too, is no success.
		}
		answered <- err
	}()
	<-entered
	close(conn.stopped)
	eventually(t, "the client to be dropped", func() bool {
		for _, k := range e.Tunnels() {
			if k.Socket == bad.ID && len(k.Tunnels) > 0 {
				return false
			}
		}
		return true
	})
	if err := <-answered; err != nil {
		t.Errorf("its visitor: %v", err)
	}
	if status, _ := get(t, visitor, "http://"+good.DNSName+"/"); status != 200 {
		t.Errorf("another socket answers %d", status)
	}
	r.close()
	settledGoroutines(t, before)
}

// endlessBody is a body without an end.
type endlessBody struct{}

func (endlessBody) Read(p []byte) (int, error) { return len(p), nil }

// TestSupersedesUnderLoad: a tunnel's newest login gets the requests from the moment its forward is answered, again and again, while requests run. None fails.
func TestSupersedesUnderLoad(t *testing.T) {
	e := edgetest.Start(t)
	a := login(t, e)
	s := a.newSocket("http")
	tun := a.newTunnel(s)
	r := a.connectTunnel(s, tun, appAddress(newApp(t, "0")))
	visitor := e.VisitorClient(t)
	ctx, stop := context.WithCancel(t.Context())
	var load sync.WaitGroup
	var served atomic.Int64
	for range 4 {
		load.Go(func() {
			for ctx.Err() == nil {
				status, body, err := tryGet(context.WithoutCancel(ctx), visitor, "http://"+s.DNSName+"/")
				if err != nil || status != 200 {
					t.Errorf("a request failed: %d %s %v", status, body, err)
					return
				}
				served.Add(1)
			}
		})
	}
	for i := range 10 {
		now := served.Load()
		eventually(t, "requests to flow", func() bool { return served.Load() > now+20 || t.Failed() })
		name := fmt.Sprint(i + 1)
		old := r
		r = a.connectTunnel(s, tun, appAddress(newApp(t, name)))
		_ = old.client.Wait()
		for range 5 {
			if status, body := get(t, visitor, "http://"+s.DNSName+"/"); status != 200 || body != "Server: "+name+"\n" {
				t.Errorf("after login %d: %d %s", i+1, status, body)
			}
		}
		old.close()
	}
	stop()
	load.Wait()
	if n := len(e.Tunnels()[0].Tunnels); n != 1 {
		t.Errorf("%d tunnels are connected", n)
	}
}

// TestClockJumps: the edge's clock goes forth and back by hours, and that of its clients does not. What is connected stays, what has expired is refused, and what is made anew is good.
func TestClockJumps(t *testing.T) {
	var offset atomic.Int64
	now := func() time.Time { return time.Now().Add(time.Duration(offset.Load())).Round(0) } // as the wall clock alone has it
	e := edgetest.Start(t, func(c *edge.Config) { c.Now = now })
	a := login(t, e)
	s := a.newSocket("http")
	staying := a.connect(s, appAddress(newApp(t, "staying")))
	visitor := e.VisitorClient(t)
	old := a.token
	oldCert := a.certify("/socket/"+s.ID+"/signkey", newKey(t))
	wrong := map[string]string{"email": e.Email, "password": "wrong"}
	for range 5 {
		a.call("POST", "/login", wrong, nil) // the throttle remembers when
	}
	for _, jump := range []time.Duration{10 * time.Hour, -20 * time.Hour, 0, -time.Hour, 30 * time.Hour, 0} {
		t.Run(jump.String(), func(t *testing.T) {
			offset.Store(int64(jump))
			a.client.CloseIdleConnections()
			if status, _ := get(t, visitor, "http://"+s.DNSName+"/"); status != 200 || !a.connected(s, staying.tunnel.ID) {
				t.Errorf("a tunnel that was connected serves %d", status)
			}
			a.token = old
			want := 200
			if jump > 5*time.Hour {
				want = 401
			}
			if status := a.call("GET", "/socket", nil, nil); status != want {
				t.Errorf("the token from before: %d, want %d", status, want)
			}
			if client, err := a.dial(s.UserName, oldCert); (err == nil) != (jump == 0) {
				t.Errorf("the certificate from before: %v", err)
			} else if err == nil {
				_ = client.Close()
			}
			if status := a.call("POST", "/login", wrong, nil); status != 401 {
				t.Errorf("one wrong password: %d", status)
			}
			a.login(e.Email, e.Password)
			if status := a.call("POST", "/login/refresh", nil, nil); status != 200 {
				t.Errorf("the new token: %d", status)
			}
			r := a.connect(s, appAddress(newApp(t, "new")))
			for range 4 {
				if status, body := get(t, visitor, "http://"+s.DNSName+"/"); status != 200 {
					t.Errorf("with a tunnel from after: %d %s", status, body)
				}
			}
			a.must("DELETE", "/socket/"+s.ID+"/tunnel/"+r.tunnel.ID, nil, nil)
		})
	}
	// A throttle that was filled in the future does not last until then.
	offset.Store(int64(48 * time.Hour))
	for status := 401; status == 401; {
		status = a.call("POST", "/login", wrong, nil)
	}
	offset.Store(0)
	a.client.CloseIdleConnections()
	a.call("POST", "/login", wrong, nil) // sees the clock go back
	offset.Store(int64(7 * time.Second))
	if status := a.call("POST", "/login", map[string]string{"email": e.Email, "password": e.Password}, nil); status != 200 {
		t.Errorf("a right password after the wait: %d", status)
	}
}
