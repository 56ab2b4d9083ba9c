package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"
)

const (
	// headerLimit is how long a connection may take to send its header.
	headerLimit = 10 * time.Second
	maxV1       = 107 // bytes, the line's end included
	signatureV2 = "\r\n\r\n\x00\r\nQUIT\n"
)

// serveProxied takes connections that begin with a header of the PROXY protocol until ctx ends. Each is answered with one
// line, VERSION SOURCE DESTINATION, and then with what it sends.
func serveProxied(ctx context.Context, l net.Listener) error {
	slog.Info("listening for the PROXY protocol", "addr", l.Addr().String())
	var open sync.WaitGroup
	defer open.Wait()
	defer context.AfterFunc(ctx, func() { _ = l.Close() })()
	for {
		conn, err := l.Accept()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		open.Go(func() {
			defer func() { _ = conn.Close() }()
			defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
			if err := tellHeader(conn); err != nil {
				slog.Info("connection without a good header", "err", err)
			}
		})
	}
}

func tellHeader(conn net.Conn) error {
	_ = conn.SetReadDeadline(time.Now().Add(headerLimit))
	r := bufio.NewReader(conn)
	told, err := readHeader(r)
	if err != nil {
		return err
	}
	_ = conn.SetReadDeadline(time.Time{})
	if _, err := fmt.Fprintln(conn, told); err != nil {
		return err
	}
	_, err = io.Copy(conn, r)
	return err
}

// readHeader reads a header of either version and returns what the answer says of it.
func readHeader(r *bufio.Reader) (string, error) {
	start, err := r.Peek(len(signatureV2))
	if err != nil {
		return "", err
	}
	if string(start) == signatureV2 {
		return readV2(r)
	}
	var line []byte
	for len(line) < maxV1 && !strings.HasSuffix(string(line), "\r\n") {
		b, err := r.ReadByte()
		if err != nil {
			return "", err
		}
		line = append(line, b)
	}
	// PROXY TCP4 SOURCE DESTINATION SOURCEPORT DESTINATIONPORT
	words := strings.Split(strings.TrimSuffix(string(line), "\r\n"), " ")
	switch {
	case len(words) >= 2 && words[0] == "PROXY" && words[1] == "UNKNOWN":
		return "v1 unknown unknown", nil
	case len(words) == 6 && words[0] == "PROXY" && (words[1] == "TCP4" || words[1] == "TCP6"):
		source, err := netip.ParseAddrPort(net.JoinHostPort(words[2], words[4]))
		if err != nil {
			return "", err
		}
		destination, err := netip.ParseAddrPort(net.JoinHostPort(words[3], words[5]))
		return fmt.Sprintf("v1 %s %s", source, destination), err
	}
	return "", fmt.Errorf("%q is no header of the PROXY protocol", line)
}

func readV2(r *bufio.Reader) (string, error) {
	head := make([]byte, len(signatureV2)+4) // then version and command, family, length
	if _, err := io.ReadFull(r, head); err != nil {
		return "", err
	}
	command, family := head[12], head[13]
	rest := make([]byte, binary.BigEndian.Uint16(head[14:]))
	if _, err := io.ReadFull(r, rest); err != nil {
		return "", err
	}
	size := 4
	switch {
	case command == 0x20: // LOCAL
		return "v2 unknown unknown", nil
	case command == 0x21 && family == 0x21:
		size = 16
	case command != 0x21 || family != 0x11:
		return "", fmt.Errorf("version and command %#x, family %#x", command, family)
	}
	if len(rest) < 2*size+4 {
		return "", fmt.Errorf("%d bytes of addresses, want %d", len(rest), 2*size+4)
	}
	address := func(ip, port []byte) netip.AddrPort {
		a, _ := netip.AddrFromSlice(ip)
		return netip.AddrPortFrom(a, binary.BigEndian.Uint16(port))
	}
	return fmt.Sprintf("v2 %s %s", address(rest[:size], rest[2*size:]), address(rest[size:2*size], rest[2*size+2:])), nil
}
