package tunnel

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
)

func TestOrderOfAddresses(t *testing.T) {
	for _, c := range []struct {
		name   string
		spread Spread
		found  string
		want   string
	}{
		{"one", Spread{Turn: 3}, "192.0.2.1", "192.0.2.1"},
		{"sorted", Spread{}, "192.0.2.10 192.0.2.9", "192.0.2.9 192.0.2.10"},
		{"turned", Spread{Turn: 4}, "192.0.2.1 192.0.2.2 192.0.2.3", "192.0.2.2 192.0.2.3 192.0.2.1"},
		{"a negative turn", Spread{Turn: -1}, "192.0.2.1 192.0.2.2 192.0.2.3", "192.0.2.3 192.0.2.1 192.0.2.2"},
		{"none twice", Spread{Turn: 1}, "192.0.2.1 ::ffff:192.0.2.1 192.0.2.2", "192.0.2.2 192.0.2.1"},
		{"a detour", Spread{Turn: 4, Detour: 1}, "192.0.2.1 192.0.2.2 192.0.2.3", "192.0.2.3 192.0.2.1 192.0.2.2"},
		{"home", Spread{Turn: 4, Detour: 1, Home: true}, "192.0.2.1 192.0.2.2 192.0.2.3", "192.0.2.2"},
		{"IPv4 first", Spread{Turn: 1}, "2001:db8::1 192.0.2.1 2001:db8::2 192.0.2.2", "192.0.2.2 192.0.2.1 2001:db8::2 2001:db8::1"},
		{"IPv6 first", Spread{IPv6: true}, "2001:db8::1 192.0.2.1 2001:db8::2", "2001:db8::1 2001:db8::2 192.0.2.1"},
		{"only the other family", Spread{IPv6: true, Turn: 1}, "192.0.2.1 192.0.2.2", "192.0.2.2 192.0.2.1"},
		{"no more than eight", Spread{}, "192.0.2.1 192.0.2.2 192.0.2.3 192.0.2.4 192.0.2.5 192.0.2.6 192.0.2.7 192.0.2.8 192.0.2.9",
			"192.0.2.1 192.0.2.2 192.0.2.3 192.0.2.4 192.0.2.5 192.0.2.6 192.0.2.7 192.0.2.8"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var found []netip.Addr
			for _, text := range strings.Fields(c.found) {
				found = append(found, netip.MustParseAddr(text))
			}
			if got := strings.Trim(fmt.Sprint(c.spread.order(found)), "[]"); got != c.want {
				t.Errorf("got %s, want %s", got, c.want)
			}
		})
	}
}
