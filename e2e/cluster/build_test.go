package cluster

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestPartKey(t *testing.T) {
	dir := t.TempDir()
	write := func(name, content string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	p := part{name: "x", args: []string{"build", "."}, sources: []string{dir}}
	key := func(p part, version string) string {
		t.Helper()
		k, err := p.key(version)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	write("main.go", "package main")
	write("go.mod", "module x")
	write("templates/a.yaml", "a: 1")
	base := key(p, "go1.26.8")
	if again := key(p, "go1.26.8"); again != base {
		t.Errorf("the same sources give %s and %s", base, again)
	}
	write("main_test.go", "package main")
	write("README.md", "hello")
	if got := key(p, "go1.26.8"); got != base {
		t.Error("a test or a text is no reason to build anew")
	}
	if key(p, "go1.27.0") == base {
		t.Error("another Go gives the same key")
	}
	other := p
	other.args = []string{"build", "-trimpath", "."}
	if key(other, "go1.26.8") == base {
		t.Error("another command gives the same key")
	}
	for name, content := range map[string]string{"main.go": "package main // changed", "go.mod": "module y", "go.sum": "sum", "templates/a.yaml": "a: 2"} {
		before := key(p, "go1.26.8")
		write(name, content)
		if key(p, "go1.26.8") == before {
			t.Errorf("another %s gives the same key", name)
		}
	}
}

func TestParts(t *testing.T) {
	ps, err := parts(repositoryRoot(t))
	if err != nil {
		t.Fatal(err)
	}
	if len(ps) == 0 || ps[0].name != "hyperkube" || !strings.HasPrefix(ps[0].title, "Kubernetes v1.") {
		t.Errorf("first part %+v: want Kubernetes with its version", ps)
	}
	for _, p := range ps {
		if p.optional != (p.name == certManagerPart) {
			t.Errorf("part %s: optional is %t; only what no cluster needs to run may be", p.name, p.optional)
		}
	}
	want := "-s -w -X k8s.io/component-base/version.gitVersion=v1.37.2 -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=37"
	if got := kubernetesFlags("v1.37.2"); !strings.HasPrefix(got, want) {
		t.Errorf("flags %s", got)
	}
}

// TestEnsureBuildsOnce builds a tiny part: the second time nothing is run, a lost file or
// another key is built again, and a failed build leaves no key behind.
func TestEnsureBuildsOnce(t *testing.T) {
	o := testOptions(t)
	src := t.TempDir()
	for name, content := range map[string]string{"go.mod": "module x\n\ngo 1.26\n", "main.go": "package main\n\nfunc main() {}\n"} {
		if err := os.WriteFile(filepath.Join(src, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.MkdirAll(o.binDir(), 0o755); err != nil {
		t.Fatal(err)
	}
	p := part{name: "x", title: "x", dir: src, args: []string{"build", "."}, links: []string{"y"}, image: "localhost/x:1"}
	built := func(key string) bool {
		t.Helper()
		var out bytes.Buffer
		o.Out = &out
		if err := p.ensure(t.Context(), o, key); err != nil {
			t.Fatal(err)
		}
		return out.Len() > 0
	}
	if !built("k1") {
		t.Error("the first time nothing was built")
	}
	if built("k1") {
		t.Error("the second time it was built again")
	}
	if err := os.Remove(filepath.Join(o.binDir(), "y")); err != nil {
		t.Fatal(err)
	}
	if !built("k1") || !exists(filepath.Join(o.binDir(), "y")) {
		t.Error("a lost link was not made again")
	}
	if !built("k2") {
		t.Error("another key was not built")
	}
	if err := os.WriteFile(filepath.Join(src, "main.go"), []byte("package main\n\nfunc main() { no }\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	o.Out = io.Discard
	err := p.ensure(t.Context(), o, "k3")
	if err == nil || !strings.Contains(err.Error(), "undefined: no") {
		t.Errorf("a build that fails says %v", err)
	}
	if exists(filepath.Join(o.binDir(), ".x.key")) {
		t.Error("a failed build left its key")
	}
}

func TestWriteArchive(t *testing.T) {
	dir := t.TempDir()
	bin := filepath.Join(dir, "app")
	if err := os.WriteFile(bin, []byte("binary"), 0o755); err != nil {
		t.Fatal(err)
	}
	img := image{
		ref: "localhost/x:1", entrypoint: []string{"/app"}, user: "65532:65532", ports: []string{"80/tcp"},
		labels: map[string]string{"a": "b"}, files: []imageFile{{from: bin, to: "/etc/ssl/app"}, {from: bin, to: "/app"}},
	}
	one, two := filepath.Join(dir, "1.tar"), filepath.Join(dir, "2.tar")
	if err := errors.Join(img.writeArchive(one), img.writeArchive(two)); err != nil {
		t.Fatal(err)
	}
	a, err := os.ReadFile(one)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(two)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(a, b) {
		t.Error("the same image gave different bytes")
	}
	files := readTar(t, a)
	var manifest []struct {
		Config   string
		RepoTags []string
		Layers   []string
	}
	if err := json.Unmarshal(files["manifest.json"], &manifest); err != nil || len(manifest) != 1 || len(manifest[0].Layers) != 1 {
		t.Fatalf("manifest %s: %v", files["manifest.json"], err)
	}
	if manifest[0].RepoTags[0] != "localhost/x:1" {
		t.Errorf("tags %v", manifest[0].RepoTags)
	}
	layer := readTar(t, files[manifest[0].Layers[0]])
	for _, name := range []string{"etc/", "etc/ssl/", "etc/ssl/app", "app"} {
		if _, ok := layer[name]; !ok {
			t.Errorf("no %s in the layer", name)
		}
	}
	if config := string(files[manifest[0].Config]); !strings.Contains(config, `"User":"65532:65532"`) || !strings.Contains(config, `"ExposedPorts":{"80/tcp":{}}`) {
		t.Errorf("config %s", config)
	}
	unpacked, packed, err := archiveSizes(one)
	if err != nil || unpacked == 0 || packed == 0 || packed >= unpacked {
		t.Errorf("sizes %d and %d, %v", unpacked, packed, err)
	}
	img.files = []imageFile{{from: bin, to: "../app"}}
	if err := img.writeArchive(one); err == nil {
		t.Error("a file outside of the image was accepted")
	}
}

func readTar(t *testing.T, b []byte) map[string][]byte {
	t.Helper()
	out := map[string][]byte{}
	for r := tar.NewReader(bytes.NewReader(b)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		if out[h.Name], err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
	}
}

func TestBuildImagesRefuses(t *testing.T) {
	o := testOptions(t)
	if _, err := BuildImages(t.Context(), o, "a b"); err == nil || !strings.Contains(err.Error(), `tag "a b"`) {
		t.Errorf("a tag with a blank: %v", err)
	}
	if _, err := BuildImages(t.Context(), o, "dev", "nothing"); err == nil || !strings.Contains(err.Error(), "the images are webhook, tunnel-sidecar") {
		t.Errorf("an unknown image: %v", err)
	}
}

func TestMissing(t *testing.T) {
	reqs := []Requirement{{"sh", "dash"}, {"no-such-command-here", "thing"}, {"/no/such/file", "thing"}}
	got := missing(reqs)
	if len(got) != 2 {
		t.Fatalf("missing %v", got)
	}
	want := "missing on this machine: no-such-command-here, /no/such/file. On Debian or Ubuntu run as root: apt-get install -y --no-install-recommends thing"
	if err := describeMissing(got); err.Error() != want {
		t.Errorf("got %v", err)
	}
}

func TestRunShowsWhatWentWrong(t *testing.T) {
	err := run(context.Background(), nil, "sh", "-c", "echo out of paper >&2; exit 3")
	if err == nil || !strings.Contains(err.Error(), "exit status 3\n    out of paper") {
		t.Errorf("got %v", err)
	}
}
