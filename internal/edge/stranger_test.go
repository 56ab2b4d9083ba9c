package edge_test

import (
	"net"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/mysocketio/mysocket-injector/internal/edge/edgetest"
)

// strangers make connections, agree on keys, and send many packets that have no place before a login.
const strangers = `
import logging, socket, sys, paramiko
from paramiko.message import Message
logging.getLogger("paramiko").addHandler(logging.NullHandler())
for i in range(int(sys.argv[3])):
    transport = paramiko.Transport(socket.create_connection((sys.argv[1], int(sys.argv[2]))))
    transport.start_client(timeout=20)
    for k in range(60):
        request = Message()
        request.add_byte(b"\x50")
        request.add_string(b"x" * 10)
        request.add_boolean(False)
        try:
            transport._send_message(request)
        except Exception:
            break
    transport.close()
`

// TestStrangersLeaveNothingBehind: whoever can't log in must not cost memory for good.
func TestStrangersLeaveNothingBehind(t *testing.T) {
	needParamiko(t)
	edge := edgetest.Start(t)
	host, port, err := net.SplitHostPort(edge.SSHAddress)
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), python, "-c", strangers, host, port, "20").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	stacks := make([]byte, 8<<20)
	var left int
	deadline := time.NewTimer(20 * time.Second)
	defer deadline.Stop()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		if left = strings.Count(string(stacks[:runtime.Stack(stacks, true)]), "handshakeTransport).readLoop("); left == 0 {
			return
		}
		select {
		case <-tick.C:
		case <-deadline.C:
			t.Fatalf("%d of 20 connections left a goroutine behind", left)
		}
	}
}
