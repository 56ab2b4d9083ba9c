package main

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/envtest"
	"sigs.k8s.io/yaml"

	"github.com/mysocketio/mysocket-injector/api/v1alpha1"
)

const (
	ownNamespace   = "mysocket-system"
	webhookService = "mysocket-injector-webhook"
	gatewayService = "mysocket-injector-gateway"
	configuration  = "mysocket-injector." + ownNamespace + ".mysocket.io"
	// programPatience is how long a program may take to become ready.
	programPatience = 3 * time.Minute
)

// lab is an API server, an edge and, once started, the control plane.
type lab struct {
	client.Client
	options
	dir         string
	env         *envtest.Environment
	out         io.Writer
	log         io.WriteCloser
	edge        *edge
	webhook     *process
	kubeconfig  string
	webhookPort int
	gatewayPort int
	metrics     string // host:port
	health      string
	roots       *x509.CertPool // of the gateway, once known
	admitted    *corev1.Pod    // the last pod that our webhook has put the sidecar into
	stopInOrder []func()
}

type discard struct{ io.Writer }

func (discard) Close() error { return nil }

// newLab starts everything but the control plane. The lab must be closed, also after an error.
func newLab(ctx context.Context, o options, out io.Writer) (*lab, error) {
	l := &lab{options: o, out: out, log: discard{io.Discard}}
	if _, err := os.Stat("charts/mysocket-injector"); err != nil {
		return l, errors.New("there is no charts/mysocket-injector here: run this in the repository's root")
	}
	var err error
	if l.dir, err = os.MkdirTemp("", "mysocket-bench-"); err != nil {
		return l, err
	}
	l.later(func() { _ = os.RemoveAll(l.dir) })
	if o.log != "" {
		if l.log, err = os.Create(o.log); err != nil {
			return l, err
		}
		l.later(func() { _ = l.log.Close() })
	}
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", l.dir+"/", "./cmd/webhook", "./cmd/mysocket-edge") //nolint:gosec // a directory of ours
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := build.CombinedOutput(); err != nil {
		return l, fmt.Errorf("build the programs: %w: %s", err, text)
	}
	for _, port := range []*int{&l.webhookPort, &l.gatewayPort} {
		if *port, err = freePort(); err != nil {
			return l, err
		}
	}
	for _, address := range []*string{&l.metrics, &l.health} {
		port, err := freePort()
		if err != nil {
			return l, err
		}
		*address = "127.0.0.1:" + strconv.Itoa(port)
	}
	if l.edge, err = startEdge(ctx, l.dir, l.log); err != nil {
		return l, err
	}
	l.later(l.edge.stop)
	return l, l.startAPIServer(ctx)
}

func (l *lab) later(f func()) { l.stopInOrder = append(l.stopInOrder, f) }

// close ends everything, in the reverse order.
func (l *lab) close() {
	l.webhook.stop()
	for i := len(l.stopInOrder) - 1; i >= 0; i-- {
		l.stopInOrder[i]()
	}
}

func (l *lab) startAPIServer(ctx context.Context) error {
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{clientgoscheme.AddToScheme, v1alpha1.AddToScheme} {
		if err := add(scheme); err != nil {
			return err
		}
	}
	l.env = &envtest.Environment{
		BinaryAssetsDirectory:    l.assets,
		CRDDirectoryPaths:        []string{"charts/mysocket-injector/crds"},
		ErrorIfCRDPathMissing:    true,
		ControlPlaneStartTimeout: time.Minute,
		ControlPlaneStopTimeout:  time.Minute,
	}
	// envtest's own range holds 254 Services.
	l.env.ControlPlane.GetAPIServer().Configure().Set("service-cluster-ip-range", "10.96.0.0/16")
	l.later(func() { _ = l.env.Stop() })
	config, err := l.env.Start()
	if err != nil {
		return err
	}
	config.QPS = -1 // no limit: this is the load
	if l.Client, err = client.New(config, client.Options{Scheme: scheme}); err != nil {
		return err
	}
	if err := l.Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: ownNamespace}}); err != nil {
		return err
	}
	if err := l.installChart(ctx); err != nil {
		return err
	}
	// The control plane has the rights of its ServiceAccount.
	user, err := l.env.AddUser(envtest.User{Name: "system:serviceaccount:" + ownNamespace + ":mysocket-injector", Groups: []string{"system:serviceaccounts", "system:authenticated"}}, nil)
	if err != nil {
		return err
	}
	text, err := user.KubeConfig()
	if err != nil {
		return err
	}
	l.kubeconfig = filepath.Join(l.dir, "kubeconfig")
	return os.WriteFile(l.kubeconfig, text, 0o600)
}

// installChart makes the chart's objects but for its pods. The API server reaches the webhook as in a cluster, by the name
// of its Service; that leads to this machine.
func (l *lab) installChart(ctx context.Context) error {
	helm := exec.CommandContext(ctx, filepath.Join(l.assets, "helm"), "template", "mysocket", "charts/mysocket-injector", "--namespace", ownNamespace, //nolint:gosec // the operator's own path
		"--set", "account.existingSecret=account,image.repository=r,image.tag=t,sidecar.image.repository=s,sidecar.image.tag=t")
	helm.Stderr = os.Stderr
	text, err := helm.Output()
	if err != nil {
		return fmt.Errorf("render the chart: %w", err)
	}
	for _, part := range bytes.Split(text, []byte("\n---\n")) {
		o := &unstructured.Unstructured{}
		if err := yaml.Unmarshal(part, &o.Object); err != nil {
			return fmt.Errorf("the rendered chart: %w", err)
		}
		if _, hook := o.GetAnnotations()["helm.sh/hook"]; hook {
			continue
		}
		switch o.GetKind() {
		case "ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding":
		case "Service":
			o.Object["spec"] = map[string]any{"type": "ExternalName", "externalName": "127.0.0.1"}
		case "MutatingWebhookConfiguration", "ValidatingWebhookConfiguration":
			if err := setPort(o, int64(l.webhookPort)); err != nil {
				return err
			}
		default:
			continue
		}
		if err := l.Create(ctx, o); err != nil {
			return fmt.Errorf("make %s %s of the chart: %w", o.GetKind(), o.GetName(), err)
		}
	}
	return nil
}

func setPort(configuration *unstructured.Unstructured, port int64) error {
	webhooks, _, err := unstructured.NestedSlice(configuration.Object, "webhooks")
	if err != nil {
		return err
	}
	for _, w := range webhooks {
		w, ok := w.(map[string]any)
		if !ok {
			return errors.New("the rendered chart: a webhook is no object")
		}
		if err := unstructured.SetNestedField(w, port, "clientConfig", "service", "port"); err != nil {
			return err
		}
	}
	return unstructured.SetNestedSlice(configuration.Object, webhooks, "webhooks")
}

// startWebhook starts the control plane and returns how long it took until it was ready, and until the gateway answered: that
// is when its informers are in step.
func (l *lab) startWebhook(ctx context.Context) (ready, serving time.Duration, err error) {
	began := time.Now()
	l.webhook, err = start("the control plane", l.log, []string{"KUBECONFIG=" + l.kubeconfig}, filepath.Join(l.dir, "webhook"),
		"--namespace="+ownNamespace, "--mysocket-api="+l.edge.url, "--mysocket-ca="+l.edge.caFile, "--mysocket-ssh="+l.edge.ssh, "--account-dir="+l.edge.accountDir,
		"--webhook-configuration="+configuration, "--webhook-service="+webhookService, "--gateway-service="+gatewayService,
		"--webhook-port="+strconv.Itoa(l.webhookPort), "--gateway-port="+strconv.Itoa(l.gatewayPort), "--metrics-address="+l.metrics, "--health-address="+l.health,
		"--sidecar-image=registry.example.com/tunnel-sidecar:v1", "--memory-limit="+strconv.FormatInt(l.memoryLimit, 10))
	if err != nil {
		return 0, 0, err
	}
	for _, step := range []struct {
		what string
		took *time.Duration
		try  func(context.Context) error
	}{
		{"the control plane to be ready", &ready, func(ctx context.Context) error { return answersOK(ctx, "http://"+l.health+"/readyz") }},
		{"the gateway to answer", &serving, func(ctx context.Context) error {
			c, err := l.dialGateway(ctx)
			if err != nil {
				return err
			}
			return c.Close()
		}},
	} {
		if err := waitFor(ctx, programPatience, step.what, func(ctx context.Context) error {
			if err := l.webhook.running(); err != nil {
				return err
			}
			return step.try(ctx)
		}); err != nil {
			return 0, 0, err
		}
		*step.took = time.Since(began)
	}
	return ready, serving, nil
}

func answersOK(ctx context.Context, url string) error {
	_, err := read(ctx, url)
	return err
}

func read(ctx context.Context, url string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody) //nolint:gosec // our own program
	if err != nil {
		return "", err
	}
	resp, err := http.DefaultClient.Do(req) //nolint:gosec // our own program
	if err != nil {
		return "", err
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s answers %s: %s", url, resp.Status, text)
	}
	return string(text), err
}

// metric sums up the control plane's metrics whose names, with their labels, begin so.
func (l *lab) metric(ctx context.Context, prefix string) (sum float64, err error) {
	text, err := read(ctx, "http://"+l.metrics+"/metrics")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(text) {
		if !strings.HasPrefix(line, prefix) {
			continue
		}
		value, err := strconv.ParseFloat(strings.TrimSpace(line[strings.LastIndexByte(line, ' ')+1:]), 64)
		if err != nil {
			return 0, err
		}
		sum += value
	}
	return sum, nil
}

// settled waits until the control plane has had nothing to do for a second, and returns when that began.
func (l *lab) settled(ctx context.Context) (time.Time, error) {
	idleSince := time.Time{}
	err := waitFor(ctx, 10*time.Minute, "the control plane to have nothing to do", func(ctx context.Context) error {
		waiting, err := l.metric(ctx, "workqueue_depth{")
		if err != nil {
			return err
		}
		active, err := l.metric(ctx, "controller_runtime_active_workers{")
		if err != nil {
			return err
		}
		switch {
		case waiting+active > 0:
			idleSince = time.Time{}
			return fmt.Errorf("%.0f objects wait and %.0f are being looked at", waiting, active)
		case idleSince.IsZero():
			idleSince = time.Now()
		}
		if time.Since(idleSince) < time.Second {
			return errors.New("it has had nothing to do for less than a second")
		}
		return nil
	})
	return idleSince, err
}

func (l *lab) say(format string, args ...any) { _, _ = fmt.Fprintf(l.out, format+"\n", args...) }

// loadAverage says how busy the machine is.
func loadAverage() string {
	text, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	return strings.Join(strings.Fields(string(text))[:3], " ")
}
