// Package docstest compares the documentation with the programs: each metric with the tables of docs/reference.md, each test that
// docs/design.md names with the tests that there are. It is for tests.
package docstest

import (
	"bufio"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

// Prefix begins the name of each metric of ours. Others are the libraries'.
const Prefix = "mysocket_"

// CompareMetrics wants the metrics of a program to be exactly those of the table under a heading of the reference, each with the same
// labels. The heading is given by its first words, such as "Sidecar".
func CompareMetrics(t *testing.T, heading string, registered prometheus.Collector) {
	t.Helper()
	want := documented(t, heading)
	if len(want) == 0 {
		t.Fatalf("docs/reference.md documents no metric under %q", heading)
	}
	have := described(t, registered)
	for name, labels := range have {
		switch in, ok := want[name]; {
		case !ok:
			t.Errorf("metric %s is not documented under %q", name, heading)
		case !slices.Equal(in, labels):
			t.Errorf("metric %s is documented with the labels %q, and has %q", name, in, labels)
		}
	}
	for name := range want {
		if _, ok := have[name]; !ok {
			t.Errorf("metric %s is documented under %q, and does not exist", name, heading)
		}
	}
}

var desc = regexp.MustCompile(`^Desc\{fqName: "([^"]+)", help: .*, variableLabels: \{([^}]*)\}\}$`)

// described lists the metrics of ours, with their labels in alphabetical order.
func described(t *testing.T, c prometheus.Collector) map[string][]string {
	t.Helper()
	descs := make(chan *prometheus.Desc)
	go func() {
		defer close(descs)
		c.Describe(descs)
	}()
	out := map[string][]string{}
	for d := range descs {
		m := desc.FindStringSubmatch(d.String())
		if m == nil {
			t.Errorf("can't read %s", d)
			continue
		}
		if strings.HasPrefix(m[1], Prefix) {
			out[m[1]] = sorted(strings.FieldsFunc(m[2], func(r rune) bool { return r == ',' || r == ' ' }))
		}
	}
	return out
}

var (
	row   = regexp.MustCompile("^\\| `(" + Prefix + "[a-z0-9_]+)` \\| (counter|gauge|histogram) \\| ([^|]*) ?\\| ")
	label = regexp.MustCompile("`([a-z_]+)`")
)

// documented lists the metrics of a table of the reference, with their labels in alphabetical order.
func documented(t *testing.T, heading string) map[string][]string {
	t.Helper()
	f, err := os.Open(filepath.Join(root(), "docs", "reference.md"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	out := map[string][]string{}
	within := false
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		line := lines.Text()
		if strings.HasPrefix(line, "#") {
			within = strings.HasPrefix(line, "### "+heading)
		}
		if !within || !strings.HasPrefix(line, "| `"+Prefix) {
			continue
		}
		m := row.FindStringSubmatch(line)
		if m == nil {
			t.Errorf("can't read the row %s", line)
			continue
		}
		if _, twice := out[m[1]]; twice {
			t.Errorf("metric %s is documented twice", m[1])
		}
		var labels []string
		for _, l := range label.FindAllStringSubmatch(withoutRemarks(m[3]), -1) {
			labels = append(labels, l[1])
		}
		out[m[1]] = sorted(labels)
	}
	if err := lines.Err(); err != nil {
		t.Fatal(err)
	}
	return out
}

// withoutRemarks drops what stands in parentheses: a label's values.
func withoutRemarks(s string) string {
	depth := 0
	return strings.Map(func(r rune) rune {
		switch r {
		case '(':
			depth++
		case ')':
			depth--
			return -1
		}
		if depth > 0 {
			return -1
		}
		return r
	}, s)
}

func sorted(s []string) []string {
	s = slices.Clone(s)
	slices.Sort(s)
	return s
}

// root is the root of the repository.
func root() string {
	_, file, _, _ := runtime.Caller(0)
	return filepath.Dir(filepath.Dir(filepath.Dir(file)))
}
