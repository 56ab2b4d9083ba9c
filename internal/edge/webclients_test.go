package edge_test

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/mysocketio/mysocket-injector/internal/edge/edgetest"
)

// run runs a program and returns what it prints.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatalf("%v; make need-test installs it", err)
	}
	out, err := exec.CommandContext(t.Context(), path, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v: %s", name, args, err, out)
	}
	return string(out)
}

// TestCurlVisits asks as users do, over each version of HTTP, up and down.
func TestCurlVisits(t *testing.T) {
	e := edgetest.Start(t)
	a := login(t, e)
	s := a.newSocket("http")
	a.connect(s, appAddress(newApp(t, "app")))
	dir := t.TempDir()
	ca, big := filepath.Join(dir, "ca.pem"), filepath.Join(dir, "big")
	if err := os.WriteFile(ca, e.CAPEM, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(big, bytes.Repeat([]byte("0123456789abcdef"), 1<<16), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ scheme, flag, version string }{
		{"http", "--http1.0", "1"}, {"http", "--http1.1", "1.1"}, {"https", "--http1.1", "1.1"}, {"https", "--http2", "2"},
		// A plain connection is not upgraded to HTTP/2: curl goes on with HTTP/1.1.
		{"http", "--http2", "1.1"},
	} {
		base := []string{"-sS", "--max-time", "15", "--cacert", ca, c.flag, "--connect-to", s.DNSName + ":80:" + e.HTTPAddress,
			"--connect-to", s.DNSName + ":443:" + e.HTTPSAddress, "-w", "\n%{http_version} %{http_code}"}
		url := c.scheme + "://" + s.DNSName
		if out := run(t, "curl", append(base, url+"/")...); out != "Server: app\n\n"+c.version+" 200" {
			t.Errorf("%v: %q", c, out)
		}
		out := run(t, "curl", append(base, "-T", big, url+"/echo")...)
		if want := strings.Repeat("0123456789abcdef", 1<<16); !strings.Contains(out, want) || !strings.HasSuffix(out, c.version+" 200") {
			t.Errorf("%v: an upload of 1 MiB came back with %d bytes", c, len(out))
		}
	}
}

// TestNghttp has nghttp ask for several things at once on one connection.
func TestNghttp(t *testing.T) {
	e := edgetest.Start(t)
	a := login(t, e)
	s := a.newSocket("http")
	a.connect(s, appAddress(newApp(t, "app")))
	args := []string{"--timeout=15", "--stat", "-H", ":authority: " + s.DNSName}
	for i := range 10 {
		args = append(args, fmt.Sprintf("https://%s/%d", e.HTTPSAddress, i))
	}
	out := run(t, "nghttp", args...)
	if n := strings.Count(out, "Server: app\n"); n != 10 {
		t.Errorf("%d of 10 answers came: %s", n, out)
	}
	if n := strings.Count(out, " 200 "); n != 10 {
		t.Errorf("%d of 10 answers were 200: %s", n, out)
	}
}

// chat is a WebSocket app, and its visitor: Debian's python3-websockets.
const (
	chatApp = `
import asyncio, websockets
async def echo(ws):
    async for message in ws:
        await ws.send(message)
async def main():
    async with websockets.serve(echo, "127.0.0.1", 0, max_size=None) as server:
        print(server.sockets[0].getsockname()[1], flush=True)
        await asyncio.Future()
asyncio.run(main())
`
	chatVisitor = `
import asyncio, ssl, sys, urllib.parse, websockets
url, host, port, ca = sys.argv[1:]
async def main():
    tls = {}
    if url.startswith("wss"):
        tls = {"ssl": ssl.create_default_context(cafile=ca), "server_hostname": urllib.parse.urlsplit(url).hostname}
    async with websockets.connect(url, host=host, port=int(port), max_size=None, **tls) as ws:
        for message in ["hello", b"\x00\xff" * 500000, ""] + ["%d" % i for i in range(50)]:
            await ws.send(message)
            got = await asyncio.wait_for(ws.recv(), 15)
            assert got == message, got[:100]
        pong = await ws.ping()
        await asyncio.wait_for(pong, 15)
    print("fine", ws.close_code)
asyncio.run(main())
`
)

func TestWebSocketClient(t *testing.T) {
	if _, err := os.Stat("/usr/lib/python3/dist-packages/websockets"); err != nil {
		t.Fatalf("needs the Debian package python3-websockets: %v; make need-test installs it", err)
	}
	e := edgetest.Start(t)
	a := login(t, e)
	s := a.newSocket("http")
	app := exec.CommandContext(t.Context(), python, "-c", chatApp)
	out, err := app.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := app.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = app.Process.Kill()
		_ = app.Wait()
	})
	port, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	a.connect(s, "127.0.0.1:"+strings.TrimSpace(port))
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, e.CAPEM, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ scheme, address string }{{"ws", e.HTTPAddress}, {"wss", e.HTTPSAddress}} {
		host, port, _ := strings.Cut(c.address, ":")
		if out := run(t, python, "-c", chatVisitor, c.scheme+"://"+s.DNSName+"/chat", host, port, ca); out != "fine 1000\n" {
			t.Errorf("%s: %s", c.scheme, out)
		}
	}
}

// Server-Sent Events, with curl: each is there before the app sends the next.
func TestCurlReadsEventsAtOnce(t *testing.T) {
	e := edgetest.Start(t)
	a := login(t, e)
	s := a.newSocket("http")
	next := make(chan struct{})
	a.connect(s, appAddress(newEventsApp(t, next)))
	for _, flag := range []string{"--http1.1", "--http2"} {
		cmd := exec.CommandContext(t.Context(), "curl", "-sSkN", "--max-time", "15", flag, "--connect-to", s.DNSName+":443:"+e.HTTPSAddress, "https://"+s.DNSName+"/")
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		reader := bufio.NewReader(out)
		for i := range 3 {
			line, err := reader.ReadString('\n')
			if err != nil || line != fmt.Sprintf("data: %d\n", i) {
				t.Fatalf("%s: got %q, %v", flag, line, err)
			}
			_, _ = reader.ReadString('\n')
			next <- struct{}{}
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("%s: %v", flag, err)
		}
	}
}
