package front

import (
	"net/http"
	"slices"
	"strings"
	"testing"
)

func TestStickyCookieIsTakenOut(t *testing.T) {
	for _, c := range []struct {
		in, out []string
		value   string
	}{
		{nil, nil, ""},
		{[]string{"a=1; b=2"}, []string{"a=1; b=2"}, ""},
		{[]string{"mysocket-tunnel=x"}, nil, "x"},
		{[]string{"a=1; mysocket-tunnel=x; b=\"2;3\""}, []string{"a=1; b=\"2;3\""}, "x"},
		{[]string{"a=1;mysocket-tunnel=x"}, []string{"a=1"}, "x"},
		{[]string{"mysocket-tunnel=x; a=1"}, []string{"a=1"}, "x"},
		{[]string{"mysocket-tunnel=x; mysocket-tunnel=y"}, nil, "y"},
		{[]string{"a=1", "mysocket-tunnel=x", "b=2"}, []string{"a=1", "b=2"}, "x"},
		{[]string{"mysocket-tunnel2=x; a=mysocket-tunnel"}, []string{"mysocket-tunnel2=x; a=mysocket-tunnel"}, ""},
		{[]string{"mysocket-tunnel"}, nil, ""},
	} {
		h := http.Header{}
		if c.in != nil {
			h["Cookie"] = slices.Clone(c.in)
		}
		value := takeStickyCookie(h)
		if value != c.value || !slices.Equal(h["Cookie"], c.out) {
			t.Errorf("%q: value %q, left %q; want %q, %q", c.in, value, h["Cookie"], c.value, c.out)
		}
		if _, there := h["Cookie"]; there != (c.out != nil) {
			t.Errorf("%q: an empty Cookie header is left", c.in)
		}
	}
}

func FuzzStickyCookie(f *testing.F) {
	for _, seed := range []string{"a=1; mysocket-tunnel=x; b=2", "mysocket-tunnel", ";;mysocket-tunnel=;", "=", " mysocket-tunnel = x ;"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, line string) {
		h := http.Header{"Cookie": {line}}
		takeStickyCookie(h)
		for _, left := range h["Cookie"] {
			if len(left) > len(line) {
				t.Errorf("%q became %q", line, left)
			}
			for part := range strings.SplitSeq(left, ";") {
				if name, _, _ := strings.Cut(part, "="); strings.TrimSpace(name) == stickyCookie {
					t.Errorf("%q became %q", line, left)
				}
			}
		}
	})
}
