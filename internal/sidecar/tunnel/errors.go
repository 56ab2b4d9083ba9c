package tunnel

import (
	"errors"
	"fmt"
	"io"
	"strings"

	"golang.org/x/crypto/ssh"
)

// Step is a part of connecting. Errors name it, so that a person knows where to look.
type Step string

// The steps of connecting, in their order.
const (
	StepDNS       Step = "dns"
	StepTCP       Step = "tcp"
	StepProxy     Step = "proxy" // instead of the first two
	StepHandshake Step = "ssh handshake"
	StepHostKey   Step = "host key"
	StepAuth      Step = "auth"
	StepForward   Step = "forward"
)

// StepError says which step of connecting failed, and why.
type StepError struct {
	Step Step
	Err  error
}

func (e *StepError) Error() string { return fmt.Sprintf("%s: %v", e.Step, e.Err) }

func (e *StepError) Unwrap() error { return e.Err }

// FailedStep returns the step that err failed in, or "" when err is no [*StepError].
func FailedStep(err error) Step {
	if failed, ok := errors.AsType[*StepError](err); ok {
		return failed.Step
	}
	return ""
}

// HostKeyError says that the edge showed a key that is not pinned.
type HostKeyError struct {
	Address string
	Got     string   // fingerprint
	Pinned  []string // fingerprints
}

func (e *HostKeyError) Error() string {
	return fmt.Sprintf("the edge %s showed host key %s, but only %s may be trusted: either its key was changed without "+
		"telling the control plane, or something else answers at this address", e.Address, e.Got, strings.Join(e.Pinned, ", "))
}

func fingerprint(key ssh.PublicKey) string {
	return key.Type() + " " + ssh.FingerprintSHA256(key)
}

// The reasons of losing a connection, also labels of metrics.
const (
	LostClosed    = "closed"
	LostKeepalive = "keepalive"
	LostFlood     = "flood"
)

// LostError says why a connection that worked is gone.
type LostError struct {
	Reason string
	Err    error
}

func (e *LostError) Error() string {
	switch {
	case e.Reason == LostKeepalive, e.Reason == LostFlood:
		return e.Err.Error()
	case errors.Is(e.Err, io.EOF):
		return "the edge closed the connection"
	}
	return fmt.Sprintf("the connection to the edge was lost: %v", e.Err)
}

func (e *LostError) Unwrap() error { return e.Err }
