package main

import (
	"flag"

	"github.com/mysocketio/mysocket-injector/internal/edge"
)

// visitorFlags are the flags that say how visitors come in.
func visitorFlags(fs *flag.FlagSet, v *edge.Visitors) {
	fs.StringVar(&v.TLSCert, "tls-cert", "", "`file` with a certificate for public names, and its chain (PEM); read again when it changes")
	fs.StringVar(&v.TLSKey, "tls-key", "", "`file` with the key of --tls-cert (PEM)")
	fs.BoolVar(&v.RedirectHTTP, "redirect-http", false, "answer visitors of the HTTP front with a redirect to HTTPS (308)")
}
