package main

import (
	"bufio"
	"context"
	"io"
	"net"
	"strings"
	"testing"
	"testing/iotest"
	"time"
)

func TestReadHeader(t *testing.T) {
	const v4 = signatureV2 + "\x21\x11\x00\x0c" + "\xc0\x00\x02\x07\x0a\xf4\x00\x05" + "\xd4\x31\x1f\x41"
	for _, tc := range []struct{ name, in, want string }{
		{"v1", "PROXY TCP4 192.0.2.7 10.244.0.5 54321 8001\r\n", "v1 192.0.2.7:54321 10.244.0.5:8001"},
		{"v1 IPv6", "PROXY TCP6 2001:db8::7 fd00::5 54321 8001\r\n", "v1 [2001:db8::7]:54321 [fd00::5]:8001"},
		{"v1 unknown", "PROXY UNKNOWN\r\n", "v1 unknown unknown"},
		{"v2", v4, "v2 192.0.2.7:54321 10.244.0.5:8001"},
		{"v2 with more", strings.Replace(v4, "\x00\x0c", "\x00\x0f", 1) + "\x04\x00\x00", "v2 192.0.2.7:54321 10.244.0.5:8001"},
		{"v2 local", signatureV2 + "\x20\x00\x00\x00", "v2 unknown unknown"},
		{"v2 too short", signatureV2 + "\x21\x11\x00\x04\x01\x02\x03\x04", ""},
		{"v2 datagrams", signatureV2 + "\x21\x12\x00\x00", ""},
		{"HTTP", "GET / HTTP/1.1\r\nHost: demo\r\n\r\n", ""},
		{"no end", strings.Repeat("x", 2*maxV1), ""},
		{"cut short", "PROXY TCP4 192.0.2.7", ""},
		{"no address", "PROXY TCP4 192.0.2 10.244.0.5 54321 8001\r\n", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tail := "hello"
			if tc.want == "" {
				tail = ""
			}
			r := bufio.NewReader(iotest.OneByteReader(strings.NewReader(tc.in + tail)))
			got, err := readHeader(r)
			if (err == nil) != (tc.want != "") || err == nil && got != tc.want {
				t.Fatalf("got %q, %v, want %q", got, err, tc.want)
			}
			if left, _ := io.ReadAll(r); err == nil && string(left) != tail {
				t.Errorf("%q is left", left)
			}
		})
	}
}

func TestServeProxied(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- serveProxied(ctx, l) }()
	silent := dial(t, l.Addr().String()) // must not keep it from ending
	defer func() { _ = silent.Close() }()
	conn := dial(t, l.Addr().String())
	defer func() { _ = conn.Close() }()
	_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.WriteString(conn, "PROXY TCP4 192.0.2.7 10.244.0.5 54321 8001\r\nhello"); err != nil {
		t.Fatal(err)
	}
	if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(conn); err != nil || string(got) != "v1 192.0.2.7:54321 10.244.0.5:8001\nhello" {
		t.Errorf("got %q, %v", got, err)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
