package edgeproxy_test

import (
	"net/url"
	"strings"
	"testing"

	"github.com/mysocketio/mysocket-injector/internal/edgeproxy"
)

func TestCheck(t *testing.T) {
	for text, want := range map[string]string{
		"http://proxy.example:3128":     "",
		"https://proxy.example":         "",
		"socks5://[2001:db8::1]:1080":   "",
		"socks5h://proxy.example/":      "",
		"ftp://proxy.example":           `scheme is "ftp"`,
		"http://me:s3cret@proxy:3128":   "user name or password",
		"http://:3128":                  "SCHEME://HOST:PORT",
		"http://proxy.example:3128/x":   "SCHEME://HOST:PORT",
		"http://proxy.example:3128/?x=": "SCHEME://HOST:PORT",
	} {
		u, err := url.Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		err = edgeproxy.Check(u)
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
		if err != nil && strings.Contains(err.Error(), "s3cret") {
			t.Errorf("%s: the error shows the password: %v", text, err)
		}
	}
}
