// Package addr says who a peer is by its address: in one form, however the address came, and by what a host has to itself. It must
// not know what peers do.
package addr

import (
	"net"
	"net/netip"
)

// Of returns the address of a TCP connection's end, the zero AddrPort if it is none.
func Of(a net.Addr) netip.AddrPort {
	if tcp, ok := a.(*net.TCPAddr); ok {
		return plain(tcp.AddrPort())
	}
	return netip.AddrPort{}
}

// Parse returns the address of a text such as 192.0.2.7:443, the zero AddrPort if it is none.
func Parse(s string) netip.AddrPort {
	ap, err := netip.ParseAddrPort(s)
	if err != nil {
		return netip.AddrPort{}
	}
	return plain(ap)
}

// plain has one form for an IPv4 address, and no zone, which means nothing to others.
func plain(ap netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(ap.Addr().Unmap().WithZone(""), ap.Port())
}

// Host is what connections of one host have in common: its address, or for IPv6 the /64 that a host has to itself, since with an
// address for every connection it would have no bound of its own, and could shut everybody else out.
func Host(a netip.Addr) netip.Addr {
	if a.Is6() {
		if p, err := a.Prefix(64); err == nil {
			return p.Addr()
		}
	}
	return a
}
