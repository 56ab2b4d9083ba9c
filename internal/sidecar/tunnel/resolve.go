package tunnel

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"
)

const (
	// maxAddresses bounds how many addresses of a name one attempt goes through.
	maxAddresses = 8
	// minShare is the least time that one address of several gets.
	minShare = 2 * time.Second
)

// Resolver finds the addresses of the edge's name; [net.Resolver] is one.
type Resolver interface {
	LookupNetIP(ctx context.Context, network, host string) ([]netip.Addr, error)
}

// Spread says which address of an edge that has several a connection goes to, so that connections of one pod, and pods of one
// workload, lie on distinct ones.
type Spread struct {
	// Turn picks the connection's own address: connections with consecutive turns have distinct ones, as far as there are.
	Turn int
	// Detour is how many addresses further to begin, because those before have failed. Home goes to the own address or nowhere, and
	// nowhere if that is Away, where a connection is already: names lose addresses, and then another one is the own.
	Detour int
	Home   bool
	Away   netip.Addr
	// IPv6 prefers IPv6 addresses to IPv4 ones. The others are only tried when the preferred can't be reached: whether a pod
	// reaches addresses of another family than its own is not sure.
	IPv6 bool
}

// order returns the addresses in the order in which to try them. A name server may give them in another order each time,
// so they are sorted first.
func (s Spread) order(found []netip.Addr) []netip.Addr {
	var preferred, others []netip.Addr
	for _, address := range found {
		address = address.Unmap()
		if address.Is6() == s.IPv6 {
			preferred = append(preferred, address)
		} else {
			others = append(others, address)
		}
	}
	turn := s.Turn + s.Detour
	if s.Home {
		turn = s.Turn
	}
	ordered := append(turned(preferred, turn), turned(others, turn)...)
	if s.Home {
		return ordered[:min(len(ordered), 1)]
	}
	return ordered[:min(len(ordered), maxAddresses)]
}

// own returns the connection's own address of those found; the zero one if there is none.
func (s Spread) own(found []netip.Addr) netip.Addr {
	s.Home = true
	if list := s.order(found); len(list) == 1 {
		return list[0]
	}
	return netip.Addr{}
}

// turned sorts the list, drops what is in it twice and begins it with the element whose turn it is.
func turned(list []netip.Addr, turn int) []netip.Addr {
	slices.SortFunc(list, netip.Addr.Compare)
	list = slices.Compact(list)
	if len(list) == 0 {
		return nil
	}
	at := (turn%len(list) + len(list)) % len(list)
	return slices.Concat(list[at:], list[:at])
}

var errAlreadyThere = errors.New("of the edge's name, the connection's own address is now the one where it is")

// dialName connects to the edge at host:port, and tells whether it is at the connection's own address. The name is resolved once; an
// address that can't be reached costs only its share of the time.
func dialName(ctx context.Context, dialer *net.Dialer, cfg Config) (conn net.Conn, home bool, err error) {
	host, port, err := net.SplitHostPort(cfg.Address)
	if err != nil {
		return nil, false, &StepError{StepDNS, fmt.Errorf("the edge's address is no host:port: %w", err)}
	}
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	found, err := lookup(ctx, cfg, host)
	if err != nil {
		return nil, false, &StepError{StepDNS, fmt.Errorf("the edge's name can't be resolved: %w", err)}
	}
	addresses, own := cfg.Spread.order(found), cfg.Spread.own(found)
	if cfg.Spread.Home && own == cfg.Spread.Away {
		return nil, false, &StepError{StepDNS, errAlreadyThere}
	}
	var failed []error
	for i, address := range addresses {
		conn, err := dialOne(ctx, dialer, net.JoinHostPort(address.String(), port), len(addresses)-i)
		if err == nil {
			return conn, address == own, nil
		}
		failed = append(failed, err)
		if ctx.Err() != nil {
			break
		}
	}
	return nil, false, &StepError{StepTCP, fmt.Errorf("the edge can't be reached: %w", errors.Join(failed...))}
}

// Reach tells whether the connection's own address of the edge takes connections. It says nothing and logs in nowhere.
func Reach(ctx context.Context, cfg Config) error {
	cfg.Spread.Home = true
	if cfg.Resolver == nil {
		cfg.Resolver = net.DefaultResolver
	}
	conn, _, err := dialEdge(ctx, cfg)
	if err != nil {
		return err
	}
	return conn.Close()
}

func lookup(ctx context.Context, cfg Config, host string) ([]netip.Addr, error) {
	if address, err := netip.ParseAddr(host); err == nil {
		return []netip.Addr{address}, nil
	}
	found, err := cfg.Resolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, err
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("%s has no addresses", host)
	}
	return found, nil
}

// dialOne connects to one address, with what is left of the time shared with those that come after it.
func dialOne(ctx context.Context, dialer *net.Dialer, address string, left int) (net.Conn, error) {
	if deadline, ok := ctx.Deadline(); ok && left > 1 {
		share := max(time.Until(deadline)/time.Duration(left), minShare)
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, share)
		defer cancel()
	}
	return dialer.DialContext(ctx, "tcp", address)
}
