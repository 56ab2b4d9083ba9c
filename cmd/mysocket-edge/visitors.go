package main

import (
	"flag"
	"fmt"
	"net/netip"
	"strings"

	"github.com/mysocketio/mysocket-injector/internal/edge"
)

// visitorFlags are the flags that say how visitors come in. What it returns must be called when they are parsed.
func visitorFlags(fs *flag.FlagSet, v *edge.Visitors) (finish func() error) {
	fs.StringVar(&v.TLSCert, "tls-cert", "", "`file` with a certificate for public names, and its chain (PEM); read again when it changes")
	fs.StringVar(&v.TLSKey, "tls-key", "", "`file` with the key of --tls-cert (PEM)")
	fs.BoolVar(&v.RedirectHTTP, "redirect-http", false, "answer visitors of the HTTP front with a redirect to HTTPS (308)")
	fs.StringVar(&v.ACMEDirectory, "acme-directory", "", "`URL` of the directory of an ACME authority from which public names get certificates;\ngiving it means that you agree to the authority's terms")
	fs.StringVar(&v.ACMEEmail, "acme-email", "", "e-mail `address` for the account at the ACME authority")
	fs.StringVar(&v.ACMECA, "acme-ca", "", "`file` with roots (PEM) for the ACME authority's own HTTPS, beside the system's")
	proxies := fs.String("trusted-proxies", "", "`networks` of proxies in front, such as 10.0.0.0/8,192.0.2.7: their X-Forwarded-For, X-Forwarded-Proto,\nX-Forwarded-Host and X-Real-Ip count")
	fronts := fs.String("proxy-protocol", "", "`fronts` (http, https, tcp; tls sockets are of tcp) where connections from --trusted-proxies begin with a\nheader of the PROXY protocol, version 1 or 2")
	return func() (err error) {
		for name := range strings.SplitSeq(*fronts, ",") {
			if name = strings.TrimSpace(name); name != "" {
				v.ProxyProtocol = append(v.ProxyProtocol, name)
			}
		}
		if v.TrustedProxies, err = edge.ParsePrefixes(*proxies); err != nil {
			v.TrustedProxies = make([]netip.Prefix, 1) // Already said; the rest is validated still.
			return fmt.Errorf("trusted-proxies: %w", err)
		}
		return nil
	}
}
