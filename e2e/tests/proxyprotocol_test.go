//go:build cluster

package tests

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/url"
	"strings"
	"testing"
	"time"
)

// visitorIP is an address of this machine that neither the edge nor the cluster has.
const visitorIP = "127.0.0.9"

// testProxyProtocol has an app of a tcp socket say what the PROXY protocol told it: the visitor's own address and port, in
// both versions, of which the second is asked for while the pod runs.
func testProxyProtocol(t *testing.T) {
	s := newStage(t, injectable)
	s.apply(s.demoApp("service.yaml", "{name: http, port: 8000, targetPort: http}", "{name: told, port: 9000, targetPort: 8001}"))
	s.annotate(web, enabled, "mysocket.io/type=tcp", "mysocket.io/proxy-protocol=v1")
	s.deploy(1, "ports: [{name: http", "args: [--proxy-addr=:8001]\n        ports: [{name: http")
	s.awaitTunnels(web, 1)
	s.rolledOut()
	before := s.pods()
	pod := before[s.somePod()].Status.PodIP
	for _, version := range []string{"v1", "v2"} {
		s.annotate(web, "mysocket.io/proxy-protocol="+version)
		s.await(patience, "a header of "+version, func() error {
			told, visitor, err := s.toldAddresses()
			if err != nil {
				return err
			}
			got, rest, _ := strings.Cut(told, " ")
			// That of the version before is right, too, until the change has arrived.
			if want := fmt.Sprintf("%s %s", visitor, net.JoinHostPort(pod, "8001")); rest != want {
				t.Fatalf("the app was told %q, want %q", told, want)
			}
			if got != version {
				return fmt.Errorf("the app was told %q", told)
			}
			t.Logf("the app was told %q", told)
			return nil
		})
	}
	s.samePods(before)
}

// toldAddresses visits a tcp socket from visitorIP. It returns the app's line about the header, and the address it came from.
func (s *stage) toldAddresses() (told, visitor string, err error) {
	s.t.Helper()
	public, err := url.Parse(s.url(web))
	if err != nil || public.Scheme != "tcp" {
		return "", "", fmt.Errorf("the public URL is %q, %w", s.url(web), err)
	}
	from := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(visitorIP)}, Timeout: 10 * time.Second}
	conn, err := from.DialContext(s.ctx, "tcp", net.JoinHostPort(env.Edge.Address, public.Port()))
	if err != nil {
		return "", "", err
	}
	defer func() { _ = conn.Close() }()
	_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
	const sent = "hello\n"
	if _, err := io.WriteString(conn, sent); err != nil {
		return "", "", err
	}
	r := bufio.NewReader(conn)
	told, err = r.ReadString('\n')
	if err != nil {
		return "", "", err
	}
	// What the visitor sends comes after the header, unchanged.
	if got, err := r.ReadString('\n'); err != nil || got != sent {
		return "", "", fmt.Errorf("the app told %q and got %q, %w", told, got, err)
	}
	return strings.TrimSuffix(told, "\n"), conn.LocalAddr().String(), nil
}
