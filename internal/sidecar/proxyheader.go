package sidecar

import (
	"net"
	"net/netip"

	"github.com/pires/go-proxyproto"

	"github.com/mysocketio/mysocket-injector/internal/gatewayapi"
)

// proxyHeader returns the header of the PROXY protocol that hands a visitor's address to the app; nil for no version.
// A visitor who is not known (an invalid address), or nobody, as in the edge's probes (0.0.0.0), is told as a connection of the
// sidecar's own, as the protocol has it.
func proxyHeader(version string, visitor netip.AddrPort, app net.Addr) []byte {
	number := byte(2)
	switch version {
	case gatewayapi.ProxyV1:
		number = 1
	case gatewayapi.ProxyV2:
	default:
		return nil
	}
	var source net.Addr
	if visitor.IsValid() && !visitor.Addr().IsUnspecified() {
		source = net.TCPAddrFromAddrPort(visitor)
	}
	header, err := proxyproto.HeaderProxyFromAddrs(number, source, app).Format()
	if err != nil {
		// Addresses that can't be written down together. The app must get a header all the same: it waits for one.
		header, _ = proxyproto.HeaderProxyFromAddrs(number, nil, nil).Format()
	}
	return header
}
