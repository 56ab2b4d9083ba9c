package tunnel

import (
	"testing"

	"golang.org/x/crypto/ssh"
)

func FuzzParseVisitor(f *testing.F) {
	f.Add([]byte{})
	f.Add(ssh.Marshal(visitor{"localhost", 4711, "192.0.2.7", 50000}))
	f.Add(ssh.Marshal(visitor{"", 0, "", 1 << 31}))
	f.Fuzz(func(t *testing.T, payload []byte) {
		v, err := parseVisitor(payload)
		if err != nil {
			return
		}
		if v.Port == 0 || v.Port > 65535 || v.OriginPort > 65535 || len(v.Host) > maxHostBytes || len(v.OriginHost) > maxHostBytes {
			t.Errorf("%+v was let through", v)
		}
	})
}

func FuzzBoundPort(f *testing.F) {
	f.Add([]byte{0, 0, 1, 2})
	f.Fuzz(func(t *testing.T, reply []byte) {
		if port, err := boundPort(reply); err == nil && (port == 0 || port > 65535) {
			t.Errorf("port %d was let through", port)
		}
	})
}

func TestHostKeyAlgorithmsAreThoseOfThePinnedKeys(t *testing.T) {
	got := hostKeyAlgorithms([]ssh.PublicKey{typedKey(ssh.KeyAlgoRSA), typedKey(ssh.KeyAlgoED25519), typedKey(ssh.KeyAlgoED25519)})
	want := []string{ssh.KeyAlgoRSASHA512, ssh.KeyAlgoRSASHA256, ssh.KeyAlgoED25519}
	if len(got) != len(want) {
		t.Fatalf("got %v, want %v", got, want)
	}
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("got %v, want %v", got, want)
		}
	}
}

// typedKey is a key of which only the type matters.
type typedKey string

func (k typedKey) Type() string                        { return string(k) }
func (k typedKey) Marshal() []byte                     { return []byte(k) }
func (k typedKey) Verify([]byte, *ssh.Signature) error { return nil }
