package main

import (
	"bytes"
	"runtime"
	"strings"
	"testing"
)

func TestWrongCommandLines(t *testing.T) {
	const gateway = "--gateway=https://gateway:443"
	tests := []struct {
		name string
		args []string
		says string
	}{
		{"no command", nil, "Usage"},
		{"unknown command", []string{"walk"}, `"walk" is no command; there are run, drain and version`},
		{"no gateway", []string{"run"}, "--gateway is missing"},
		{"plain http", []string{"run", "--gateway=http://x"}, `--gateway is "http://x"; it must look like https://host:port`},
		{"a path in the gateway", []string{"run", "--gateway=https://x/y"}, "https://host:port"},
		{"unknown flag", []string{"run", gateway, "--colour=red"}, "colour"},
		{"an argument", []string{"run", gateway, "now"}, `"now" is not a flag`},
		{"pod IP", []string{"run", gateway, "--pod-ip=web"}, `--pod-ip is "web"; it must be an IP address`},
		{"no pod IP", []string{"run", gateway, "--pod-ip="}, "--pod-ip is missing"},
		{"admin address", []string{"run", gateway, "--admin-address=14180"}, "--admin-address is"},
		{"relative file", []string{"run", gateway, "--token-file=token"}, `--token-file is "token"; it must be an absolute path`},
		{"drain timeout", []string{"run", gateway, "--drain-timeout=0s"}, "--drain-timeout is 0s"},
		{"no duration", []string{"run", gateway, "--drain-timeout=25"}, "25"},
		{"ready grace", []string{"run", gateway, "--ready-grace=-1s"}, "--ready-grace is -1s"},
		{"log level", []string{"run", gateway, "--log-level=loud"}, `--log-level is "loud"; it must be debug, info, warn or error`},
		{"edge proxy", []string{"run", gateway, "--edge-proxy=ftp://proxy.example"}, `--edge-proxy: the proxy's scheme is "ftp"`},
		{"edge proxy with a password", []string{"run", gateway, "--edge-proxy=http://me:s3cret@proxy.example"}, "--edge-proxy: the proxy's address has a user name or password"},
		{"log format", []string{"run", gateway, "--log-format=xml"}, `--log-format is "xml"; it must be text or json`},
		{"socket name", []string{"drain", "--drain-socket=a/b"}, `--drain-socket is "a/b"`},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			env := func(name string) string { return map[string]string{"POD_IP": "10.0.0.1"}[name] }
			var stdout, stderr bytes.Buffer
			if code := mainCode(test.args, env, &stdout, &stderr); code != 2 {
				t.Errorf("exit code %d, want 2", code)
			}
			if !strings.Contains(stderr.String(), test.says) {
				t.Errorf("said %q, want %q", stderr.String(), test.says)
			}
			if lines := strings.Count(stderr.String(), "\n"); lines != 1 && len(test.args) > 0 {
				t.Errorf("said %d lines: %q", lines, stderr.String())
			}
		})
	}
}

func TestVersionAndHelp(t *testing.T) {
	for _, args := range [][]string{{"version"}, {"help"}, {"-h"}, {"run", "-h"}, {"drain", "--help"}} {
		var stdout, stderr bytes.Buffer
		if code := mainCode(args, func(string) string { return "" }, &stdout, &stderr); code != 0 || stdout.Len()+stderr.Len() == 0 {
			t.Errorf("%v: code %d, said %q %q", args, code, stdout.String(), stderr.String())
		}
	}
}

func TestLogLinesSayOnlyWhatThereIs(t *testing.T) {
	var out bytes.Buffer
	logger, err := newLogger(&out, "info", "text")
	if err != nil {
		t.Fatal(err)
	}
	logger.Info("tunnel lost", "err", nil, "hint", "", "edge", "e:22")
	if got := out.String(); !strings.HasSuffix(got, "level=INFO msg=\"tunnel lost\" edge=e:22\n") {
		t.Errorf("got %q", got)
	}
}

func TestProxyFor(t *testing.T) {
	t.Setenv("HTTPS_PROXY", "http://from-environment.example:3128")
	t.Setenv("NO_PROXY", "near.example")
	for _, tc := range []struct{ flag, address, want string }{
		{"socks5://from-flag.example:1080", "near.example:22", "socks5://from-flag.example:1080"},
		{"", "edge.example:22", "http://from-environment.example:3128"},
		{"", "near.example:22", ""},
	} {
		proxy, err := proxyFor(tc.flag)
		if err != nil {
			t.Fatal(err)
		}
		got, err := proxy(tc.address)
		text := ""
		if got != nil {
			text = got.String()
		}
		if err != nil || text != tc.want {
			t.Errorf("flag %q, %s: got %q, %v; want %q", tc.flag, tc.address, text, err, tc.want)
		}
	}
}

func TestUseProcessors(t *testing.T) {
	before := runtime.GOMAXPROCS(0)
	defer runtime.GOMAXPROCS(before)
	use := useProcessors(3)
	for tunnels, want := range []int{1, 1, 2, 3, 3} {
		use(tunnels)
		if got := runtime.GOMAXPROCS(0); got != want {
			t.Errorf("%d tunnels use %d processors, want %d", tunnels, got, want)
		}
	}
}
