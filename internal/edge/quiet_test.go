package edge_test

import (
	"io"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"

	"github.com/mysocketio/mysocket-injector/internal/edge/edgetest"
)

// A client that would discard what is written into its session, as the sidecar does, can say so. It still hears of the session's end.
func TestQuietSession(t *testing.T) {
	e := edgetest.Start(t)
	a := login(t, e)
	s := a.newSocket("http")
	r := a.connect(s, appAddress(newApp(t, "app")))
	open := func(quiet bool) (heard <-chan string) {
		ch, requests, err := r.client.OpenChannel("session", nil)
		if err != nil {
			t.Fatal(err)
		}
		go ssh.DiscardRequests(requests)
		if quiet {
			if _, err := ch.SendRequest("quiet@mysocket.io", false, nil); err != nil {
				t.Fatal(err)
			}
		}
		if ok, err := ch.SendRequest("shell", true, nil); err != nil || !ok {
			t.Fatal(ok, err)
		}
		all := make(chan string, 1)
		go func() {
			text, _ := io.ReadAll(ch)
			all <- string(text)
		}()
		return all
	}
	quiet, loud := open(true), open(false)
	visitor := e.VisitorClient(t)
	for range 3 {
		if status, body := get(t, visitor, "http://"+s.DNSName+"/"); status != 200 {
			t.Fatalf("status %d %s", status, body)
		}
	}
	e.Stop()
	if text := <-quiet; text != "" {
		t.Errorf("the quiet session was told %q", text)
	}
	if text := <-loud; !strings.Contains(text, "Welcome") {
		t.Errorf("the other session was told %q", text)
	}
}
