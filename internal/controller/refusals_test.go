package controller

import (
	"errors"
	"testing"
	"time"

	"sigs.k8s.io/controller-runtime/pkg/client"
)

func TestRefusals(t *testing.T) {
	var (
		now     = time.Now()
		service = client.ObjectKey{Namespace: "shop", Name: "web"}
		asked   = "a tls socket"
		refused = errors.New("no tls")
	)
	for _, tc := range []struct {
		name    string
		service client.ObjectKey
		what    string
		after   time.Duration
		want    error
	}{
		{"the same again", service, asked, 29 * time.Second, refused},
		{"when it is time", service, asked, 30 * time.Second, nil},
		{"something else", service, "an http socket", 0, nil},
		{"another Service", client.ObjectKey{Namespace: "shop", Name: "api"}, asked, 0, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var r refusals
			if err := r.of(tc.service, tc.what, now); err != nil {
				t.Fatalf("before anything was refused: %v", err)
			}
			r.remember(service, asked, refused, now.Add(30*time.Second))
			if err := r.of(tc.service, tc.what, now.Add(tc.after)); !errors.Is(err, tc.want) {
				t.Errorf("got %v, want %v", err, tc.want)
			}
			r.forget(service)
			if err := r.of(service, asked, now); err != nil {
				t.Errorf("after it was forgotten: %v", err)
			}
		})
	}
}
