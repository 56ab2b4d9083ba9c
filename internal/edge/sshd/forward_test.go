package sshd

import (
	"slices"
	"testing"

	"golang.org/x/crypto/ssh"
)

func FuzzForwardRequest(f *testing.F) {
	for _, r := range []forwardRequest{{"localhost", 0}, {"127.0.0.1", 12345}, {"", 80}, {"example.com", 1}, {"localhost", 1 << 31}} {
		f.Add(ssh.Marshal(r))
	}
	f.Add([]byte(nil))
	f.Add([]byte{0, 0, 0, 9, 'l'})
	f.Add(append(ssh.Marshal(forwardRequest{"localhost", 0}), 1))
	f.Fuzz(func(t *testing.T, payload []byte) {
		r, err := parseForwardRequest(payload)
		if err == nil && (!slices.Contains(allowedHosts, r.Host) || r.Port > 65535) {
			t.Errorf("%q was taken as %+v", payload, r)
		}
	})
}

func TestUserID(t *testing.T) {
	for name, want := range map[string]string{
		"0123456789abcdef0123456789abcdef":     "01234567-89ab-cdef-0123-456789abcdef",
		"0123456789ABCDEF0123456789ABCDEF":     "01234567-89ab-cdef-0123-456789abcdef",
		"01234567-89ab-cdef-0123-456789abcdef": "", "root": "", "": "", "zz23456789abcdef0123456789abcdef": "",
	} {
		if got, err := userID(name); got != want || (err == nil) != (want != "") {
			t.Errorf("userID(%q) = %q, %v", name, got, err)
		}
	}
}

func TestBannerVersion(t *testing.T) {
	if got := bannerVersion("v1.2-rc 1\r\n"); got != "v1.2_rc_1__" {
		t.Errorf("got %q", got)
	}
}
