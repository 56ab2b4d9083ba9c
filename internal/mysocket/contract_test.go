package mysocket_test

import (
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"net/http"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/mysocketio/mysocket-injector/internal/edge/edgetest"
	"github.com/mysocketio/mysocket-injector/internal/mysocket"
	"github.com/mysocketio/mysocket-injector/internal/mysocket/mysockettest"
)

// TestContract takes the client through all it does at a real edge.
func TestContract(t *testing.T) {
	e := edgetest.Start(t)
	proxy := mysockettest.Start(t, e)
	c := proxy.Client(t)
	ctx := t.Context()

	user, err := c.Login(ctx)
	if want := strings.ReplaceAll(e.UserID, "-", ""); err != nil || user != want {
		t.Fatalf("user %q, %v; want %q", user, err, want)
	}
	if sockets, err := c.Sockets(ctx, time.Hour); err != nil || len(sockets) != 0 {
		t.Fatalf("a new account has the sockets %v, %v", sockets, err)
	}
	made, err := c.CreateSocket(ctx, mysocket.Socket{Name: "k8s shop.web", Type: "http", Description: "made by a test"})
	if err != nil {
		t.Fatal(err)
	}
	if made.Name != "k8s shop.web" || made.Type != "http" || !strings.HasSuffix(made.DNSName, "."+e.Domain) || made.UserName != user || !strings.HasPrefix(made.URL(), "https://"+made.DNSName) {
		t.Errorf("made %+v at %s", made, made.URL())
	}
	tcp, err := c.CreateSocket(ctx, mysocket.Socket{Name: "k8s shop.db", Type: "tcp"})
	if err != nil || !strings.HasPrefix(tcp.URL(), "tcp://"+tcp.DNSName+":2") {
		t.Errorf("made %+v, %v", tcp, err)
	}
	// The list was kept for an hour, but not over our own changes.
	sockets, err := c.Sockets(ctx, time.Hour)
	if err != nil || len(sockets) != 2 {
		t.Fatalf("sockets %v, %v", sockets, err)
	}

	made.Description = "changed"
	updated, err := c.UpdateSocket(ctx, made)
	if err != nil || updated.Description != "changed" || updated.ID != made.ID || updated.DNSName != made.DNSName {
		t.Errorf("updated %+v, %v", updated, err)
	}
	made.Type = "tcp"
	if _, err := c.UpdateSocket(ctx, made); !mysocket.IsRefused(err) || !strings.Contains(err.Error(), "socket_type cannot change") {
		t.Errorf("another type: %v", err)
	}
	if _, err := c.CreateSocket(ctx, mysocket.Socket{Name: "x", Type: "tls"}); !mysocket.IsRefused(err) || !strings.Contains(err.Error(), `"tls" is not supported`) {
		t.Errorf("a type the edge lacks: %v", err)
	}

	tunnel, err := c.CreateTunnel(ctx, made.ID)
	if err != nil || tunnel.LocalPort == 0 {
		t.Fatalf("tunnel %+v, %v", tunnel, err)
	}
	if tunnels, err := c.Tunnels(ctx, made.ID); err != nil || len(tunnels) != 1 || tunnels[0].ID != tunnel.ID {
		t.Errorf("tunnels %+v, %v", tunnels, err)
	}
	public, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ssh.NewPublicKey(public)
	if err != nil {
		t.Fatal(err)
	}
	signed, err := c.SignKey(ctx, made.ID, tunnel.ID, string(ssh.MarshalAuthorizedKey(key)))
	if err != nil {
		t.Fatal(err)
	}
	parsed, _, _, _, err := ssh.ParseAuthorizedKey([]byte(signed.Certificate))
	if cert, ok := parsed.(*ssh.Certificate); err != nil || !ok || string(cert.Key.Marshal()) != string(key.Marshal()) || signed.HostKey == "" {
		t.Errorf("signed %+v, %v", signed, err)
	}
	if _, err := c.SignKey(ctx, made.ID, tunnel.ID, "no key"); !mysocket.IsRefused(err) {
		t.Errorf("signed no key: %v", err)
	}

	for range 2 { // the second finds it gone
		if err := c.DeleteTunnel(ctx, made.ID, tunnel.ID); err != nil {
			t.Error(err)
		}
	}
	if _, err := c.SignKey(ctx, made.ID, tunnel.ID, string(ssh.MarshalAuthorizedKey(key))); !mysocket.IsNotFound(err) {
		t.Errorf("signed for a tunnel that is gone: %v", err)
	}
	for range 2 {
		if err := c.DeleteSocket(ctx, made.ID); err != nil {
			t.Error(err)
		}
	}
	if _, err := c.CreateTunnel(ctx, made.ID); !mysocket.IsNotFound(err) {
		t.Errorf("a tunnel of a socket that is gone: %v", err)
	}
	if n := proxy.Requests("POST /login"); n != 1 {
		t.Errorf("%d logins, want 1", n)
	}
}

func TestContractOfFailures(t *testing.T) {
	e := edgetest.Start(t)
	proxy := mysockettest.Start(t, e)
	ctx := t.Context()

	stranger := proxy.ClientOf(t, mysocket.Account{Email: e.Email, Password: "another password"})
	if _, err := stranger.Sockets(ctx, 0); !errors.Is(err, mysocket.ErrCredentials) {
		t.Errorf("a wrong password: %v", err)
	}
	c := proxy.Client(t)
	proxy.Fail("POST /socket", mysockettest.LostAnswer)
	if _, err := c.CreateSocket(ctx, mysocket.Socket{Name: "k8s shop.web", Type: "http"}); err == nil {
		t.Error("a lost answer is a success")
	}
	if sockets, err := c.Sockets(ctx, time.Hour); err != nil || len(sockets) != 1 {
		t.Errorf("after a lost answer: %v, %v", sockets, err)
	}
	proxy.Fail("GET /socket", mysockettest.Answer(http.StatusTooManyRequests, "", "Retry-After", "3"))
	if _, err := c.Sockets(ctx, 0); mysocket.RetryAfter(err) != 3*time.Second {
		t.Errorf("429: %v", err)
	}
	e.Stop()
	_, err := c.Sockets(ctx, 0)
	var api *mysocket.APIError
	if !errors.As(err, &api) || api.Status != http.StatusBadGateway { // the proxy's own
		t.Errorf("no edge: %v", err)
	}
}
