package edge_test

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"strings"
	"testing"

	"github.com/mysocketio/mysocket-injector/internal/edge"
	"github.com/mysocketio/mysocket-injector/internal/edge/edgetest"
	"github.com/mysocketio/mysocket-injector/internal/edge/etcdtest"
	"github.com/mysocketio/mysocket-injector/internal/edge/store"
)

// at is the account at another edge, with the token that it has.
func (a *account) at(e *edgetest.Edge) *account {
	return &account{t: a.t, edge: e, client: e.APIClient(a.t), token: a.token}
}

func twoEdges(t *testing.T) (*etcdtest.Etcd, *edgetest.Edge, *edgetest.Edge) {
	t.Helper()
	server := etcdtest.Start(t)
	return server, edgetest.Start(t, edgetest.SharedState(server, "127.0.0.1")), edgetest.Start(t, edgetest.SharedState(server, "127.0.0.2"))
}

func TestTwoEdgesAreOne(t *testing.T) {
	_, one, two := twoEdges(t)
	if one.HostKey != two.HostKey || !bytes.Equal(one.CAPEM, two.CAPEM) || one.UserID != two.UserID {
		t.Error("the edges have keys or accounts of their own")
	}
	a := login(t, one)
	b := a.at(two)
	s := a.newSocket("http")
	app := appAddress(newApp(t, "app"))

	// Made at one edge, the objects are at once there at the other: for the API, for the login, for visitors.
	first, second := a.connect(s, app), b.connect(s, app)
	for _, e := range []*edgetest.Edge{one, two} {
		if status, _ := get(t, e.VisitorClient(t), "https://"+s.DNSName+"/"); status != 200 {
			t.Errorf("status %d", status)
		}
	}
	var list []socket
	b.must("GET", "/socket", nil, &list)
	if len(list) != 1 || len(list[0].Tunnels) != 2 {
		t.Errorf("the second edge has %+v", list)
	}
	// An access token is good at the edge that did not make it.
	border0 := b.at(two)
	border0.token = one.Token
	border0.must("GET", "/api/v1/socket/"+s.ID, nil, nil)

	// What is deleted at one edge ends at the other.
	a.must("DELETE", "/socket/"+s.ID+"/tunnel/"+second.tunnel.ID, nil, nil)
	_ = second.client.Wait()
	b.must("DELETE", "/socket/"+s.ID, nil, nil)
	_ = first.client.Wait()
	eventually(t, "no tunnel to be left", func() bool { return !a.connected(s, first.tunnel.ID) && !b.connected(s, second.tunnel.ID) })
	if status, _ := get(t, one.VisitorClient(t), "http://"+s.DNSName+"/"); status != 404 {
		t.Errorf("a deleted socket: %d", status)
	}
}

// TestATunnelAtTwoEdges shows that each edge has its own rotation: the newest login of a tunnel wins at the edge it comes to, and only there.
func TestATunnelAtTwoEdges(t *testing.T) {
	_, one, two := twoEdges(t)
	a := login(t, one)
	b := a.at(two)
	s := a.newSocket("http")
	app := appAddress(newApp(t, "app"))
	old := a.connect(s, app)
	b.connectTunnel(s, old.tunnel, app)
	if !a.connected(s, old.tunnel.ID) {
		t.Error("a login at the second edge took the tunnel away from the first")
	}
	a.connectTunnel(s, old.tunnel, app)
	_ = old.client.Wait() // superseded
	if !b.connected(s, old.tunnel.ID) {
		t.Error("a login at the first edge took the tunnel away from the second")
	}
}

func TestASocketHasNoTunnelHere(t *testing.T) {
	_, one, two := twoEdges(t)
	a := login(t, one)
	s := a.newSocket("http")
	a.connect(s, appAddress(newApp(t, "app")))
	eventually(t, "the other edge to know the socket", func() bool { return len(two.Tunnels()) == 1 })
	resp, err := two.VisitorClient(t).Get("http://" + s.DNSName + "/")
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	if resp.StatusCode != http.StatusBadGateway || resp.Header.Get("Retry-After") == "" {
		t.Errorf("a visitor of the edge without a tunnel: %d, Retry-After %q", resp.StatusCode, resp.Header.Get("Retry-After"))
	}
}

// TestTCPPortsOfTwoEdges shows that a tcp socket has one port at all edges, and that no port is given away twice.
func TestTCPPortsOfTwoEdges(t *testing.T) {
	server := etcdtest.Start(t)
	few := func(c *edge.Config) { c.TCPPorts = edge.PortRange{Min: 21000, Max: 21007} }
	one := edgetest.Start(t, edgetest.SharedState(server, "127.0.0.3"), few)
	two := edgetest.Start(t, edgetest.SharedState(server, "127.0.0.4"), few)
	a := login(t, one)
	b := a.at(two)
	made := make(chan socket, 8)
	for i := range 8 {
		go func() {
			of := a
			if i%2 == 1 {
				of = b
			}
			var s socket
			of.must("POST", "/socket", map[string]any{"name": "tcp", "socket_type": "tcp"}, &s)
			made <- s
		}()
	}
	ports := map[int]bool{}
	var last socket
	for range 8 {
		last = <-made
		ports[last.Ports[0]] = true
	}
	if len(ports) != 8 {
		t.Errorf("8 sockets have the ports %v", ports)
	}
	if status := a.call("POST", "/socket", map[string]any{"name": "tcp", "socket_type": "tcp"}, nil); status != 503 {
		t.Errorf("a ninth socket for 8 ports: %d", status)
	}

	echo, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = echo.Close() })
	go func() {
		for {
			conn, err := echo.Accept()
			if err != nil {
				return
			}
			go func() { _, _ = io.Copy(conn, conn); _ = conn.Close() }()
		}
	}()
	a.connect(last, echo.Addr().String())
	b.connect(last, echo.Addr().String())
	for _, host := range []string{"127.0.0.3", "127.0.0.4"} {
		address := net.JoinHostPort(host, strconv.Itoa(last.Ports[0]))
		conn, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(conn, "hello")
		_ = conn.(*net.TCPConn).CloseWrite()
		if got, err := io.ReadAll(conn); err != nil || string(got) != "hello" {
			t.Errorf("%s: %q, %v", host, got, err)
		}
		_ = conn.Close()
	}
	a.must("DELETE", "/socket/"+last.ID, nil, nil)
	for _, host := range []string{"127.0.0.3", "127.0.0.4"} {
		eventually(t, "the port to be closed at "+host, func() bool {
			conn, err := net.Dial("tcp", net.JoinHostPort(host, strconv.Itoa(last.Ports[0])))
			if err == nil {
				_ = conn.Close()
			}
			return err != nil
		})
	}
}

// TestAccountsOfRunningEdges changes accounts as the commands do, beside edges that run.
func TestAccountsOfRunningEdges(t *testing.T) {
	server, one, two := twoEdges(t)
	a := login(t, one)
	s := a.newSocket("http")
	app := appAddress(newApp(t, "app"))
	first, second := a.connect(s, app), a.at(two).connect(s, app)
	accounts, err := edge.OpenSharedAccounts(store.EtcdConfig{Endpoints: []string{server.URL}}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = accounts.Close() })
	if _, err := accounts.Add(edge.NewUser{Email: "new@example.com", Password: "a long password"}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the new account at the second edge", func() bool { return len(two.Users()) == 2 })
	(&account{t: t, edge: two, client: two.APIClient(t)}).login("new@example.com", "a long password")
	if err := accounts.Delete(one.Email); err != nil {
		t.Fatal(err)
	}
	_, _ = first.client.Wait(), second.client.Wait()
	eventually(t, "its token to be refused", func() bool { return a.call("GET", "/socket", nil, nil) == 401 })
}

// TestEtcdIsAway shows what goes on without etcd, and what doesn't.
func TestEtcdIsAway(t *testing.T) {
	server, one, two := twoEdges(t)
	a := login(t, one)
	s := a.newSocket("http")
	app := appAddress(newApp(t, "app"))
	r := a.connect(s, app)
	spare := a.newTunnel(s)
	signer := a.certify("/socket/"+s.ID+"/tunnel/"+spare.ID+"/signkey", newKey(t))
	eventually(t, "the other edge to know", func() bool {
		known := two.Tunnels()
		return len(known) == 1 && known[0].Registered == 2
	})
	server.Kill()

	visitor := one.VisitorClient(t)
	if status, _ := get(t, visitor, "http://"+s.DNSName+"/"); status != 200 {
		t.Errorf("a visitor: %d", status)
	}
	// The first change finds out; it must not hold the visitors up meanwhile.
	refused := make(chan int, 1)
	var says struct {
		Message string `json:"error_message"`
	}
	go func() { refused <- a.call("POST", "/socket", map[string]string{"name": "n"}, &says) }()
	for status := 0; status == 0; {
		select {
		case status = <-refused:
			if status != 503 || !strings.Contains(says.Message, "try again") {
				t.Errorf("a change: %d %q", status, says.Message)
			}
		default:
			if status, _ := get(t, visitor, "http://"+s.DNSName+"/"); status != 200 {
				t.Errorf("a visitor meanwhile: %d", status)
			}
		}
	}
	a.login(one.Email, one.Password)
	a.must("GET", "/socket/"+s.ID, nil, nil)
	// A tunnel comes back to an edge without etcd.
	_ = r.client.Close()
	client, err := a.at(two).dial(s.UserName, signer)
	if err != nil {
		t.Fatalf("a login: %v", err)
	}
	again := newReplica(t, client, app)
	again.forward("localhost", uint32(spare.LocalPort))
	if status, _ := get(t, two.VisitorClient(t), "http://"+s.DNSName+"/"); status != 200 {
		t.Errorf("a visitor of the tunnel that came back: %d", status)
	}

	server.Restart()
	eventually(t, "changes to be possible again", func() bool { return a.call("POST", "/socket", map[string]string{"name": "n"}, nil) == 200 })
	eventually(t, "the other edge to know", func() bool { return len(two.Tunnels()) == 2 })
}

func TestOnePlaceForTheState(t *testing.T) {
	cfg := edge.Config{Domain: "edge.test", Etcd: store.EtcdConfig{Endpoints: []string{"http://127.0.0.1:1"}}, APIAddress: "127.0.0.1:0", SSHAddress: "127.0.0.1:0",
		HTTPAddress: "127.0.0.1:0", HTTPSAddress: "127.0.0.1:0", AdminAddress: "127.0.0.1:0", TCPPorts: edge.PortRange{Min: 1, Max: 1}}
	if err := cfg.Validate(); err != nil {
		t.Fatal(err)
	}
	cfg.StatePath = "x"
	if err := cfg.Validate(); err == nil || !strings.Contains(err.Error(), "two places") {
		t.Errorf("both a file and etcd: %v", err)
	}
	cfg.StatePath, cfg.Etcd = "", store.EtcdConfig{}
	if err := cfg.Validate(); err == nil || !strings.Contains(err.Error(), "etcd-endpoints") {
		t.Errorf("neither a file nor etcd: %v", err)
	}
	cfg.StatePath, cfg.Etcd = "", store.EtcdConfig{Endpoints: []string{"http://127.0.0.1:1"}, CAFile: "x"}
	if _, err := edge.OpenSharedAccounts(cfg.Etcd, slog.New(slog.DiscardHandler)); err == nil || errors.Is(err, store.ErrUnavailable) {
		t.Errorf("a wrong configuration: %v", err)
	}
}
