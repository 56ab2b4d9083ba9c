package addr

import (
	"net"
	"net/netip"
	"testing"
)

func TestHost(t *testing.T) {
	for a, want := range map[string]string{
		"192.0.2.7": "192.0.2.7", "2001:db8:1:2::7": "2001:db8:1:2::", "2001:db8:1:2:3:4:5:6": "2001:db8:1:2::", "2001:db8:1:3::7": "2001:db8:1:3::",
	} {
		if got := Host(netip.MustParseAddr(a)); got != netip.MustParseAddr(want) {
			t.Errorf("%s counts as %s, want %s", a, got, want)
		}
	}
	if got := Host(netip.Addr{}); got.IsValid() {
		t.Errorf("no address counts as %s", got)
	}
}

func TestOneForm(t *testing.T) {
	for in, want := range map[string]string{
		"192.0.2.7:1": "192.0.2.7:1", "[::ffff:192.0.2.7]:1": "192.0.2.7:1", "[fe80::1%eth0]:1": "[fe80::1]:1", "[2001:db8::1]:1": "[2001:db8::1]:1",
	} {
		if got := Parse(in); got != netip.MustParseAddrPort(want) {
			t.Errorf("Parse(%s) = %s, want %s", in, got, want)
		}
		if got := Of(net.TCPAddrFromAddrPort(netip.MustParseAddrPort(in))); got != netip.MustParseAddrPort(want) {
			t.Errorf("Of(%s) = %s, want %s", in, got, want)
		}
	}
	if got := Parse("nobody"); got.IsValid() {
		t.Errorf("nobody is %s", got)
	}
	if got := Of(&net.UnixAddr{}); got.IsValid() {
		t.Errorf("a Unix socket is %s", got)
	}
}
