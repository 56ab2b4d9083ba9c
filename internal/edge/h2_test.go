package edge_test

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/mysocketio/mysocket-injector/internal/edge/edgetest"
)

// h2Visitor speaks HTTP/2 in frames of its own, as no client library would.
type h2Visitor struct {
	t      *testing.T
	conn   *tls.Conn
	framer *http2.Framer
}

func newH2Visitor(t *testing.T, e *edgetest.Edge, name string) *h2Visitor {
	t.Helper()
	conn, err := tls.Dial("tcp", e.HTTPSAddress, &tls.Config{RootCAs: e.CAPool(), ServerName: name, NextProtos: []string{"h2"}, MinVersion: tls.VersionTLS12})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(patience))
	v := &h2Visitor{t: t, conn: conn, framer: http2.NewFramer(conn, conn)}
	v.framer.AllowIllegalWrites = true
	v.framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	if _, err := io.WriteString(conn, http2.ClientPreface); err != nil {
		t.Fatal(err)
	}
	if err := v.framer.WriteSettings(); err != nil {
		t.Fatal(err)
	}
	return v
}

// ask sends a request on stream 1 and returns the status, or "reset" or "closed".
func (v *h2Visitor) ask(fields [][2]string, body string) string {
	v.t.Helper()
	var block bytes.Buffer
	encoder := hpack.NewEncoder(&block)
	for _, f := range fields {
		_ = encoder.WriteField(hpack.HeaderField{Name: f[0], Value: f[1]})
	}
	_ = v.framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block.Bytes(), EndHeaders: true, EndStream: body == ""})
	if body != "" {
		_ = v.framer.WriteData(1, true, []byte(body))
	}
	for {
		frame, err := v.framer.ReadFrame()
		if err != nil {
			var timeout interface{ Timeout() bool }
			if errors.As(err, &timeout) && timeout.Timeout() {
				v.t.Fatal("no answer")
			}
			return "closed"
		}
		switch frame := frame.(type) {
		case *http2.MetaHeadersFrame:
			return frame.PseudoValue("status")
		case *http2.RSTStreamFrame:
			return "reset"
		case *http2.GoAwayFrame:
			return "closed"
		}
	}
}

// What HTTP/2 can carry and HTTP/1.1 would read as something else does not reach the app, which gets HTTP/1.1.
func TestSmuggledOverHTTP2(t *testing.T) {
	e := edgetest.Start(t)
	a := login(t, e)
	s := a.newSocket("http")
	app := newWireApp(t)
	r := a.connect(s, app.address)
	refused := []string{"reset", "closed", "400"}
	cases := []struct {
		name   string
		fields [][2]string
		body   string
		allow  []string
		app    string
	}{
		{"plain", nil, "", []string{"200"}, "GET /case-0. HTTP/1.1\r\n"},
		{"length too small", [][2]string{{"content-length", "2"}}, "abcd", refused, ""},
		{"length too large", [][2]string{{"content-length", "9"}}, "abcd", refused, ""},
		{"two lengths", [][2]string{{"content-length", "4"}, {"content-length", "5"}}, "abcd", refused, ""},
		{"transfer-encoding", [][2]string{{"transfer-encoding", "chunked"}}, "0\r\n\r\nGET /smuggled HTTP/1.1\r\n\r\n", refused, ""},
		{"connection", [][2]string{{"connection", "x"}}, "", refused, ""},
		{"line end in a value", [][2]string{{"x", "y\r\ntransfer-encoding: chunked"}}, "", refused, ""},
		{"LF in a value", [][2]string{{"x", "y\nz: 1"}}, "", refused, ""},
		{"NUL in a value", [][2]string{{"x", "y\x00z"}}, "", refused, ""},
		{"line end in a name", [][2]string{{"x: y\r\nz", "1"}}, "", refused, ""},
		{"colon in a name", [][2]string{{"transfer-encoding: chunked\r\nx", "y"}}, "", refused, ""},
		{"upper case", [][2]string{{"X-Y", "z"}}, "", refused, ""},
		{"pseudo header after others", [][2]string{{"x", "y"}, {":path", "/other"}}, "", refused, ""},
		{"path twice", [][2]string{{":path", "/other"}}, "", refused, ""},
		{"other host", [][2]string{{"host", "other.example"}}, "", append([]string{"200"}, refused...), "Host: " + s.DNSName + "\r\n"},
	}
	for i, c := range cases {
		method := "GET"
		if c.body != "" {
			method = "POST"
		}
		fields := append([][2]string{{":method", method}, {":scheme", "https"}, {":authority", s.DNSName}, {":path", fmt.Sprintf("/case-%d.", i)}}, c.fields...)
		if got := newH2Visitor(t, e, s.DNSName).ask(fields, c.body); !slices.Contains(c.allow, got) {
			t.Errorf("%s: %s, want one of %s", c.name, got, c.allow)
		}
	}
	// The method and the path become part of the first line.
	for _, c := range [][2]string{
		{"GET / HTTP/1.1\r\nx: y\r\n", "/method"}, {"GET /smuggled", "/method"}, {"GET", "/path HTTP/1.1\r\nHost: x\r\n\r\nGET /smuggled"}, {"GET", "/path\r\nx: smuggled"},
		{"GET", "smuggled.example/path"},
	} {
		got := newH2Visitor(t, e, s.DNSName).ask([][2]string{{":method", c[0]}, {":scheme", "https"}, {":authority", s.DNSName}, {":path", c[1]}}, "")
		if !slices.Contains(refused, got) {
			t.Errorf("method %q, path %q: %s", c[0], c[1], got)
		}
	}
	r.close()
	app.stop()
	for _, raw := range app.got {
		head, _, whole := strings.Cut(raw, "\r\n\r\n")
		if !whole {
			continue // broken off before the app could take it for a request
		}
		known := false
		for i, c := range cases {
			if strings.Contains(head, fmt.Sprintf("/case-%d.", i)) {
				known = true
				if c.app == "" && (c.body == "" || strings.HasSuffix(raw, "0\r\n\r\n")) || !strings.Contains(raw, c.app) {
					t.Errorf("%s: the app got %q", c.name, raw)
				}
			}
		}
		if !known || strings.Contains(raw, "smuggled") {
			t.Errorf("the app got %q", raw)
		}
	}
}

// Headers of HTTP/2 that never end, and streams that are opened and reset at once: others are served, and what has no end is
// ended.
func TestHTTP2Floods(t *testing.T) {
	e := edgetest.Start(t, short)
	a := login(t, e)
	s := a.newSocket("http")
	a.connect(s, appAddress(newApp(t, "app")))
	var block bytes.Buffer
	encoder := hpack.NewEncoder(&block)
	for _, f := range [][2]string{{":method", "GET"}, {":scheme", "https"}, {":authority", s.DNSName}, {":path", "/"}} {
		_ = encoder.WriteField(hpack.HeaderField{Name: f[0], Value: f[1]})
	}
	head := block.Bytes()
	for _, c := range []struct {
		name string
		// times is how often it is sent: more than the edge takes of what has no end.
		times int
		ends  bool
		send  func(v *h2Visitor, i int) error
	}{
		{"endless header", 1_000_000, true, func(v *h2Visitor, i int) error {
			if i == 0 {
				return v.framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: head})
			}
			var more bytes.Buffer
			_ = hpack.NewEncoder(&more).WriteField(hpack.HeaderField{Name: fmt.Sprint("x-", i), Value: strings.Repeat("x", 8000)})
			return v.framer.WriteContinuation(1, false, more.Bytes())
		}},
		{"rapid reset", 2000, false, func(v *h2Visitor, i int) error {
			id := uint32(2*i + 1)
			if err := v.framer.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: head, EndHeaders: true, EndStream: true}); err != nil {
				return err
			}
			return v.framer.WriteRSTStream(id, http2.ErrCodeCancel)
		}},
	} {
		v := newH2Visitor(t, e, s.DNSName)
		var err error
		for i := 0; err == nil && i < c.times; i++ {
			err = c.send(v, i)
		}
		var timeout interface{ Timeout() bool }
		if c.ends && (err == nil || errors.As(err, &timeout) && timeout.Timeout()) {
			t.Errorf("%s: the connection was not closed: %v", c.name, err)
		}
		_ = v.conn.Close()
		if status, _ := get(t, e.VisitorClient(t), "https://"+s.DNSName+"/"); status != 200 {
			t.Errorf("%s: another visitor got %d", c.name, status)
		}
	}
	eventually(t, "all requests to end", func() bool { return e.Tunnels()[0].Tunnels[0].Open == 0 })
}
