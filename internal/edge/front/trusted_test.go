package front

import (
	"net/http"
	"net/netip"
	"strings"
	"testing"
)

func request(peer string, header http.Header) *http.Request {
	return &http.Request{RemoteAddr: peer, Header: header}
}

func TestProvenance(t *testing.T) {
	trusted := Trusted{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("2001:db8::/32")}
	const proxy = "10.0.0.1:1234"
	type want struct{ visitor, path, proto, host string }
	for name, c := range map[string]struct {
		peer   string
		header http.Header
		want   want
	}{
		"a stranger is not believed": {"192.0.2.1:99", http.Header{
			"X-Forwarded-For": {"1.1.1.1"}, "X-Real-Ip": {"1.1.1.1"}, "X-Forwarded-Proto": {"https"}, "X-Forwarded-Host": {"a"},
		}, want{"192.0.2.1:99", "192.0.2.1", "", ""}},
		"a proxy that says nothing": {proxy, http.Header{}, want{"10.0.0.1:1234", "10.0.0.1", "", ""}},
		"a proxy": {proxy, http.Header{
			"X-Forwarded-For": {"192.0.2.1"}, "X-Forwarded-Proto": {"HTTPS"}, "X-Forwarded-Host": {"shop.example.com:8443"},
		}, want{"192.0.2.1:1234", "192.0.2.1, 10.0.0.1", "https", "shop.example.com:8443"}},
		"what the visitor made up is dropped": {proxy, http.Header{"X-Forwarded-For": {"1.1.1.1, 10.9.9.9, 192.0.2.1"}},
			want{"192.0.2.1:1234", "192.0.2.1, 10.0.0.1", "", ""}},
		"two proxies": {proxy, http.Header{"X-Forwarded-For": {"1.1.1.1, 192.0.2.1, 10.0.0.2"}},
			want{"192.0.2.1:1234", "192.0.2.1, 10.0.0.2, 10.0.0.1", "", ""}},
		"in several fields": {proxy, http.Header{"X-Forwarded-For": {"1.1.1.1", "192.0.2.1", "10.0.0.2,10.0.0.3"}},
			want{"192.0.2.1:1234", "192.0.2.1, 10.0.0.2, 10.0.0.3, 10.0.0.1", "", ""}},
		"only proxies": {proxy, http.Header{"X-Forwarded-For": {"10.0.0.3, 10.0.0.2"}},
			want{"10.0.0.3:1234", "10.0.0.3, 10.0.0.2, 10.0.0.1", "", ""}},
		"IPv6, with ports": {"[2001:db8::1]:1", http.Header{"X-Forwarded-For": {"[2001:db9::1]:4711, [2001:db8::2], 10.0.0.2:80"}},
			want{"[2001:db9::1]:1", "2001:db9::1, 2001:db8::2, 10.0.0.2, 2001:db8::1", "", ""}},
		"IPv4 in IPv6": {"[::ffff:10.0.0.1]:1234", http.Header{"X-Forwarded-For": {"::ffff:192.0.2.1"}},
			want{"192.0.2.1:1234", "192.0.2.1, 10.0.0.1", "", ""}},
		"no address":    {proxy, http.Header{"X-Forwarded-For": {"192.0.2.1, unknown"}}, want{"10.0.0.1:1234", "10.0.0.1", "", ""}},
		"an empty list": {proxy, http.Header{"X-Forwarded-For": {""}}, want{"10.0.0.1:1234", "10.0.0.1", "", ""}},
		"X-Real-Ip":     {proxy, http.Header{"X-Real-Ip": {"192.0.2.1"}}, want{"192.0.2.1:1234", "192.0.2.1, 10.0.0.1", "", ""}},
		"X-Forwarded-For before X-Real-Ip": {proxy, http.Header{"X-Real-Ip": {"1.1.1.1"}, "X-Forwarded-For": {"192.0.2.1"}},
			want{"192.0.2.1:1234", "192.0.2.1, 10.0.0.1", "", ""}},
		"the nearest proxy's word": {proxy, http.Header{"X-Forwarded-Proto": {"http, https"}, "X-Forwarded-Host": {"a, b"}},
			want{"10.0.0.1:1234", "10.0.0.1", "https", "b"}},
		"nonsense": {proxy, http.Header{"X-Forwarded-Proto": {"gopher"}, "X-Forwarded-Host": {"a\"><b"}, "X-Real-Ip": {"x"}},
			want{"10.0.0.1:1234", "10.0.0.1", "", ""}},
	} {
		o := trusted.provenanceOf(request(c.peer, c.header))
		if got := (want{o.visitor.String(), strings.Join(o.path, ", "), o.proto, o.host}); got != c.want {
			t.Errorf("%s: %+v, want %+v", name, got, c.want)
		}
	}
	if o := trusted.provenanceOf(request(proxy, http.Header{"X-Forwarded-For": {strings.Repeat("10.0.0.2,", 1000) + "10.0.0.2"}})); len(o.path) > maxHops+1 {
		t.Errorf("%d hops are told", len(o.path))
	}
}

func FuzzProvenance(f *testing.F) {
	trusted := Trusted{netip.MustParsePrefix("10.0.0.0/8")}
	for _, seed := range []string{"192.0.2.1", "1.1.1.1, 10.0.0.2", "[::1]:80,", ",,,", "unknown", "::ffff:10.0.0.1%eth0", "a\x00b"} {
		f.Add(seed, seed, seed)
	}
	f.Fuzz(func(t *testing.T, forwarded, host, real string) {
		header := http.Header{"X-Forwarded-For": {forwarded}, "X-Forwarded-Host": {host}, "X-Real-Ip": {real}, "X-Forwarded-Proto": {host}}
		out := &http.Request{Header: http.Header{}}
		o := trusted.provenanceOf(request("10.0.0.1:1", header))
		o.tell(out, request("10.0.0.1:1", nil))
		// The client of a tunnel needs an address and a port.
		if !o.visitor.IsValid() || o.visitor.Port() == 0 || o.visitor.Addr().Zone() != "" {
			t.Errorf("the visitor is %s", o.visitor)
		}
		for name, values := range out.Header {
			if len(values) != 1 || len(values[0]) > 50*(maxHops+1) || strings.ContainsFunc(values[0], func(r rune) bool { return r < ' ' || r > '~' }) {
				t.Errorf("%s: %q", name, values)
			}
		}
	})
}
