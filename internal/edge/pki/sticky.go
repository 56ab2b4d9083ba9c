package pki

import (
	"crypto/hmac"
	"crypto/sha256"
)

// StickyKey is the secret that visitors' cookies are made with. It is derived from the token key, so that it is the same
// after a restart, and on all edges that share a state.
func (k *Keys) StickyKey() []byte {
	mac := hmac.New(sha256.New, k.TokenKey)
	_, _ = mac.Write([]byte("sticky cookie"))
	return mac.Sum(nil)
}
