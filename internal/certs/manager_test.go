package certs

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"
)

const (
	testNamespace = "mysocket-system"
	serverName    = "mysocket-webhook.mysocket-system.svc"
)

// testConfig has short lifetimes, so that the tests' virtual hours see several of each.
func testConfig() Config {
	return Config{
		Namespace:       testNamespace,
		SecretName:      "mysocket-certificates",
		DNSNames:        []string{serverName, "mysocket-gateway.mysocket-system.svc", serverName},
		MutatingWebhook: "mysocket-injector",
		LeafLifetime:    30 * time.Minute,
		CALifetime:      2 * time.Hour,
		Overlap:         4 * time.Minute,
	}
}

// mutating is the configuration as a chart would install it: without a caBundle.
func mutating() *admissionregistrationv1.MutatingWebhookConfiguration {
	hook := func(name string) admissionregistrationv1.MutatingWebhook {
		return admissionregistrationv1.MutatingWebhook{
			Name: name,
			ClientConfig: admissionregistrationv1.WebhookClientConfig{Service: &admissionregistrationv1.ServiceReference{
				Namespace: testNamespace, Name: "mysocket-webhook", Path: ptr.To("/mutate-pods")}},
			FailurePolicy:  ptr.To(admissionregistrationv1.Ignore),
			TimeoutSeconds: ptr.To[int32](5),
			SideEffects:    ptr.To(admissionregistrationv1.SideEffectClassNone),
		}
	}
	return &admissionregistrationv1.MutatingWebhookConfiguration{
		ObjectMeta: metav1.ObjectMeta{Name: "mysocket-injector", Labels: map[string]string{"a": "b"}},
		Webhooks:   []admissionregistrationv1.MutatingWebhook{hook("pods.mysocket.io"), hook("more.mysocket.io")},
	}
}

func newManager(t testing.TB, cfg Config, c client.Client) *Manager {
	t.Helper()
	m, err := New(cfg, c)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// reads returns what a manager read last.
func (m *Manager) reads() *material {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.material
}

// run runs the parts of managers until stopped.
func run(t testing.TB, parts ...interface{ Start(context.Context) error }) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	for _, p := range parts {
		running.Go(func() {
			if err := p.Start(ctx); err != nil {
				t.Error(err)
			}
		})
	}
	return sync.OnceFunc(func() {
		cancel()
		running.Wait()
	})
}

// pass lets virtual time go by.
func pass(d time.Duration) {
	<-time.After(d)
	synctest.Wait()
}

// handshake connects as a client that trusts the bundle, over a pipe.
func handshake(m *Manager, bundle []byte) error {
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(bundle)
	ours, theirs := net.Pipe()
	defer func() { _ = ours.Close() }()
	served := make(chan error, 1)
	go func() {
		defer func() { _ = theirs.Close() }()
		served <- tls.Server(theirs, &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: m.GetCertificate}).Handshake()
	}()
	err := tls.Client(ours, &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: roots, ServerName: serverName}).Handshake()
	_ = ours.Close()
	<-served
	return err
}

func readMutating(t testing.TB, c client.Client) *admissionregistrationv1.MutatingWebhookConfiguration {
	t.Helper()
	got := &admissionregistrationv1.MutatingWebhookConfiguration{}
	if err := c.Get(context.Background(), client.ObjectKey{Name: "mysocket-injector"}, got); err != nil {
		t.Fatal(err)
	}
	return got
}

func readSecret(t testing.TB, c client.Client) *corev1.Secret {
	t.Helper()
	got := &corev1.Secret{}
	if err := c.Get(context.Background(), client.ObjectKey{Namespace: testNamespace, Name: "mysocket-certificates"}, got); err != nil {
		t.Fatal(err)
	}
	return got
}

// TestClientsNeverFail lets three replicas go through several CAs, with changes of the leader and people who delete and
// break the Secret, and connects all the time: as the API server, with the caBundle of this moment, and as a sidecar, with
// a bundle that is behind by most of the overlap.
func TestClientsNeverFail(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := fake.NewClientBuilder().WithObjects(mutating()).Build()
		var replicas []*Manager
		for i := range 3 {
			cfg := testConfig()
			cfg.Interval = 15 * time.Second
			if i == 2 {
				cfg.Interval = time.Minute // a replica that sees everything late
			}
			m := newManager(t, cfg, c)
			defer run(t, m)()
			replicas = append(replicas, m)
		}
		stopLeader := run(t, replicas[0].Leader())
		defer func() { stopLeader() }()
		pass(time.Minute)

		const step = 30 * time.Second
		const late = 6 // steps that the sidecar's bundle is behind: 3 of 4 minutes
		published := [][]byte{}
		cas, leaves := map[string]bool{}, map[string]bool{}
		for i := range int(6 * time.Hour / step) {
			switch i % 240 {
			case 60: // the leader changes
				stopLeader()
				stopLeader = run(t, replicas[i/240%3].Leader())
			case 120:
				secret := readSecret(t, c)
				secret.Data[keyLeafKey] = []byte("oops")
				if err := c.Update(t.Context(), secret); err != nil {
					t.Fatal(err)
				}
			case 200:
				if err := c.Delete(t.Context(), readSecret(t, c)); err != nil {
					t.Fatal(err)
				}
			}
			published = append(published, replicas[i%3].CABundle())
			behind := published[max(0, i-late)]
			for n, m := range replicas {
				if err := m.Ready(); err != nil {
					t.Fatalf("step %d: replica %d is not ready: %v", i, n, err)
				}
				if i%3 == n {
					if err := handshake(m, behind); err != nil {
						t.Fatalf("step %d: a sidecar at replica %d: %v", i, n, err)
					}
					if err := handshake(m, readMutating(t, c).Webhooks[1].ClientConfig.CABundle); err != nil {
						t.Fatalf("step %d: the API server at replica %d: %v", i, n, err)
					}
				}
			}
			served, err := replicas[0].GetCertificate(nil)
			if err != nil {
				t.Fatal(err)
			}
			cas[string(served.Leaf.AuthorityKeyId)] = true
			leaves[served.Leaf.SerialNumber.String()] = true
			pass(step)
		}
		if len(cas) < 5 || len(leaves) < 15 {
			t.Errorf("only %d CAs and %d certificates were in use", len(cas), len(leaves))
		}
	})
}

// TestFirstSeconds shows a replica without a leader, and what Ready says on the way.
func TestFirstSeconds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := fake.NewClientBuilder().Build()
		registry := prometheus.NewRegistry()
		cfg := testConfig()
		cfg.Registerer = registry
		follower, other := newManager(t, cfg, c), newManager(t, testConfig(), c)
		changed := follower.Subscribe()
		defer run(t, follower)()
		says := func(want string) {
			t.Helper()
			if err := follower.Ready(); (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
				t.Errorf("Ready says %v, want %q", err, want)
			}
		}

		pass(time.Minute)
		says("no certificate yet")
		if _, err := follower.GetCertificate(nil); err == nil {
			t.Error("a certificate out of nothing")
		}
		if follower.CABundle() != nil {
			t.Error("a CA out of nothing")
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := follower.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Wait returned %v", err)
		}

		defer run(t, other.Leader())()
		if err := follower.Wait(t.Context()); err != nil {
			t.Fatal(err)
		}
		<-changed
		pass(10 * time.Second)
		says("MutatingWebhookConfiguration mysocket-injector does not exist")
		if err := handshake(follower, other.CABundle()); err != nil {
			t.Error(err)
		}

		wrong := mutating()
		wrong.Webhooks[1].ClientConfig.Service.Name = "another"
		if err := c.Create(t.Context(), wrong); err != nil {
			t.Fatal(err)
		}
		pass(10 * time.Second)
		says("not another.mysocket-system.svc")

		right := readMutating(t, c)
		right.Webhooks[1].ClientConfig.Service.Name = "mysocket-webhook"
		if err := c.Update(t.Context(), right); err != nil {
			t.Fatal(err)
		}
		pass(10 * time.Second)
		says("")

		// From now on a fault in the configuration is mended, and is no reason to stop serving.
		if err := c.Delete(t.Context(), readMutating(t, c)); err != nil {
			t.Fatal(err)
		}
		pass(10 * time.Second)
		says("")
		if err := follower.Published(); err == nil || !strings.Contains(err.Error(), "does not exist") {
			t.Errorf("Published says %v", err)
		}

		select {
		case <-changed:
			t.Error("a signal without a change")
		default:
		}
		select {
		case <-follower.Subscribe():
		default:
			t.Error("a late subscriber gets no signal")
		}
		expiry := map[string]float64{}
		families, err := registry.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, metric := range families[0].GetMetric() {
			expiry[metric.GetLabel()[0].GetValue()] = metric.GetGauge().GetValue() - float64(time.Now().Unix())
		}
		if families[0].GetName() != "mysocket_certificate_expiry_seconds" || expiry["leaf"] < 25*60 || expiry["leaf"] > 30*60 || expiry["ca"] < 110*60 || expiry["ca"] > 120*60 {
			t.Errorf("%s: seconds left %v", families[0].GetName(), expiry)
		}
	})
}

// TestExpiredWithoutALeader shows that a replica doesn't call itself ready with a certificate that nobody renews.
func TestExpiredWithoutALeader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := fake.NewClientBuilder().WithObjects(mutating()).Build()
		m := newManager(t, testConfig(), c)
		defer run(t, m)()
		stopLeader := run(t, m.Leader())
		pass(10 * time.Second)
		stopLeader()
		if err := m.Ready(); err != nil {
			t.Fatal(err)
		}
		pass(31 * time.Minute)
		if err := m.Ready(); err == nil || !strings.Contains(err.Error(), "expired at 2000-01-01T00:30:") {
			t.Errorf("Ready says %v", err)
		}
		defer run(t, m.Leader())()
		pass(10 * time.Second)
		if err := m.Ready(); err != nil {
			t.Error(err)
		}
	})
}

// TestBrokenSecret breaks each part of the Secret: followers go on with what they had, the leader makes it anew, keeps
// what isn't its own, and logs no key.
func TestBrokenSecret(t *testing.T) {
	for _, key := range []string{keyCACert, keyCAKey, keyLeafCert, keyLeafKey, keyOthers} {
		t.Run(key, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var log bytes.Buffer
				c := fake.NewClientBuilder().WithObjects(mutating()).Build()
				cfg := testConfig()
				cfg.Log = slog.New(slog.NewTextHandler(&log, nil))
				m, follower := newManager(t, cfg, c), newManager(t, testConfig(), c)
				stop := run(t, m.Leader(), m, follower)
				defer func() { stop() }()
				pass(10 * time.Second)
				before := m.CABundle()
				stop()

				secret := readSecret(t, c)
				secret.Data[key] = []byte("c2VjcmV0IGtleQ")
				secret.Data["note"] = []byte("mine")
				if err := c.Update(t.Context(), secret); err != nil {
					t.Fatal(err)
				}
				stop = run(t, m, follower)
				pass(time.Minute)
				if err := handshake(follower, before); err != nil {
					t.Errorf("without a leader: %v", err)
				}

				stop()
				stop = run(t, m.Leader(), m, follower)
				pass(10 * time.Second)
				repaired := readSecret(t, c)
				if _, err := parse(repaired.Data); err != nil {
					t.Fatal(err)
				}
				if string(repaired.Data["note"]) != "mine" {
					t.Error("another's key in the Secret is gone")
				}
				for name, bundle := range map[string][]byte{"old": before, "new": m.CABundle()} {
					if err := handshake(follower, bundle); err != nil {
						t.Errorf("with the %s bundle: %v", name, err)
					}
				}
				stop()
				for _, line := range []string{"made anew since the Secret can't be used: " + key, "in order again"} {
					if !strings.Contains(log.String(), line) {
						t.Errorf("the log doesn't say %q:\n%s", line, log.String())
					}
				}
				if strings.Contains(log.String(), "c2VjcmV0") || strings.Contains(log.String(), "PRIVATE KEY-----") {
					t.Errorf("the log shows what the Secret holds:\n%s", log.String())
				}
			})
		})
	}
}

// TestTwoWriters shows that an old leader that doesn't know it yet can't undo what the new one wrote.
func TestTwoWriters(t *testing.T) {
	ctx := t.Context()
	c := fake.NewClientBuilder().WithObjects(mutating()).Build()
	writers := make([]*Manager, 4)
	for i := range writers {
		writers[i] = newManager(t, testConfig(), c)
	}
	var all sync.WaitGroup
	for _, m := range writers {
		all.Go(func() {
			if err := m.ensureSecret(ctx); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	for i, m := range writers {
		if !bytes.Equal(m.CABundle(), writers[0].CABundle()) {
			t.Errorf("writer %d has another CA than writer 0", i)
		}
	}
}

// TestWriteErrors shows which errors are tried again at once, and that nothing unwritten is served.
func TestWriteErrors(t *testing.T) {
	secrets := schema.GroupResource{Resource: "secrets"}
	for _, tc := range []struct {
		name  string
		err   error
		fails int // that many writes
		tries int
		ok    bool
	}{
		{"conflicts", apierrors.NewConflict(secrets, "x", errors.New("changed")), 2, 3, true},
		{"somebody else created it", apierrors.NewAlreadyExists(secrets, "x"), 1, 2, true},
		{"conflicts for ever", apierrors.NewConflict(secrets, "x", errors.New("changed")), 1000, writeAttempts, false},
		{"forbidden", apierrors.NewForbidden(secrets, "x", errors.New("no")), 1000, 1, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tries := 0
			c := fake.NewClientBuilder().WithInterceptorFuncs(interceptor.Funcs{
				Create: func(ctx context.Context, c client.WithWatch, obj client.Object, opts ...client.CreateOption) error {
					if tries++; tries <= tc.fails {
						return tc.err
					}
					return c.Create(ctx, obj, opts...)
				},
			}).Build()
			m := newManager(t, testConfig(), c)
			err := m.ensureSecret(t.Context())
			if (err == nil) != tc.ok || tries != tc.tries || (m.CABundle() != nil) != tc.ok {
				t.Errorf("error %v after %d tries, a CA in use: %v", err, tries, m.CABundle() != nil)
			}
		})
	}
}

// TestLogsOnlyChanges lets the API server be down for an hour.
func TestLogsOnlyChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		c := fake.NewClientBuilder().WithInterceptorFuncs(interceptor.Funcs{
			Get: func(context.Context, client.WithWatch, client.ObjectKey, client.Object, ...client.GetOption) error {
				return fmt.Errorf("connection refused")
			},
		}).Build()
		cfg := testConfig()
		cfg.Log = slog.New(slog.NewTextHandler(&log, nil))
		m := newManager(t, cfg, c)
		stop := run(t, m, m.Leader())
		pass(time.Hour)
		stop()
		if n := strings.Count(log.String(), "\n"); n != 2 {
			t.Errorf("%d lines, want one of the reader and one of the writer:\n%s", n, log.String())
		}
	})
}

// TestPublish shows that only caBundle of a configuration changes, and that it comes back when somebody clears it.
func TestPublish(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		validating := &admissionregistrationv1.ValidatingWebhookConfiguration{
			ObjectMeta: metav1.ObjectMeta{Name: "mysocket-injector"},
			Webhooks: []admissionregistrationv1.ValidatingWebhook{{
				Name:         "services.mysocket.io",
				ClientConfig: admissionregistrationv1.WebhookClientConfig{URL: ptr.To("https://outside.example"), CABundle: []byte("stale")},
			}},
		}
		c := fake.NewClientBuilder().WithObjects(mutating(), validating).Build()
		cfg := testConfig()
		cfg.ValidatingWebhook = "mysocket-injector"
		m := newManager(t, cfg, c)
		defer run(t, m, m.Leader())()
		pass(10 * time.Second)

		check := func() {
			t.Helper()
			got := readMutating(t, c)
			for i := range got.Webhooks {
				if !bytes.Equal(got.Webhooks[i].ClientConfig.CABundle, m.CABundle()) {
					t.Errorf("webhook %s has the caBundle %q", got.Webhooks[i].Name, got.Webhooks[i].ClientConfig.CABundle)
				}
				got.Webhooks[i].ClientConfig.CABundle = nil
			}
			got.ResourceVersion = ""
			if want := mutating(); !apiequality.Semantic.DeepEqual(got.ObjectMeta, want.ObjectMeta) || !apiequality.Semantic.DeepEqual(got.Webhooks, want.Webhooks) {
				t.Errorf("more than caBundle has changed: %+v", got)
			}
			other := &admissionregistrationv1.ValidatingWebhookConfiguration{}
			if err := c.Get(t.Context(), client.ObjectKey{Name: "mysocket-injector"}, other); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(other.Webhooks[0].ClientConfig.CABundle, m.CABundle()) {
				t.Errorf("the validating webhook has the caBundle %q", other.Webhooks[0].ClientConfig.CABundle)
			}
		}
		check()

		applied := mutating() // as a tool does that applies the chart's manifest and prunes what isn't in it
		applied.ResourceVersion = readMutating(t, c).ResourceVersion
		if err := c.Update(t.Context(), applied); err != nil {
			t.Fatal(err)
		}
		pass(2 * DefaultInterval)
		check()
		if err := m.Ready(); err != nil {
			t.Error(err)
		}

		// A replica that starts after somebody deleted the validating one works without.
		if err := c.Delete(t.Context(), validating); err != nil {
			t.Fatal(err)
		}
		late := newManager(t, cfg, c)
		defer run(t, late)()
		pass(2 * DefaultInterval)
		for _, m := range []*Manager{m, late} {
			if m.Ready() != nil || m.Published() != nil {
				t.Errorf("without the validating webhook: ready %v, published %v", m.Ready(), m.Published())
			}
		}
	})
}

// TestPatchOfReorderedWebhooks shows that a bundle never lands in another webhook than the one that was looked at.
func TestPatchOfReorderedWebhooks(t *testing.T) {
	c := fake.NewClientBuilder().WithObjects(mutating()).Build()
	m := newManager(t, testConfig(), c)
	seen := m.configurations()[0]
	if err := m.readConfiguration(t.Context(), seen); err != nil {
		t.Fatal(err)
	}
	patch, err := bundlePatch(seen.webhooks(), []byte("bundle"))
	if err != nil {
		t.Fatal(err)
	}
	now := readMutating(t, c)
	now.Webhooks[0], now.Webhooks[1] = now.Webhooks[1], now.Webhooks[0]
	if err := c.Update(t.Context(), now); err != nil {
		t.Fatal(err)
	}
	if err := m.patch(t.Context(), seen, patch); err == nil {
		t.Error("the patch was applied to reordered webhooks")
	}
	for _, w := range readMutating(t, c).Webhooks {
		if len(w.ClientConfig.CABundle) > 0 {
			t.Errorf("%s has a caBundle", w.Name)
		}
	}
}
