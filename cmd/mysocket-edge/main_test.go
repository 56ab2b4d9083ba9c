package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func invoke(t *testing.T, stdin string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = run(t.Context(), args, strings.NewReader(stdin), &out, &errs)
	return code, out.String(), errs.String()
}

func TestUsage(t *testing.T) {
	for _, c := range []struct {
		args []string
		code int
		says string
	}{
		{nil, 2, "Usage:"},
		{[]string{"help"}, 0, "Usage:"},
		{[]string{"version"}, 0, "mysocket-edge dev"},
		{[]string{"fly"}, 2, `no command "fly"`},
		{[]string{"user"}, 2, "user add"},
		{[]string{"user", "fly"}, 2, `no command "fly"`},
		{[]string{"token"}, 2, "token create"},
		{[]string{"token", "fly"}, 2, `no command "fly"; there are create, list and revoke`},
		{[]string{"user", "password", "--help"}, 0, "-password-file"},
		{[]string{"backup", "--help"}, 0, "-out"},
		{[]string{"restore", "--help"}, 0, "-from"},
		{[]string{"token", "help"}, 0, "token revoke"},
		{[]string{"token", "create", "--help"}, 0, "-lifetime"},
		{[]string{"serve", "--help"}, 0, "-tcp-ports"},
		{[]string{"user", "add", "--help"}, 0, "-password-file"},
		{[]string{"ca", "--help"}, 0, "-admin-address"},
		{[]string{"ca", "--admin-address", "9090"}, 2, `--admin-address "9090" is not host:port`},
		{[]string{"serve", "extra"}, 2, `unexpected argument "extra"`},
		{[]string{"serve", "--nothing"}, 2, "-nothing"},
		{[]string{"serve", "--domain", "Not A Domain"}, 2, `--domain "Not A Domain" is not a DNS name`},
		{[]string{"serve", "--api-address", "8443"}, 2, `--api-address "8443" is not host:port`},
		{[]string{"serve", "--ssh-address", ":99999"}, 2, `--ssh-address ":99999" has no port`},
		{[]string{"serve", "--tcp-ports", "9-1"}, 2, `--tcp-ports "9-1" is not a range`},
		{[]string{"serve", "--header-timeout", "0s"}, 2, `-header-timeout: allowed are more than 0s`},
		{[]string{"serve", "--idle-timeout", "-1s"}, 2, `--idle-timeout is -1s; allowed are more than 0s, up to 24h0m0s`},
		{[]string{"serve", "--body-timeout", "25h"}, 2, `--body-timeout is 25h0m0s; allowed are up to 24h0m0s, and 0s, which is for ever`},
		{[]string{"serve", "--upgraded-idle-timeout", "-1s"}, 2, `--upgraded-idle-timeout is -1s`},
		{[]string{"serve", "--answer-timeout", "soon"}, 2, `-answer-timeout`},
		{[]string{"serve", "--body-timeout", "0s", "--upgraded-idle-timeout", "0s", "--answer-timeout", "0s", "--tcp-ports", "9-1"}, 2, "serve: --tcp-ports"},
		{[]string{"serve", "--slow-start", "1h"}, 2, `--slow-start is 1h0m0s; allowed are 0s to 10m0s`},
		{[]string{"serve", "--api-hosts", "a.example, b c"}, 2, `--api-hosts: "b c"`},
		{[]string{"serve", "--trusted-proxies", "10.0.0.0/8, proxy.example"}, 2, `--trusted-proxies: "proxy.example" is neither a network such as 10.0.0.0/8 nor an IP address`},
		{[]string{"serve", "--proxy-protocol", "http, ftp", "--trusted-proxies", "10.0.0.1"}, 2, `--proxy-protocol: "ftp" is not one of http, https, tcp`},
		{[]string{"serve", "--proxy-protocol", "tcp"}, 2, "--proxy-protocol needs trusted-proxies"},
		{[]string{"serve", "--acme-directory", "http://acme.example"}, 2, `--acme-directory "http://acme.example" is not the https:// URL`},
		{[]string{"serve", "--tls-cert", "x.pem"}, 2, "--tls-cert and tls-key belong together"},
		{[]string{"serve", "--log-level", "loud"}, 2, `--log-level "loud"`},
		{[]string{"serve", "--control-socket", strings.Repeat("x", 200)}, 2, `a socket's path may have 103`},
		{[]string{"serve", "--log-format", "xml"}, 2, `--log-format "xml"`},
		{[]string{"serve", "--etcd-endpoints", "10.0.0.1:2379"}, 2, `--etcd-endpoints "10.0.0.1:2379" is not a URL`},
		{[]string{"serve", "--etcd-endpoints", "http://127.0.0.1:1", "--state", "x.db"}, 2, "--state and etcd-endpoints are two places"},
		{[]string{"serve", "--etcd-ca", "ca.pem"}, 2, "--etcd-ca needs etcd-endpoints"},
		{[]string{"serve", "--startup-wait", "-1s"}, 2, "--startup-wait is -1s; allowed are 0s to 10m"},
		{[]string{"serve", "--shutdown-delay", "1h"}, 2, "--shutdown-delay is 1h"},
		{[]string{"user", "list", "--etcd-ca", "ca.pem"}, 1, "etcd-ca needs etcd-endpoints"},
		{[]string{"user", "list", "--etcd-endpoints", "https://10.0.0.1"}, 1, "no host and port"},
		{[]string{"token", "list", "--etcd-endpoints", "http://127.0.0.1:1", "--state", "x.db"}, 1, "two places for one state"},
		{[]string{"serve", "--state", "/nonexistent/x.db", "--ssh-address", "127.0.0.1:0"}, 1, "/nonexistent"},
	} {
		code, out, errs := invoke(t, "", c.args...)
		if code != c.code || !strings.Contains(out+errs, c.says) {
			t.Errorf("%q: exit %d, %s%s", c.args, code, out, errs)
		}
	}
}

func TestUserCommands(t *testing.T) {
	dir := t.TempDir()
	state := filepath.Join(dir, "x.db")
	passwordFile := filepath.Join(dir, "password")
	if err := os.WriteFile(passwordFile, []byte("from a file\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		stdin string
		args  []string
		code  int
		says  string
	}{
		{"a long password\nand more\n", []string{"user", "add", "--email", "a@example.com", "--name", "Ann"}, 0, "-"},
		{"", []string{"user", "add", "--email", "b@example.com", "--password-file", passwordFile}, 0, "-"},
		{"a long password\n", []string{"user", "add", "--email", "A@example.com"}, 1, "already"},
		{"another password\n", []string{"user", "add", "--email", "A@example.com", "--if-missing"}, 0, "-"},
		{"", []string{"user", "add", "--email", "c@example.com"}, 1, "no password on stdin"},
		{"short", []string{"user", "add", "--email", "c@example.com"}, 1, "5 bytes"},
		{"a long password", []string{"user", "add", "--email", "nonsense"}, 1, `"nonsense"`},
		{"a long password", []string{"user", "add"}, 2, "--email is required"},
		{"", []string{"user", "add", "--email", "c@example.com", "--password-file", filepath.Join(dir, "none")}, 1, "none"},
		{"", []string{"user", "list"}, 0, "b@example.com"},
		{"a long password", []string{"user", "add", "--email", "new@example.com", "--if-missing"}, 0, "-"},
		{"", []string{"user", "delete", "--email", "new@example.com"}, 0, "deleted new@example.com"},
		{"", []string{"user", "delete", "--email", "b@example.com"}, 0, "deleted b@example.com"},
		{"", []string{"user", "delete", "--email", "b@example.com"}, 1, `no account for "b@example.com"`},
		{"", []string{"user", "delete"}, 2, "--email is required"},
		{"another password", []string{"user", "password", "--email", "a@example.com"}, 0, "changed the password of a@example.com"},
		{"", []string{"user", "password", "--email", "a@example.com", "--password-file", passwordFile}, 0, "changed"},
		{"short", []string{"user", "password", "--email", "a@example.com"}, 1, "5 bytes"},
		{"another password", []string{"user", "password", "--email", "b@example.com"}, 1, `no account for "b@example.com"`},
		{"", []string{"user", "password", "--email", "a@example.com"}, 1, "no password on stdin"},
		{"another password", []string{"user", "password"}, 2, "--email is required"},
		{"", []string{"backup"}, 2, "--out is required"},
		{"", []string{"restore"}, 2, "--from is required"},
	} {
		code, out, errs := invoke(t, c.stdin, append(c.args, "--state", state)...)
		if code != c.code || !strings.Contains(out+errs, c.says) {
			t.Errorf("%q: exit %d, %s%s", c.args, code, out, errs)
		}
		if strings.Contains(out+errs, "a long password") || strings.Contains(out+errs, "another password") {
			t.Errorf("%q prints the password", c.args)
		}
	}
	if _, out, _ := invoke(t, "", "user", "list", "--state", state); strings.Count(out, "@") != 1 {
		t.Errorf("the list is\n%s", out)
	}
}

// TestNoStateIsMadeByMistake has commands look for a state where there is none. An empty one would pass for it: a backup of it would be "saved".
func TestNoStateIsMadeByMistake(t *testing.T) {
	dir := t.TempDir()
	state := filepath.Join(dir, "x.db")
	for _, args := range [][]string{
		{"user", "list"},
		{"user", "list", "--control-socket", "off"},
		{"user", "delete", "--email", "a@example.com"},
		{"user", "password", "--email", "a@example.com"},
		{"token", "create", "--email", "a@example.com"},
		{"token", "list"},
		{"token", "revoke", "--id", "x"},
		{"backup", "--out", filepath.Join(dir, "copy.db")},
	} {
		if code, out, errs := invoke(t, "a long password", append(args, "--state", state)...); code != 1 || out != "" || !strings.Contains(errs, "there is no state file "+state) {
			t.Errorf("%q: exit %d, %s%s", args, code, out, errs)
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("made %v, %v", left, err)
	}
}

func TestTokenCommands(t *testing.T) {
	state := filepath.Join(t.TempDir(), "x.db")
	do := func(code int, says string, args ...string) string {
		t.Helper()
		got, out, errs := invoke(t, "a long password", append(args, "--state", state)...)
		if got != code || !strings.Contains(out+errs, says) {
			t.Errorf("%q: exit %d, %s%s; want %d with %q", args, got, out, errs, code, says)
		}
		return strings.TrimSpace(out)
	}
	do(0, "-", "user", "add", "--email", "a@example.com")
	token := do(0, ".", "token", "create", "--email", "A@example.com", "--name", "control plane")
	if strings.Count(token, ".") != 2 || strings.ContainsAny(token, " \n") {
		t.Errorf("printed %q", token)
	}
	do(0, ".", "token", "create", "--email", "a@example.com", "--lifetime", "24h")
	do(1, `no account for "b@example.com"`, "token", "create", "--email", "b@example.com")
	do(2, "--email is required", "token", "create")
	do(2, "--lifetime -1s is negative", "token", "create", "--email", "a@example.com", "--lifetime", "-1s")
	do(1, "the lifetime 1ms is not within", "token", "create", "--email", "a@example.com", "--lifetime", "1ms")
	do(2, "-lifetime", "token", "create", "--email", "a@example.com", "--lifetime", "long")
	list := strings.Split(do(0, "control plane", "token", "list"), "\n")
	if len(list) != 3 || !strings.Contains(list[1], "never") || strings.Contains(list[2], "never") || strings.Contains(strings.Join(list, ""), token) {
		t.Errorf("the list is %q", list)
	}
	id := strings.Fields(list[1])[0]
	do(0, "revoked "+id, "token", "revoke", "--id", id)
	do(1, "no access token with the id", "token", "revoke", "--id", id)
	do(2, "--id is required", "token", "revoke")
	do(0, "deleted", "user", "delete", "--email", "a@example.com")
	if list := do(0, "E-MAIL", "token", "list"); strings.Count(list, "\n") != 0 {
		t.Errorf("tokens outlive their account: %s", list)
	}
}
