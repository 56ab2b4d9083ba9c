package gatewayclient_test

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/mysocketio/mysocket-injector/internal/gatewayapi"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/gatewayclient"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/retry"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/retry/clocktest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const socketID = "0b8e3b7e-2f0c-4b0e-9c58-0f1d6f1f2a3b"

type setup struct {
	cfg    gatewayclient.Config
	server *httptest.Server
	client *gatewayclient.Client
}

func start(t *testing.T, handler http.HandlerFunc) *setup {
	t.Helper()
	server := httptest.NewTLSServer(handler)
	t.Cleanup(server.Close)
	dir := t.TempDir()
	s := &setup{server: server, cfg: gatewayclient.Config{
		URL: server.URL, TokenFile: filepath.Join(dir, "token"), CAFile: filepath.Join(dir, "ca.crt"), UserAgent: "test", Clock: retry.System(),
	}}
	write(t, s.cfg.TokenFile, "first-token\n")
	write(t, s.cfg.CAFile, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})))
	s.open(t)
	return s
}

func (s *setup) open(t *testing.T) {
	t.Helper()
	client, err := gatewayclient.New(s.cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.Close)
	s.client = client
}

func write(t *testing.T, name, content string) {
	t.Helper()
	if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestNewRefusesAddressesThatAreNone(t *testing.T) {
	for _, address := range []string{"", "gateway:443", "http://gateway:443", "https://", "https://gateway/path", "https://u:p@gateway", "https://gateway?x=1", "https://gate way"} {
		if _, err := gatewayclient.New(gatewayclient.Config{URL: address}); err == nil || !strings.Contains(err.Error(), "https://host:port") {
			t.Errorf("%q: got %v, want an error that shows what is allowed", address, err)
		}
	}
}

// first is the first connection of the tests' socket.
var first = gatewayclient.Connection{SocketID: socketID}

func TestCallsAreWhatTheContractSays(t *testing.T) {
	var got []string
	s := start(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		got = append(got, r.Method+" "+r.URL.RequestURI()+" "+r.Header.Get("Authorization")+" "+string(body))
		if r.Method == http.MethodPost {
			_ = json.NewEncoder(w).Encode(gatewayapi.Registration{TunnelID: "t1"})
			return
		}
		w.WriteHeader(http.StatusNoContent)
	})
	if r, err := s.client.Register(t.Context(), first, "key"); err != nil || r.TunnelID != "t1" {
		t.Errorf("register: %+v, %v", r, err)
	}
	// The kubelet has rotated the token.
	write(t, s.cfg.TokenFile, "second-token")
	if _, err := s.client.Renew(t.Context(), first, "t1", "key"); err != nil {
		t.Error(err)
	}
	if err := s.client.Report(t.Context(), first, gatewayapi.StatusReport{State: gatewayapi.StateConnected}); err != nil {
		t.Error(err)
	}
	if err := s.client.Delete(t.Context(), first, "t1"); err != nil {
		t.Error(err)
	}
	// A further connection of the same socket.
	third := gatewayclient.Connection{SocketID: socketID, Number: 2}
	if _, err := s.client.Register(t.Context(), third, "key"); err != nil {
		t.Error(err)
	}
	if _, err := s.client.Renew(t.Context(), third, "t1", "key"); err != nil {
		t.Error(err)
	}
	if err := s.client.Report(t.Context(), third, gatewayapi.StatusReport{State: gatewayapi.StateConnected}); err != nil {
		t.Error(err)
	}
	if err := s.client.Delete(t.Context(), third, "t1"); err != nil {
		t.Error(err)
	}
	want := []string{
		"POST /v1/sockets/" + socketID + `/tunnels Bearer first-token {"publicKey":"key"}`,
		"POST /v1/sockets/" + socketID + `/tunnels/t1/certificate Bearer second-token {"publicKey":"key"}`,
		"PUT /v1/sockets/" + socketID + `/status Bearer second-token {"state":"Connected"}`,
		"DELETE /v1/sockets/" + socketID + "/tunnels/t1 Bearer second-token ",
		"POST /v1/sockets/" + socketID + `/tunnels?connection=2 Bearer second-token {"publicKey":"key"}`,
		"POST /v1/sockets/" + socketID + `/tunnels/t1/certificate?connection=2 Bearer second-token {"publicKey":"key"}`,
		"PUT /v1/sockets/" + socketID + `/status?connection=2 Bearer second-token {"state":"Connected"}`,
		"DELETE /v1/sockets/" + socketID + "/tunnels/t1?connection=2 Bearer second-token ",
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestRefusals(t *testing.T) {
	tests := []struct {
		name       string
		status     int
		header     string
		body       string
		says       string
		retryAfter time.Duration
	}{
		{"forbidden", 403, "", `{"reason":"Forbidden","message":"pod shop/web may not act for socket x"}`, "may not act", 0},
		{"too many", 429, "7", `{"reason":"TooManyRequests","message":"slow down"}`, "slow down", 7 * time.Second},
		{"unavailable with a date", 503, time.Unix(1_000_030, 0).UTC().Format(http.TimeFormat), `{"reason":"Unavailable","message":"starting"}`, "starting", 30 * time.Second},
		{"absurd Retry-After", 503, "99999999999", `{"reason":"Unavailable","message":"starting"}`, "starting", 24 * time.Hour},
		{"unreadable Retry-After", 503, "soon", `{"reason":"Unavailable","message":"starting"}`, "starting", 0},
		{"not the gateway", 502, "", "<html>", "is something else at", 0},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			s := start(t, func(w http.ResponseWriter, _ *http.Request) {
				if test.header != "" {
					w.Header().Set("Retry-After", test.header)
				}
				w.WriteHeader(test.status)
				_, _ = io.WriteString(w, test.body)
			})
			s.cfg.Clock = clocktest.New(time.Unix(1_000_000, 0))
			s.open(t)
			_, err := s.client.Register(t.Context(), first, "key")
			refused, ok := errors.AsType[*gatewayclient.RefusedError](err)
			if !ok || refused.Status != test.status || !strings.Contains(err.Error(), test.says) {
				t.Fatalf("got %v", err)
			}
			if got := gatewayclient.RetryAfter(err); got != test.retryAfter {
				t.Errorf("Retry-After is %s, want %s", got, test.retryAfter)
			}
		})
	}
}

func TestDeletingWhatIsGoneIsNoError(t *testing.T) {
	s := start(t, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNotFound) })
	if err := s.client.Delete(t.Context(), first, "t1"); err != nil {
		t.Error(err)
	}
	if _, err := s.client.Renew(t.Context(), first, "t1", "key"); !gatewayclient.IsNotFound(err) {
		t.Errorf("got %v, want not found", err)
	}
}

func TestRedirectsAreNotFollowed(t *testing.T) {
	elsewhere := httptest.NewTLSServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		t.Errorf("the token went elsewhere: %s", r.Header.Get("Authorization"))
	}))
	defer elsewhere.Close()
	s := start(t, func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, elsewhere.URL, http.StatusTemporaryRedirect)
	})
	if _, err := s.client.Register(t.Context(), first, "key"); err == nil {
		t.Error("a redirect was taken for an answer")
	}
}

func TestTheCAIsReadWheneverItIsUsed(t *testing.T) {
	s := start(t, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) })
	bundle, err := os.ReadFile(s.cfg.CAFile)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(s.cfg.CAFile); err != nil {
		t.Fatal(err)
	}
	err = s.client.Delete(t.Context(), first, "t1")
	if _, ok := errors.AsType[*gatewayclient.CAMissingError](err); !ok || s.client.CAAvailable() {
		t.Fatalf("without a bundle: got %v, want that it is missing", err)
	}
	write(t, s.cfg.CAFile, "no certificate")
	if err := s.client.Delete(t.Context(), first, "t1"); err == nil || !strings.Contains(err.Error(), "holds no PEM certificate") {
		t.Errorf("with a broken bundle: got %v", err)
	}
	write(t, s.cfg.CAFile, string(bundle))
	if err := s.client.Delete(t.Context(), first, "t1"); err != nil {
		t.Errorf("with the right bundle: %v", err)
	}
}

func TestAnotherCAIsNotTrusted(t *testing.T) {
	s := start(t, func(http.ResponseWriter, *http.Request) { t.Error("the token was sent to who is not trusted") })
	s.server.Config.ErrorLog = nil
	write(t, s.cfg.CAFile, otherCA)
	if err := s.client.Delete(t.Context(), first, "t1"); err == nil || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("got %v, want a certificate error", err)
	}
}

func TestATokenFileWithoutAToken(t *testing.T) {
	s := start(t, func(http.ResponseWriter, *http.Request) { t.Error("a call was made without a token") })
	for _, content := range []string{"", "  \n", "two words"} {
		write(t, s.cfg.TokenFile, content)
		if err := s.client.Delete(t.Context(), first, "t1"); err == nil || strings.Contains(err.Error(), "two words") {
			t.Errorf("%q: got %v, want an error without the content", content, err)
		}
	}
	_ = os.Remove(s.cfg.TokenFile)
	if err := s.client.Delete(t.Context(), first, "t1"); err == nil || !strings.Contains(err.Error(), s.cfg.TokenFile) {
		t.Errorf("got %v, want an error that names the file", err)
	}
}

func TestAnOversizedAnswerIsRefused(t *testing.T) {
	s := start(t, func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, `{"tunnelID":"`+strings.Repeat("x", gatewayapi.MaxBodyBytes)+`"}`)
	})
	if _, err := s.client.Register(t.Context(), first, "key"); err == nil || !strings.Contains(err.Error(), "larger than") {
		t.Errorf("got %v", err)
	}
}

func TestTheStreamOfAssignments(t *testing.T) {
	one := `{"assignments":[{"socketID":"` + socketID + `","socketName":"k8s shop.web","service":"web","url":"https://x","port":8000}]}`
	tests := []struct {
		name  string
		lines string
		want  []int // assignments of each event, -1 for a refused line
		says  string
	}{
		{"snapshots and heartbeats", one + "\n\n\n" + `{"assignments":[]}` + "\n" + `{"assignments":null}` + "\n", []int{1, 0, 0}, "EOF"},
		{"no line end at the end", one, []int{1}, "EOF"},
		{"a line that is none", "hello\n" + one + "\n", []int{-1, 1}, "EOF"},
		{"a line that is too long", one + "\n" + strings.Repeat("x", gatewayapi.MaxBodyBytes+1) + "\n", []int{1}, "longer than"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			s := start(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, test.lines) })
			var got []int
			err := s.client.Assignments(t.Context(), func(event gatewayclient.Event) {
				n := len(event.Snapshot.Assignments)
				if event.Err != nil {
					n = -1
				}
				got = append(got, n)
			})
			if fmt.Sprint(got) != fmt.Sprint(test.want) {
				t.Errorf("got %v, want %v", got, test.want)
			}
			if err == nil || !strings.Contains(err.Error(), test.says) {
				t.Errorf("got %v, want %q", err, test.says)
			}
		})
	}
}

func TestADeadStreamIsGivenUp(t *testing.T) {
	clock := clocktest.New(time.Unix(1_000_000, 0))
	beat := make(chan struct{})
	s := start(t, func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, "{\"assignments\":[]}\n")
		w.(http.Flusher).Flush()
		select {
		case <-beat:
		case <-r.Context().Done():
			return
		}
		_, _ = io.WriteString(w, "\n")
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	})
	s.cfg.Clock = clock
	s.open(t)
	received, ended := make(chan struct{}, 1), make(chan error, 1)
	go func() {
		ended <- s.client.Assignments(t.Context(), func(gatewayclient.Event) { received <- struct{}{} })
	}()
	<-received
	clock.Advance(29 * time.Second)
	close(beat)
	clock.AwaitTimer(t, 30*time.Second) // the heartbeat has set it anew
	clock.Advance(30 * time.Second)
	select {
	case err := <-ended:
		if err == nil || !strings.Contains(err.Error(), "nothing came") {
			t.Errorf("got %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("the dead stream was not given up")
	}
}

func TestTheStreamEndsWithItsContext(t *testing.T) {
	s := start(t, func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, "{\"assignments\":[]}\n")
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	})
	ctx, cancel := context.WithCancel(t.Context())
	if err := s.client.Assignments(ctx, func(gatewayclient.Event) { cancel() }); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

func TestParseSnapshotRefusesWhatIsWrong(t *testing.T) {
	assignment := func(id string, port int) string { return fmt.Sprintf(`{"socketID":%q,"port":%d}`, id, port) }
	many := make([]string, gatewayapi.MaxAssignments+1)
	for i := range many {
		many[i] = assignment(fmt.Sprintf("s%d", i), 80)
	}
	for name, list := range map[string]string{
		"no port":                assignment("s1", 0),
		"a large port":           assignment("s1", 65536),
		"an id of dots":          assignment("..", 80),
		"a path":                 assignment("a/b", 80),
		"no id":                  assignment("", 80),
		"twice the same":         assignment("s1", 80) + "," + assignment("s1", 81),
		"too many":               strings.Join(many, ","),
		"too many connections":   `{"socketID":"s1","port":80,"connections":5}`,
		"fewer than none":        `{"socketID":"s1","port":80,"connections":-1}`,
		"another PROXY protocol": `{"socketID":"s1","port":80,"proxyProtocol":"v3"}`,
		"a long name":            `{"socketID":"s1","port":80,"socketName":"` + strings.Repeat("x", 513) + `"}`,
	} {
		if _, err := gatewayclient.ParseSnapshot([]byte(`{"assignments":[` + list + `]}`)); err == nil {
			t.Errorf("%s was let through", name)
		}
	}
	for _, line := range []string{`{}`, `[]`, `{"assignments":{}}`, `null`, `{"assignments":`} {
		if _, err := gatewayclient.ParseSnapshot([]byte(line)); err == nil {
			t.Errorf("%s was let through", line)
		}
	}
}

func FuzzParseSnapshot(f *testing.F) {
	f.Add([]byte(`{"assignments":[{"socketID":"s1","port":80,"url":"https://x"}]}`))
	f.Add([]byte(`{"assignments":null}`))
	f.Add([]byte(`{"assignments":[{"socketID":"../x","port":-1}]}`))
	f.Fuzz(func(t *testing.T, line []byte) {
		snapshot, err := gatewayclient.ParseSnapshot(line)
		if err != nil {
			return
		}
		for _, assignment := range snapshot.Assignments {
			if !gatewayclient.ValidID(assignment.SocketID) || strings.ContainsAny(assignment.SocketID, "/ \n%") || assignment.Port < 1 {
				t.Errorf("%+v was let through", assignment)
			}
		}
	})
}

// otherCA is a certificate that signed nothing here.
const otherCA = `-----BEGIN CERTIFICATE-----
MIIBeDCCAR2gAwIBAgIUcnEh4b6ZtoK9gP5DemAvL4Is28owCgYIKoZIzj0EAwIw
EDEOMAwGA1UEAwwFb3RoZXIwIBcNMjYxMTI1MDMxNzM4WhgPMjEyNjExMDEwMzE3
MzhaMBAxDjAMBgNVBAMMBW90aGVyMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE
bQC8B9rars/qbVIy0rD2J0+kvyg72K1oTwKU4RWKyd7Acm8pYgs+ClR5S24TE42t
JzneEVZsjPrKeh8jkvsOzqNTMFEwHQYDVR0OBBYEFLgnQGX7OnIyw8Vb6Ah2QM5h
qg6hMB8GA1UdIwQYMBaAFLgnQGX7OnIyw8Vb6Ah2QM5hqg6hMA8GA1UdEwEB/wQF
MAMBAf8wCgYIKoZIzj0EAwIDSQAwRgIhAJVGTDkEVXwIgRjrAZ/lbppBD5BuWtsP
+DIZEt0lqsyJAiEAq5bFBfjCEXgFz5bFgRbh7/ZcOkgR5TW1KbDpvsyNUL0=
-----END CERTIFICATE-----
`
