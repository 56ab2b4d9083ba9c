package main

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

func writeConfig(t testing.TB, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "edge.yaml")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestPrecedence(t *testing.T) {
	path := writeConfig(t, `# a comment
domain: file.example.com
ssh-address: ":2201"
api-address: ":2301"
api-hosts: [a.example.com, 192.0.2.1]
allow-registration: true
come-back: 5s
`)
	t.Setenv("MYSOCKET_EDGE_CONFIG", path)
	t.Setenv("MYSOCKET_EDGE_SSH_ADDRESS", ":2202")
	t.Setenv("MYSOCKET_EDGE_API_ADDRESS", ":2302")
	t.Setenv("MYSOCKET_EDGE_ALLOW_REGISTRATION", "false")
	// What Kubernetes adds to a pod beside Services of these names.
	for _, name := range []string{"SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTPS", "ADMIN_SERVICE_HOST", "PORT_443_TCP_ADDR", "PORT_443_TCP"} {
		t.Setenv("MYSOCKET_EDGE_"+name, "10.0.0.1")
	}
	t.Setenv("MYSOCKET_EDGE_PORT", "tcp://10.0.0.1:443")
	var stderr bytes.Buffer
	cfg, _, _, ok := serveConfig([]string{"--api-address", ":2303"}, &stderr)
	if !ok {
		t.Fatal(stderr.String())
	}
	if cfg.Domain != "file.example.com" || cfg.SSHAddress != ":2202" || cfg.APIAddress != ":2303" || cfg.AllowRegistration ||
		cfg.ComeBack != 5*time.Second || strings.Join(cfg.APIHosts, " ") != "a.example.com 192.0.2.1" || cfg.HTTPAddress != ":80" {
		t.Errorf("the configuration is %+v", cfg)
	}
}

// TestTwoPlacesForOneState has them in any two layers: an edge that took one of them silently would begin anew, with other keys.
func TestTwoPlacesForOneState(t *testing.T) {
	const endpoints = "http://127.0.0.1:1"
	for _, c := range []struct{ file, variable, value, flag string }{
		{"state: x.db\netcd-endpoints: " + endpoints + "\n", "", "", ""},
		{"state: x.db\n", "MYSOCKET_EDGE_ETCD_ENDPOINTS", endpoints, ""},
		{"state: x.db\n", "", "", "--etcd-endpoints=" + endpoints},
		{"etcd-endpoints: " + endpoints + "\n", "MYSOCKET_EDGE_STATE", "x.db", ""},
		{"", "MYSOCKET_EDGE_STATE", "x.db", "--etcd-endpoints=" + endpoints},
	} {
		t.Run(c.file+c.variable+c.flag, func(t *testing.T) {
			if c.variable != "" {
				t.Setenv(c.variable, c.value)
			}
			args := []string{"serve", "--config", writeConfig(t, c.file)}
			if c.flag != "" {
				args = append(args, c.flag)
			}
			if code, _, errs := invoke(t, "", args...); code != 2 || !strings.Contains(errs, "two places for one state") {
				t.Errorf("exit %d, %s", code, errs)
			}
		})
	}
	t.Setenv("MYSOCKET_EDGE_STATE", "x.db")
	if code, _, errs := invoke(t, "", "user", "list", "--etcd-endpoints", endpoints); code != 1 || !strings.Contains(errs, "two places for one state") {
		t.Errorf("a command: exit %d, %s", code, errs)
	}
}

func TestMistakesHaveAPlace(t *testing.T) {
	for _, c := range []struct{ file, says string }{
		{"domian: x\n", `edge.yaml:1: there is no flag "domian"`},
		{"\n\ndomain: a.example\ndomain: b.example\n", "edge.yaml:4: domain is given twice; it is in line 3 already"},
		{"domain: 5\n", "edge.yaml:1: domain is 5, which YAML takes for a number; write it in quotes"},
		{"domain:\n", "edge.yaml:1: domain has no value"},
		{"domain: {a: b}\n", "edge.yaml:1: domain must have a plain value"},
		{"allow-registration: yes please\n", `edge.yaml:1: allow-registration is "yes please"; it must be true or false`},
		{"allow-registration: \"true\"\n", `it must be true or false, without quotes`},
		{"come-back: soon\n", `edge.yaml:1: come-back is "soon"; it must be a time such as`},
		{"come-back: 1h\n", "edge.yaml:1: come-back is 1h0m0s; allowed are 0s to 5m0s"},
		{"domain: Not A Domain\n", `edge.yaml:1: domain "Not A Domain" is not a DNS name`},
		{"api-hosts: [a b]\n", `edge.yaml:1: api-hosts: "a b" is neither`},
		{"config: other.yaml\n", "edge.yaml:1: config can't be given in the file"},
		{"- domain\n", "edge.yaml:1: the file must be lines of the form"},
		{"domain: a.example\n--- \ndomain: b.example\n", "edge.yaml:2: a second document begins"},
		{"domain: [\n", "edge.yaml:"},
		{"? [a]\n: b\n", "edge.yaml:1: there is no flag"},
		{"tcp-ports: 1-2\nssh-address: 127.0.0.1\nlog-level: loud\n", "edge.yaml:2: ssh-address"},
	} {
		code, _, errs := invoke(t, "", "serve", "--config", writeConfig(t, c.file))
		if code != 2 || !strings.Contains(errs, c.says) {
			t.Errorf("%q: exit %d, %s; want %q", c.file, code, errs, c.says)
		}
		for _, line := range strings.Split(strings.TrimSpace(errs), "\n") {
			if !strings.HasPrefix(line, "mysocket-edge serve: ") {
				t.Errorf("%q: the line %q is no sentence of its own", c.file, line)
			}
		}
	}
	// All mistakes are said at once, those of a flag that the command line overrides too.
	_, _, errs := invoke(t, "", "serve", "--come-back", "1s", "--config", writeConfig(t, "come-back: x\nnothing: 1\n"))
	if strings.Count(errs, "\n") != 2 {
		t.Errorf("said\n%s", errs)
	}
	for _, path := range []string{filepath.Join(t.TempDir(), "none.yaml"), t.TempDir()} {
		if code, _, errs := invoke(t, "", "serve", "--config", path); code != 2 || !strings.Contains(errs, path) {
			t.Errorf("%s: exit %d, %s", path, code, errs)
		}
	}
	if code, _, errs := invoke(t, "", "serve", "--config", writeConfig(t, "#"+strings.Repeat("x", maxConfigFile))); code != 2 || !strings.Contains(errs, "larger") {
		t.Errorf("a large file: exit %d, %s", code, errs)
	}
}

func TestMistakesInTheEnvironment(t *testing.T) {
	for _, c := range []struct{ name, value, says string }{
		{"MYSOCKET_EDGE_DOMIAN", "x", "the environment variable MYSOCKET_EDGE_DOMIAN stands for no flag"},
		{"MYSOCKET_EDGE_domain", "x", "MYSOCKET_EDGE_domain stands for no flag"},
		{"MYSOCKET_EDGE_HTTP_PORT", "80", "MYSOCKET_EDGE_HTTP_PORT stands for no flag"},
		{"MYSOCKET_EDGE_COME_BACK", "soon", `MYSOCKET_EDGE_COME_BACK: come-back is "soon"`},
		{"MYSOCKET_EDGE_DOMAIN", "Not A Domain", `MYSOCKET_EDGE_DOMAIN: domain "Not A Domain"`},
		{"MYSOCKET_EDGE_CONFIG", "/nonexistent", "/nonexistent"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Setenv(c.name, c.value)
			if code, _, errs := invoke(t, "", "serve"); code != 2 || !strings.Contains(errs, c.says) {
				t.Errorf("exit %d, %s", code, errs)
			}
		})
	}
}

// TestEveryKindOfFlag is about flags that the edge need not have today: those of the flag package, and ones that are given several times.
func TestEveryKindOfFlag(t *testing.T) {
	fs := flag.NewFlagSet("program", flag.ContinueOnError)
	count, share, size := fs.Int("count", 1, ""), fs.Float64("share", 1, ""), fs.Uint("size", 1, "")
	var many []string
	fs.Func("many", "", func(v string) error {
		if v == "bad" {
			return fmt.Errorf("not that")
		}
		many = append(many, v)
		return nil
	})
	path := writeConfig(t, "count: 12\nshare: 0.5\nsize: 7\nmany: [a, \"b\", 3]\n")
	var stderr bytes.Buffer
	if _, _, ok := parseLayers(fs, []string{"--config", path}, nil, &stderr); !ok {
		t.Fatal(stderr.String())
	}
	if *count != 12 || *share != 0.5 || *size != 7 || strings.Join(many, "") != "ab3" {
		t.Errorf("count %d, share %v, size %d, many %v", *count, *share, *size, many)
	}
	for _, c := range []struct{ file, says string }{
		{"count: a\n", "count is \"a\"; it must be a whole number"},
		{"size: -1\n", "not negative"},
		{"share: x\n", "must be a number"},
		{"many: bad\n", `many is "bad": not that`},
	} {
		fs := flag.NewFlagSet("program", flag.ContinueOnError)
		fs.Int("count", 1, "")
		fs.Uint("size", 1, "")
		fs.Float64("share", 1, "")
		fs.Func("many", "", func(string) error { return fmt.Errorf("not that") })
		stderr.Reset()
		if _, code, ok := parseLayers(fs, []string{"--config", writeConfig(t, c.file)}, nil, &stderr); ok || code != 2 || !strings.Contains(stderr.String(), c.says) {
			t.Errorf("%q: %s", c.file, stderr.String())
		}
	}
}

func FuzzConfigFile(f *testing.F) {
	example, err := os.ReadFile("../../contrib/mysocket-edge.yaml")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(example)
	f.Add([]byte("domain: &a x\nstate: *a\n"))
	f.Add([]byte("a: [*b]\n"))
	f.Add([]byte("<<: {domain: x}\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		var stderr bytes.Buffer
		_, _, code, ok := serveConfig([]string{"--config", writeConfig(t, string(data))}, &stderr)
		if ok != (stderr.Len() == 0) || !ok && code != 2 {
			t.Errorf("ok %v, exit %d, %q", ok, code, stderr.String())
		}
	})
}

func TestExampleFile(t *testing.T) {
	var stderr bytes.Buffer
	cfg, _, _, ok := serveConfig([]string{"--config", "../../contrib/mysocket-edge.yaml"}, &stderr)
	if !ok {
		t.Fatal(stderr.String())
	}
	if cfg.Domain != "edge.example.com" || cfg.StatePath != "/var/lib/mysocket-edge/edge.db" || cfg.SSHAddress != ":2222" {
		t.Errorf("the configuration is %+v", cfg)
	}
}

// TestUnit has systemd judge the unit, with this program where it is to be installed, and looks at how it calls it.
func TestUnit(t *testing.T) {
	unit, err := os.ReadFile("../../contrib/mysocket-edge.service")
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`(?m)^ExecStart=(/usr/local/bin/mysocket-edge) serve --config (/etc/mysocket-edge/edge.yaml)$`).FindSubmatch(unit)
	if m == nil {
		t.Fatalf("the unit has no ExecStart that is known here:\n%s", unit)
	}
	// systemd looks whether the program is there; the account is made by whoever installs it.
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	unit = bytes.ReplaceAll(unit, m[1], []byte(self))
	unit = bytes.ReplaceAll(unit, []byte("User=mysocket-edge\n"), nil)
	path := filepath.Join(t.TempDir(), "mysocket-edge.service")
	if err := os.WriteFile(path, unit, 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(t.Context(), "systemd-analyze", "verify", "--man=no", path).CombinedOutput()
	// It also says what it thinks of the machine's own units.
	if err != nil || strings.Contains(string(out), "mysocket-edge") {
		t.Errorf("%v: %s", err, out)
	}
}
