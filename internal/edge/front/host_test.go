package front

import (
	"strings"
	"testing"
)

func TestHostName(t *testing.T) {
	for in, want := range map[string]string{
		"a.edge.test": "a.edge.test", "A.Edge.Test:8080": "a.edge.test", "a.edge.test.": "a.edge.test", "a.edge.test.:443": "a.edge.test",
		"": "", ":80": "", "[::1]:80": "[::1]", "[::1]": "[::1]", "10.0.0.1:80": "10.0.0.1",
	} {
		if got := hostName(in); got != want {
			t.Errorf("hostName(%q) = %q, want %q", in, got, want)
		}
	}
}

func FuzzHostName(f *testing.F) {
	for _, seed := range []string{"a.edge.test", "A:80", "[::1]:80", "a.", "::", "a:b:c", "\xff."} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, host string) {
		got := hostName(host)
		if len(got) > 3*len(host) {
			t.Errorf("%q became %q", host, got)
		}
		if got != strings.ToLower(got) {
			t.Errorf("%q became %q, which is not lower case", host, got)
		}
		if asciiOnly(host) != strings.ToValidUTF8(asciiOnly(host), "") {
			t.Errorf("%q is logged as %q", host, asciiOnly(host))
		}
	})
}
