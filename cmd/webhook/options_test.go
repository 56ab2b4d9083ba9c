package main

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"flag"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/mysocketio/mysocket-injector/internal/mysocket"
)

// noEnv is an environment without anything.
func noEnv(string) string { return "" }

// parse parses flags after those that must be there.
func parse(t *testing.T, more ...string) (*options, error) {
	t.Helper()
	args := append([]string{"--namespace=mysocket-system", "--webhook-configuration=mysocket-injector", "--sidecar-image=example.com/sidecar:1"}, more...)
	return parseOptions(args, noEnv, &bytes.Buffer{})
}

func file(t *testing.T, text string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

func hostKey(t *testing.T) string {
	t.Helper()
	public, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ssh.NewPublicKey(public)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(key)))
}

func TestOptionsHaveDefaults(t *testing.T) {
	o, err := parse(t)
	if err != nil {
		t.Fatal(err)
	}
	if o.apiURL != "https://api.mysocket.io" || o.sshAddress != "ssh.mysocket.io:22" || o.webhookPort != 10250 || o.gatewayPort != 10443 ||
		o.rolloutMaxConcurrent != 1 || o.shutdownDelay != 5*time.Second || o.rolloutOutdated || o.certificate != "" || o.certificateOverlap != 24*time.Hour || o.hostKeys != nil || o.apiCA != nil || o.logLevel != 0 || o.logFormat != "text" {
		t.Errorf("options %+v", o)
	}
	if o.sidecar.GatewayURL != "https://mysocket-injector-gateway.mysocket-system.svc:443" || o.sidecar.ReadyGrace != time.Minute ||
		o.sidecar.AdminPort != 14180 || o.sidecar.Resources.Limits.Memory().String() != "256Mi" || o.sidecar.Resources.Requests.Cpu().String() != "10m" {
		t.Errorf("sidecar %+v", o.sidecar)
	}
	if o, err = parse(t, "--socket-name=shop=shop,shop-eu", "--socket-name=pay=shop"); err != nil || len(o.names.Allowed) != 2 ||
		!slices.Equal(o.names.Allowed["shop"], []string{"shop", "shop-eu"}) || !slices.Equal(o.names.Allowed["pay"], []string{"shop"}) {
		t.Errorf("names %+v, %v", o, err)
	}
	o, err = parseOptions([]string{"--webhook-configuration=x", "--sidecar-image=x"}, func(name string) string {
		if name != "POD_NAMESPACE" {
			t.Errorf("reads %s", name)
		}
		return "from-env"
	}, &bytes.Buffer{})
	if err != nil || o.namespace != "from-env" {
		t.Errorf("namespace %q, %v", o.namespace, err)
	}
}

func TestOptionsSayWhatIsWrong(t *testing.T) {
	for _, tc := range []struct {
		name string
		args []string
		want string
	}{
		{"argument", []string{"x"}, `unexpected argument "x": there are only flags`},
		{"namespace", []string{"--namespace="}, "--namespace is missing, and so is the environment variable POD_NAMESPACE"},
		{"webhook configuration", []string{"--webhook-configuration="}, "--webhook-configuration is missing"},
		{"http API", []string{"--mysocket-api=http://api.example.com"}, `--mysocket-api: the API address "http://api.example.com" must start with https://`},
		{"API that is no URL", []string{"--mysocket-api=example"}, `--mysocket-api: the API address "example" is not a URL like`},
		{"ssh without a port", []string{"--mysocket-ssh=ssh.example.com"}, `--mysocket-ssh "ssh.example.com" is not host:port`},
		{"ssh without a host", []string{"--mysocket-ssh=:22"}, `--mysocket-ssh ":22" is not host:port`},
		{"ssh port 0", []string{"--mysocket-ssh=a:0"}, `--mysocket-ssh "a:0" is not host:port`},
		{"ssh port too high", []string{"--mysocket-ssh=a:65536"}, `--mysocket-ssh "a:65536" is not host:port`},
		{"ssh port with a sign", []string{"--mysocket-ssh=a:+22"}, `--mysocket-ssh "a:+22" is not host:port`},
		{"ssh port by name", []string{"--mysocket-ssh=a:ssh"}, `--mysocket-ssh "a:ssh" is not host:port`},
		{"cluster name", []string{"--cluster-name=a b"}, `--cluster-name "a b": allowed are up to 63 letters, digits and dashes`},
		{"cluster name that ends in a dash", []string{"--cluster-name=a-"}, `--cluster-name "a-": allowed`},
		{"cluster name that is long", []string{"--cluster-name=" + strings.Repeat("a", 64)}, "allowed are up to 63"},
		{"socket name alone", []string{"--socket-name=shop"}, "it must be NAME=NAMESPACE[,NAMESPACE...]"},
		{"socket name that is made for Services", []string{"--socket-name=k8s-shop=shop"}, `socket name "k8s-shop": k8s and what begins with`},
		{"socket name without a namespace", []string{"--socket-name=shop="}, `namespace "": `},
		{"socket name with a namespace that is none", []string{"--socket-name=shop=shop,Shop"}, `namespace "Shop": `},
		{"socket name twice", []string{"--socket-name=shop=a", "--socket-name=shop=b"}, `the name "shop" is given twice`},
		{"webhook port", []string{"--webhook-port=0"}, "--webhook-port 0: allowed are 1 to 65535"},
		{"gateway port", []string{"--gateway-port=65536"}, "--gateway-port 65536: allowed are 1 to 65535"},
		{"one port for two", []string{"--gateway-port=10250"}, "--webhook-port and --gateway-port are both 10250; they must differ"},
		{"admin port", []string{"--sidecar-admin-port=-1"}, "--sidecar-admin-port -1: allowed are 1024 to 65535"},
		{"admin port that overflows", []string{"--sidecar-admin-port=4294967376"}, "--sidecar-admin-port 4294967376: allowed"},
		{"privileged admin port", []string{"--sidecar-admin-port=80"}, "--sidecar-admin-port 80: allowed are 1024 to 65535"},
		{"log level", []string{"--log-level=trace"}, `--log-level "trace": allowed are debug, info, warn, error`},
		{"log level with an offset", []string{"--log-level=info+2"}, `--log-level "info+2": allowed`},
		{"log format", []string{"--log-format=xml"}, `--log-format "xml": allowed are text, json`},
		{"resources that are no JSON", []string{"--sidecar-resources=lots"}, "--sidecar-resources lots: "},
		{"resources with a typing error", []string{`--sidecar-resources={"limit":{}}`}, `unknown field "limit"`},
		{"resources that are no quantity", []string{`--sidecar-resources={"limits":{"cpu":"much"}}`}, "--sidecar-resources"},
		{"resources and more", []string{`--sidecar-resources={} {}`}, "there is something after the JSON object"},
		{"resources above the limit", []string{`--sidecar-resources={"requests":{"cpu":"2"},"limits":{"cpu":"1"}}`}, "the request 2 is above the limit 1"},
		{"no restart at all", []string{"--rollout-max-concurrent=0"}, "--rollout-max-concurrent 0: allowed are 1 to 100"},
		{"too many restarts", []string{"--rollout-max-concurrent=101"}, "--rollout-max-concurrent 101: allowed are 1 to 100"},
		{"outdated sidecars", []string{"--rollout-outdated=yes"}, `--rollout-outdated "yes": allowed are never, auto`},
		{"sidecar image", []string{"--sidecar-image="}, `sidecar image ""`},
		{"overlap that is short", []string{"--certificate-overlap=9s"}, "--certificate-overlap 9s: allowed are 10s to 168h0m0s"},
		{"overlap that is long", []string{"--certificate-overlap=169h"}, "--certificate-overlap 169h0m0s: allowed"},
		{"Certificate", []string{"--cert-manager-certificate=a/b"}, `--cert-manager-certificate "a/b": `},
		{"pull policy", []string{"--sidecar-pull-policy=Sometimes"}, `"Sometimes": allowed are Always, IfNotPresent, Never`},
		{"ready grace", []string{"--sidecar-ready-grace=-1s"}, "--sidecar-ready-grace -1s: it must be longer than zero"},
		{"ready grace that would mean the default", []string{"--sidecar-ready-grace=0"}, "--sidecar-ready-grace 0s: it must be longer than zero"},
		{"memory limit", []string{"--memory-limit=-1"}, "--memory-limit -1: it can't be negative"},
		{"shutdown delay", []string{"--shutdown-delay=-1s"}, "--shutdown-delay -1s: allowed are 0s to 15s"},
		{"shutdown delay beyond the grace period", []string{"--shutdown-delay=16s"}, "--shutdown-delay 16s: allowed are 0s to 15s"},
		{"sidecar log level", []string{"--sidecar-log-level=trace"}, `sidecar log level "trace"`},
		{"sidecar edge proxy", []string{"--sidecar-edge-proxy=ftp://proxy.example"}, `sidecar edge proxy "ftp://proxy.example"`},
		{"sidecar preStop sleep", []string{"--sidecar-prestop-sleep=61"}, "sidecar preStop sleep 61: allowed are 0 to 60, in seconds"},
		{"sidecar log format", []string{"--sidecar-log-format=xml"}, `sidecar log format "xml"`},
		{"gateway service", []string{"--gateway-service=a/b"}, "gateway URL"},
		{"host keys that are not there", []string{"--mysocket-ssh-host-keys=/nowhere"}, "--mysocket-ssh-host-keys: open /nowhere"},
		{"host keys that are none", []string{"--mysocket-ssh-host-keys=" + file(t, "# edge\nhello world\n")}, `--mysocket-ssh-host-keys: "hello world" is not a public key in authorized_keys form`},
		{"a second host key that is long garbage", []string{"--mysocket-ssh-host-keys=" + file(t, hostKey(t)+"\n"+strings.Repeat("x", 1<<17))}, "is not a public key"},
		{"CA that is not there", []string{"--mysocket-ca=/nowhere"}, "--mysocket-ca: open /nowhere"},
		{"CA that is none", []string{"--mysocket-ca=" + file(t, "hello")}, "holds no PEM certificate"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			o, err := parse(t, tc.args...)
			if err == nil || o != nil || !strings.Contains(err.Error(), tc.want) || len(err.Error()) > 500 {
				t.Errorf("got %v, want %s", err, tc.want)
			}
		})
	}
}

func TestOptionsThatEndTheProgram(t *testing.T) {
	var help bytes.Buffer
	if _, err := parseOptions([]string{"--help"}, noEnv, &help); !errors.Is(err, flag.ErrHelp) || !strings.Contains(help.String(), "-mysocket-api") {
		t.Errorf("--help: %v", err)
	}
	if o, err := parseOptions([]string{"--version"}, noEnv, &bytes.Buffer{}); err != nil || !o.version {
		t.Errorf("--version needs more: %v", err)
	}
	if _, err := parseOptions([]string{"--nonsense"}, noEnv, &bytes.Buffer{}); err == nil {
		t.Error("an unknown flag is taken")
	}
}

func TestHostKeys(t *testing.T) {
	a, b := hostKey(t), hostKey(t)
	for name, tc := range map[string]struct {
		text string
		want []string
	}{
		"empty":                 {"", nil},
		"comments alone":        {"\n # edge\n\n", nil},
		"two":                   {a + " first\r\n" + b, []string{a, b}},
		"as ssh-keyscan prints": {"ssh.example.com " + a + "\n", []string{a}},
	} {
		o, err := parse(t, "--mysocket-ssh-host-keys="+file(t, tc.text))
		if err != nil || !slices.Equal(o.hostKeys, tc.want) {
			t.Errorf("%s: got %q, %v; want %q", name, o.hostKeys, err, tc.want)
		}
	}
}

func TestCA(t *testing.T) {
	server := httptest.NewTLSServer(nil)
	defer server.Close()
	text := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}))
	if o, err := parse(t, "--mysocket-ca="+file(t, text)); err != nil || o.apiCA == nil {
		t.Errorf("got %v", err)
	}
	if o, err := parse(t, "--mysocket-ca="+file(t, "\n")); err != nil || o.apiCA != nil {
		t.Errorf("an empty file: %v", err)
	}
}

func TestCredentials(t *testing.T) {
	dir := t.TempDir()
	o := &options{accountDir: dir}
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want := func(wantErr string) {
		t.Helper()
		if _, err := o.credentials(); err == nil || err.Error() != wantErr {
			t.Errorf("got %v, want %s", err, wantErr)
		}
	}
	remove := func(name string) {
		t.Helper()
		if err := os.Remove(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	const allowed = `; it must have either "email" and "password", or "token"`
	want("the account's Secret has none of the keys" + allowed)
	write("email", "me@example.com\n")
	want(`the account's Secret has no key "password"` + allowed)
	write("password", "\r\n")
	want(`the key "password" of the account's Secret is empty`)
	write("password", " with spaces \n")
	check := func(want mysocket.Account) {
		t.Helper()
		if got, err := o.credentials(); err != nil || got != want {
			t.Errorf("%+v, %v; want %+v", got, err, want)
		}
	}
	check(mysocket.Account{Email: "me@example.com", Password: " with spaces "})
	write("password", "changed") // read anew every time
	check(mysocket.Account{Email: "me@example.com", Password: "changed"})

	write("token", "a.b.c\n")
	want(`the account's Secret has the key "token" and also "email"` + allowed)
	remove("email")
	want(`the account's Secret has the key "token" and also "password"` + allowed)
	remove("password")
	check(mysocket.Account{Token: "a.b.c"})
	write("token", "")
	want(`the key "token" of the account's Secret is empty`)
	remove("token")
	write("password", "x")
	want(`the account's Secret has no key "email"` + allowed)

	// As the kubelet mounts a Secret: what the link leads to counts, whole.
	data := filepath.Join(dir, "..2026")
	if err := errors.Join(os.Mkdir(data, 0o700), os.WriteFile(filepath.Join(data, "token"), []byte("d.e.f"), 0o600), os.Symlink("..2026", filepath.Join(dir, "..data"))); err != nil {
		t.Fatal(err)
	}
	check(mysocket.Account{Token: "d.e.f"})
}
