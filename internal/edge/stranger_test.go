package edge_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/mysocketio/mysocket-injector/internal/edge"
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
	// Breaking the protocol ends a pause long before it is over, on a busy machine too.
	e := edgetest.Start(t, func(c *edge.Config) { c.Timings.LoginPause = 300 * time.Millisecond })
	host, port, err := net.SplitHostPort(e.SSHAddress)
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), python, "-c", strangers, host, port, "20").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	nothingLeft(t)
}

// TestAccountsLeaveNothingBehind: nor may somebody who can.
func TestAccountsLeaveNothingBehind(t *testing.T) {
	needParamiko(t)
	e := edgetest.Start(t)
	a := login(t, e)
	s := a.newSocket("http")
	host, port, err := net.SplitHostPort(e.SSHAddress)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := ssh.NewSignerFromKey(key)
	if err != nil {
		t.Fatal(err)
	}
	keyFile := filepath.Join(t.TempDir(), "id")
	for path, data := range map[string][]byte{
		keyFile:               pemOf(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}),
		keyFile + "-cert.pub": ssh.MarshalAuthorizedKey(a.certify("/socket/"+s.ID+"/signkey", signer).PublicKey()),
	} {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := exec.CommandContext(t.Context(), python, filepath.Join("testdata", "outofplace.py"), host, port, s.UserName, keyFile, keyFile+"-cert.pub", "20").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	nothingLeft(t)
}

// nothingLeft waits until x/crypto/ssh has no goroutine for any connection.
func nothingLeft(t *testing.T) {
	t.Helper()
	stacks := make([]byte, 8<<20)
	var left int
	defer func() {
		if t.Failed() {
			t.Logf("%d connections left a goroutine behind", left)
		}
	}()
	eventually(t, "the connections to leave nothing behind", func() bool {
		left = strings.Count(string(stacks[:runtime.Stack(stacks, true)]), "handshakeTransport).readLoop(")
		return left == 0
	})
}
