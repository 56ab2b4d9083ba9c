package main

import (
	"bufio"
	"context"
	"io"
	"net/http"
	"testing"
	"time"
)

// TestWebSocket has the app end, or the visitor close, while a WebSocket is open: both sides say so before the connection ends.
func TestWebSocket(t *testing.T) {
	for _, tc := range []struct {
		name   string
		end    bool
		status string
	}{
		{"the app ends", true, "\x03\xe9"},        // 1001
		{"the visitor closes", false, "\x03\xe8"}, // 1000
	} {
		t.Run(tc.name, func(t *testing.T) {
			addr := freeAddress(t)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			ended := make(chan error, 1)
			go func() { ended <- serve(ctx, addr) }()
			conn := dial(t, addr)
			defer func() { _ = conn.Close() }()
			_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
			send := func(text string) {
				t.Helper()
				if _, err := io.WriteString(conn, text); err != nil {
					t.Fatal(err)
				}
			}
			send("GET /ws?ms=60000 HTTP/1.1\r\nHost: demo\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")
			r := bufio.NewReader(conn)
			res, err := http.ReadResponse(r, nil)
			if err != nil {
				t.Fatal(err)
			}
			// The sample handshake of RFC 6455.
			if got := res.Header.Get("Sec-WebSocket-Accept"); res.StatusCode != http.StatusSwitchingProtocols || got != "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" {
				t.Fatalf("got %s, %q", res.Status, got)
			}
			if op, message := readFrame(t, r); op != opText || message[:2] != "0 " {
				t.Errorf("the first message is %#x %q", op, message)
			}
			closing := "\x88\x82\x00\x00\x00\x00" + tc.status // with a mask of zeroes
			if tc.end {
				cancel()
			} else {
				send("\x81\x82\x01\x01\x01\x01\x00\x00" + closing) // a message before
			}
			if op, message := readFrame(t, r); op != opClose || message != tc.status {
				t.Errorf("the last message is %#x %q", op, message)
			}
			if tc.end {
				send(closing)
			}
			if rest, err := io.ReadAll(r); err != nil || len(rest) > 0 {
				t.Errorf("then %q, %v", rest, err)
			}
			cancel()
			if err := <-ended; err != nil {
				t.Error(err)
			}
		})
	}
}

func readFrame(t *testing.T, r io.Reader) (op byte, message string) {
	t.Helper()
	var head [2]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, head[1])
	if _, err := io.ReadFull(r, b); err != nil {
		t.Fatal(err)
	}
	return head[0] &^ 0x80, string(b)
}
