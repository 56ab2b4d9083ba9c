package edge_test

import (
	"io"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/mysocketio/mysocket-injector/internal/edge/edgetest"
)

// An answer whose length is known comes through as it is written, and its header before its body is there: nothing is kept until it is
// whole.
func TestAnswerOfKnownLengthIsNotHeldBack(t *testing.T) {
	e := edgetest.Start(t)
	a := login(t, e)
	s := a.newSocket("http")
	next := make(chan struct{})
	app := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", "3")
		w.WriteHeader(http.StatusOK)
		for _, part := range []string{"", "a", "b", "c"} {
			_, _ = io.WriteString(w, part)
			_ = http.NewResponseController(w).Flush()
			select {
			case <-next:
			case <-r.Context().Done():
				return
			}
		}
	}))
	t.Cleanup(app.Close)
	a.connect(s, appAddress(app))
	for _, scheme := range []string{"http", "https"} {
		resp, err := e.VisitorClient(t).Get(scheme + "://" + s.DNSName + "/") // returns with the header
		if err != nil {
			t.Fatal(err)
		}
		for _, want := range "abc" {
			next <- struct{}{}
			got := make([]byte, 1)
			if _, err := io.ReadFull(resp.Body, got); err != nil || rune(got[0]) != want {
				t.Fatalf("%s: read %q, %v, want %c", scheme, got, err, want)
			}
		}
		next <- struct{}{}
		_ = resp.Body.Close()
	}
}
