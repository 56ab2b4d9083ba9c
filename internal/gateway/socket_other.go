//go:build !linux

package gateway

import "net"

// noteDeadPeers is for Linux. Elsewhere TCP's own patience decides.
func noteDeadPeers(net.Conn) {}
