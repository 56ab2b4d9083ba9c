package front

import (
	"cmp"
	"net/http"
	"net/netip"
	"strings"

	"github.com/mysocketio/mysocket-injector/internal/edge/addr"
)

// maxHops bounds how much of X-Forwarded-For is looked at. Chains of proxies are short.
const maxHops = 16

// Trusted are the addresses of proxies in front of the edge, whose word on who the visitor is counts.
type Trusted []netip.Prefix

// Has says whether an address is that of a trusted proxy.
func (t Trusted) Has(peer netip.Addr) bool {
	peer = peer.Unmap().WithZone("")
	for _, p := range t {
		if p.Contains(peer) {
			return true
		}
	}
	return false
}

// provenance is where a request comes from, and what the app is told of it.
type provenance struct {
	// visitor is who asks. The port is that of the connection to the edge, which may be a proxy's.
	visitor netip.AddrPort
	// path is the visitor and the proxies that the request came through, as X-Forwarded-For has it.
	path []string
	// proto and host are what the visitor used, "" for what the edge sees itself.
	proto, host string
}

// provenanceOf finds out where a request comes from. Only a trusted proxy is believed. Of X-Forwarded-For the visitor is the
// right-most address that is not a trusted proxy's: whoever is trusted has put it there. What stands left of it the visitor
// may have made up, and it is dropped.
func (t Trusted) provenanceOf(r *http.Request) provenance {
	peer := addr.Parse(r.RemoteAddr)
	o := provenance{visitor: peer, path: []string{peer.Addr().String()}}
	if !t.Has(peer.Addr()) {
		return o
	}
	switch proto := strings.ToLower(lastOf(r.Header, "X-Forwarded-Proto")); proto {
	case "http", "https":
		o.proto = proto
	}
	if host := lastOf(r.Header, "X-Forwarded-Host"); hostPattern(host) {
		o.host = host
	}
	hops := hopsOf(r.Header)
	for i := len(hops) - 1; i >= 0 && len(o.path) < maxHops; i-- {
		addr, ok := parseHop(hops[i])
		if !ok {
			break // Nobody that is trusted writes this: who is next to it has to do for the visitor.
		}
		o.visitor = netip.AddrPortFrom(addr, peer.Port())
		o.path = append([]string{addr.String()}, o.path...)
		if !t.Has(addr) {
			return o
		}
	}
	if len(hops) == 0 {
		if addr, ok := parseHop(lastOf(r.Header, "X-Real-Ip")); ok {
			o.visitor = netip.AddrPortFrom(addr, peer.Port())
			o.path = []string{addr.String(), peer.Addr().String()}
		}
	}
	return o
}

// hopsOf are the last entries of X-Forwarded-For, in whatever number of fields.
func hopsOf(h http.Header) []string {
	var hops []string
	fields := h.Values("X-Forwarded-For")
	for i := len(fields) - 1; i >= 0 && len(hops) < maxHops; i-- {
		rest, more := fields[i], true
		for more && len(hops) < maxHops {
			hop := rest
			if at := strings.LastIndexByte(rest, ','); at >= 0 {
				rest, hop = rest[:at], rest[at+1:]
			} else {
				more = false
			}
			hops = append([]string{strings.TrimSpace(hop)}, hops...)
		}
	}
	return hops
}

// parseHop reads an address, with a port or without.
func parseHop(hop string) (netip.Addr, bool) {
	a, err := netip.ParseAddr(strings.TrimSuffix(strings.TrimPrefix(hop, "["), "]"))
	if err != nil {
		with := addr.Parse(hop)
		return with.Addr(), with.IsValid()
	}
	return a.Unmap().WithZone(""), true
}

// lastOf is the last entry of a field that may be a list: that of the nearest proxy.
func lastOf(h http.Header, name string) string {
	values := h.Values(name)
	if len(values) == 0 {
		return ""
	}
	last := values[len(values)-1]
	return strings.TrimSpace(last[strings.LastIndexByte(last, ',')+1:])
}

// secure says whether the visitor came over HTTPS.
func (o *provenance) secure(r *http.Request) bool {
	return o.proto == "https" || o.proto == "" && r.TLS != nil
}

// tell sets the headers that say who the visitor is.
func (o *provenance) tell(out, in *http.Request) {
	proto := "http"
	if o.secure(in) {
		proto = "https"
	}
	out.Header.Set("X-Forwarded-For", strings.Join(o.path, ", "))
	out.Header.Set("X-Forwarded-Proto", proto)
	out.Header.Set("X-Forwarded-Host", cmp.Or(o.host, in.Host))
	out.Header.Set("X-Real-Ip", o.visitor.Addr().String())
}

// maxHost is the longest host that a proxy may report, a name with a port.
const maxHost = 253 + len(":65535")

// hostPattern says whether a text looks like what a Host header has.
func hostPattern(host string) bool {
	if host == "" || len(host) > maxHost {
		return false
	}
	for _, c := range []byte(host) {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '-', c == '.', c == '_', c == ':', c == '[', c == ']':
		default:
			return false
		}
	}
	return true
}
