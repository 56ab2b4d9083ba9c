package cluster

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func testOptions(t *testing.T) Options {
	t.Helper()
	dir := t.TempDir()
	return Options{Root: repositoryRoot(t), RunDir: filepath.Join(dir, "run"), CacheDir: filepath.Join(dir, "cache"), Out: t.Output()}
}

func TestWriteConfig(t *testing.T) {
	o := testOptions(t)
	p, err := newPKI(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if err := writeConfig(o, p); err != nil {
		t.Fatal(err)
	}
	for file, wants := range map[string][]string{
		"config/containerd.toml": {`sandbox_image = "localhost/pause:1"`, `restrict_oom_score_adj = true`, `conf_dir = "` + o.RunDir + `/config/cni"`},
		"config/kubelet.yaml":    {"cgroupRoot: /mysocket-e2e", "maxPods: 110", `clusterDNS: ["10.96.0.10"]`, o.RunDir + "/pki/ca.crt"},
		"config/kube-proxy.yaml": {"mode: nftables", "clusterCIDR: 10.244.0.0/16", o.RunDir + "/config/kube-proxy.kubeconfig"},
		"config/resolv.conf":     {""},
		"admin.kubeconfig":       {"user: admin}"},
	} {
		b, err := os.ReadFile(filepath.Join(o.RunDir, file))
		if err != nil {
			t.Error(err)
			continue
		}
		for _, want := range wants {
			if !strings.Contains(string(b), want) {
				t.Errorf("%s: no %q", file, want)
			}
		}
		if strings.Contains(string(b), "<no value>") || strings.Contains(string(b), "{{") {
			t.Errorf("%s is not rendered whole", file)
		}
	}
	b, err := os.ReadFile(filepath.Join(o.RunDir, "config/cni/10-mysocket-e2e.conflist"))
	if err != nil {
		t.Fatal(err)
	}
	var cni struct {
		Plugins []struct {
			Type   string
			IPMasq bool
		}
	}
	if err := json.Unmarshal(b, &cni); err != nil {
		t.Fatal(err)
	}
	if len(cni.Plugins) != 1 || cni.Plugins[0].Type != "ptp" || cni.Plugins[0].IPMasq {
		t.Errorf("CNI plugins %+v: want ptp alone, without masquerading", cni.Plugins)
	}
}

func TestRenderRefusesMissingValues(t *testing.T) {
	if _, err := render("kubeconfig.yaml", map[string]string{"User": "x"}); err == nil {
		t.Error("rendered without the values it names")
	}
}

func TestCoreDNSManifest(t *testing.T) {
	b, err := render("coredns.yaml", testOptions(t).settings())
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"image: localhost/coredns:1", "clusterIP: 10.96.0.10", "mysocket.test:53 {", `answer "{{ .Name }} 5 IN A 172.31.255.2"`} {
		if !strings.Contains(string(b), want) {
			t.Errorf("no %q in\n%s", want, b)
		}
	}
}

func TestPlan(t *testing.T) {
	o := testOptions(t)
	p := newPlan(o, "/usr/bin/containerd")
	names := map[string]component{}
	for _, c := range p.Components {
		names[c.Name] = c
		if !filepath.IsAbs(c.Args[0]) {
			t.Errorf("%s: program %q is no absolute path", c.Name, c.Args[0])
		}
		if c.After != "" && c.After != afterContainerd && c.After != afterAPIServer {
			t.Errorf("%s waits for %q", c.Name, c.After)
		}
	}
	for _, want := range []string{"etcd", "containerd", "kube-apiserver", "kubelet", "kube-controller-manager", "kube-scheduler", "kube-proxy"} {
		if _, ok := names[want]; !ok {
			t.Errorf("no %s in the plan", want)
		}
	}
	if !slices.Contains(names["kube-apiserver"].Args, "--enable-admission-plugins=NodeRestriction") {
		t.Error("the API server runs without NodeRestriction")
	}
	for to, from := range p.Binds {
		if !strings.HasPrefix(from, o.RunDir+"/") {
			t.Errorf("%s shows %s, which is outside of the run directory", to, from)
		}
	}
}

func TestCheckRunDir(t *testing.T) {
	for dir, ok := range map[string]bool{
		"/var/tmp/mysocket-e2e": true, "/home/x/run": true, "/": false, "/tmp": false, "/run/x": false,
		"/var/lib/kubelet": false, "/var/lib/kubelet/x": false, "/var/lib/kubelets": true,
	} {
		if err := checkRunDir(dir); (err == nil) != ok {
			t.Errorf("%s: %v", dir, err)
		}
	}
}

func TestOptionsFromEnvironment(t *testing.T) {
	t.Setenv("MYSOCKET_E2E_RUN", "/srv/e2e/run")
	t.Setenv("MYSOCKET_E2E_CACHE", "")
	t.Setenv("XDG_CACHE_HOME", "/srv/cache")
	o, err := Options{}.complete()
	if err != nil {
		t.Fatal(err)
	}
	if o.RunDir != "/srv/e2e/run" || o.binDir() != "/srv/cache/mysocket-injector/bin" || o.Root != repositoryRoot(t) {
		t.Errorf("got %+v", o)
	}
	t.Setenv("MYSOCKET_E2E_CACHE", "/srv/mine")
	if o, err = (Options{}).complete(); err != nil || o.binDir() != "/srv/mine/bin" {
		t.Errorf("got %+v, %v", o, err)
	}
	if _, err := findRoot("/"); err == nil || !strings.Contains(err.Error(), "-root") {
		t.Errorf("a root in /: %v", err)
	}
}
