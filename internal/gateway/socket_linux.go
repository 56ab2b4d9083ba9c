package gateway

import (
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// deadAfter is when a peer that acknowledges nothing is taken for dead: three heartbeats.
const deadAfter = 30 * time.Second

// noteDeadPeers makes writes fail to a peer that vanished. Without it the kernel tries for a quarter of an hour.
func noteDeadPeers(c net.Conn) {
	if socket, err := socketOf(c); err == nil {
		_ = socket.Control(func(fd uintptr) {
			_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(deadAfter.Milliseconds())) // only slower without
		})
	}
}
