package edge_test

import (
	"testing"

	"github.com/mysocketio/mysocket-injector/internal/edge/edgetest"
)

// BenchmarkRequest is one small GET through the HTTP front, over three tunnels, with a few visitors at once.
func BenchmarkRequest(b *testing.B) {
	e := edgetest.Start(b)
	a := login(b, e)
	s := a.newSocket("http")
	for range 3 {
		a.connect(s, appAddress(newApp(b, "app")))
	}
	visitor := e.VisitorClient(b)
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if status, body, err := tryGet(b.Context(), visitor, "http://"+s.DNSName+"/"); status != 200 || err != nil {
				b.Errorf("status %d %s, %v", status, body, err)
			}
		}
	})
}
