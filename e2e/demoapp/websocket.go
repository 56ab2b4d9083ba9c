package main

import (
	"bufio"
	"context"
	"crypto/sha1" // #nosec G505 -- RFC 6455 has it
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"
)

const (
	opText, opClose = 0x1, 0x8
	// goingAway is the status with which a WebSocket is closed when the app ends (RFC 6455, 7.4.1).
	goingAway = 1001
	// closeLimit is how long the other side may take to answer a close.
	closeLimit = 5 * time.Second
	maxMessage = 125
)

// webSockets are the WebSockets that are open. The server that they came from knows them no more.
type webSockets struct {
	ending context.Context
	open   sync.WaitGroup
}

// serve makes a request a WebSocket and sends a line every time, until the other side closes it or the app ends.
func (s *webSockets) serve(w http.ResponseWriter, r *http.Request, hostname string, every time.Duration) {
	key := r.Header.Get("Sec-WebSocket-Key")
	if !strings.EqualFold(r.Header.Get("Upgrade"), "websocket") || key == "" {
		http.Error(w, "want a WebSocket handshake", http.StatusUpgradeRequired)
		return
	}
	s.open.Add(1) // while the request is open, so the server waits for it
	defer s.open.Done()
	conn, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	defer func() { _ = conn.Close() }()
	_ = conn.SetDeadline(time.Time{})
	_, err = fmt.Fprintf(conn, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: %s\r\n\r\n", acceptKey(key))
	if err != nil {
		return
	}
	theirs := make(chan []byte, 1) // the status of their close; closed when nothing more can be read
	go func() {
		defer close(theirs)
		if status, err := readClose(buffered.Reader); err == nil {
			theirs <- status
		}
	}()
	s.talk(conn, theirs, hostname, every)
}

func (s *webSockets) talk(conn net.Conn, theirs <-chan []byte, hostname string, every time.Duration) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for i := 0; ; i++ {
		if _, err := conn.Write(frame(opText, fmt.Appendf(nil, "%d %s", i, hostname))); err != nil {
			return
		}
		select {
		case status, ok := <-theirs:
			if ok {
				_, _ = conn.Write(frame(opClose, status))
			}
			return
		case <-s.ending.Done():
			_ = conn.SetDeadline(time.Now().Add(closeLimit))
			if _, err := conn.Write(frame(opClose, binary.BigEndian.AppendUint16(nil, goingAway))); err != nil {
				return
			}
			if _, ok := <-theirs; !ok {
				slog.Warn("a WebSocket's close was not answered")
			}
			return
		case <-tick.C:
		}
	}
}

// acceptKey is the answer to a handshake's key (RFC 6455, 4.2.2).
func acceptKey(key string) string {
	sum := sha1.Sum([]byte(key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11")) // #nosec G401 -- RFC 6455 has it
	return base64.StdEncoding.EncodeToString(sum[:])
}

// frame is a whole message of at most maxMessage bytes, as a server sends it.
func frame(op byte, message []byte) []byte {
	return append([]byte{0x80 | op, byte(len(message))}, message...)
}

// readClose reads a client's messages up to its close, whose status it returns.
func readClose(r *bufio.Reader) ([]byte, error) {
	for {
		var head [6]byte // two bytes and the mask
		if _, err := io.ReadFull(r, head[:]); err != nil {
			return nil, err
		}
		size := head[1] & 0x7f
		if head[1]&0x80 == 0 || size > maxMessage {
			return nil, fmt.Errorf("a message without a mask, or of more than %d bytes", maxMessage)
		}
		message := make([]byte, size)
		if _, err := io.ReadFull(r, message); err != nil {
			return nil, err
		}
		for i := range message {
			message[i] ^= head[2+i%4]
		}
		if head[0]&0xf == opClose {
			return message, nil
		}
	}
}
