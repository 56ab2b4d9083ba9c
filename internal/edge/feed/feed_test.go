package feed

import (
	"fmt"
	"testing"
)

func TestSlowWatcherMissesLines(t *testing.T) {
	var h Hub
	h.Publish("a", func() string { t.Error("a line was made for nobody"); return "" })
	slow, other := h.Subscribe("a"), h.Subscribe("b", "a")
	for i := range buffer + 10 {
		h.Publish("a", func() string { return fmt.Sprint(i) })
		<-other.Lines
	}
	if n := len(slow.Lines); n != buffer {
		t.Errorf("%d lines wait", n)
	}
	slow.Close()
	other.Close()
	if len(h.watchers) != 0 {
		t.Errorf("watchers are left: %v", h.watchers)
	}
}
