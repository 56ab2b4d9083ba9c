package tunnel_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/crypto/ssh"

	"github.com/mysocketio/mysocket-injector/internal/sidecar/tunnel"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/tunnel/sshtest"
)

// names is a name server that knows one name, and turns its addresses with each answer, as many do.
type names struct {
	name      string
	addresses []netip.Addr
	asked     atomic.Int64
}

func (n *names) LookupNetIP(_ context.Context, network, host string) ([]netip.Addr, error) {
	turn := int(n.asked.Add(1)) % max(1, len(n.addresses))
	if network != "ip" || host != n.name {
		return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
	}
	return slices.Concat(n.addresses[turn:], n.addresses[:turn]), nil
}

func parseAll(t *testing.T, list string) []netip.Addr {
	t.Helper()
	var addresses []netip.Addr
	for _, text := range strings.Fields(list) {
		address, err := netip.ParseAddr(text)
		if err != nil {
			t.Fatal(err)
		}
		addresses = append(addresses, address)
	}
	return addresses
}

func TestConnectionsAreSpreadOverTheEdgesAddresses(t *testing.T) {
	first := sshtest.Start(t)
	_, port, err := net.SplitHostPort(first.Address)
	if err != nil {
		t.Fatal(err)
	}
	servers := []*sshtest.Server{first, sshtest.StartAt(t, "127.0.0.2:"+port), sshtest.StartAt(t, "127.0.0.3:"+port)}
	key, app := sshtest.NewKey(t), listenApp(t, echo)
	resolver := &names{name: "edge.example", addresses: parseAll(t, "127.0.0.3 127.0.0.1 127.0.0.2")}
	cfg := config(first, key, app)
	cfg.Address, cfg.Resolver = "edge.example:"+port, resolver
	for _, server := range servers[1:] {
		cfg.HostKeys = append(cfg.HostKeys, server.HostKey)
	}
	logins := func() string {
		var counts []int
		for _, server := range servers {
			counts = append(counts, server.Logins())
		}
		return fmt.Sprint(counts)
	}
	for turn, want := range []string{"[1 0 0]", "[1 1 0]", "[1 1 1]", "[2 1 1]"} {
		cfg.Spread.Turn = turn
		connect(t, cfg)
		if got := logins(); got != want {
			t.Fatalf("logins at the three addresses after turn %d: %s, want %s", turn, got, want)
		}
	}
	if asked := resolver.asked.Load(); asked != 4 {
		t.Errorf("the name was resolved %d times for 4 attempts", asked)
	}

	// One address is gone: the next one is taken in the same attempt.
	servers[1].Stop()
	cfg.Spread.Turn = 1
	connect(t, cfg)
	if got := logins(); got != "[2 1 2]" {
		t.Errorf("logins %s; the third address should have taken the second's", got)
	}
	// All are: the error names each.
	servers[0].Stop()
	servers[2].Stop()
	_, err = tunnel.Connect(t.Context(), cfg)
	if tunnel.FailedStep(err) != tunnel.StepTCP {
		t.Fatalf("got %v", err)
	}
	for _, address := range []string{"127.0.0.1", "127.0.0.2", "127.0.0.3"} {
		if !strings.Contains(err.Error(), address) {
			t.Errorf("the error %q does not name %s", err, address)
		}
	}
}

// The address that can't be reached is taken out of the name, as DNS with health checks does. The own address is then the one where the
// connection is, and a second one there would end it, with all its visitors.
func TestTheWayHomeDoesNotLeadToWhereTheConnectionIs(t *testing.T) {
	there := sshtest.Start(t)
	_, port, err := net.SplitHostPort(there.Address)
	if err != nil {
		t.Fatal(err)
	}
	resolver := &names{name: "edge.example", addresses: parseAll(t, "127.0.0.1 127.0.0.2")}
	cfg := config(there, sshtest.NewKey(t), listenApp(t, echo))
	cfg.Address, cfg.Resolver, cfg.Spread.Turn = "edge.example:"+port, resolver, 1
	away := connect(t, cfg)
	if away.Home() || away.Address() != resolver.addresses[0] {
		t.Fatalf("the connection is at %s, home %t", away.Address(), away.Home())
	}
	cfg.Spread.Away = away.Address()
	if err := tunnel.Reach(t.Context(), cfg); err == nil {
		t.Error("an address where nobody listens was reached")
	}
	resolver.addresses = resolver.addresses[:1]
	if err := tunnel.Reach(t.Context(), cfg); err == nil {
		t.Error("the connection is to go where it is")
	}
	cfg.Spread.Home = true
	if _, err := tunnel.Connect(t.Context(), cfg); err == nil || there.Logins() != 1 {
		t.Errorf("%d logins, %v", there.Logins(), err)
	}
	resolver.addresses = parseAll(t, "127.0.0.1 127.0.0.2")
	sshtest.StartAt(t, "127.0.0.2:"+port)
	if err := tunnel.Reach(t.Context(), cfg); err != nil {
		t.Errorf("the own address is back, and not reached: %v", err)
	}
}

func TestNamesThatCannotBeResolved(t *testing.T) {
	for name, resolver := range map[string]*names{"unknown": {name: "other.example"}, "empty": {name: "edge.example"}} {
		t.Run(name, func(t *testing.T) {
			cfg := config(&sshtest.Server{Address: "edge.example:22", HostKey: sshtest.NewKey(t).PublicKey()}, sshtest.NewKey(t), nil)
			cfg.Resolver = resolver
			_, err := tunnel.Connect(t.Context(), cfg)
			if failed, ok := errors.AsType[*tunnel.StepError](err); !ok || failed.Step != tunnel.StepDNS || !strings.Contains(err.Error(), "edge.example") {
				t.Errorf("got %v, want a failure of the step dns that names edge.example", err)
			}
		})
	}
}

// An address is gone to as it is: nobody is asked for it.
func TestAddressesAreNotResolved(t *testing.T) {
	server := sshtest.Start(t)
	resolver := &names{}
	cfg := config(server, sshtest.NewKey(t), listenApp(t, echo))
	cfg.Resolver, cfg.HostKeys = resolver, []ssh.PublicKey{server.HostKey}
	connect(t, cfg)
	if asked := resolver.asked.Load(); asked != 0 {
		t.Errorf("the resolver was asked %d times", asked)
	}
}
