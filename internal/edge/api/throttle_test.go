package api

import (
	"fmt"
	"testing"
	"time"
)

func TestThrottle(t *testing.T) {
	now := time.Unix(1000, 0)
	th := newThrottle(func() time.Time { return now }, "no", maxFailures, failureRefill, maxAddresses)
	try := func(remote string) bool {
		a, err := th.begin(hostOf(remote).String())
		if err == nil {
			a.failed()
		}
		return err == nil
	}
	for i := range maxFailures {
		if !try("192.0.2.1:1") {
			t.Fatalf("failure %d was throttled", i)
		}
	}
	if try("192.0.2.1:2") {
		t.Error("one more failure than allowed")
	}
	if !try("192.0.2.2:1") {
		t.Error("another address was throttled")
	}
	now = now.Add(failureRefill)
	if !try("192.0.2.1:1") || try("192.0.2.1:1") {
		t.Error("the wait does not give one try back")
	}
	// A clock that goes back takes nothing away, and waits are as long as before.
	now = now.Add(-5 * time.Hour)
	if try("192.0.2.1:1") {
		t.Error("a clock that went back gives tries")
	}
	if now = now.Add(failureRefill); !try("192.0.2.1:1") {
		t.Error("a clock that went back makes the wait longer")
	}
	// Tries that are under way count.
	for range maxFailures {
		if _, err := th.begin(hostOf("192.0.2.3:1").String()); err != nil {
			t.Fatal(err)
		}
	}
	if try("192.0.2.3:1") {
		t.Error("many tries at once are a way around")
	}
	// One IPv6 host has a whole /64.
	for i := range maxFailures {
		try(fmt.Sprintf("[2001:db8::%d]:1", i+1))
	}
	if try("[2001:db8::ffff]:1") || !try("[2001:db8:1::1]:1") {
		t.Error("IPv6 addresses are not throttled by /64")
	}
}

func TestThrottleForgets(t *testing.T) {
	now := time.Unix(1000, 0)
	th := newThrottle(func() time.Time { return now }, "no", maxFailures, failureRefill, maxAddresses)
	for i := range maxAddresses + 100 {
		if a, err := th.begin(fmt.Sprintf("10.%d.%d.%d:1", i>>16, i>>8&255, i&255)); err == nil {
			a.failed()
		}
	}
	if n := len(th.buckets); n > maxAddresses {
		t.Errorf("%d addresses are remembered", n)
	}
	now = now.Add(time.Hour)
	const more = maxAddresses/16 + 100
	for i := range more {
		if _, err := th.begin(fmt.Sprintf("192.0.%d.%d", i>>8, i&255)); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(th.buckets); n > more {
		t.Errorf("%d addresses are remembered after an hour", n)
	}
}
