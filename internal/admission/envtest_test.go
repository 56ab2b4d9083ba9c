package admission

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/envtest"
	"sigs.k8s.io/controller-runtime/pkg/webhook/admission"
	"sigs.k8s.io/yaml"

	"github.com/mysocketio/mysocket-injector/internal/annotations"
	"github.com/mysocketio/mysocket-injector/internal/inject"
)

// TestRealAPIServer puts the mutator behind a real API server, with the plug-ins that meddle with pods: ServiceAccount,
// LimitRanger, ResourceQuota and PodSecurity.
func TestRealAPIServer(t *testing.T) {
	config := startAPIServer(t)
	ctx := t.Context()
	c, err := client.New(config, client.Options{})
	if err != nil {
		t.Fatal(err)
	}
	services, err := cache.New(config, cache.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := RegisterIndex(ctx, services); err != nil {
		t.Fatal(err)
	}
	cacheContext, stopCache := context.WithCancel(ctx)
	var running sync.WaitGroup
	running.Go(func() { _ = services.Start(cacheContext) })
	t.Cleanup(func() {
		stopCache()
		running.Wait()
	})
	m, _ := newMutator(t, services, c)
	calls := installWebhook(t, c, m)

	restricted := makeNamespace(t, c, "restricted", map[string]string{"pod-security.kubernetes.io/enforce": "restricted"})
	budgeted := makeNamespace(t, c, "budgeted", nil)
	if err := c.Create(ctx, &corev1.ResourceQuota{ObjectMeta: metav1.ObjectMeta{Namespace: budgeted, Name: "all"},
		Spec: corev1.ResourceQuotaSpec{Hard: corev1.ResourceList{corev1.ResourceLimitsMemory: resource.MustParse("1Gi")}}}); err != nil {
		t.Fatal(err)
	}
	plain := makeNamespace(t, c, "plain", nil)
	for _, ns := range []string{restricted, budgeted, plain} {
		svc := service("web", "true", "web")
		svc.Namespace = ns
		svc.Spec.Ports = []corev1.ServicePort{{Port: 80}}
		if err := c.Create(ctx, svc); err != nil {
			t.Fatal(err)
		}
	}

	t.Run("a Service created just before its pod", func(t *testing.T) {
		for range 20 { // a cache that is behind is a matter of milliseconds
			ns := makeNamespace(t, c, "", nil)
			svc := service("web", "true", "web")
			svc.Namespace = ns
			svc.Spec.Ports = []corev1.ServicePort{{Port: 80}}
			if err := c.Create(ctx, svc); err != nil {
				t.Fatal(err)
			}
			if pod := createPod(t, c, ns, webPod()); !inject.IsCurrent(pod, sidecarConfig()) {
				t.Error("not injected")
			}
		}
	})
	t.Run("pod security restricted", func(t *testing.T) {
		pod := webPod()
		pod.Spec.SecurityContext = &corev1.PodSecurityContext{RunAsNonRoot: ptr.To(true), SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault}}
		pod.Spec.Containers[0].SecurityContext = &corev1.SecurityContext{AllowPrivilegeEscalation: ptr.To(false), Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}}}
		checkCreated(t, createPod(t, c, restricted, pod))
	})
	t.Run("a quota that demands limits", func(t *testing.T) {
		pod := webPod()
		pod.Spec.Containers[0].Resources.Limits = corev1.ResourceList{corev1.ResourceMemory: resource.MustParse("64Mi")}
		checkCreated(t, createPod(t, c, budgeted, pod))
	})
	t.Run("whom the API server does not ask about", func(t *testing.T) {
		before := calls.Load()
		own := makeNamespace(t, c, ownNamespace, nil) // labelled, and never ours all the same
		unlabelled := makeNamespace(t, c, "unlabelled", map[string]string{annotations.NamespaceInjection: "disabled"})
		mirror := webPod()
		metav1.SetMetaDataAnnotation(&mirror.ObjectMeta, corev1.MirrorPodAnnotationKey, "abc")
		mirror.Spec.NodeName = "a"
		for _, tc := range []struct {
			ns  string
			pod *corev1.Pod
		}{{own, webPod()}, {unlabelled, webPod()}, {plain, mirror}} {
			tc.pod.Namespace = tc.ns
			if err := c.Create(ctx, tc.pod, client.DryRunAll); err != nil || inject.HasSidecar(tc.pod) {
				t.Errorf("in %s: %v, injected %t", tc.ns, err, inject.HasSidecar(tc.pod))
			}
		}
		if n := calls.Load() - before; n != 0 {
			t.Errorf("the webhook was called %d times", n)
		}
		pod := webPod() // with annotations, but none of a mirror pod
		metav1.SetMetaDataAnnotation(&pod.ObjectMeta, "example.com/a", "b")
		pod.Namespace = plain
		if err := c.Create(ctx, pod, client.DryRunAll); err != nil || !inject.HasSidecar(pod) {
			t.Errorf("%v, injected %t", err, inject.HasSidecar(pod))
		}
	})
	t.Run("dry run", func(t *testing.T) {
		pod := webPod()
		pod.Namespace = plain
		if err := c.Create(ctx, pod, client.DryRunAll); err != nil || !inject.IsCurrent(pod, sidecarConfig()) {
			t.Errorf("%v, injected %v", err, inject.IsCurrent(pod, sidecarConfig()))
		}
	})
	files, err := filepath.Glob("../inject/testdata/*.in.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("no golden pods (%v)", err)
	}
	for _, file := range files {
		name := strings.TrimSuffix(filepath.Base(file), ".in.yaml")
		t.Run("golden pod "+name, func(t *testing.T) {
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			pod := &corev1.Pod{}
			if err := yaml.Unmarshal(data, pod); err != nil {
				t.Fatal(err)
			}
			pod.Name, pod.GenerateName = name, ""
			metav1.SetMetaDataLabel(&pod.ObjectMeta, "app", "web")
			checkCreated(t, createPod(t, c, plain, pod))
		})
	}
}

// checkCreated looks at a pod as the API server stored it.
func checkCreated(t *testing.T, pod *corev1.Pod) {
	t.Helper()
	if !inject.IsCurrent(pod, sidecarConfig()) {
		t.Fatal("not injected")
	}
	again, skip := inject.Inject(pod, sidecarConfig())
	if skip != nil {
		t.Fatal(skip)
	}
	// Were a default of the API server's missing from what we inject, each reinvocation would patch the pod for nothing.
	// (Not so where the pod has a budget as a whole: the API server has since filled that in from what we request.)
	if ops := patch(pod, again); pod.Spec.Resources == nil && (len(ops) > 0 || !apiequality.Semantic.DeepEqual(pod, again)) {
		was, _ := json.Marshal(pod.Spec.InitContainers)
		would, _ := json.Marshal(ops)
		t.Errorf("the stored pod isn't what would be injected:\nstored  %s\npatches %s", was, would)
	}
	at := slices.IndexFunc(pod.Spec.InitContainers, func(c corev1.Container) bool { return c.Name == inject.ContainerName })
	for _, mount := range pod.Spec.InitContainers[at].VolumeMounts {
		if mount.Name != inject.VolumeName {
			t.Errorf("the sidecar mounts %s, which is the app's", mount.Name)
		}
	}
}

func createPod(t *testing.T, c client.Client, ns string, pod *corev1.Pod) *corev1.Pod {
	t.Helper()
	pod.Namespace = ns
	if err := c.Create(t.Context(), pod); err != nil {
		t.Fatal(err)
	}
	return pod
}

// makeNamespace makes a namespace, with a made-up name if there is none, that is labelled for injection.
func makeNamespace(t *testing.T, c client.Client, name string, labels map[string]string) string {
	t.Helper()
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{annotations.NamespaceInjection: annotations.NamespaceInjectionEnabled}}}
	if name == "" {
		ns.GenerateName = "test-"
	}
	for k, v := range labels {
		ns.Labels[k] = v
	}
	if err := c.Create(t.Context(), ns); err != nil {
		t.Fatal(err)
	}
	// No controller runs that would make it, and the ServiceAccount plug-in refuses pods without.
	if err := c.Create(t.Context(), &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: ns.Name, Name: "default"}}); err != nil {
		t.Fatal(err)
	}
	return ns.Name
}

func startAPIServer(t *testing.T) *rest.Config {
	t.Helper()
	if os.Getenv("KUBEBUILDER_ASSETS") == "" {
		t.Skip("KUBEBUILDER_ASSETS does not say where the API server's binaries are; make test-envtest sets it")
	}
	env := &envtest.Environment{}
	env.ControlPlane.GetAPIServer().Configure().
		Disable("disable-admission-plugins"). // envtest's own default switches the ServiceAccount plug-in off
		Set("enable-admission-plugins", "ServiceAccount")
	config, err := env.Start()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := env.Stop(); err != nil {
			t.Error(err)
		}
	})
	return config
}

// installWebhook serves the mutator and tells the API server with the chart's configuration, but with a policy that hides no
// failure. It returns how often the webhook was called.
func installWebhook(t *testing.T, c client.Client, m *PodMutator) *atomic.Int64 {
	t.Helper()
	calls := &atomic.Int64{}
	mux := http.NewServeMux()
	handler := &admission.Webhook{Handler: m}
	mux.HandleFunc("/mutate-pod", func(w http.ResponseWriter, r *http.Request) {
		calls.Add(1)
		handler.ServeHTTP(w, r)
	})
	server := httptest.NewTLSServer(mux)
	t.Cleanup(server.Close)
	configuration := &admissionregistrationv1.MutatingWebhookConfiguration{}
	readChart(t, "MutatingWebhookConfiguration", configuration)
	if len(configuration.Webhooks) != 1 {
		t.Fatalf("the chart has %d mutating webhooks", len(configuration.Webhooks))
	}
	hook := &configuration.Webhooks[0]
	if hook.ClientConfig.Service == nil || *hook.ClientConfig.Service.Path != "/mutate-pod" || len(hook.ClientConfig.CABundle) != 0 {
		t.Fatalf("the chart's client configuration is %+v", hook.ClientConfig)
	}
	hook.ClientConfig = admissionregistrationv1.WebhookClientConfig{URL: ptr.To(server.URL + "/mutate-pod"), CABundle: pemOf(server.Certificate().Raw)}
	hook.FailurePolicy = ptr.To(admissionregistrationv1.Fail)
	if err := c.Create(t.Context(), configuration); err != nil {
		t.Fatal(err)
	}
	// The API server learns of the configuration through a watch.
	ns := makeNamespace(t, c, "", nil)
	svc := service("web", "true", "web")
	svc.Namespace = ns
	svc.Spec.Ports = []corev1.ServicePort{{Port: 80}}
	if err := c.Create(t.Context(), svc); err != nil {
		t.Fatal(err)
	}
	for deadline := time.After(30 * time.Second); ; {
		pod := webPod()
		pod.Namespace = ns
		if err := c.Create(t.Context(), pod, client.DryRunAll); err == nil && inject.HasSidecar(pod) {
			return calls
		}
		select {
		case <-deadline:
			t.Fatal("the API server doesn't call the webhook")
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func pemOf(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}
