package sshd

import (
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"
)

func variable(name, value string) []byte {
	return ssh.Marshal(struct{ Name, Value string }{name, value})
}

func TestParseName(t *testing.T) {
	longest := strings.Repeat("n", 63) + "/" + strings.Repeat("p", 253)
	for _, c := range []struct {
		what    string
		payload []byte
		name    string
	}{
		{"a pod", variable(nameVariable, "shop/web-7d9c5-x2x4b"), "shop/web-7d9c5-x2x4b"},
		{"a host", variable(nameVariable, "Db_1.example.com"), "Db_1.example.com"},
		{"the longest", variable(nameVariable, longest), longest},
		{"too long", variable(nameVariable, longest+"x"), ""},
		{"nothing", variable(nameVariable, ""), ""},
		{"another variable", variable("LANG", "C"), ""},
		{"a space", variable(nameVariable, "a b"), ""},
		{"a line", variable(nameVariable, "a\nb"), ""},
		{"a last line", variable(nameVariable, "a\n"), ""},
		{"HTML", variable(nameVariable, "<b>"), ""},
		{"a control character", variable(nameVariable, "a\x1b[31m"), ""},
		{"a dash first", variable(nameVariable, "-a"), ""},
		{"no request", []byte{0, 0}, ""},
		{"too much", append(variable(nameVariable, "a"), 0), ""},
		{"no bytes", nil, ""},
	} {
		if name, ok := parseName(c.payload); name != c.name || ok != (c.name != "") {
			t.Errorf("%s: %q, %v", c.what, name, ok)
		}
	}
}

func FuzzParseName(f *testing.F) {
	f.Add(variable(nameVariable, "shop/web-1"))
	f.Add([]byte{0, 0, 0, 1})
	f.Fuzz(func(t *testing.T, payload []byte) {
		name, ok := parseName(payload)
		if ok != (name != "") || len(name) > maxName || strings.ContainsAny(name, "<>&\"' \n\r\x1b") {
			t.Errorf("%q gives %q, %v", payload, name, ok)
		}
	})
}
