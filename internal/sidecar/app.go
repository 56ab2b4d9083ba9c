package sidecar

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"strconv"
)

// podApp is the app as it is reached at the pod's own address.
type podApp struct{ ip string }

// dial connects to a port of the pod.
func (a podApp) dial(ctx context.Context, port int32) (*net.TCPConn, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", net.JoinHostPort(a.ip, strconv.Itoa(int(port))))
	if err != nil {
		return nil, err
	}
	app, ok := conn.(*net.TCPConn)
	if !ok {
		return nil, errors.Join(errors.New("the connection to the app is not TCP"), conn.Close())
	}
	return app, nil
}

// check connects to a port of the pod and hangs up: an app that accepts counts as well. An app that expects a header of the
// PROXY protocol gets that of a check, since many log a connection without one as an error.
func (a podApp) check(ctx context.Context, port int32, proxyProtocol string) error {
	conn, err := a.dial(ctx, port)
	if err != nil {
		return err
	}
	if header := proxyHeader(proxyProtocol, netip.AddrPort{}, conn.RemoteAddr()); header != nil {
		_, _ = conn.Write(header) // it has accepted; what it does next is not the question
	}
	return conn.Close()
}
