package admission

import (
	"bytes"
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"text/template"
	"time"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/webhook/admission"
	"sigs.k8s.io/yaml"

	"github.com/mysocketio/mysocket-injector/internal/annotations"
)

const saysDenied = `admission webhook "services.mysocket.io" denied the request: `

// TestRealAPIServerAsksAboutServices has a real API server call the validator, on the conditions that the chart sets.
func TestRealAPIServerAsksAboutServices(t *testing.T) {
	config := startAPIServer(t)
	ctx := t.Context()
	var heard warnings
	config.WarningHandlerWithContext = &heard
	c, err := client.New(config, client.Options{})
	if err != nil {
		t.Fatal(err)
	}
	shop := makeNamespace(t, c, "shop", nil)
	for _, name := range []string{ownNamespace, "unlabelled"} {
		if err := c.Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}); err != nil {
			t.Fatal(err)
		}
	}
	create := func(ns, name string, svc *corev1.Service, opts ...client.CreateOption) (*corev1.Service, error) {
		svc = svc.DeepCopy()
		svc.Namespace, svc.Name = ns, name
		return svc, c.Create(ctx, svc, opts...)
	}
	mustCreate := func(ns, name string, svc *corev1.Service) *corev1.Service {
		t.Helper()
		svc, err := create(ns, name, svc)
		if err != nil {
			t.Fatal(err)
		}
		return svc
	}
	// Got in before there was a webhook.
	wrong := publicService("enabled", "true", "type", "htpp")
	wrong.Finalizers = []string{annotations.Finalizer}
	bad, leaving := mustCreate(shop, "bad", wrong), mustCreate(shop, "leaving", wrong)

	clusterCache, err := cache.New(config, cache.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, kind := range []client.Object{&corev1.Pod{}, &corev1.Namespace{}} {
		if _, err := clusterCache.GetInformer(ctx, kind); err != nil {
			t.Fatal(err)
		}
	}
	cacheContext, stopCache := context.WithCancel(ctx)
	var running sync.WaitGroup
	running.Go(func() { _ = clusterCache.Start(cacheContext) })
	t.Cleanup(func() {
		stopCache()
		running.Wait()
	})
	if err := c.Create(ctx, ownedPod("web-5d4f-abcde", "ReplicaSet/web-5d4f")); err != nil {
		t.Fatal(err)
	}
	awaitAPIServer(t, "the cache knows the pod", func() bool {
		return clusterCache.Get(ctx, client.ObjectKey{Namespace: shop, Name: "web-5d4f-abcde"}, &corev1.Pod{}) == nil
	})
	v, _ := newValidator(t, clusterCache)
	server, calls := installValidator(t, c, v)

	// silently runs what the API server must not ask about.
	silently := func(t *testing.T, do func() error) {
		t.Helper()
		before := calls.Load()
		if err := do(); err != nil {
			t.Error(err)
		}
		if n := calls.Load() - before; n != 0 {
			t.Errorf("the webhook was called %d times", n)
		}
	}
	patchService := func(svc *corev1.Service, patch string) error {
		return c.Patch(ctx, svc.DeepCopy(), client.RawPatch(types.MergePatchType, []byte(patch)))
	}
	refused := func(t *testing.T, err error, sentence string) {
		t.Helper()
		if !apierrors.IsForbidden(err) || err.Error() != saysDenied+sentence {
			t.Errorf("got %v\nwant %s%s", err, saysDenied, sentence)
		}
	}

	t.Run("a wrong one is refused", func(t *testing.T) {
		_, err := create(shop, "web", publicService("enabled", "true", "type", "htpp"))
		refused(t, err, saysType)
		_, err = create(shop, "web", publicService("enabled", "true", "type", "htpp"), client.DryRunAll)
		refused(t, err, saysType)
		_, err = create("unlabelled", "web", publicService("enabled", "true", "port", "9999"))
		refused(t, err, saysPort)

		svc := mustCreate(shop, "annotated-later", publicService())
		refused(t, patchService(svc, `{"metadata":{"annotations":{"mysocket.io/enabled":"true","mysocket.io/port":"9999"}}}`), saysPort)
		applied := `{"apiVersion":"v1","kind":"Service","metadata":{"name":"annotated-later","namespace":"shop","annotations":{"mysocket.io/enabled":"true","mysocket.io/type":"htpp"}}}`
		refused(t, c.Patch(ctx, svc.DeepCopy(), client.RawPatch(types.ApplyPatchType, []byte(applied)), client.FieldOwner("test")), saysType)
		if err := patchService(svc, `{"metadata":{"annotations":{"mysocket.io/enabled":"true"}}}`); err != nil {
			t.Fatal(err)
		}
		refused(t, patchService(svc, `{"spec":{"selector":null}}`), saysNoPod)
	})
	t.Run("a right one is told what follows", func(t *testing.T) {
		heard.take()
		mustCreate(shop, "right", publicService("enabled", "true"))
		if got, want := heard.take(), "mysocket: will be restarted to get the tunnel sidecar, unless paused or OnDelete: Deployment web"; got != want {
			t.Errorf("warned of %q, want %q", got, want)
		}
		svc := mustCreate("unlabelled", "right", publicService())
		if err := patchService(svc, `{"metadata":{"annotations":{"mysocket.io/enabled":"true"}}}`); err != nil {
			t.Error(err)
		}
		if got, want := heard.take(), "mysocket: "+annotations.NotLabelled("unlabelled"); got != want {
			t.Errorf("warned of %q, want %q", got, want)
		}
		if err := patchService(svc, `{"metadata":{"annotations":{"mysocket.io/socket-id":"another"}}}`); err != nil {
			t.Error(err)
		}
		if got := heard.take(); !strings.HasPrefix(got, "mysocket: mysocket.io/socket-id is written by the control plane") {
			t.Errorf("warned of %q", got)
		}
		as := rest.CopyConfig(config)
		as.Impersonate = rest.ImpersonationConfig{UserName: "system:serviceaccount:" + ownNamespace + ":mysocket-injector", Groups: []string{"system:masters"}}
		controlPlane, err := client.New(as, client.Options{})
		if err != nil {
			t.Fatal(err)
		}
		if err := controlPlane.Patch(ctx, svc, client.RawPatch(types.MergePatchType, []byte(`{"metadata":{"annotations":{"mysocket.io/socket-id":"1"}}}`))); err != nil {
			t.Error(err)
		}
		if got := heard.take(); got != "" {
			t.Errorf("the control plane was warned of %q", got)
		}
	})
	t.Run("about one that is not ours we are not asked", func(t *testing.T) {
		silently(t, func() error {
			plain := publicService()
			plain.Annotations = map[string]string{"example.com/mysocket.io": "true"}
			svc, err := create(shop, "not-ours", plain)
			if err != nil {
				return err
			}
			for _, patch := range []string{`{"metadata":{"labels":{"a":"b"}}}`, `{"metadata":{"annotations":{"a":"b"}}}`, `{"spec":{"selector":null}}`, `{"spec":{"ports":[{"port":1}]}}`} {
				if err := patchService(svc, patch); err != nil {
					return err
				}
			}
			bare, err := create(shop, "not-ours-bare", publicService())
			if err != nil {
				return err
			}
			if err := patchService(bare, `{"spec":{"sessionAffinity":"ClientIP"}}`); err != nil {
				return err
			}
			return c.Delete(ctx, svc)
		})
	})
	t.Run("about one of our class, without annotations, we are asked", func(t *testing.T) {
		before := calls.Load()
		svc := publicService()
		svc.Spec.Type, svc.Spec.LoadBalancerClass = corev1.ServiceTypeLoadBalancer, ptr.To("mysocket.io/edge")
		mustCreate(shop, "our-class", svc)
		if n := calls.Load() - before; n != 1 {
			t.Errorf("the webhook was called %d times", n)
		}
		silently(t, func() error {
			svc.Spec.LoadBalancerClass = ptr.To("example.com/class")
			_, err := create(shop, "another-class", svc)
			return err
		})
	})
	t.Run("nor about the cluster's own namespace and ours", func(t *testing.T) {
		for _, ns := range []string{metav1.NamespaceSystem, ownNamespace} {
			silently(t, func() error {
				_, err := create(ns, "wrong", publicService("enabled", "true", "type", "htpp"))
				return err
			})
		}
	})
	t.Run("nor about what we don't read", func(t *testing.T) {
		for _, patch := range []string{`{"metadata":{"labels":{"a":"b"}}}`, `{"metadata":{"finalizers":null}}`, `{"metadata":{"finalizers":["a/b"]}}`, `{"metadata":{"ownerReferences":null}}`} {
			silently(t, func() error { return patchService(bad, patch) })
		}
		silently(t, func() error {
			return c.Status().Patch(ctx, bad.DeepCopy(), client.RawPatch(types.MergePatchType, []byte(`{"status":{"conditions":[{"type":"a/b","status":"True","reason":"A","message":"","lastTransitionTime":"2026-01-01T00:00:00Z"}]}}`)))
		})
	})
	t.Run("a wrong one can go", func(t *testing.T) {
		silently(t, func() error {
			if err := c.Delete(ctx, leaving.DeepCopy()); err != nil {
				return err
			}
			// A patch begins with what the API server has in its cache. With an older one it would ask us, find that it is
			// out of date, and not ask us again.
			awaitAPIServer(t, "its cache has the deletion", func() bool {
				cached := &corev1.Service{}
				err := c.Get(ctx, client.ObjectKeyFromObject(leaving), cached, &client.GetOptions{Raw: &metav1.GetOptions{ResourceVersion: "0"}})
				return err == nil && cached.DeletionTimestamp != nil
			})
			// All at once, as somebody who clears up by hand.
			if err := patchService(leaving, `{"metadata":{"annotations":{"mysocket.io/deletion-policy":"retain"}}}`); err != nil {
				return err
			}
			return patchService(leaving, `{"metadata":{"finalizers":null}}`)
		})
		if err := c.Get(ctx, client.ObjectKeyFromObject(leaving), leaving); !apierrors.IsNotFound(err) {
			t.Errorf("it is still there: %v", err)
		}
	})
	t.Run("a wrong one goes on being changed by others", func(t *testing.T) {
		heard.take()
		if err := patchService(bad, `{"spec":{"selector":{"app":"green"}}}`); err != nil {
			t.Error(err)
		}
		if got, want := heard.take(), "mysocket: the Service is still not public: "+saysType; got != want {
			t.Errorf("warned of %q, want %q", got, want)
		}
		refused(t, patchService(bad, `{"metadata":{"annotations":{"mysocket.io/rollout":"never"}}}`), saysType)
		if err := patchService(bad, `{"metadata":{"annotations":{"mysocket.io/enabled":null}}}`); err != nil {
			t.Error(err)
		}
	})
	t.Run("without the webhook all gets in", func(t *testing.T) {
		server.Close()
		configuration := chartConfiguration(t)
		ignore := []byte(`[{"op":"replace","path":"/webhooks/0/failurePolicy","value":"Ignore"}]`)
		if err := c.Patch(ctx, configuration, client.RawPatch(types.JSONPatchType, ignore)); err != nil {
			t.Fatal(err)
		}
		awaitAPIServer(t, "a wrong Service gets in", func() bool {
			_, err := create(shop, "while-down", publicService("enabled", "true", "type", "htpp"))
			return err == nil
		})
	})
}

// warnings hears what kubectl would print.
type warnings struct {
	mu   sync.Mutex
	said []string
}

func (w *warnings) HandleWarningHeaderWithContext(_ context.Context, code int, _ string, text string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if code == 299 && strings.HasPrefix(text, warningPrefix) {
		w.said = append(w.said, text)
	}
}

func (w *warnings) take() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	said := strings.Join(w.said, "\n")
	w.said = nil
	return said
}

// installValidator serves the validator, tells the API server, and counts its calls.
func installValidator(t *testing.T, c client.Client, v *ServiceValidator) (*httptest.Server, *atomic.Int64) {
	t.Helper()
	calls := &atomic.Int64{}
	mux := http.NewServeMux()
	handler := &admission.Webhook{Handler: v}
	mux.HandleFunc("/validate-service", func(w http.ResponseWriter, r *http.Request) {
		calls.Add(1)
		handler.ServeHTTP(w, r)
	})
	server := httptest.NewTLSServer(mux)
	t.Cleanup(server.Close)
	configuration := chartConfiguration(t)
	hook := &configuration.Webhooks[0]
	if hook.ClientConfig.Service == nil || *hook.ClientConfig.Service.Path != "/validate-service" {
		t.Fatalf("the chart's client configuration is %+v", hook.ClientConfig)
	}
	hook.ClientConfig = admissionregistrationv1.WebhookClientConfig{URL: ptr.To(server.URL + "/validate-service"), CABundle: pemOf(server.Certificate().Raw)}
	hook.FailurePolicy = ptr.To(admissionregistrationv1.Fail) // it hides no failure
	if err := c.Create(t.Context(), configuration); err != nil {
		t.Fatal(err)
	}
	ns := makeNamespace(t, c, "", nil)
	awaitAPIServer(t, "it calls the webhook", func() bool {
		svc := publicService("enabled", "yes")
		svc.Namespace = ns
		return apierrors.IsForbidden(c.Create(t.Context(), svc, client.DryRunAll))
	})
	return server, calls
}

// awaitAPIServer waits for what the API server learns through a watch.
func awaitAPIServer(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.After(30 * time.Second); !is(); {
		select {
		case <-deadline:
			t.Fatal("not within 30 s: " + what)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// chartConfiguration is the validating webhook's configuration as the chart has it.
func chartConfiguration(t *testing.T) *admissionregistrationv1.ValidatingWebhookConfiguration {
	t.Helper()
	configuration := &admissionregistrationv1.ValidatingWebhookConfiguration{}
	readChart(t, "ValidatingWebhookConfiguration", configuration)
	if len(configuration.Webhooks) != 1 {
		t.Fatalf("the chart has %d validating webhooks", len(configuration.Webhooks))
	}
	return configuration
}

// readChart reads an object out of the webhook's template in the chart. Of Helm's language it knows what that template uses.
func readChart(t *testing.T, kind string, into any) {
	t.Helper()
	text, err := os.ReadFile("../../charts/mysocket-injector/templates/webhook.yaml")
	if err != nil {
		t.Fatal(err)
	}
	tmpl, err := template.New("webhook.yaml").Funcs(template.FuncMap{
		"include": func(name string, _ any) string { return strings.ToLower(strings.ReplaceAll(name, ".", "-")) },
		"nindent": func(int, string) string { return " {}" },
		"quote":   strconv.Quote,
	}).Parse(string(text))
	if err != nil {
		t.Fatal(err)
	}
	var rendered bytes.Buffer
	if err := tmpl.Execute(&rendered, map[string]any{
		"Release": map[string]any{"Namespace": ownNamespace},
		"Values":  map[string]any{"webhook": map[string]any{"failurePolicy": "Ignore", "timeoutSeconds": 5}},
	}); err != nil {
		t.Fatal(err)
	}
	documents := strings.Split(rendered.String(), "\n---\n")
	at := slices.IndexFunc(documents, func(d string) bool { return strings.Contains(d, "kind: "+kind) })
	if at < 0 {
		err = errors.New("there is none")
	} else {
		err = yaml.UnmarshalStrict([]byte(documents[at]), into)
	}
	if err != nil {
		t.Fatalf("the chart's %s: %v", kind, err)
	}
}
