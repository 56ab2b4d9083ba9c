package edge_test

import (
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/mysocketio/mysocket-injector/internal/edge"
	"github.com/mysocketio/mysocket-injector/internal/edge/edgetest"
)

// ejected says whether the tunnel is connected, and out of the rotation.
func ejected(e *edgetest.Edge, tunnelID string) bool {
	for _, k := range e.Tunnels() {
		for _, t := range k.Tunnels {
			if t.Tunnel == tunnelID {
				return t.Ejected
			}
		}
	}
	return false
}

// labelled reads one number with labels from /metrics.
func labelled(t testing.TB, e *edgetest.Edge, series string) string {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: patience}
	_, body := get(t, client, e.AdminURL+"/metrics")
	for line := range strings.Lines(body) {
		if value, ok := strings.CutPrefix(line, series+" "); ok {
			return strings.TrimSpace(value)
		}
	}
	t.Fatalf("there is no metric %s", series)
	return ""
}

func TestFailingTunnelIsEjectedAndReturns(t *testing.T) {
	e := edgetest.Start(t, func(c *edge.Config) { c.Timings.Penalty = time.Nanosecond })
	a := login(t, e)
	s := a.newSocket("http")
	bad := a.connect(s, appAddress(newApp(t, "bad")))
	bad.refuse.Store(true)
	a.connect(s, appAddress(newApp(t, "good")))
	visitor := e.VisitorClient(t)
	for range 20 {
		if status, body := get(t, visitor, "http://"+s.DNSName+"/"); status != 200 || body != "Server: good\n" {
			t.Fatalf("got %d %s", status, body)
		}
	}
	if !ejected(e, bad.tunnel.ID) {
		t.Fatal("the tunnel that refuses is not ejected")
	}
	if n := labelled(t, e, "mysocket_edge_ejections_total"); n != "1" {
		t.Errorf("%s ejections", n)
	}
	bad.refuse.Store(false)
	eventually(t, "the tunnel to return", func() bool { return !ejected(e, bad.tunnel.ID) })
	eventually(t, "a request to go there", func() bool {
		_, body := get(t, visitor, "http://"+s.DNSName+"/")
		return body == "Server: bad\n"
	})
	if n := labelled(t, e, `mysocket_edge_probes_total{result="opened"}`); n != "1" {
		t.Errorf("%s probes opened a channel", n)
	}
}

// A connection that answers keepalives, and opens no channels, is found out without a visitor.
func TestDataPathProbeFindsAStuckClient(t *testing.T) {
	e := edgetest.Start(t, func(c *edge.Config) {
		c.Timings.KeepaliveInterval, c.Timings.OpenTimeout = 50*time.Millisecond, 100*time.Millisecond
		c.Timings.KeepaliveMisses = 1 << 20
	})
	a := login(t, e)
	s := a.newSocket("http")
	tun := a.newTunnel(s)
	signer := a.certify("/socket/"+s.ID+"/tunnel/"+tun.ID+"/signkey", newKey(t))
	raw, err := net.Dial("tcp", e.SSHAddress)
	if err != nil {
		t.Fatal(err)
	}
	conn, chans, reqs, err := ssh.NewClientConn(raw, e.SSHAddress, &ssh.ClientConfig{
		User: s.UserName, Auth: []ssh.AuthMethod{ssh.PublicKeys(signer)}, HostKeyCallback: ssh.FixedHostKey(hostKey(t, e)), Timeout: patience,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	var types []string
	work := make(chan struct{})
	served := make(chan struct{})
	go func() {
		defer close(served)
		first := <-chans
		<-work
		types = append(types, first.ChannelType())
		_ = first.Reject(ssh.UnknownChannelType, "no")
		for nc := range chans {
			types = append(types, nc.ChannelType())
			_ = nc.Reject(ssh.UnknownChannelType, "no")
		}
	}()
	none := make(chan ssh.NewChannel)
	close(none)
	r := &replica{t: t, client: ssh.NewClient(conn, none, reqs)}
	r.forward("localhost", uint32(tun.LocalPort))
	eventually(t, "the stuck tunnel to be ejected", func() bool { return ejected(e, tun.ID) })
	close(work)
	_ = conn.Close()
	<-served
	if types[0] != "probe@mysocket.io" {
		t.Errorf("the first channel is of type %q", types[0])
	}
}

func TestStickyVisitors(t *testing.T) {
	e := edgetest.Start(t)
	a := login(t, e)
	s := a.newSocket("http")
	a.must("PUT", "/socket/"+s.ID, map[string]any{"tags": map[string]string{"mysocket-edge/sticky": "cookie", "mine": "stays"}}, nil)
	replicas := map[string]*replica{}
	for _, name := range []string{"pod-0", "pod-1", "pod-2"} {
		replicas["Server: "+name+"\n"] = a.connect(s, appAddress(newApp(t, name)))
	}
	visitor := e.VisitorClient(t)
	ask := func(scheme, cookie, path string) (body string, set *http.Cookie) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), "GET", scheme+"://"+s.DNSName+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Cookie", "mine=1; mysocket-tunnel="+cookie)
		resp, err := visitor.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = resp.Body.Close() }()
		data, _ := io.ReadAll(resp.Body)
		if cookies := resp.Cookies(); len(cookies) > 0 {
			set = cookies[0]
		}
		return string(data), set
	}
	body, set := ask("https", "forged", "/")
	if set == nil || !set.HttpOnly || !set.Secure || set.SameSite != http.SameSiteLaxMode || set.Path != "/" || set.Domain != "" {
		t.Fatalf("the cookie is %v", set)
	}
	if _, plain := ask("http", "", "/"); plain == nil || plain.Secure {
		t.Errorf("the cookie over plain HTTP is %v", plain)
	}
	for name, r := range replicas {
		if strings.Contains(set.Value, r.tunnel.ID) || strings.Contains(set.Value, s.ID) {
			t.Errorf("the cookie has an id of %s", name)
		}
	}
	for i := range 10 {
		if again, reset := ask([]string{"http", "https"}[i%2], set.Value, "/"); again != body || reset != nil {
			t.Fatalf("went from %q to %q, cookie %v", body, again, reset)
		}
	}
	if echo, _ := ask("http", set.Value, "/echo"); !strings.Contains(echo, "mine=1") || strings.Contains(echo, "mysocket-tunnel") {
		t.Errorf("the app got %s", echo)
	}
	// A tunnel that is gone: another one, and a new cookie, that sticks in turn.
	replicas[body].close()
	eventually(t, "the tunnel to be gone", func() bool { return !a.connected(s, replicas[body].tunnel.ID) })
	other, moved := ask("http", set.Value, "/")
	if other == body || moved == nil || moved.Value == set.Value {
		t.Fatalf("went to %q with cookie %v", other, moved)
	}
	if again, reset := ask("http", moved.Value, "/"); again != other || reset != nil {
		t.Errorf("went from %q to %q, cookie %v", other, again, reset)
	}
	for result, want := range map[string]string{"kept": "12", "moved": "2", "new": "1"} {
		if n := labelled(t, e, `mysocket_edge_sticky_requests_total{result="`+result+`"}`); n != want {
			t.Errorf("%s sticky requests count as %s, want %s", n, result, want)
		}
	}
}

func TestStickyTagIsChecked(t *testing.T) {
	e := edgetest.Start(t)
	a := login(t, e)
	for _, c := range []struct {
		kind, value, says string
	}{
		{"http", "source", `tags: mysocket-edge/sticky is "source"; allowed: cookie`},
		{"tcp", "cookie", "tags: mysocket-edge/sticky is for http and https sockets; this one is tcp"},
	} {
		var refused struct {
			Message string `json:"error_message"`
		}
		status := a.call("POST", "/socket", map[string]any{"name": "x", "socket_type": c.kind, "tags": map[string]string{"mysocket-edge/sticky": c.value}}, &refused)
		if status != 400 || refused.Message != c.says {
			t.Errorf("%s %q: %d %s", c.kind, c.value, status, refused.Message)
		}
	}
}
