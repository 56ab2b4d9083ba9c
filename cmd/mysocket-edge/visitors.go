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
	fs.StringVar(&v.ACMEDirectory, "acme-directory", "", "`URL` of the directory of an ACME authority from which public names get certificates;\ngiving it means that you agree to the authority's terms")
	fs.StringVar(&v.ACMEEmail, "acme-email", "", "e-mail `address` for the account at the ACME authority")
	fs.StringVar(&v.ACMECA, "acme-ca", "", "`file` with roots (PEM) for the ACME authority's own HTTPS, beside the system's")
}
