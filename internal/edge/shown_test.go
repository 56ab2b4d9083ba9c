package edge

import (
	"crypto/x509"
	"testing"
	"time"
)

// TestCertificatesThatAreGoneAreForgotten: those of sockets that were deleted end first, and would take the places on the page.
func TestCertificatesThatAreGoneAreForgotten(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	s := shownCertificates{now: func() time.Time { return now }}
	show := func(name string, end time.Duration) {
		s.note(&x509.Certificate{DNSNames: []string{name}, NotAfter: now.Add(end)})
	}
	show("gone.edge.test", 30*24*time.Hour)
	show("kept.edge.test", 60*24*time.Hour)
	now = now.Add(keepShown / 2)
	show("kept.edge.test", 60*24*time.Hour)
	if all := s.soonest(); len(all) != 2 || all[0].Name != "gone.edge.test" {
		t.Errorf("within the time: %v", all)
	}
	now = now.Add(keepShown/2 + time.Second)
	if all := s.soonest(); len(all) != 1 || all[0].Name != "kept.edge.test" {
		t.Errorf("after it: %v", all)
	}
}
