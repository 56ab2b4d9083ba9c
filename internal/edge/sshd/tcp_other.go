//go:build !linux

package sshd

import (
	"net"
	"time"
)

// tuneTCP turns TCP keepalive on. TCP_USER_TIMEOUT is Linux's; elsewhere the SSH keepalive alone finds dead peers.
func tuneTCP(conn net.Conn) error {
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		return nil
	}
	return tcp.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: userTimeout / 2, Interval: 5 * time.Second, Count: 3})
}
