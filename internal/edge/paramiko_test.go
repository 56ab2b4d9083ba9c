package edge_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/mysocketio/mysocket-injector/internal/edge/edgetest"
)

// paramiko is where Debian's package has it. Another Python may be first in the path.
const (
	python   = "/usr/bin/python3"
	paramiko = "/usr/lib/python3/dist-packages/paramiko"
)

func needParamiko(t testing.TB) {
	t.Helper()
	if _, err := os.Stat(paramiko); err != nil {
		t.Fatal("paramiko is missing: make need-test installs the Debian package python3-paramiko")
	}
}

// TestParamiko has paramiko do all that the classic client does: log in, make a socket with a tunnel, have a key signed, log
// in over SSH, forward, open a session with a terminal and a shell, serve visitors, and leave when the edge closes the session.
func TestParamiko(t *testing.T) {
	needParamiko(t)
	for _, c := range []struct{ key, signkey, bind string }{
		{"rsa", "tunnel", "localhost"},
		{"ecdsa", "tunnel", "127.0.0.1"},
		{"ecdsa", "socket", "localhost"},
		{"rsa", "socket", "127.0.0.1"},
	} {
		t.Run(c.key+" "+c.signkey+" "+c.bind, func(t *testing.T) {
			t.Parallel()
			e := edgetest.Start(t)
			ca := filepath.Join(t.TempDir(), "ca.pem")
			if err := os.WriteFile(ca, e.CAPEM, 0o600); err != nil {
				t.Fatal(err)
			}
			host, portText, err := net.SplitHostPort(e.SSHAddress)
			if err != nil {
				t.Fatal(err)
			}
			port, err := strconv.Atoi(portText)
			if err != nil {
				t.Fatal(err)
			}
			given, err := json.Marshal(map[string]any{
				"api": e.APIURL, "ca": ca, "email": e.Email, "password": e.Password, "ssh_host": host, "ssh_port": port,
				"host_key": strings.Fields(e.HostKey)[1], "key": c.key, "signkey": c.signkey, "bind": c.bind,
			})
			if err != nil {
				t.Fatal(err)
			}
			var out, faults lockedBuffer
			cmd := exec.CommandContext(t.Context(), python, filepath.Join("testdata", "classic.py"))
			cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(given), &out, &faults
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			exited := make(chan error, 1)
			ended := make(chan struct{})
			go func() {
				defer close(ended)
				exited <- cmd.Wait()
			}()
			t.Cleanup(func() {
				_ = cmd.Process.Kill()
				<-ended
				if t.Failed() {
					t.Logf("the client said:\n%s\n%s", out.String(), faults.String())
				}
			})
			said := func(line string) func() bool {
				return func() bool {
					select {
					case <-ended:
						return true // and what follows fails
					default:
						return strings.Contains(out.String(), line)
					}
				}
			}
			eventually(t, "the client to be ready", said("ready"))
			eventually(t, "its tunnel", func() bool { return len(e.Tunnels()) == 1 && len(e.Tunnels()[0].Tunnels) == 1 })
			name := e.Tunnels()[0].DNSName
			eventually(t, "the welcome", said("https://"+name))
			visitor := e.VisitorClient(t)
			for i := range 3 {
				if status, body := get(t, visitor, fmt.Sprintf("https://%s/number/%d", name, i)); status != 200 || body != "classic" {
					t.Errorf("got %d %q", status, body)
				}
				eventually(t, "a live line", said(fmt.Sprintf("GET /number/%d -> 200", i)))
			}
			e.Stop()
			if err := <-exited; err != nil {
				t.Errorf("the client ended with %v", err)
			}
			if text := out.String(); !strings.Contains(text, "closed 0") || strings.Contains(text, "mismatch") || strings.Count(text, "origin 127.0.0.1") != 3 {
				t.Error("the channels or the end of the session were not what a classic client expects")
			}
		})
	}
}
