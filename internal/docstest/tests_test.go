package docstest

import (
	"bufio"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

var (
	// inCode is what stands in backquotes in the last cell of the table of failures: a directory, a test, or a further subtest of
	// the test before it, which begins with a slash.
	inCode   = regexp.MustCompile("`([^`]+)`")
	testFunc = regexp.MustCompile(`(?m)^func (Test\w+)\(`)
)

// TestTheTestsOfTheDesignExist reads the table of failures in docs/design.md and looks for each test that it names.
func TestTheTestsOfTheDesignExist(t *testing.T) {
	f, err := os.Open(filepath.Join(root(), "docs", "design.md"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	within, names := false, 0
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		line := lines.Text()
		if strings.HasPrefix(line, "## ") {
			within = line == "## Failures and the tests that show them"
		}
		cells := strings.Split(strings.Trim(line, "|"), " | ")
		if !within || !strings.HasPrefix(line, "|") || len(cells) != 3 || strings.HasPrefix(line, "| what") {
			continue
		}
		dir, test := "", ""
		found := 0
		for _, m := range inCode.FindAllStringSubmatch(cells[2], -1) {
			name, sub, _ := strings.Cut(m[1], "/")
			switch {
			case strings.HasPrefix(m[1], "Test"):
				test = name
			case name == "": // a subtest
			default:
				dir = m[1]
				continue
			}
			names++
			found++
			source := sourceOfTests(t, dir)
			if !hasTest(source, test) {
				t.Errorf("%s has no test %s, which docs/design.md names", dir, test)
			}
			if sub != "" && !strings.Contains(source, `"`+sub+`"`) {
				t.Errorf("%s has no subtest %q of %s, which docs/design.md names", dir, sub, test)
			}
		}
		if found == 0 {
			t.Errorf("docs/design.md names no test for: %s", cells[0])
		}
	}
	if err := lines.Err(); err != nil {
		t.Fatal(err)
	}
	if names < 50 {
		t.Errorf("found only %d names of tests in docs/design.md", names)
	}
}

func hasTest(source, name string) bool {
	for _, m := range testFunc.FindAllStringSubmatch(source, -1) {
		if m[1] == name {
			return true
		}
	}
	return false
}

// sourceOfTests is the text of a directory's test files.
func sourceOfTests(t *testing.T, dir string) string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(root(), filepath.FromSlash(dir), "*_test.go"))
	if err != nil || len(files) == 0 {
		t.Errorf("docs/design.md names tests of %q, which has none (%v)", dir, err)
	}
	var all strings.Builder
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		all.Write(b)
	}
	return all.String()
}
