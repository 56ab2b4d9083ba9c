package docstest

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestEveryNameInTheSourceIsDocumented finds metrics that no test of a program registers.
func TestEveryNameInTheSourceIsDocumented(t *testing.T) {
	all := map[string][]string{}
	for _, heading := range []string{"Control plane", "Sidecar", "Edge"} {
		for name, labels := range documented(t, heading) {
			all[name] = labels
		}
	}
	name := regexp.MustCompile(`"(` + Prefix + `[a-z0-9_]+)"`)
	found := map[string]bool{}
	for _, dir := range []string{"cmd", "internal"} {
		err := filepath.WalkDir(filepath.Join(root(), dir), func(file string, _ fs.DirEntry, err error) error {
			if err != nil || !strings.HasSuffix(file, ".go") || strings.HasSuffix(file, "_test.go") {
				return err
			}
			text, err := os.ReadFile(file)
			if err != nil {
				return err
			}
			for _, m := range name.FindAllSubmatch(text, -1) {
				found[string(m[1])] = true
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if len(found) < 10 {
		t.Fatalf("found only %v", found)
	}
	for n := range found {
		_, ok := all[n]
		for _, part := range []string{"_sum", "_count", "_bucket"} { // of a histogram, as a scrape names them
			_, whole := all[strings.TrimSuffix(n, part)]
			ok = ok || whole
		}
		for d := range all {
			ok = ok || strings.HasPrefix(d, n+"_") // a namespace, to which the names are added
		}
		if !ok {
			t.Errorf("metric %s is not documented", n)
		}
	}
}

func TestWithoutRemarks(t *testing.T) {
	for in, want := range map[string]string{
		"`state` (as in [Tunnel objects](#tunnel-objects))":        "`state` ",
		"`endpoint` (`a`, `b`), `code` (HTTP status; `0`: (none))": "`endpoint` , `code` ",
		"": "",
	} {
		if got := withoutRemarks(in); got != want {
			t.Errorf("withoutRemarks(%q) = %q, want %q", in, got, want)
		}
	}
}
