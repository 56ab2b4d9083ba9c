package mysocket

import (
	"fmt"
)

// Account is what the API is used with: an e-mail address and a password (the classic dialect is spoken), or an access
// token (the border0 dialect is).
type Account struct {
	Email    string
	Password string
	Token    string
}

// Credentials returns the account. It is called before every request, so that a change is picked up at once, also one
// from one kind to the other, and should be cheap. While it fails, a token that is still valid is used.
type Credentials func() (Account, error)

// The keys of the account's Secret.
const (
	KeyEmail    = "email"
	KeyPassword = "password"
	KeyToken    = "token"
)

// ParseAccount makes an account of what is in its Secret; get tells the value of a key and whether it is there. The
// error says which key is wrong, and no value.
func ParseAccount(get func(key string) (string, bool)) (Account, error) {
	var a Account
	given := map[string]bool{}
	for _, k := range []struct {
		key  string
		into *string
	}{{KeyEmail, &a.Email}, {KeyPassword, &a.Password}, {KeyToken, &a.Token}} {
		v, ok := get(k.key)
		if ok && v == "" {
			return Account{}, fmt.Errorf("the key %q of the account's Secret is empty", k.key)
		}
		*k.into, given[k.key] = v, ok
	}
	const allowed = `it must have either "email" and "password", or "token"`
	switch {
	case given[KeyToken] && (given[KeyEmail] || given[KeyPassword]):
		other := KeyEmail
		if !given[KeyEmail] {
			other = KeyPassword
		}
		return Account{}, fmt.Errorf("the account's Secret has the key %q and also %q; %s", KeyToken, other, allowed)
	case given[KeyToken]:
		return a, nil
	case !given[KeyEmail] && !given[KeyPassword]:
		return Account{}, fmt.Errorf("the account's Secret has none of the keys; %s", allowed)
	case !given[KeyEmail]:
		return Account{}, fmt.Errorf("the account's Secret has no key %q; %s", KeyEmail, allowed)
	case !given[KeyPassword]:
		return Account{}, fmt.Errorf("the account's Secret has no key %q; %s", KeyPassword, allowed)
	}
	return a, nil
}
