package docstest

import (
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

// TestChartValuesAreDocumented wants the values of each chart to be those of its table in docs/reference.md and those of its schema.
func TestChartValuesAreDocumented(t *testing.T) {
	for chart, heading := range map[string]string{"mysocket-injector": "## Chart values", "mysocket-edge": "### The edge's chart"} {
		t.Run(chart, func(t *testing.T) {
			var values map[string]any
			read(t, filepath.Join("charts", chart, "values.yaml"), func(b []byte) error { return yaml.Unmarshal(b, &values) })
			var s schema
			read(t, filepath.Join("charts", chart, "values.schema.json"), func(b []byte) error { return json.Unmarshal(b, &s) })
			have := map[string]bool{}
			for path, leaf := range leaves("", values, s, s.Definitions) {
				have[path] = true
				if !leaf {
					t.Errorf("value %s is in values.yaml and not in the schema, or the other way round", path)
				}
			}
			if len(have) < 20 {
				t.Fatalf("found only %v", slices.Sorted(maps.Keys(have)))
			}
			documented := documentedValues(t, heading)
			for path := range have {
				if !documented[path] {
					t.Errorf("value %s is not documented under %q", path, heading)
				}
			}
			for path := range documented {
				if !have[path] {
					t.Errorf("value %s is documented under %q, and does not exist", path, heading)
				}
			}
		})
	}
}

// schema is what is read of a JSON schema.
type schema struct {
	Ref         string            `json:"$ref"`
	Properties  map[string]schema `json:"properties"`
	Definitions map[string]schema `json:"definitions"`
}

// leaves returns the paths of all values that the schema gives no properties, and whether values and schema both have them.
func leaves(prefix string, values map[string]any, s schema, definitions map[string]schema) map[string]bool {
	if name, ok := strings.CutPrefix(s.Ref, "#/definitions/"); ok {
		s = definitions[name]
	}
	if len(s.Properties) == 0 {
		return map[string]bool{prefix: true}
	}
	out := map[string]bool{}
	for name, of := range s.Properties {
		path := strings.TrimPrefix(prefix+"."+name, ".")
		value, ok := values[name]
		if !ok {
			out[path] = path == "global" // Helm's own
			continue
		}
		below, _ := value.(map[string]any)
		maps.Copy(out, leaves(path, below, of, definitions))
	}
	for name := range values {
		if _, ok := s.Properties[name]; !ok {
			out[strings.TrimPrefix(prefix+"."+name, ".")] = false
		}
	}
	delete(out, "global")
	return out
}

func read(t *testing.T, file string, parse func([]byte) error) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(root(), file))
	if err == nil {
		err = parse(b)
	}
	if err != nil {
		t.Fatalf("%s: %v", file, err)
	}
}

var valueName = regexp.MustCompile("`([A-Za-z.]+)`")

// documentedValues lists what the first cells of the table under a heading have in backquotes.
func documentedValues(t *testing.T, heading string) map[string]bool {
	t.Helper()
	out := map[string]bool{}
	within := false
	read(t, filepath.Join("docs", "reference.md"), func(b []byte) error {
		for line := range strings.Lines(string(b)) {
			if strings.HasPrefix(line, "#") {
				within = strings.TrimSpace(line) == heading
			}
			cells := strings.Split(line, " | ")
			if !within || !strings.HasPrefix(line, "| `") || len(cells) < 2 {
				continue
			}
			for _, m := range valueName.FindAllStringSubmatch(cells[0], -1) {
				out[m[1]] = true
			}
		}
		return nil
	})
	if len(out) == 0 {
		t.Fatalf("docs/reference.md documents no value under %q", heading)
	}
	return out
}
