package probe

import (
	"context"
	"encoding/binary"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strconv"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/mysocketio/mysocket-injector/internal/gatewayapi"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func port(t *testing.T, address string) int32 {
	t.Helper()
	if u, err := url.Parse(address); err == nil && u.Host != "" {
		address = u.Host
	}
	_, p, err := net.SplitHostPort(address)
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.ParseInt(p, 10, 32)
	if err != nil {
		t.Fatal(err)
	}
	return int32(n)
}

// expect compares a probe's error with a part of it; empty means success.
func expect(t *testing.T, err error, want string) {
	t.Helper()
	switch {
	case err == nil && want == "":
	case err == nil:
		t.Errorf("the probe succeeded; want an error with %q", want)
	case want == "" || !strings.Contains(err.Error(), want):
		t.Errorf("the probe says %q; want %q", err, want)
	}
}

func TestHTTP(t *testing.T) {
	elsewhere := httptest.NewServer(http.NotFoundHandler())
	defer elsewhere.Close()
	hang := make(chan struct{})
	app := http.NewServeMux()
	app.HandleFunc("/ok", func(http.ResponseWriter, *http.Request) {})
	app.HandleFunc("/busy", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusServiceUnavailable) })
	app.HandleFunc("/see-other", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/ok", http.StatusFound) })
	app.HandleFunc("/see-busy", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/busy", http.StatusFound) })
	app.HandleFunc("/round", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/round", http.StatusFound) })
	app.HandleFunc("/away", func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, strings.Replace(elsewhere.URL, "127.0.0.1", "localhost", 1), http.StatusFound)
	})
	app.HandleFunc("/hang", func(http.ResponseWriter, *http.Request) { <-hang })
	app.HandleFunc("/asked", func(w http.ResponseWriter, r *http.Request) {
		if r.Host != "shop.example" || r.Header.Get("X-Key") != "s3cret" || r.URL.RawQuery != "deep=1" || !strings.HasPrefix(r.UserAgent(), "mysocket-sidecar-probe/") {
			w.WriteHeader(http.StatusBadRequest)
		}
	})
	plain := httptest.NewServer(app)
	defer plain.Close()
	secure := httptest.NewTLSServer(app)
	defer secure.Close()
	defer close(hang)
	headers := []gatewayapi.Header{{Name: "host", Value: "shop.example"}, {Name: "x-key", Value: "s3cret"}}
	for _, tc := range []struct {
		name, path, want string
		headers          []gatewayapi.Header
	}{
		{"ready", "/ok", "", nil},
		{"not ready", "/busy", "GET /busy on port", nil},
		{"its status", "/busy", "status 503", nil},
		{"redirect", "/see-other", "", nil},
		{"redirect to what is not ready", "/see-busy", "status 503", nil},
		{"redirect without end", "/round", "more than 10 redirects", nil},
		{"redirect to another host", "/away", "", nil},
		{"no answer", "/hang", "no answer in 1 s", nil},
		{"headers, host and query", "/asked?deep=1", "", headers},
		{"without them", "/asked", "status 400", nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for kind, server := range map[string]*httptest.Server{gatewayapi.ProbeHTTP: plain, gatewayapi.ProbeHTTPS: secure} {
				err := New("127.0.0.1", "test").Run(t.Context(), &gatewayapi.Probe{Kind: kind, Port: port(t, server.URL), Path: tc.path, Headers: tc.headers, TimeoutSeconds: 1})
				expect(t, err, tc.want)
				if err != nil && strings.Contains(err.Error(), "s3cret") {
					t.Errorf("the error shows a header: %v", err)
				}
			}
		})
	}
	// A host of the probe's own is asked instead of the pod.
	err := New("192.0.2.1", "test").Run(t.Context(), &gatewayapi.Probe{Kind: gatewayapi.ProbeHTTP, Host: "127.0.0.1", Port: port(t, plain.URL), Path: "/ok", TimeoutSeconds: 5})
	expect(t, err, "")
}

func TestTCP(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	of := &gatewayapi.Probe{Kind: gatewayapi.ProbeTCP, Port: port(t, l.Addr().String()), TimeoutSeconds: 5}
	expect(t, New("127.0.0.1", "test").Run(t.Context(), of), "")
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	expect(t, New("127.0.0.1", "test").Run(t.Context(), of), "connection refused")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	expect(t, New("127.0.0.1", "test").Run(ctx, of), "canceled")
	expect(t, New("127.0.0.1", "test").Run(t.Context(), &gatewayapi.Probe{Kind: "exec"}), `no probe of the kind "exec"`)
}

// frame is a gRPC message.
func frame(message ...byte) []byte {
	return append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(message))), message...)
}

func TestGRPC(t *testing.T) {
	var protocols http.Protocols
	protocols.SetUnencryptedHTTP2(true)
	answer, status := frame(8, 1), "0"
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked, err := io.ReadAll(r.Body)
		if err != nil || string(asked) != string(frame(append([]byte{10, 4}, "shop"...)...)) || r.URL.Path != healthPath || r.Header.Get("Content-Type") != "application/grpc" || r.ProtoMajor != 2 {
			t.Errorf("asked %v of %s, %v", asked, r.URL, err)
		}
		w.Header().Set("Content-Type", "application/grpc")
		w.Header().Set("Trailer", "Grpc-Status")
		_, _ = w.Write(answer)
		w.Header().Set("Grpc-Status", status)
	}))
	server.Config.Protocols = &protocols
	server.Start()
	defer server.Close()
	of := &gatewayapi.Probe{Kind: gatewayapi.ProbeGRPC, Port: port(t, server.URL), Service: "shop", TimeoutSeconds: 5}
	for _, tc := range []struct {
		name, status, want string
		answer             []byte
	}{
		{"serving", "0", "", frame(8, 1)},
		{"serving, with fields to come", "0", "", frame(18, 1, 'x', 8, 1)},
		{"not serving", "0", "it says 2, and 1 is SERVING", frame(8, 2)},
		{"nothing said", "0", "it says 0", frame()},
		{"not known", "5", `gRPC status "5"`, nil},
		{"half a frame", "0", "no gRPC message", frame(8, 1)[:6]},
		{"no frame", "0", "no gRPC message", nil},
		{"no message", "0", "no health message", frame(8)},
	} {
		t.Run(tc.name, func(t *testing.T) {
			answer, status = tc.answer, tc.status
			expect(t, New("127.0.0.1", "test").Run(t.Context(), of), tc.want)
		})
	}
}

func FuzzServingStatus(f *testing.F) {
	f.Add(frame(8, 1))
	f.Add(frame(18, 200))
	f.Fuzz(func(t *testing.T, data []byte) {
		if servingStatus(data) == nil && len(data) < framePrefix+2 {
			t.Errorf("%v counts as serving", data)
		}
	})
}
