package cluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
)

const (
	cniDir   = "/usr/lib/cni"
	caBundle = "/etc/ssl/certs/ca-certificates.crt"
)

// Requirement is a command (or a file, when it begins with a slash) and the Debian package
// that has it.
type Requirement struct{ What, Package string }

// runRequirements is what a running cluster needs beside what is built from Go modules.
// kube-proxy uses nft; the kubelet mounts with mount; enter uses nsenter.
var runRequirements = []Requirement{
	{"containerd", "containerd"},
	{"ctr", "containerd"},
	{"containerd-shim-runc-v2", "containerd"},
	{"runc", "runc"},
	{cniDir + "/ptp", "containernetworking-plugins"},
	{cniDir + "/host-local", "containernetworking-plugins"},
	{cniDir + "/loopback", "containernetworking-plugins"},
	{"nft", "nftables"},
	{"ip", "iproute2"},
	{"mount", "mount"},
	{"nsenter", "util-linux"},
}

// imageRequirements is what building the product's images needs.
var imageRequirements = []Requirement{{caBundle, "ca-certificates"}}

// missing returns the requirements that are not there.
func missing(reqs []Requirement) []Requirement {
	var out []Requirement
	for _, r := range reqs {
		var err error
		if strings.HasPrefix(r.What, "/") {
			_, err = os.Stat(r.What)
		} else {
			_, err = lookPath(r.What)
		}
		if err != nil {
			out = append(out, r)
		}
	}
	return out
}

// lookPath also looks where root's commands are: a user's PATH often lacks the sbin directories.
func lookPath(name string) (string, error) {
	p, err := exec.LookPath(name)
	if err == nil {
		return p, nil
	}
	for _, dir := range []string{"/usr/local/sbin", "/usr/sbin", "/sbin"} {
		if p, err := exec.LookPath(dir + "/" + name); err == nil {
			return p, nil
		}
	}
	return "", err
}

// describeMissing says what is not there and how to get it.
func describeMissing(reqs []Requirement) error {
	var names, pkgs []string
	for _, r := range reqs {
		names = append(names, r.What)
		if !slices.Contains(pkgs, r.Package) {
			pkgs = append(pkgs, r.Package)
		}
	}
	return fmt.Errorf("missing on this machine: %s. On Debian or Ubuntu run as root: apt-get install -y --no-install-recommends %s",
		strings.Join(names, ", "), strings.Join(pkgs, " "))
}

// EnsurePackages installs the packages of what is missing when this process is root on a
// Debian, and says what is missing otherwise.
func EnsurePackages(ctx context.Context, out io.Writer, reqs []Requirement) error {
	lacking := missing(reqs)
	if len(lacking) == 0 {
		return nil
	}
	aptGet, err := exec.LookPath("apt-get")
	if os.Geteuid() != 0 || err != nil {
		return describeMissing(lacking)
	}
	var pkgs []string
	for _, r := range lacking {
		if !slices.Contains(pkgs, r.Package) {
			pkgs = append(pkgs, r.Package)
		}
	}
	err = Step(out, "installing Debian packages: "+strings.Join(pkgs, " "), func() error {
		if err := run(ctx, nil, aptGet, "update", "-q"); err != nil {
			return err
		}
		env := []string{"DEBIAN_FRONTEND=noninteractive"}
		return run(ctx, env, aptGet, append([]string{"install", "-y", "-q", "--no-install-recommends"}, pkgs...)...)
	})
	if err != nil {
		return errors.Join(err, describeMissing(lacking))
	}
	if still := missing(reqs); len(still) > 0 {
		return describeMissing(still)
	}
	return nil
}

// run runs a command with more environment and no input. Its output is shown only in the
// error, and there only its end: that is where commands say what was wrong.
func run(ctx context.Context, env []string, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), env...)
	return runCmd(cmd)
}

func runCmd(cmd *exec.Cmd) error {
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w%s", strings.Join(cmd.Args, " "), err, tail(string(out), 2000))
	}
	return nil
}

// tail returns the last whole lines of s that fit in about n bytes, each indented.
func tail(s string, n int) string {
	s = strings.TrimSpace(s)
	if s == "" {
		return ""
	}
	if len(s) > n {
		s = s[len(s)-n:]
		if i := strings.IndexByte(s, '\n'); i >= 0 {
			s = s[i+1:]
		}
	}
	return "\n    " + strings.ReplaceAll(s, "\n", "\n    ")
}
