package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/goleak"
	"go.uber.org/zap"

	"github.com/mysocketio/mysocket-injector/internal/edge/etcdtest"
)

const patience = 30 * time.Second

// eventually waits for what another edge's change brings.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(patience)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-deadline:
			t.Fatalf("waited %s in vain for %s", patience, what)
		case <-tick.C:
		}
	}
}

// follower remembers what happened, as words.
type follower struct {
	mu   sync.Mutex
	says []string
}

func follow(s *Store) *follower {
	f := &follower{}
	s.Follow(func(c Changes) {
		f.mu.Lock()
		defer f.mu.Unlock()
		for _, k := range c.SocketsMade {
			f.says = append(f.says, "made "+k.Name)
		}
		for _, t := range c.TunnelsDeleted {
			f.says = append(f.says, "deleted tunnel "+t.ID)
		}
		for _, k := range c.SocketsDeleted {
			f.says = append(f.says, "deleted "+k.Name)
		}
		for _, u := range c.UsersDeleted {
			f.says = append(f.says, "deleted "+u.Email)
		}
	})
	return f
}

func (f *follower) has(what string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, s := range f.says {
		if s == what {
			return true
		}
	}
	return false
}

func (f *follower) String() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return strings.Join(f.says, ", ")
}

func newSocket(t *testing.T, s *Store, u User, name string, tunnels int) (Socket, []Tunnel) {
	t.Helper()
	k, made, err := s.CreateSocket(Socket{UserID: u.ID, Name: name, Type: TypeHTTP}, "edge.test", tunnels)
	if err != nil {
		t.Fatal(err)
	}
	return k, made
}

// TestFollowersAreToldBeforeTheCaller is true of both backends: a deletion is acknowledged when nothing of it is left.
func TestFollowersAreToldBeforeTheCaller(t *testing.T) {
	overBoth(t, func(t *testing.T, open func() *Store) {
		s := open()
		u := addUser(t, s, "a@example.com")
		newSocket(t, s, u, "before", 0)
		f := follow(s)
		k, tunnels := newSocket(t, s, u, "web", 1)
		if !f.has("made before") || !f.has("made web") {
			t.Errorf("told of %s", f)
		}
		if _, err := s.DeleteTunnel(tunnels[0].ID); err != nil || !f.has("deleted tunnel "+tunnels[0].ID) {
			t.Errorf("%v; told of %s", err, f)
		}
		second, err := s.CreateTunnel(k.ID)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.UpdateSocket(k.ID, func(k *Socket) error { k.Name = "renamed"; return nil }); err != nil || f.has("made renamed") {
			t.Errorf("%v; told of %s", err, f)
		}
		if err := s.DeleteUser(u.ID); err != nil {
			t.Fatal(err)
		}
		for _, what := range []string{"deleted tunnel " + second.ID, "deleted renamed", "deleted before", "deleted a@example.com"} {
			if !f.has(what) {
				t.Errorf("not told %s, but %s", what, f)
			}
		}
	})
}

func TestWhatOneEdgeWritesAnotherKnows(t *testing.T) {
	server := etcdtest.Start(t)
	a, b := openEtcd(t, server), openEtcd(t, server)
	f := follow(b)
	u := addUser(t, a, "a@example.com")
	k, tunnels := newSocket(t, a, u, "web", 1)
	// At once, not only when the watch has told: this is how a sidecar comes to b with what the control plane made at a.
	if got, err := b.Tunnel(tunnels[0].ID); err != nil || got != tunnels[0] {
		t.Fatalf("the other edge knows %+v, %v", got, err)
	}
	if got, err := b.Socket(k.ID); err != nil || got.DNSName != k.DNSName {
		t.Errorf("the other edge knows %+v, %v", got, err)
	}
	if _, err := b.UpdateSocket(k.ID, func(k *Socket) error { k.Description = "new"; return nil }); err != nil {
		t.Error(err)
	}
	eventually(t, "the update at the first edge", func() bool {
		got, err := a.Socket(k.ID)
		return err == nil && got.Description == "new"
	})
	if _, err := a.DeleteTunnel(tunnels[0].ID); err != nil {
		t.Error(err)
	}
	if err := a.DeleteUser(u.ID); err != nil {
		t.Error(err)
	}
	for _, what := range []string{"made web", "deleted tunnel " + tunnels[0].ID, "deleted web", "deleted a@example.com"} {
		eventually(t, what, func() bool { return f.has(what) })
	}
	if n := len(b.AllSockets()) + len(b.Users()) + len(b.Tunnels(k.ID)); n != 0 {
		t.Errorf("%d objects are left at the other edge", n)
	}
}

// TestEdgesDoNotContradictEachOther has several edges make the same things at the same time.
func TestEdgesDoNotContradictEachOther(t *testing.T) {
	server := etcdtest.Start(t)
	const edges, each = 4, 8
	var stores []*Store
	for range edges {
		stores = append(stores, openEtcd(t, server))
	}
	u := addUser(t, stores[0], "owner@example.com")
	var mu sync.Mutex
	made := map[string]int{}
	secrets := map[string]bool{}
	var all sync.WaitGroup
	start := make(chan struct{})
	for n, s := range stores {
		all.Go(func() {
			<-start
			secret, err := s.Secret("key", func() ([]byte, error) { return fmt.Append(nil, "of edge ", n), nil })
			if err != nil {
				t.Error(err)
			}
			mu.Lock()
			secrets[string(secret)] = true
			mu.Unlock()
			for i := range each {
				results := map[string]error{}
				_, results["user"] = s.AddUser(User{Email: fmt.Sprintf("%d@example.com", i)})
				_, results["name"] = s.CreateUniqueSocket(Socket{UserID: u.ID, Name: fmt.Sprint("n", i)}, "edge.test")
				_, _, results["port"] = s.CreateSocket(Socket{UserID: u.ID, Name: "tcp", Type: TypeTCP, TCPPort: 20000 + i}, "edge.test", 1)
				mu.Lock()
				for what, err := range results {
					switch {
					case err == nil:
						made[what]++
					case !errors.Is(err, ErrExists):
						t.Errorf("%s: %v", what, err)
					case what == "port" && !errors.Is(err, ErrPortTaken):
						t.Errorf("port: %v", err)
					}
				}
				mu.Unlock()
			}
		})
	}
	close(start)
	all.Wait()
	if made["user"] != each || made["name"] != each || made["port"] != each || len(secrets) != 1 {
		t.Errorf("%d of each were wanted by %d edges; made were %v, and secrets %v", each, edges, made, secrets)
	}
	for _, s := range stores {
		eventually(t, "all edges to know the same", func() bool { return len(s.AllSockets()) == 2*each && len(s.Users()) == each+1 })
		ports := map[int]bool{}
		for _, k := range s.AllSockets() {
			for _, t := range s.Tunnels(k.ID) {
				ports[t.LocalPort] = true
			}
		}
		if len(ports) != each {
			t.Errorf("%d tunnels have %d local ports", each, len(ports))
		}
	}
}

// TestASocketIsNotOutlivedByATunnel has one edge delete sockets while another makes tunnels for them.
func TestASocketIsNotOutlivedByATunnel(t *testing.T) {
	server := etcdtest.Start(t)
	a, b := openEtcd(t, server), openEtcd(t, server)
	u := addUser(t, a, "a@example.com")
	for range 20 {
		k, _ := newSocket(t, a, u, "web", 1)
		if _, err := b.Socket(k.ID); err != nil {
			t.Fatal(err)
		}
		var both sync.WaitGroup
		both.Go(func() {
			for {
				if _, err := b.CreateTunnel(k.ID); err != nil {
					if !errors.Is(err, ErrNotFound) {
						t.Error(err)
					}
					return
				}
			}
		})
		both.Go(func() {
			if _, err := a.DeleteSocket(k.ID); err != nil {
				t.Error(err)
			}
		})
		both.Wait()
		if n := len(b.Tunnels(k.ID)); n != 0 {
			t.Fatalf("%d tunnels are left of a socket that was deleted", n)
		}
	}
	again := openEtcd(t, server)
	if n := len(again.tunnels); n != 0 {
		t.Errorf("%d tunnels are left in etcd", n)
	}
}

// TestMoreThanOneTransaction deletes more than etcd takes in one.
func TestMoreThanOneTransaction(t *testing.T) {
	server := etcdtest.Start(t)
	s := openEtcd(t, server)
	u := addUser(t, s, "a@example.com")
	k, _ := newSocket(t, s, u, "web", 0)
	for range 2*maxEtcdChanges + 10 {
		if _, err := s.CreateTunnel(k.ID); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.DeleteUser(u.ID); err != nil {
		t.Fatal(err)
	}
	again := openEtcd(t, server)
	if n := len(again.tunnels) + len(again.sockets) + len(again.users); n != 0 {
		t.Errorf("%d objects are left", n)
	}
}

// gate is a way to etcd that a test closes and opens.
type gate struct {
	ln    net.Listener
	to    string
	mu    sync.Mutex
	shut  bool
	conns map[net.Conn]struct{}
	wg    sync.WaitGroup
}

func newGate(t *testing.T, to string) *gate {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	target, err := url.Parse(to)
	if err != nil {
		t.Fatal(err)
	}
	g := &gate{ln: ln, to: target.Host, conns: map[net.Conn]struct{}{}}
	g.wg.Go(g.accept)
	t.Cleanup(func() {
		_ = ln.Close()
		g.close(true)
		g.wg.Wait()
	})
	return g
}

func (g *gate) accept() {
	for {
		in, err := g.ln.Accept()
		if err != nil {
			return
		}
		out, err := net.Dial("tcp", g.to)
		if err != nil {
			_ = in.Close()
			continue
		}
		g.mu.Lock()
		if g.shut {
			_, _ = in.Close(), out.Close()
		}
		g.conns[in], g.conns[out] = struct{}{}, struct{}{}
		g.mu.Unlock()
		for _, pair := range [][2]net.Conn{{in, out}, {out, in}} {
			g.wg.Go(func() {
				_, _ = io.Copy(pair[0], pair[1])
				_, _ = in.Close(), out.Close()
			})
		}
	}
}

func (g *gate) close(shut bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.shut = shut
	if shut {
		for c := range g.conns {
			_ = c.Close()
		}
		clear(g.conns)
	}
}

// TestEtcdIsAway shows an edge that has lost etcd: it knows what it knew, refuses changes, and when etcd is back it learns what it has missed, even if
// etcd no longer has the single changes.
func TestEtcdIsAway(t *testing.T) {
	for _, compacted := range []bool{false, true} {
		t.Run(fmt.Sprint("compacted ", compacted), func(t *testing.T) {
			server := etcdtest.Start(t)
			way := newGate(t, server.URL)
			there := openEtcd(t, server)
			s, err := OpenEtcd(t.Context(), EtcdConfig{Endpoints: []string{"http://" + way.ln.Addr().String()}}, slog.New(slog.DiscardHandler), nil)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = s.Close() })
			u := addUser(t, s, "a@example.com")
			kept, _ := newSocket(t, s, u, "kept", 1)
			gone, tunnels := newSocket(t, s, u, "gone", 1)
			f := follow(s)
			if _, err := there.Socket(gone.ID); err != nil { // which makes it know all that
				t.Fatal(err)
			}

			way.close(true)
			if _, err := s.CreateTunnel(kept.ID); !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "etcd") {
				t.Errorf("a change without etcd: %v", err)
			}
			if s.Up() {
				t.Error("the store says that etcd answers")
			}
			if _, err := s.SocketByDNSName(gone.DNSName); err != nil {
				t.Errorf("what was known is forgotten: %v", err)
			}
			began := time.Now()
			for range 100 { // and nobody queues up for the time to be over
				if _, err := s.CreateTunnel(kept.ID); !errors.Is(err, ErrUnavailable) {
					t.Errorf("one more change without etcd: %v", err)
				}
				if _, err := s.Socket("of a stranger"); !errors.Is(err, ErrNotFound) {
					t.Errorf("what is not known: %v", err)
				}
				if _, err := s.Blob(t.Context(), "of a visitor"); !errors.Is(err, ErrUnavailable) {
					t.Errorf("a blob: %v", err)
				}
			}
			if took := time.Since(began); took > etcdTimeout {
				t.Errorf("100 changes, and look-ups of what is not known, took %s while etcd was known to be away", took)
			}
			newSocket(t, there, u, "new", 0)
			if _, err := there.DeleteSocket(gone.ID); err != nil {
				t.Fatal(err)
			}
			if _, err := there.UpdateSocket(kept.ID, func(k *Socket) error { k.Description = "changed"; return nil }); err != nil {
				t.Fatal(err)
			}
			if compacted {
				compact(t, server)
			}
			way.close(false)

			for _, what := range []string{"made new", "deleted gone", "deleted tunnel " + tunnels[0].ID} {
				eventually(t, what, func() bool { return f.has(what) })
			}
			eventually(t, "the change", func() bool {
				k, err := s.Socket(kept.ID)
				return err == nil && k.Description == "changed"
			})
			if f.has("deleted kept") || strings.Count(f.String(), "made kept") != 1 {
				t.Errorf("told of %s", f)
			}
			eventually(t, "changes to be possible", func() bool {
				_, err := s.CreateTunnel(kept.ID)
				return err == nil
			})
		})
	}
}

func etcdClient(t *testing.T, server *etcdtest.Etcd) *clientv3.Client {
	t.Helper()
	c, err := clientv3.New(clientv3.Config{Endpoints: []string{server.URL}, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func compact(t *testing.T, server *etcdtest.Etcd) {
	t.Helper()
	c := etcdClient(t, server)
	resp, err := c.Get(t.Context(), "x")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Compact(t.Context(), resp.Header.Revision); err != nil {
		t.Fatal(err)
	}
}

// TestALockIsGivenBackToASilentEtcd: an edge that stops waits for it.
func TestALockIsGivenBackToASilentEtcd(t *testing.T) {
	server := etcdtest.Start(t)
	s := openEtcd(t, server)
	if err := s.LockBlobs(t.Context(), "name"); err != nil {
		t.Fatal(err)
	}
	server.Freeze()
	began := time.Now()
	if err := s.UnlockBlobs(t.Context(), "name"); !errors.Is(err, ErrUnavailable) {
		t.Errorf("got %v", err)
	}
	if took := time.Since(began); took > 4*etcdTimeout {
		t.Errorf("it took %s", took)
	}
}

// TestARefusalIsAnAnswer has etcd and its client refuse changes, each for being too large: others go on.
func TestARefusalIsAnAnswer(t *testing.T) {
	s := openEtcd(t, etcdtest.Start(t))
	for _, size := range []int{3 << 19, 3 << 20} {
		if err := s.PutBlob(t.Context(), "large", make([]byte, size)); !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "large") {
			t.Errorf("a change of %d bytes: %v", size, err)
		}
		if !s.Up() {
			t.Errorf("after a change of %d bytes etcd counts as away", size)
		}
		if err := s.PutBlob(t.Context(), "small", []byte("x")); err != nil {
			t.Errorf("after a change of %d bytes: %v", size, err)
		}
	}
}

// TestEtcdGoesBack shows an edge whose etcd was replaced by one with an older state: its own is that one's then.
func TestEtcdGoesBack(t *testing.T) {
	server := etcdtest.Start(t)
	s := openEtcd(t, server)
	u := addUser(t, s, "a@example.com")
	newSocket(t, s, u, "web", 1)
	f := follow(s)
	server.Kill()
	server.Forget()
	server.Restart()
	for _, what := range []string{"deleted web", "deleted a@example.com"} {
		eventually(t, what, func() bool { return f.has(what) })
	}
	eventually(t, "changes to be possible", s.Up)
	u = addUser(t, s, "a@example.com")
	newSocket(t, s, u, "anew", 1)
	if !f.has("made anew") {
		t.Errorf("told of %s", f)
	}
}

// TestEtcdGoesBackUnseen does the same where other programs have used the etcd so much that its revision is no lower.
func TestEtcdGoesBackUnseen(t *testing.T) {
	server := etcdtest.Start(t)
	way := newGate(t, server.URL)
	s, err := OpenEtcd(t.Context(), EtcdConfig{Endpoints: []string{"http://" + way.ln.Addr().String()}}, slog.New(slog.DiscardHandler), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	u := addUser(t, s, "a@example.com")
	newSocket(t, s, u, "web", 1)
	f := follow(s)
	way.close(true)
	server.Kill()
	server.Forget()
	server.Restart()
	c := etcdClient(t, server)
	for range 50 {
		if _, err := c.Put(t.Context(), "/of/others", "x"); err != nil {
			t.Fatal(err)
		}
	}
	way.close(false)
	for _, what := range []string{"deleted web", "deleted a@example.com"} {
		eventually(t, what, func() bool { return f.has(what) })
	}
}

func TestWhatEtcdHolds(t *testing.T) {
	server := etcdtest.Start(t)
	s := openEtcd(t, server)
	u := addUser(t, s, "a@example.com")
	c := etcdClient(t, server)
	ctx := t.Context()

	// A record that nobody can read is left out, and its like taken in.
	k, _ := newSocket(t, s, u, "web", 0)
	if _, err := c.Put(ctx, DefaultEtcdPrefix+"/sockets/"+k.ID, "{"); err != nil {
		t.Fatal(err)
	}
	other := openEtcdAt(t, server, "/another")
	if n := len(other.Users()); n != 0 {
		t.Errorf("below another prefix there are %d users", n)
	}
	newSocket(t, s, u, "next", 0)
	if got, err := s.Socket(k.ID); err != nil || got.Name != "web" {
		t.Errorf("a record that can't be read took the place of %+v, %v", got, err)
	}
	_, err := OpenEtcd(ctx, EtcdConfig{Endpoints: []string{server.URL}}, slog.New(slog.DiscardHandler), nil)
	if err == nil || !strings.Contains(err.Error(), k.ID) {
		t.Errorf("opening a state with a record that can't be read: %v", err)
	}
	if _, err := c.Put(ctx, "/another/changes", "2"); err != nil {
		t.Fatal(err)
	}
	_, err = OpenEtcd(ctx, EtcdConfig{Endpoints: []string{server.URL}, Prefix: "/another"}, slog.New(slog.DiscardHandler), nil)
	if err == nil || !strings.Contains(err.Error(), "another version") {
		t.Errorf("a state of another format: %v", err)
	}
}

func openEtcdAt(t *testing.T, server *etcdtest.Etcd, prefix string) *Store {
	t.Helper()
	s, err := OpenEtcd(t.Context(), EtcdConfig{Endpoints: []string{server.URL}, Prefix: prefix}, slog.New(slog.DiscardHandler), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func TestNoEtcd(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	_, err := OpenEtcd(ctx, EtcdConfig{Endpoints: []string{"http://127.0.0.1:1"}}, slog.New(slog.DiscardHandler), nil)
	if !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "http://127.0.0.1:1") {
		t.Errorf("no etcd: %v", err)
	}
}

func TestEtcdConfig(t *testing.T) {
	https := []string{"https://10.0.0.1:2379"}
	for _, c := range []struct {
		cfg  EtcdConfig
		says string // nothing if it is right
	}{
		{EtcdConfig{}, ""},
		{EtcdConfig{Endpoints: []string{"http://localhost:2379", "http://[::1]:2379"}}, ""},
		{EtcdConfig{Endpoints: https, Prefix: "/a/b-c.d_e", CertFile: "c", KeyFile: "k", CAFile: "a", User: "u", PasswordFile: "p"}, ""},
		{EtcdConfig{CAFile: "a"}, "etcd-ca needs etcd-endpoints"},
		{EtcdConfig{Prefix: "/a"}, "etcd-prefix needs etcd-endpoints"},
		{EtcdConfig{User: "u"}, "etcd-user needs etcd-endpoints"},
		{EtcdConfig{Endpoints: []string{"10.0.0.1:2379"}}, `"10.0.0.1:2379" is not a URL`},
		{EtcdConfig{Endpoints: []string{"https://u:p@10.0.0.1:2379"}}, "is not a URL"},
		{EtcdConfig{Endpoints: []string{"https://10.0.0.1"}}, "no host and port"},
		{EtcdConfig{Endpoints: []string{"https://10.0.0.1:0"}}, "no host and port"},
		{EtcdConfig{Endpoints: []string{"https://10.0.0.1:2379", "http://10.0.0.2:2379"}}, "all must be the same"},
		{EtcdConfig{Endpoints: []string{"http://10.0.0.2:2379"}, CAFile: "a"}, "use https"},
		{EtcdConfig{Endpoints: https, Prefix: "edge"}, `etcd-prefix "edge" is not a path`},
		{EtcdConfig{Endpoints: https, Prefix: "/edge/"}, "is not a path"},
		{EtcdConfig{Endpoints: https, CertFile: "c"}, "etcd-cert and etcd-key go together"},
		{EtcdConfig{Endpoints: https, User: "c"}, "etcd-user and etcd-password-file go together"},
		{EtcdConfig{Endpoints: make([]string, maxEtcdEndpoints+1)}, "allowed are 32"},
	} {
		err := c.cfg.Validate()
		if (err == nil) != (c.says == "") || err != nil && !strings.Contains(err.Error(), c.says) {
			t.Errorf("%+v: %v", c.cfg, err)
		}
	}
	for endpoint, plain := range map[string]bool{
		"http://127.0.0.1:2379": false, "http://localhost:2379": false, "http://10.0.0.1:2379": true, "https://10.0.0.1:2379": false,
	} {
		if got := (&EtcdConfig{Endpoints: []string{endpoint}}).PlainText(); got != plain {
			t.Errorf("%s: %v", endpoint, got)
		}
	}
}

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }
