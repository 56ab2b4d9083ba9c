//go:build cluster

package tests

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"
	"testing"
)

// testTLSSocket has the edge end the TLS of visitors to a Service whose app speaks none, on a port of its own.
func testTLSSocket(t *testing.T) {
	s := newStage(t, injectable)
	s.apply(s.demoApp("service.yaml"))
	s.annotate(web, enabled, "mysocket.io/type=tls")
	s.deploy(2)
	s.awaitTunnels(web, 2)
	s.rolledOut()
	public, err := url.Parse(s.url(web))
	if err != nil || public.Scheme != "tls" {
		t.Fatalf("the public URL is %q, %v", s.url(web), err)
	}
	client, err := visitor(func(tr *http.Transport) { tr.DisableKeepAlives = true })
	if err != nil {
		t.Fatal(err)
	}
	counts := map[string]int{}
	for i := range 20 {
		server, err := ask(s.ctx, client, "https://"+public.Host+"/")
		if err != nil {
			t.Fatalf("request %d: %v", i+1, err)
		}
		counts[server]++
	}
	for name := range s.pods() {
		if n := counts[name]; n < 7 || n > 13 {
			t.Errorf("pod %s answered %d of 20 visitors, want 7 to 13", name, n)
		}
	}

	// A visitor who asks this port for another name is told so, before anything reaches the app.
	dialer := tls.Dialer{Config: &tls.Config{ServerName: "other." + env.Edge.Domain, MinVersion: tls.VersionTLS12}}
	conn, err := dialer.DialContext(s.ctx, "tcp", net.JoinHostPort(env.Edge.Address, public.Port()))
	if err == nil {
		err = errors.Join(errors.New("it was let in"), conn.Close())
	}
	if !strings.Contains(fmt.Sprint(err), "unrecognized name") {
		t.Errorf("a visitor with another name: %v", err)
	}
}
