package mysocket_test

import (
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/mysocketio/mysocket-injector/internal/edge/edgetest"
	"github.com/mysocketio/mysocket-injector/internal/mysocket"
	"github.com/mysocketio/mysocket-injector/internal/mysocket/mysockettest"
)

// subject is a client of one dialect at a real edge, and what is different about that dialect where one can see it: its
// paths, its account, and whether there are tunnel objects.
type subject struct {
	*testing.T
	edge   *edgetest.Edge
	proxy  *mysockettest.Proxy
	client *mysocket.Client

	list, create string
	refused      mysocket.Account
	tunnels      bool
}

// contract is what callers rely on, in both dialects.
var contract = []struct {
	name string
	test func(*subject)
}{
	{"login gives the SSH user", loginGivesTheUser},
	{"a socket's life", socketsLife},
	{"the list is kept, but not over our own changes", listIsKept},
	{"a list of many sockets is whole", listIsWhole},
	{"a socket of a name is found by it", socketIsFound},
	{"what the edge lacks is refused with a sentence", lackingIsRefused},
	{"guards and upstream settings come back", settingsComeBack},
	{"registering a replica and logging in", replicaRegisters},
	{"a socket that is gone", socketGone},
	{"an account that is refused", accountRefused},
	{"a lost answer makes no duplicate", lostAnswer},
	{"the API asks to wait", asksToWait},
	{"401 in the middle", unauthorizedInTheMiddle},
	{"no API", noAPI},
}

func TestContract(t *testing.T) {
	for _, dialect := range []string{"classic", "border0"} {
		t.Run(dialect, func(t *testing.T) {
			for _, c := range contract {
				t.Run(c.name, func(t *testing.T) {
					s := &subject{T: t, edge: edgetest.Start(t)}
					s.proxy = mysockettest.Start(t, s.edge)
					switch dialect {
					case "classic":
						s.client, s.list, s.create, s.tunnels = s.proxy.Client(t), "GET /socket", "POST /socket", true
						s.refused = mysocket.Account{Email: s.edge.Email, Password: "another password"}
					case "border0":
						s.client, s.list, s.create = s.proxy.TokenClient(t), "GET /api/v1/sockets", "POST /api/v1/socket"
						s.refused = mysocket.Account{Token: s.edge.Token[:len(s.edge.Token)-4] + "AAAA"}
					}
					c.test(s)
				})
			}
		})
	}
}

func (s *subject) must(k mysocket.Socket, err error) mysocket.Socket {
	s.Helper()
	if err != nil {
		s.Fatal(err)
	}
	return k
}

func (s *subject) sockets(maxAge time.Duration) []mysocket.Socket {
	s.Helper()
	list, err := s.client.Sockets(s.Context(), maxAge)
	if err != nil {
		s.Fatal(err)
	}
	return list
}

func (s *subject) web() mysocket.Socket {
	s.Helper()
	return s.must(s.client.CreateSocket(s.Context(), mysocket.Socket{Name: "k8s shop.web", Type: "http"}))
}

func loginGivesTheUser(s *subject) {
	user, err := s.client.Login(s.Context())
	if want := strings.ReplaceAll(s.edge.UserID, "-", ""); err != nil || user != want {
		s.Errorf("user %q, %v; want %q", user, err, want)
	}
	for range 3 {
		s.sockets(0)
	}
	if n := s.proxy.Requests("POST /login"); n > 1 {
		s.Errorf("%d logins", n)
	}
}

func socketsLife(s *subject) {
	ctx := s.Context()
	if list := s.sockets(time.Hour); len(list) != 0 {
		s.Fatalf("a new account has %v", list)
	}
	made := s.must(s.client.CreateSocket(ctx, mysocket.Socket{Name: "k8s shop.web", Type: "http", Description: "made by a test"}))
	if made.Name != "k8s shop.web" || made.Type != "http" || !strings.HasSuffix(made.DNSName, "."+s.edge.Domain) || !strings.HasPrefix(made.URL(), "https://"+made.DNSName) {
		s.Errorf("made %+v at %s", made, made.URL())
	}
	tcp := s.must(s.client.CreateSocket(ctx, mysocket.Socket{Name: "k8s Prod shop.db", Type: "tcp"}))
	if tcp.Name != "k8s Prod shop.db" || !strings.HasPrefix(tcp.URL(), "tcp://"+tcp.DNSName+":2") {
		s.Errorf("made %+v", tcp)
	}
	made.Description = "changed"
	updated := s.must(s.client.UpdateSocket(ctx, made))
	if updated.Description != "changed" || updated.ID != made.ID || updated.DNSName != made.DNSName || updated.Name != made.Name {
		s.Errorf("updated %+v", updated)
	}
	if list := s.sockets(0); len(list) != 2 || list[0].Description != "changed" || list[0].Name != made.Name || list[1].Name != tcp.Name {
		s.Errorf("the list is %+v", list)
	}
	for range 2 { // the second finds it gone
		if err := s.client.DeleteSocket(ctx, made.ID); err != nil {
			s.Error(err)
		}
	}
	if list := s.sockets(0); len(list) != 1 || list[0].ID != tcp.ID {
		s.Errorf("left are %+v", list)
	}
}

func listIsKept(s *subject) {
	s.sockets(time.Hour)
	s.sockets(time.Hour)
	if n := s.proxy.Requests(s.list); n != 1 {
		s.Errorf("%d lists, want 1", n)
	}
	s.web()
	if list := s.sockets(time.Hour); len(list) != 1 {
		s.Errorf("after a change: %v", list)
	}
}

func listIsWhole(s *subject) {
	const many = 105 // two pages, where there are pages
	for i := range many {
		s.must(s.client.CreateSocket(s.Context(), mysocket.Socket{Name: fmt.Sprintf("k8s shop.s%d", i), Type: "http"}))
	}
	names := map[string]bool{}
	for _, k := range s.sockets(0) {
		names[k.Name] = true
	}
	for i := range many {
		if name := fmt.Sprintf("k8s shop.s%d", i); !names[name] {
			s.Errorf("%s is missing", name)
		}
	}
	if len(names) != many {
		s.Errorf("%d names, want %d", len(names), many)
	}
}

func socketIsFound(s *subject) {
	for _, name := range []string{"k8s shop.web", "k8s a-b.c", "k8s a.b-c", "k8s Prod shop.web", "k8s prod shop.web", "plain", "ümlaut and More", "k8s " + strings.Repeat("x", 63) + "." + strings.Repeat("y", 63)} {
		made := s.must(s.client.CreateSocket(s.Context(), mysocket.Socket{Name: name, Type: "http"}))
		found := 0
		for _, k := range s.sockets(0) {
			if k.Name == name {
				found++
				if k.ID != made.ID {
					s.Errorf("%q is %s, made was %s", name, k.ID, made.ID)
				}
			}
		}
		if found != 1 {
			s.Errorf("%d sockets are called %q", found, name)
		}
	}
}

func lackingIsRefused(s *subject) {
	made := s.web()
	made.Type = "tcp"
	if _, err := s.client.UpdateSocket(s.Context(), made); !mysocket.IsRefused(err) || !strings.Contains(err.Error(), "socket_type cannot change") {
		s.Errorf("another type: %v", err)
	}
	if _, err := s.client.CreateSocket(s.Context(), mysocket.Socket{Name: "x", Type: "ssh"}); !mysocket.IsRefused(err) || !strings.Contains(err.Error(), `"ssh" is not supported`) {
		s.Errorf("a type that the edge lacks: %v", err)
	}
	private := mysocket.Socket{Name: "y", Type: "http", Access: &mysocket.Access{CloudAuth: true, AllowedEmails: []string{"a@example.com"}}}
	if _, err := s.client.CreateSocket(s.Context(), private); !mysocket.IsRefused(err) || !strings.Contains(err.Error(), "cloud authentication") {
		s.Errorf("a guard that the edge lacks: %v", err)
	}
	if list := s.sockets(0); len(list) != 1 {
		s.Errorf("something was made all the same: %+v", list)
	}
}

func settingsComeBack(s *subject) {
	k := mysocket.Socket{Name: "k8s shop.web", Type: "http", Protected: true, ProtectedUsername: "me", ProtectedPassword: "not for everybody", Upstream: &mysocket.Upstream{UpstreamType: "http", UpstreamHTTPHostname: "app.internal"}}
	check := func(got mysocket.Socket) {
		s.Helper()
		if !got.Protected || got.ProtectedUsername != "me" || got.ProtectedPassword != "" || got.Upstream == nil || got.UpstreamHTTPHostname != "app.internal" {
			s.Errorf("got %+v", got)
		}
	}
	made := s.must(s.client.CreateSocket(s.Context(), k))
	check(made)
	check(s.sockets(0)[0])
	made.Protected, made.ProtectedUsername = false, ""
	if open := s.must(s.client.UpdateSocket(s.Context(), made)); open.Protected {
		s.Errorf("the guard stayed: %+v", open)
	}
}

func newKey(t *testing.T) (ssh.Signer, string) {
	t.Helper()
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := ssh.NewSignerFromKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return signer, string(ssh.MarshalAuthorizedKey(signer.PublicKey()))
}

func replicaRegisters(s *subject) {
	ctx := s.Context()
	made := s.web()
	user, err := s.client.Login(ctx)
	if err != nil {
		s.Fatal(err)
	}
	var ids []string
	for range 2 {
		tunnel, err := s.client.CreateTunnel(ctx, made.ID)
		if err != nil || len(tunnel.ID) != 36 || (tunnel.LocalPort != 0) != s.tunnels {
			s.Fatalf("tunnel %+v, %v", tunnel, err)
		}
		ids = append(ids, tunnel.ID)
		key, line := newKey(s.T)
		signed, err := s.client.SignKey(ctx, made.ID, tunnel.ID, line)
		if err != nil || signed.HostKey == "" {
			s.Fatalf("signed %+v, %v", signed, err)
		}
		parsed, _, _, _, err := ssh.ParseAuthorizedKey([]byte(signed.Certificate))
		if err != nil {
			s.Fatal(err)
		}
		certificate, err := ssh.NewCertSigner(parsed.(*ssh.Certificate), key)
		if err != nil {
			s.Fatal(err)
		}
		hostKey, _, _, _, err := ssh.ParseAuthorizedKey([]byte(s.edge.HostKey))
		if err != nil {
			s.Fatal(err)
		}
		conn, err := ssh.Dial("tcp", s.edge.SSHAddress, &ssh.ClientConfig{User: user, Auth: []ssh.AuthMethod{ssh.PublicKeys(certificate)}, HostKeyCallback: ssh.FixedHostKey(hostKey)})
		if err != nil {
			s.Fatalf("log in: %v", err)
		}
		defer func() { _ = conn.Close() }()
		if _, err := conn.Listen("tcp", fmt.Sprintf("localhost:%d", tunnel.LocalPort)); err != nil {
			s.Fatalf("forward: %v", err)
		}
	}
	mysockettest.Eventually(s, "both replicas are in the rotation", func() bool { return len(s.edge.Tunnels()[0].Tunnels) == 2 })
	if _, err := s.client.SignKey(ctx, made.ID, ids[0], "no key"); !mysocket.IsRefused(err) {
		s.Errorf("signed no key: %v", err)
	}
	if list, err := s.client.Tunnels(ctx, made.ID); err != nil || (len(list) == 2) != s.tunnels {
		s.Errorf("tunnels %+v, %v", list, err)
	}
	for range 2 {
		if err := s.client.DeleteTunnel(ctx, made.ID, ids[0]); err != nil {
			s.Error(err)
		}
	}
	_, line := newKey(s.T)
	if _, err := s.client.SignKey(ctx, made.ID, ids[0], line); mysocket.IsNotFound(err) != s.tunnels {
		s.Errorf("signed for a tunnel that was deleted: %v", err)
	}
	if err := s.client.DeleteSocket(ctx, made.ID); err != nil {
		s.Error(err)
	}
	mysockettest.Eventually(s, "the socket's connections end with it", func() bool { return len(s.edge.Tunnels()) == 0 })
}

func socketGone(s *subject) {
	made := s.web()
	if err := s.client.DeleteSocket(s.Context(), made.ID); err != nil {
		s.Fatal(err)
	}
	_, line := newKey(s.T)
	tunnel, err := s.client.CreateTunnel(s.Context(), made.ID)
	if err == nil { // where a tunnel is no object
		_, err = s.client.SignKey(s.Context(), made.ID, tunnel.ID, line)
	}
	if !mysocket.IsNotFound(err) {
		s.Errorf("a replica registered: %v", err)
	}
	if _, err := s.client.UpdateSocket(s.Context(), made); !mysocket.IsNotFound(err) {
		s.Errorf("it was changed: %v", err)
	}
}

func accountRefused(s *subject) {
	c := s.proxy.ClientOf(s.T, s.refused)
	for range 2 {
		_, err := c.Sockets(s.Context(), 0)
		if !errors.Is(err, mysocket.ErrCredentials) {
			s.Errorf("got %v", err)
		}
		for _, secret := range []string{s.refused.Password, s.refused.Token} {
			if secret != "" && err != nil && strings.Contains(err.Error(), secret) {
				s.Errorf("the error shows a secret: %v", err)
			}
		}
	}
}

func lostAnswer(s *subject) {
	s.proxy.Fail(s.create, mysockettest.LostAnswer)
	if _, err := s.client.CreateSocket(s.Context(), mysocket.Socket{Name: "k8s shop.web", Type: "http"}); err == nil {
		s.Error("a lost answer is a success")
	}
	if list := s.sockets(time.Hour); len(list) != 1 || list[0].Name != "k8s shop.web" {
		s.Errorf("after a lost answer: %v", list)
	}
}

func asksToWait(s *subject) {
	s.proxy.Fail(s.list, mysockettest.Answer(http.StatusTooManyRequests, "", "Retry-After", "3"))
	if _, err := s.client.Sockets(s.Context(), 0); mysocket.RetryAfter(err) != 3*time.Second {
		s.Errorf("429: %v", err)
	}
}

// unauthorizedInTheMiddle: a password gets another token at once. An access token that is refused is given a rest.
func unauthorizedInTheMiddle(s *subject) {
	s.sockets(0)
	s.proxy.Fail(s.list, mysockettest.Answer(http.StatusUnauthorized, ""))
	_, err := s.client.Sockets(s.Context(), 0)
	if s.tunnels && err != nil || !s.tunnels && !errors.Is(err, mysocket.ErrCredentials) {
		s.Errorf("got %v", err)
	}
}

func noAPI(s *subject) {
	s.edge.Stop()
	_, err := s.client.Sockets(s.Context(), 0)
	var api *mysocket.APIError
	if !errors.As(err, &api) || api.Status != http.StatusBadGateway { // the proxy's own
		s.Errorf("got %v", err)
	}
}
