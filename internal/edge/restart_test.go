package edge_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/mysocketio/mysocket-injector/internal/edge"
	"github.com/mysocketio/mysocket-injector/internal/edge/edgetest"
)

func TestRestartKeepsEverything(t *testing.T) {
	dir := t.TempDir()
	first := edgetest.Start(t, func(c *edge.Config) {
		c.CAOut, c.SSHHostKeyOut = filepath.Join(dir, "ca.pem"), filepath.Join(dir, "host.pub")
	})
	a := login(t, first)
	web, tcp := a.newSocket("http"), a.newSocket("tcp")
	app := appAddress(newApp(t, "app"))
	r := a.connect(web, app)
	first.Stop()
	_ = r.client.Wait() // The client is told by the end of its connection.

	again := edgetest.Start(t, edgetest.SameState(first))
	if again.UserID != first.UserID || again.HostKey != first.HostKey || string(again.CAPEM) != string(first.CAPEM) {
		t.Error("the account or the keys are others after a restart")
	}
	ca, err := os.ReadFile(filepath.Join(dir, "ca.pem"))
	if err != nil || string(ca) != string(again.CAPEM) {
		t.Errorf("--ca-out: %v", err)
	}
	host, err := os.ReadFile(filepath.Join(dir, "host.pub"))
	if err != nil || string(host) != again.HostKey+"\n" {
		t.Errorf("--ssh-host-key-out: %v", err)
	}
	// The old token and the old objects are good.
	a.edge, a.client = again, again.APIClient(t)
	var list []socket
	a.must("GET", "/socket", nil, &list)
	if len(list) != 2 || list[0].DNSName != web.DNSName || list[1].Ports[0] != tcp.Ports[0] || len(list[0].Tunnels) != 1 || list[0].Tunnels[0] != r.tunnel {
		t.Errorf("after the restart there are %+v", list)
	}
	a.connectTunnel(web, r.tunnel, app)
	if status, _ := get(t, again.VisitorClient(t), "https://"+web.DNSName+"/"); status != 200 {
		t.Errorf("status %d", status)
	}
	a.must("DELETE", "/socket/"+tcp.ID, nil, nil)
}

func TestStateFileIsHeldByOne(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	edgetest.Start(t, func(c *edge.Config) { c.StatePath = path })
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the state file has mode %v, %v", info.Mode(), err)
	}
	if _, err := edge.OpenAccounts(path); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("a second use of the state file: %v", err)
	}
}

func TestDrainLetsRequestsEnd(t *testing.T) {
	e := edgetest.Start(t, func(c *edge.Config) { c.Timings.Drain = patience })
	a := login(t, e)
	s := a.newSocket("http")
	entered, release := make(chan struct{}), make(chan struct{})
	app := newCountingApp(t, func(http.ResponseWriter, *http.Request) {
		close(entered)
		<-release
	})
	a.connect(s, app.address)
	status := make(chan int, 1)
	visitor := e.VisitorClient(t)
	go func() {
		code, _, _ := tryGet(context.Background(), visitor, "http://"+s.DNSName+"/")
		status <- code
	}()
	<-entered
	stopped := make(chan struct{})
	go func() {
		e.Stop()
		close(stopped)
	}()
	admin := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	eventually(t, "/healthz to fail", func() bool {
		code, _, err := tryGet(t.Context(), admin, e.AdminURL+"/healthz")
		return err != nil || code == 503
	})
	select {
	case <-stopped:
		t.Fatal("the edge stopped while a request was open")
	default:
	}
	close(release)
	if code := <-status; code != 200 {
		t.Errorf("the open request got %d", code)
	}
	<-stopped
}

func TestAdmin(t *testing.T) {
	e := edgetest.Start(t)
	a := login(t, e)
	s := a.newSocket("http")
	r := a.connect(s, appAddress(newApp(t, "app")))
	get(t, e.VisitorClient(t), "http://"+s.DNSName+"/")
	admin := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	if code, _ := get(t, admin, e.AdminURL+"/healthz"); code != 200 {
		t.Errorf("/healthz: %d", code)
	}
	_, body := get(t, admin, e.AdminURL+"/debug/tunnels")
	var list []edge.DebugSocket
	if err := json.Unmarshal([]byte(body), &list); err != nil {
		t.Fatal(err)
	}
	if len(list) != 1 || list[0].Socket != s.ID || list[0].Registered != 1 || len(list[0].Tunnels) != 1 {
		t.Fatalf("/debug/tunnels says %s", body)
	}
	tun := list[0].Tunnels[0]
	if tun.Tunnel != r.tunnel.ID || tun.Remote != r.client.LocalAddr().String() || tun.Total != 1 || time.Since(tun.Since) > time.Minute {
		t.Errorf("/debug/tunnels says %+v", tun)
	}
	_, body = get(t, admin, e.AdminURL+"/metrics")
	for _, line := range []string{`mysocket_edge_requests_total{code="200"} 1`, "mysocket_edge_tunnels_connected 1"} {
		if !strings.Contains(body, line) {
			t.Errorf("/metrics has no %s", line)
		}
	}
	if strings.Contains(body, s.ID) || strings.Contains(body, s.DNSName) {
		t.Error("/metrics names a socket")
	}
}

func TestConfigIsValidated(t *testing.T) {
	good := edge.Config{
		Domain: "edge.example.com", StatePath: "x.db", APIAddress: ":8443", SSHAddress: ":22", HTTPAddress: ":80",
		HTTPSAddress: ":443", AdminAddress: "127.0.0.1:9090", TCPPorts: edge.PortRange{Min: 20000, Max: 29999},
	}
	if err := good.Validate(); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		change func(*edge.Config)
		says   string
	}{
		{func(c *edge.Config) { c.Domain = "" }, `domain ""`},
		{func(c *edge.Config) { c.Domain = "Edge.example.com" }, `domain "Edge.example.com"`},
		{func(c *edge.Config) { c.Domain = "10.0.0.1" }, `domain "10.0.0.1"`},
		{func(c *edge.Config) { c.Domain = strings.Repeat("a.", 100) + "a" }, "domain"},
		{func(c *edge.Config) { c.StatePath = "" }, "state"},
		{func(c *edge.Config) { c.APIAddress = "8443" }, `api-address "8443"`},
		{func(c *edge.Config) { c.SSHAddress = ":70000" }, `ssh-address ":70000"`},
		{func(c *edge.Config) { c.HTTPAddress = "a b:80" }, `http-address "a b:80"`},
		{func(c *edge.Config) { c.HTTPSAddress = "" }, "https-address"},
		{func(c *edge.Config) { c.AdminAddress = ":x" }, "admin-address"},
		{func(c *edge.Config) { c.APIHosts = []string{"fine.example", "not fine"} }, `"not fine"`},
		{func(c *edge.Config) { c.ComeBack = -time.Second }, "come-back is -1s"},
		{func(c *edge.Config) { c.ComeBack = time.Hour }, "come-back is 1h0m0s; allowed are 0s to 5m0s"},
		{func(c *edge.Config) { c.TCPPorts = edge.PortRange{Min: 5, Max: 4} }, "tcp-ports 5-4"},
	} {
		cfg := good
		c.change(&cfg)
		if err := cfg.Validate(); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v", c.says, err)
		}
	}
	for _, s := range []string{"", "1", "a-b", "2-1", "0-10", "1-70000", "1-2-3"} {
		if r, err := edge.ParsePortRange(s); err == nil {
			t.Errorf("range %q is %v", s, r)
		}
	}
}

func TestAddressInUse(t *testing.T) {
	e := edgetest.Start(t)
	_, err := edge.New(edge.Config{
		Domain: "edge.example.com", StatePath: filepath.Join(t.TempDir(), "x.db"), APIAddress: "127.0.0.1:0", SSHAddress: "127.0.0.1:0",
		HTTPAddress: e.HTTPAddress, HTTPSAddress: "127.0.0.1:0", AdminAddress: "127.0.0.1:0", TCPPorts: edge.PortRange{Min: 20000, Max: 29999},
	})
	if err == nil || !strings.Contains(err.Error(), fmt.Sprint("http-address ", e.HTTPAddress)) {
		t.Errorf("got %v", err)
	}
}
