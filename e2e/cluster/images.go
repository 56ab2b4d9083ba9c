package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// Image is an image that was built, as an archive that containerd, docker and podman load.
type Image struct {
	Name     string // short: "webhook"
	Ref      string // "localhost/mysocket-injector/webhook:dev"
	Archive  string
	Unpacked int64 // bytes on a node's disk
	Packed   int64 // bytes in a registry (gzip)
}

// ImageRepository is where all images of the project are named.
const ImageRepository = "localhost/mysocket-injector/"

// imageSource is a Dockerfile and the directory it is built from, both below the repository root.
type imageSource struct{ name, dockerfile, context string }

var imageSources = []imageSource{
	{name: "webhook", dockerfile: "Dockerfile.webhook", context: "."},
	{name: "tunnel-sidecar", dockerfile: "Dockerfile.sidecar", context: "."},
	{name: "mysocket-edge", dockerfile: "Dockerfile.edge", context: "."},
	{name: "demo-app", dockerfile: "e2e/demoapp/Dockerfile", context: "e2e"},
	{name: "netprobe", dockerfile: "e2e/netprobe/Dockerfile", context: "e2e"},
}

// ImageNames are the short names of the images that BuildImages knows.
func ImageNames() []string {
	var names []string
	for _, s := range imageSources {
		names = append(names, s.name)
	}
	return names
}

var validTag = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$`)

// BuildImages builds the images named (all of them without a name) from the repository's
// Dockerfiles, with the go command instead of a container builder: the final stages begin at
// scratch, so there is nothing to pull and nothing to run. The tag is also the version that the
// programs are stamped with.
func BuildImages(ctx context.Context, opts Options, tag string, names ...string) ([]Image, error) {
	o, err := opts.complete()
	if err != nil {
		return nil, err
	}
	if !validTag.MatchString(tag) {
		return nil, fmt.Errorf("tag %q: want letters, digits, '.', '_' and '-', at most 128, beginning with a letter, a digit or '_'", tag)
	}
	for _, n := range names {
		if !slices.Contains(ImageNames(), n) {
			return nil, fmt.Errorf("image %q: the images are %s", n, strings.Join(ImageNames(), ", "))
		}
	}
	if err := EnsurePackages(ctx, o.Out, imageRequirements); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(o.imageDir(), 0o755); err != nil {
		return nil, err
	}
	var out []Image
	for _, src := range imageSources {
		if len(names) > 0 && !slices.Contains(names, src.name) {
			continue
		}
		var img Image
		err := Step(o.Out, "building image "+ImageRepository+src.name+":"+tag, func() error {
			var err error
			img, err = src.build(ctx, o, tag)
			return err
		})
		if err != nil {
			return nil, err
		}
		_, _ = fmt.Fprintf(o.Out, "  %s: %s on disk, %s in a registry\n", img.Ref, mebibytes(img.Unpacked), mebibytes(img.Packed))
		out = append(out, img)
	}
	return out, nil
}

func mebibytes(n int64) string { return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20)) }

func (src imageSource) build(ctx context.Context, o Options, tag string) (Image, error) {
	file := filepath.Join(o.Root, src.dockerfile)
	f, err := os.Open(file)
	if err != nil {
		return Image{}, err
	}
	r, err := parseDockerfile(src.dockerfile, f, map[string]string{"VERSION": tag})
	if err := errors.Join(err, f.Close()); err != nil {
		return Image{}, err
	}
	tmp, err := os.MkdirTemp("", "mysocket-image-*")
	if err != nil {
		return Image{}, err
	}
	defer func() { _ = os.RemoveAll(tmp) }()
	binary := filepath.Join(tmp, "binary")
	cmd := exec.CommandContext(ctx, "go", slices.Concat(r.goBuild[:1], []string{"-o", binary, "-buildvcs=false"}, r.goBuild[1:])...)
	cmd.Dir = filepath.Join(o.Root, src.context)
	cmd.Env = slices.Concat(os.Environ(), []string{"GOWORK=off", "GOFLAGS=", "GOOS=linux"}, r.goEnv)
	if err := runCmd(cmd); err != nil {
		return Image{}, err
	}
	img := image{ref: ImageRepository + src.name + ":" + tag, entrypoint: r.entrypoint, user: r.user, labels: r.labels, ports: r.ports}
	for _, c := range r.copies {
		from := c.from
		if from == r.output {
			from = binary
		}
		img.files = append(img.files, imageFile{from: from, to: c.to})
	}
	out := Image{Name: src.name, Ref: img.ref, Archive: o.archive(src.name + "-" + tag)}
	if err := img.writeArchive(out.Archive); err != nil {
		return Image{}, err
	}
	out.Unpacked, out.Packed, err = archiveSizes(out.Archive)
	return out, err
}
