package main

import (
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
)

// checkCA asks the running edge for the certificate that it has also written to a file, and others for theirs.
func checkCA(t *testing.T, admin, file string) {
	t.Helper()
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if code, out, errs := invoke(t, "", "ca", "--admin-address", admin); code != 0 || out != string(want) {
		t.Errorf("ca: exit %d, %s%s, want what is in ca.pem", code, out, errs)
	}
	for answer, says := range map[string]string{"": "404 Not Found", "hello": "something else than a certificate"} {
		other := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if answer == "" {
				http.NotFound(w, r)
				return
			}
			_, _ = w.Write([]byte(answer))
		}))
		code, out, errs := invoke(t, "", "ca", "--admin-address", other.Listener.Addr().String())
		other.Close()
		if code != 1 || out != "" || !strings.Contains(errs, says) {
			t.Errorf("ca at a stranger: exit %d, %q, %q", code, out, errs)
		}
		if code, _, errs := invoke(t, "", "ca", "--admin-address", other.Listener.Addr().String()); code != 1 || !strings.Contains(errs, "no edge answers") {
			t.Errorf("ca where nobody listens: exit %d, %q", code, errs)
		}
	}
}
