package sidecar

import (
	"bufio"
	"bytes"
	"net"
	"net/netip"
	"testing"

	"github.com/pires/go-proxyproto"
)

func TestProxyHeader(t *testing.T) {
	v4, v6 := net.TCPAddrFromAddrPort(netip.MustParseAddrPort("10.244.0.7:8000")), net.TCPAddrFromAddrPort(netip.MustParseAddrPort("[fd00::7]:8000"))
	for _, tc := range []struct {
		name, version, visitor string
		app                    net.Addr
		want                   string // as v1 has it
	}{
		{"off", "", "198.51.100.9:4711", v4, ""},
		{"a version that is none", "v3", "198.51.100.9:4711", v4, ""},
		{"IPv4", "v1", "198.51.100.9:4711", v4, "PROXY TCP4 198.51.100.9 10.244.0.7 4711 8000\r\n"},
		{"IPv6", "v1", "[2001:db8::9]:4711", v6, "PROXY TCP6 2001:db8::9 fd00::7 4711 8000\r\n"},
		{"an IPv6 visitor of an IPv4 pod", "v1", "[2001:db8::9]:4711", v4, "PROXY TCP6 2001:db8::9 ::ffff:10.244.0.7 4711 8000\r\n"},
		{"an IPv4 visitor of an IPv6 pod", "v1", "198.51.100.9:4711", v6, "PROXY TCP6 ::ffff:198.51.100.9 fd00::7 4711 8000\r\n"},
		{"a visitor who is not known", "v1", "", v4, "PROXY UNKNOWN\r\n"},
		{"a probe of the edge", "v1", "0.0.0.0:0", v4, "PROXY UNKNOWN\r\n"},
		{"a probe of the edge, binary", "v2", "0.0.0.0:0", v4, "PROXY UNKNOWN\r\n"},
		{"binary IPv4", "v2", "198.51.100.9:4711", v4, "PROXY TCP4 198.51.100.9 10.244.0.7 4711 8000\r\n"},
		{"binary IPv6", "v2", "[2001:db8::9]:4711", v6, "PROXY TCP6 2001:db8::9 fd00::7 4711 8000\r\n"},
		{"a visitor who is not known, binary", "v2", "", v4, "PROXY UNKNOWN\r\n"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			visitor := netip.AddrPort{}
			if tc.visitor != "" {
				visitor = netip.MustParseAddrPort(tc.visitor)
			}
			got := proxyHeader(tc.version, visitor, tc.app)
			if tc.version == "v2" {
				if !bytes.HasPrefix(got, proxyproto.SIGV2) {
					t.Fatalf("got %q, which is not version 2", got)
				}
				header, err := proxyproto.Read(bufio.NewReader(bytes.NewReader(got)))
				if err != nil {
					t.Fatal(err)
				}
				header.Version = 1
				if got, err = header.Format(); err != nil {
					t.Fatal(err)
				}
			}
			if string(got) != tc.want {
				t.Errorf("got %q, want %q", got, tc.want)
			}
		})
	}
}
