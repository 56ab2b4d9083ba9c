package front

import (
	"net"
	"net/http"
	"strconv"
)

// toHTTPS answers a request that came in plain HTTP with a redirect to the HTTPS front, if the operator wants that. It says
// whether it did. The host is that of a socket: nobody can be sent elsewhere with a Host header.
func (w *Web) toHTTPS(rw http.ResponseWriter, r *http.Request, v *visit) bool {
	if w.cfg.RedirectPort == nil || r.TLS != nil {
		return false
	}
	host := v.socket.DNSName
	if port := w.cfg.RedirectPort(); port != 443 {
		host = net.JoinHostPort(host, strconv.Itoa(port))
	}
	target := r.URL.EscapedPath()
	if target == "" || target == "*" {
		target = "/"
	}
	if r.URL.RawQuery != "" || r.URL.ForceQuery {
		target += "?" + r.URL.RawQuery
	}
	rw.Header().Set("Location", "https://"+host+target)
	// 308 rather than 301: a POST must stay one.
	w.page(rw, r, v, http.StatusPermanentRedirect, "This socket is served over HTTPS.")
	return true
}
