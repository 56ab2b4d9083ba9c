package main

import (
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// The documentation lists the modules that the sidecar links: one more in each pod is a decision, and no accident.
func TestLinkedModules(t *testing.T) {
	const own = "github.com/mysocketio/mysocket-injector"
	out, err := exec.CommandContext(t.Context(), "go", "list", "-deps", "-f", "{{with .Module}}{{.Path}}{{end}}", ".").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	linked := strings.Fields(string(out))
	slices.Sort(linked)
	linked = slices.DeleteFunc(slices.Compact(linked), func(module string) bool { return module == own })

	text, err := os.ReadFile("../../docs/design.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, found := strings.Cut(string(text), "\n### What the sidecar links\n")
	if !found {
		t.Fatal("docs/design.md has no section of what the sidecar links")
	}
	section, _, _ = strings.Cut(section, "\n#")
	var listed []string
	for _, row := range regexp.MustCompile("(?m)^\\| `([^`]+)` \\|").FindAllStringSubmatch(section, -1) {
		listed = append(listed, row[1])
	}
	if !slices.Equal(linked, listed) {
		t.Errorf("the sidecar links\n%s\nand docs/design.md lists\n%s", strings.Join(linked, "\n"), strings.Join(listed, "\n"))
	}
}
