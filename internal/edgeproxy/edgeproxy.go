// Package edgeproxy says what the address of a proxy to the edge may be: the control plane, which puts it into pods, and the
// sidecar, which connects through it, must agree. It must not connect to anything.
package edgeproxy

import (
	"errors"
	"fmt"
	"net/url"
)

// The schemes of proxies. With each the proxy resolves the edge's name.
const (
	HTTP    = "http"
	HTTPS   = "https"
	SOCKS5  = "socks5"
	SOCKS5H = "socks5h"
)

// Check says what is wrong with the address of a proxy. Credentials are refused: whoever may look at a pod reads them.
func Check(u *url.URL) error {
	if u.User != nil {
		return errors.New("the proxy's address has a user name or password in it, which everybody who may read pods would see; only proxies without are supported")
	}
	switch u.Scheme {
	case HTTP, HTTPS, SOCKS5, SOCKS5H:
	default:
		return fmt.Errorf("the proxy's scheme is %q; it must be SCHEME://HOST:PORT with http, https, socks5 or socks5h", u.Scheme)
	}
	if u.Hostname() == "" || u.Path != "" && u.Path != "/" || u.RawQuery != "" || u.Fragment != "" {
		return errors.New("the proxy's address must be SCHEME://HOST:PORT, and nothing after")
	}
	return nil
}
