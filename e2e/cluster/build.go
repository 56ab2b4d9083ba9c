package cluster

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
)

const (
	kubernetesModule = "k8s.io/kubernetes"
	coreDNSModule    = "github.com/coredns/coredns"
	helmPackage      = "helm.sh/helm/v4/cmd/helm"
	helmVersion      = "v4.3.1"

	pauseImage   = "localhost/pause:1"
	coreDNSImage = "localhost/coredns:1"

	certManagerModule = "github.com/cert-manager/cert-manager"
	certManagerPart   = "cert-manager"
	certManagerImage  = "localhost/cert-manager:1"

	initBinary = "mysocket-e2e-init"
)

// part is one binary that the cluster needs: built once and kept under a key of everything
// that goes into it.
type part struct {
	name  string   // file name in the binary directory
	title string   // for people
	dir   string   // where the go command runs
	args  []string // of the go command, without -o
	links []string // other names of the same binary
	// sources are the directories whose Go and module files are part of the key.
	sources []string
	// install is true for "go install" of a foreign module, which takes GOBIN and no -o.
	install bool
	// image, when set, is the single-binary image that is made of the part.
	image string
	// optional parts are built only for the tests that use them.
	optional bool
}

// parts lists what up needs, the longest build first, and what is optional.
func parts(root string) ([]part, error) {
	e2e := filepath.Join(root, "e2e")
	kube, err := requiredVersion(filepath.Join(e2e, "hyperkube", "go.mod"), kubernetesModule)
	if err != nil {
		return nil, err
	}
	dns, err := requiredVersion(filepath.Join(e2e, "coredns", "go.mod"), coreDNSModule)
	if err != nil {
		return nil, err
	}
	certManager, err := requiredVersion(filepath.Join(e2e, "certmanager", "go.mod"), certManagerModule)
	if err != nil {
		return nil, err
	}
	build := func(ldflags, pkg string) []string {
		return []string{"build", "-trimpath", "-buildvcs=false", "-ldflags", ldflags, pkg}
	}
	return []part{
		{
			name: "hyperkube", title: "Kubernetes " + kube, dir: filepath.Join(e2e, "hyperkube"),
			args: build(kubernetesFlags(kube), "."), links: []string{"kube-apiserver", "etcd", "kubectl"},
			sources: []string{filepath.Join(e2e, "hyperkube")},
		},
		{
			name: "coredns", title: "CoreDNS " + dns, dir: filepath.Join(e2e, "coredns"), args: build("-s -w", "."),
			sources: []string{filepath.Join(e2e, "coredns")}, image: coreDNSImage,
		},
		{
			name: "helm", title: "Helm " + helmVersion, dir: e2e, install: true,
			args: []string{"install", "-trimpath", "-ldflags", "-s -w -X helm.sh/helm/v4/internal/version.version=" + helmVersion, helmPackage + "@" + helmVersion},
		},
		{
			name: "pause", title: "pause", dir: e2e, args: build("-s -w", "./pause"),
			sources: []string{filepath.Join(e2e, "pause")}, image: pauseImage,
		},
		{
			name: initBinary, title: "the node's init", dir: e2e, args: build("-s -w", "./cmd/cluster"),
			// Not the module files: this program uses only the standard library, and the tests'
			// dependencies must not be a reason to start a running cluster anew.
			sources: []string{filepath.Join(e2e, "cluster"), filepath.Join(e2e, "cmd", "cluster")},
		},
		{
			name: certManagerPart, title: "cert-manager " + certManager, dir: filepath.Join(e2e, "certmanager"), args: build("-s -w", "."),
			sources: []string{filepath.Join(e2e, "certmanager")}, image: certManagerImage, optional: true,
		},
	}, nil
}

// kubernetesFlags stamps the version: without it the API server calls itself v0.0.0 and refuses
// to be asked for features of its own minor.
func kubernetesFlags(version string) string {
	major, rest, _ := strings.Cut(strings.TrimPrefix(version, "v"), ".")
	minor, _, _ := strings.Cut(rest, ".")
	flags := "-s -w"
	for _, pkg := range []string{"k8s.io/component-base/version", "k8s.io/client-go/pkg/version"} {
		flags += fmt.Sprintf(" -X %[1]s.gitVersion=%[2]s -X %[1]s.gitMajor=%[3]s -X %[1]s.gitMinor=%[4]s -X %[1]s.gitTreeState=clean",
			pkg, version, major, minor)
	}
	return flags
}

// requiredVersion finds the version at which a go.mod requires a module.
func requiredVersion(gomod, module string) (string, error) {
	b, err := os.ReadFile(gomod)
	if err != nil {
		return "", err
	}
	m := regexp.MustCompile(`(?m)^(?:require)?\s*` + regexp.QuoteMeta(module) + `\s+(v\S+)`).FindSubmatch(b)
	if m == nil {
		return "", fmt.Errorf("%s does not require %s", gomod, module)
	}
	return string(m[1]), nil
}

// key is a hash of everything that decides what the part's binary will be: the Go version and
// platform, the command, and the Go and module files.
func (p part) key(goVersion string) (string, error) {
	h := sha256.New()
	_, _ = fmt.Fprintf(h, "%s %s/%s\n%q\n", goVersion, runtime.GOOS, runtime.GOARCH, p.args)
	for _, dir := range p.sources {
		entries, err := os.ReadDir(dir)
		if err != nil {
			return "", err
		}
		for _, e := range entries {
			name := e.Name()
			sub := e.IsDir() && name == "templates"
			if !sub && !isSource(name) {
				continue
			}
			files := []string{filepath.Join(dir, name)}
			if sub {
				if files, err = filepath.Glob(filepath.Join(dir, name, "*")); err != nil {
					return "", err
				}
			}
			for _, f := range files {
				b, err := os.ReadFile(f)
				if err != nil {
					return "", err
				}
				_, _ = fmt.Fprintf(h, "%s/%s %d\n", filepath.Base(dir), filepath.Base(f), len(b))
				_, _ = h.Write(b)
			}
		}
	}
	return hex.EncodeToString(h.Sum(nil))[:24], nil
}

func isSource(name string) bool {
	if name == "go.mod" || name == "go.sum" {
		return true
	}
	return strings.HasSuffix(name, ".go") && !strings.HasSuffix(name, "_test.go")
}

// Build builds what the cluster runs, unless it is in the cache already, and returns the
// directory of the binaries: hyperkube with its links kube-apiserver, etcd and kubectl, coredns,
// helm, pause.
func Build(ctx context.Context, opts Options) (binDir string, err error) {
	o, err := opts.complete()
	if err != nil {
		return "", err
	}
	_, err = build(ctx, o, nil)
	return o.binDir(), err
}

// BuildEnvtestAssets builds only Kubernetes and returns a directory that has kube-apiserver,
// etcd and kubectl: the value for KUBEBUILDER_ASSETS.
func BuildEnvtestAssets(ctx context.Context, opts Options) (dir string, err error) {
	o, err := opts.complete()
	if err != nil {
		return "", err
	}
	_, err = build(ctx, o, []string{"hyperkube"})
	return o.binDir(), err
}

// CertManager is cert-manager, ready to be installed in a cluster.
type CertManager struct {
	Ref     string // of the image
	Archive string // of the image
	CRDs    string // the directory of its CustomResourceDefinitions
}

// BuildCertManager builds cert-manager, unless it is in the cache already. No cluster needs it to run.
func BuildCertManager(ctx context.Context, opts Options) (*CertManager, error) {
	o, err := opts.complete()
	if err != nil {
		return nil, err
	}
	if _, err := build(ctx, o, []string{certManagerPart}); err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", certManagerModule)
	cmd.Dir = filepath.Join(o.Root, "e2e", "certmanager")
	cmd.Env = append(os.Environ(), "GOWORK=off", "GOFLAGS=")
	dir, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("find the module %s: %w", certManagerModule, err)
	}
	return &CertManager{
		Ref: certManagerImage, Archive: o.archive(certManagerPart), CRDs: filepath.Join(strings.TrimSpace(string(dir)), "deploy", "crds"),
	}, nil
}

// build makes the parts named (all that are not optional when names is empty) and returns the key of each.
func build(ctx context.Context, o Options, names []string) (map[string]string, error) {
	if _, err := exec.LookPath("go"); err != nil {
		return nil, errors.New("missing on this machine: go (the version in go.mod or newer), which builds the cluster")
	}
	if err := os.MkdirAll(o.binDir(), 0o755); err != nil {
		return nil, err
	}
	all, err := parts(o.Root)
	if err != nil {
		return nil, err
	}
	unlock, err := lockFile(ctx, o.Out, filepath.Join(o.CacheDir, "build.lock"))
	if err != nil {
		return nil, err
	}
	defer unlock()
	version, err := exec.CommandContext(ctx, "go", "env", "GOVERSION").Output()
	if err != nil {
		return nil, fmt.Errorf("ask go for its version: %w", err)
	}
	keys := map[string]string{}
	for _, p := range all {
		if len(names) > 0 && !slices.Contains(names, p.name) || len(names) == 0 && p.optional {
			continue
		}
		key, err := p.key(strings.TrimSpace(string(version)))
		if err != nil {
			return nil, err
		}
		keys[p.name] = key
		if err := p.ensure(ctx, o, key); err != nil {
			return nil, err
		}
	}
	return keys, nil
}

// ensure builds the part when what is in the cache has another key or is not whole.
func (p part) ensure(ctx context.Context, o Options, key string) error {
	bin := filepath.Join(o.binDir(), p.name)
	keyFile := filepath.Join(o.binDir(), "."+p.name+".key")
	old, _ := os.ReadFile(keyFile)
	whole := string(old) == key && exists(bin)
	for _, l := range p.links {
		whole = whole && exists(filepath.Join(o.binDir(), l))
	}
	if p.image != "" {
		whole = whole && exists(o.archive(p.name))
	}
	if whole {
		return nil
	}
	// The key goes first and comes back last: an interrupted build is not mistaken for a whole one.
	if err := os.Remove(keyFile); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	err := Step(o.Out, "building "+p.title, func() error { return p.compile(ctx, bin) })
	if err != nil {
		return err
	}
	for _, l := range p.links {
		link := filepath.Join(o.binDir(), l)
		if err := os.Remove(link); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		if err := os.Symlink(p.name, link); err != nil {
			return err
		}
	}
	if p.image != "" {
		img := image{ref: p.image, entrypoint: []string{"/" + p.name}, files: []imageFile{{from: bin, to: "/" + p.name}}}
		if err := img.writeArchive(o.archive(p.name)); err != nil {
			return err
		}
	}
	return writeFile(keyFile, []byte(key), 0o644)
}

// compile runs the go command into a directory beside the target and moves the binary into
// place at the end, so that a running cluster keeps the file it has open.
func (p part) compile(ctx context.Context, bin string) error {
	tmp, err := os.MkdirTemp(filepath.Dir(bin), ".build-*")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(tmp) }()
	built := filepath.Join(tmp, p.name)
	env := []string{"CGO_ENABLED=0"}
	args := p.args
	if p.install {
		env = append(env, "GOBIN="+tmp)
	} else {
		args = append([]string{args[0], "-o", built}, args[1:]...)
	}
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = p.dir
	// A workspace file or flags of the user must not decide which modules go in.
	cmd.Env = append(os.Environ(), append(env, "GOWORK=off", "GOFLAGS=")...)
	if err := runCmd(cmd); err != nil {
		return err
	}
	return os.Rename(built, bin)
}

// archive is the file of an image that is made of a part.
func (o Options) archive(name string) string { return filepath.Join(o.imageDir(), name+".tar") }

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
