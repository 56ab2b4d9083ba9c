package main

import (
	"strings"
	"testing"
)

func TestShow(t *testing.T) {
	ours := samples{"rate": {10, 30, 20}, "alone": {1}, "zero": {5}}
	theirs := samples{"rate": {20, 20, 80}, "zero": {0}}
	for what, want := range map[string]string{
		"rate":    "20 (10-30) x0.50", // the median of the rounds' ratios, 0.5, 1.5 and 0.25
		"alone":   "1 (1-1)",
		"zero":    "5 (5-5)",
		"nothing": "-",
	} {
		if got := ours.show(what, "%.0f", theirs); got != want {
			t.Errorf("%s: %q, want %q", what, got, want)
		}
	}
}

func TestFlags(t *testing.T) {
	for _, c := range []struct{ args, says string }{
		{"", "--edge is missing"},
		{"--edge x --rounds 0", "--rounds 0: allowed are 1 to 100"},
		{"--edge x extra", `unexpected argument "extra"`},
		{"edge", "--edge is missing"},
		{"edge --edge x --seconds 0", "--seconds 0: allowed are 0.1 to 60"},
		{"edge --edge x --tunnels 15", "--tunnels 15: allowed are multiples of 10"},
		{"edge --edge x --only proxy,bulk", `--only "proxy,bulk": allowed are proxy, tunnels, balance`},
		{"edge --edge x --under water", `--under "water": allowed are requests, upload, download`},
		{"apps none", `"none" is not a number`},
		{"tunnel", "give the login as JSON"},
		{`tunnel {"Ports":[1,2],"Backends":["a"]}`, "open"},
		{"profiled {}", "give what to do as JSON"},
	} {
		if err := run(t.Context(), strings.Fields(c.args)); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%q: %v, want %q", c.args, err, c.says)
		}
	}
}
