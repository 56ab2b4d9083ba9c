package sidecar

import (
	"errors"
	"net/http"
	"unicode/utf8"

	"github.com/mysocketio/mysocket-injector/internal/sidecar/gatewayclient"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/tunnel"
)

// hint says what a person can do about an error, or nothing when the error says all.
func hint(err error) string {
	switch tunnel.FailedStep(err) {
	case tunnel.StepDNS:
		return "check the edge's address in the control plane's settings, and the pod's DNS"
	case tunnel.StepTCP:
		return "check that the edge runs, and that network policies let this pod reach it"
	case tunnel.StepProxy:
		return "check the chart's sidecar.edgeProxy, that this pod reaches the proxy, and that the proxy may reach the edge's port"
	case tunnel.StepHostKey:
		return "if the edge's key was changed on purpose, give the new one to the control plane"
	case tunnel.StepAuth:
		return "a new certificate is asked for before the next attempt; if this stays, compare the clocks of edge and cluster"
	case tunnel.StepForward:
		return "the tunnel is asked for again before the next attempt"
	case tunnel.StepHandshake:
		return "check that the edge's address is that of its SSH server"
	}
	if refused, ok := errors.AsType[*gatewayclient.RefusedError](err); ok {
		switch refused.Status {
		case http.StatusUnauthorized:
			return "the gateway does not accept this pod's token; check that the pod was injected by this control plane"
		case http.StatusForbidden:
			return "check that the Service is still enabled and selects this pod"
		}
	}
	return ""
}

// cutUTF8 returns at most n bytes of s without cutting a character in two.
func cutUTF8(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n]
}
