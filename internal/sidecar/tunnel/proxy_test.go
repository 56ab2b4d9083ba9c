package tunnel_test

import (
	"bufio"
	"encoding/binary"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/mysocketio/mysocket-injector/internal/sidecar/tunnel"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/tunnel/sshtest"
)

// splice passes bytes both ways until one side ends. What in has read already goes first.
func splice(visitor net.Conn, in io.Reader, address string) {
	to, err := net.Dial("tcp", address)
	if err != nil {
		return
	}
	var running sync.WaitGroup
	running.Go(func() { _, _ = io.Copy(to, in); _ = to.Close() })
	_, _ = io.Copy(visitor, to)
	_ = visitor.Close()
	running.Wait()
}

// connectProxy answers CONNECT. With glued, it sends its answer together with the first bytes of the server.
func connectProxy(t *testing.T, answer string, asked *string, glued bool) string {
	at := listenApp(t, func(conn *net.TCPConn) {
		in := bufio.NewReader(conn)
		req, err := http.ReadRequest(in)
		if err != nil || req.Method != http.MethodConnect {
			return
		}
		*asked = req.Host
		if !strings.Contains(answer, " 200 ") || !glued {
			_, _ = io.WriteString(conn, answer)
		}
		if !strings.Contains(answer, " 200 ") {
			return
		}
		if glued {
			to, err := net.Dial("tcp", req.Host)
			if err != nil {
				return
			}
			first := make([]byte, 4)
			if _, err := io.ReadFull(to, first); err != nil {
				return
			}
			_, _ = io.WriteString(conn, answer+string(first))
			var running sync.WaitGroup
			running.Go(func() { _, _ = io.Copy(to, in); _ = to.Close() })
			_, _ = io.Copy(conn, to)
			_ = conn.Close()
			running.Wait()
			return
		}
		splice(conn, in, req.Host)
	})
	return at.String()
}

// socksProxy speaks as much of SOCKS5 as a client without a password needs; code is its answer, 0 for success.
func socksProxy(t *testing.T, code byte, asked *string) string {
	at := listenApp(t, func(conn *net.TCPConn) {
		head := make([]byte, 2)
		if _, err := io.ReadFull(conn, head); err != nil || head[0] != 5 {
			return
		}
		if _, err := io.CopyN(io.Discard, conn, int64(head[1])); err != nil {
			return
		}
		_, _ = conn.Write([]byte{5, 0})
		req := make([]byte, 5)
		if _, err := io.ReadFull(conn, req); err != nil {
			return
		}
		var host string
		switch req[3] {
		case 1:
			rest := make([]byte, 3)
			_, _ = io.ReadFull(conn, rest)
			host = net.IP(append([]byte{req[4]}, rest...)).String()
		case 3:
			name := make([]byte, req[4])
			_, _ = io.ReadFull(conn, name)
			host = string(name)
		default:
			return
		}
		port := make([]byte, 2)
		_, _ = io.ReadFull(conn, port)
		*asked = net.JoinHostPort(host, strconv.Itoa(int(binary.BigEndian.Uint16(port))))
		_, _ = conn.Write([]byte{5, code, 0, 1, 0, 0, 0, 0, 0, 0})
		if code == 0 {
			splice(conn, conn, *asked)
		}
	})
	return at.String()
}

func TestProxies(t *testing.T) {
	const yes = "HTTP/1.1 200 Connection established\r\nVia: test\r\n\r\n"
	for _, tc := range []struct {
		name, scheme string
		start        func(*testing.T, *string) string
		want         string // in the error; empty for none
	}{
		{"CONNECT", "http", func(t *testing.T, asked *string) string { return connectProxy(t, yes, asked, false) }, ""},
		{"CONNECT, answered together with the server's first bytes", "http", func(t *testing.T, asked *string) string { return connectProxy(t, yes, asked, true) }, ""},
		{"SOCKS5", "socks5", func(t *testing.T, asked *string) string { return socksProxy(t, 0, asked) }, ""},
		{"SOCKS5 with names", "socks5h", func(t *testing.T, asked *string) string { return socksProxy(t, 0, asked) }, ""},
		{"CONNECT refused", "http", func(t *testing.T, asked *string) string {
			return connectProxy(t, "HTTP/1.1 403 Forbidden\r\n\r\n", asked, false)
		}, `answers CONNECT with "403 Forbidden"`},
		{"no HTTP", "http", func(t *testing.T, asked *string) string { return connectProxy(t, "go away\r\n\r\n", asked, false) }, "answer to CONNECT can't be read"},
		{"an endless answer", "http", func(t *testing.T, asked *string) string {
			return connectProxy(t, "HTTP/1.1 201 "+strings.Repeat("x", 1<<20), asked, false)
		}, "it is longer than"},
		{"SOCKS5 refused", "socks5", func(t *testing.T, asked *string) string { return socksProxy(t, 2, asked) }, "connection not allowed by ruleset"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			server := sshtest.Start(t)
			cfg := config(server, sshtest.NewKey(t), listenApp(t, echo))
			var asked string
			cfg.Proxy = &url.URL{Scheme: tc.scheme, Host: tc.start(t, &asked)}
			tun, err := tunnel.Connect(t.Context(), cfg)
			if tc.want != "" {
				if err == nil {
					tun.Close()
					t.Fatal("connected")
				}
				if tunnel.FailedStep(err) != tunnel.StepProxy || !strings.Contains(err.Error(), tc.want) || !strings.Contains(err.Error(), cfg.Proxy.String()) {
					t.Errorf("the error is %v; want one of the step proxy with %q", err, tc.want)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer tun.Close()
			if asked != server.Address {
				t.Errorf("the proxy was asked for %s, want %s", asked, server.Address)
			}
			conn := server.Await(t)
			channel, err := conn.Visit(conn.AwaitForward(t))
			if err != nil {
				t.Fatal(err)
			}
			if _, err := io.WriteString(channel, "hello"); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, 5)
			if _, err := io.ReadFull(channel, got); err != nil || string(got) != "hello" {
				t.Errorf("got %q, %v", got, err)
			}
		})
	}
}
