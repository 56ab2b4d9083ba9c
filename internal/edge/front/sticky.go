package front

import (
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"net/http"
	"strings"

	"github.com/mysocketio/mysocket-injector/internal/edge/metrics"
	"github.com/mysocketio/mysocket-injector/internal/edge/registry"
	"github.com/mysocketio/mysocket-injector/internal/edge/store"
)

// stickyCookie names, to the edge alone, the tunnel that a visitor's requests go to.
const stickyCookie = "mysocket-tunnel"

// sticky says whether visitors of the socket stick to a tunnel.
func sticky(s store.Socket) bool { return s.Tags[store.StickyTag] == store.StickyCookie }

// stickyValue is what the cookie has for a tunnel. Without the key nobody can tell the tunnel from it, nor make one up.
func (w *Web) stickyValue(t *registry.Tunnel) string {
	mac := hmac.New(sha256.New, w.cfg.StickyKey)
	_, _ = mac.Write([]byte(t.SocketID + "\x00" + t.TunnelID))
	return base64.RawURLEncoding.EncodeToString(mac.Sum(nil)[:16])
}

// takeStickyCookie removes the edge's cookie from a request's header, whether the socket is sticky or not, and returns its
// value. What others have put there stays as it is.
func takeStickyCookie(h http.Header) (value string) {
	lines := h["Cookie"]
	kept := lines[:0:0]
	for _, line := range lines {
		if !strings.Contains(line, stickyCookie) {
			kept = append(kept, line)
			continue
		}
		var parts []string
		for part := range strings.SplitSeq(line, ";") {
			name, v, _ := strings.Cut(part, "=")
			if strings.TrimSpace(name) == stickyCookie {
				value = strings.TrimSpace(v)
				continue
			}
			parts = append(parts, part)
		}
		if line = strings.TrimSpace(strings.Join(parts, ";")); line != "" {
			kept = append(kept, line)
		}
	}
	switch {
	case len(lines) == 0:
	case len(kept) == 0:
		delete(h, "Cookie")
	default:
		h["Cookie"] = kept
	}
	return value
}

// preferred is the choice of a visit's tunnel by its cookie; nil if it is to be chosen by load alone.
func (w *Web) preferred(v *visit) func(*registry.Tunnel) bool {
	if v.cookie == "" || !sticky(v.socket) {
		return nil
	}
	return func(t *registry.Tunnel) bool {
		return subtle.ConstantTimeCompare([]byte(v.cookie), []byte(w.stickyValue(t))) == 1
	}
}

// stick has the visitor come back to the tunnel that answered.
func (w *Web) stick(v *visit, h http.Header) {
	if !sticky(v.socket) || v.tunnel == nil {
		return
	}
	value := w.stickyValue(v.tunnel)
	switch v.cookie {
	case value:
		w.cfg.Metrics.Sticky(metrics.StickyKept)
		return
	case "":
		w.cfg.Metrics.Sticky(metrics.StickyNew)
	default:
		w.cfg.Metrics.Sticky(metrics.StickyMoved)
	}
	cookie := http.Cookie{Name: stickyCookie, Value: value, Path: "/", HttpOnly: true, Secure: v.secure, SameSite: http.SameSiteLaxMode}
	h.Add("Set-Cookie", cookie.String())
}
