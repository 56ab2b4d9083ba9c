package sshd

import (
	"regexp"

	"golang.org/x/crypto/ssh"
)

const (
	// nameVariable is the one environment variable that a session takes: what the client calls itself, such as the namespace and the name
	// of its pod. OpenSSH sends it with -o SetEnv=MYSOCKET_NAME=shop/web-1.
	nameVariable = "MYSOCKET_NAME"
	// maxName has room for the longest namespace and the longest name of a pod.
	maxName = 63 + 1 + 253
)

var namePattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._/-]*$`)

// parseName reads an env request (RFC 4254, 6.4). ok is false for other variables, and for a name that is none.
func parseName(payload []byte) (name string, ok bool) {
	var r struct{ Name, Value string }
	if err := ssh.Unmarshal(payload, &r); err != nil || r.Name != nameVariable || len(r.Value) > maxName || !namePattern.MatchString(r.Value) {
		return "", false
	}
	return r.Value, true
}

// setName gives the connection's tunnels their name, those that are to come too. Only the first name counts.
func (c *connection) setName(name string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.name != "" {
		return false
	}
	c.name = name
	for _, f := range c.forwards {
		f.tunnel.SetName(name)
	}
	c.log.Info("tunnel client has a name", "name", name)
	return true
}
