package inject

import (
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
)

func TestValidate(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(*Config)
		want   string // part of the error; empty for none
	}{
		{"as in the chart", func(*Config) {}, ""},
		{"no image", func(c *Config) { c.Image = "" }, "image"},
		{"image with a newline", func(c *Config) { c.Image += "\n" }, "image"},
		{"pull policy", func(c *Config) { c.ImagePullPolicy = "Sometimes" }, `"Sometimes": allowed are Always, IfNotPresent, Never`},
		{"http gateway", func(c *Config) { c.GatewayURL = "http://gateway:8443" }, "https://host:port"},
		{"gateway with a path", func(c *Config) { c.GatewayURL = "https://gateway:8443/" }, "https://host:port"},
		{"gateway with a password", func(c *Config) { c.GatewayURL = "https://a:b@gateway" }, "https://host:port"},
		{"gateway port", func(c *Config) { c.GatewayURL = "https://gateway:70000" }, "70000"},
		{"gateway on the default port", func(c *Config) { c.GatewayURL = "https://gateway" }, ""},
		{"gateway that is no URL", func(c *Config) { c.GatewayURL = "https://%zz" }, "https://host:port"},
		{"config map", func(c *Config) { c.CAConfigMap = "Not A Name" }, `"Not A Name"`},
		{"privileged port", func(c *Config) { c.AdminPort = 80 }, "1024 to 65535"},
		{"port too high", func(c *Config) { c.AdminPort = 65536 }, "65536"},
		{"ready grace", func(c *Config) { c.ReadyGrace = -time.Second }, "-1s"},
		{"log level", func(c *Config) { c.LogLevel = "verbose" }, "debug, info, warn, error"},
		{"log format", func(c *Config) { c.LogFormat = "xml" }, "text, json"},
		{"request above limit", func(c *Config) {
			c.Resources.Requests = corev1.ResourceList{corev1.ResourceMemory: resource.MustParse("1Gi")}
		}, "the request 1Gi is above the limit 64Mi"},
		{"negative limit", func(c *Config) { c.Resources.Limits[corev1.ResourceCPU] = resource.MustParse("-1") }, "negative"},
		{"no resources", func(c *Config) { c.Resources = corev1.ResourceRequirements{} }, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			cfg := testConfig()
			tc.change(&cfg)
			err := cfg.Validate()
			switch {
			case tc.want == "" && err != nil:
				t.Errorf("refused: %v", err)
			case tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)):
				t.Errorf("got %v, want an error with %q", err, tc.want)
			}
		})
	}
}

// TestHashNamesWhatIsInjected shows that every setting changes the hash, and that a default written out does not.
func TestHashNamesWhatIsInjected(t *testing.T) {
	base := testConfig()
	if again := testConfig(); base.Hash() != again.Hash() || len(base.Hash()) != 12 {
		t.Fatalf("hashes of one configuration: %q and %q", base.Hash(), again.Hash())
	}
	explicit := testConfig().withDefaults()
	if explicit.Hash() != base.Hash() {
		t.Error("defaults written out change the hash")
	}
	seen := map[string]string{base.Hash(): "the base"}
	for name, change := range map[string]func(*Config){
		"image":       func(c *Config) { c.Image = "registry.example/tunnel-sidecar:1.1" },
		"pull policy": func(c *Config) { c.ImagePullPolicy = corev1.PullAlways },
		"gateway":     func(c *Config) { c.GatewayURL = "https://other:8443" },
		"config map":  func(c *Config) { c.CAConfigMap = "other" },
		"memory":      func(c *Config) { c.Resources.Limits[corev1.ResourceMemory] = resource.MustParse("128Mi") },
		"request":     func(c *Config) { c.Resources.Requests[corev1.ResourceCPU] = resource.MustParse("20m") },
		"admin port":  func(c *Config) { c.AdminPort = 15000 },
		"ready grace": func(c *Config) { c.ReadyGrace = time.Second },
		"edge proxy":  func(c *Config) { c.EdgeProxy = "socks5://proxy.example:1080" },
		"sleep":       func(c *Config) { c.PreStopSleep = 5 },
		"log level":   func(c *Config) { c.LogLevel = "debug" },
		"log format":  func(c *Config) { c.LogFormat = "json" },
	} {
		cfg := testConfig()
		change(&cfg)
		if other, ok := seen[cfg.Hash()]; ok {
			t.Errorf("%s has the same hash as %s", name, other)
		}
		seen[cfg.Hash()] = name
	}
}

func TestEdgeProxy(t *testing.T) {
	for text, want := range map[string]string{
		"":                            "",
		"http://proxy.example:3128":   "",
		"socks5h://10.0.0.7:1080":     "",
		"proxy.example:3128":          "SCHEME://HOST:PORT",
		"http://proxy.example:3128/x": "SCHEME://HOST:PORT",
		"http://me:s3cret@proxy:3128": "user name or password",
		"http://me:s3cret@pro xy":     "no URL",
	} {
		cfg := testConfig()
		cfg.EdgeProxy = text
		err := cfg.Validate()
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
		if err != nil && strings.Contains(err.Error(), "s3cret") {
			t.Errorf("%q: the error shows the password: %v", text, err)
		}
		if err != nil {
			continue
		}
		pod, skip := Inject(&corev1.Pod{Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "app"}}}}, cfg)
		if skip != nil {
			t.Fatal(skip)
		}
		if args := pod.Spec.InitContainers[0].Args; slices.Contains(args, "--edge-proxy="+text) != (text != "") {
			t.Errorf("%q: the sidecar's arguments are %q", text, args)
		}
	}
}
