package certs

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	certmanagerv1 "github.com/cert-manager/cert-manager/pkg/apis/certmanager/v1"
	cmmeta "github.com/cert-manager/cert-manager/pkg/apis/meta/v1"
	"github.com/go-logr/logr"
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/rest"
	"k8s.io/utils/ptr"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/config"
	"sigs.k8s.io/controller-runtime/pkg/envtest"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"
	webhookadmission "sigs.k8s.io/controller-runtime/pkg/webhook/admission"

	"github.com/mysocketio/mysocket-injector/api/v1alpha1"
	"github.com/mysocketio/mysocket-injector/internal/admission"
	"github.com/mysocketio/mysocket-injector/internal/annotations"
	"github.com/mysocketio/mysocket-injector/internal/controller"
	"github.com/mysocketio/mysocket-injector/internal/gateway"
	"github.com/mysocketio/mysocket-injector/internal/gatewayapi"
	"github.com/mysocketio/mysocket-injector/internal/inject"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/gatewayclient"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/retry"
)

// Lifetimes of the test under load: short, and long enough for a machine that stalls for a second or two.
const (
	loadLeaf     = 10 * time.Second
	loadCA       = 50 * time.Second
	loadOverlap  = 3200 * time.Millisecond
	loadSidecars = 12
)

// TestRotationUnderLoad runs two replicas of admission and gateway over real TLS, with a real API server that calls the one and the
// sidecars' client that calls the other, while certificates and CAs are replaced every few seconds and the leader changes.
// Every admission and every stream is a handshake of its own. None fails.
func TestRotationUnderLoad(t *testing.T) {
	if os.Getenv("KUBEBUILDER_ASSETS") == "" {
		t.Skip("KUBEBUILDER_ASSETS does not say where the API server's binaries are; make test-envtest sets it")
	}
	ctrl.SetLogger(logr.Discard())
	env := &envtest.Environment{CRDDirectoryPaths: []string{filepath.Join("..", "..", "charts", "mysocket-injector", "crds"), certManagerCRDs(t)}, ErrorIfCRDPathMissing: true}
	admin, err := env.Start()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := env.Stop(); err != nil {
			t.Error(err)
		}
	})
	admin.QPS = -1
	scheme := certManagerScheme(t)
	if err := v1alpha1.AddToScheme(scheme); err != nil {
		t.Fatal(err)
	}
	c, err := client.New(admin, client.Options{Scheme: scheme})
	if err != nil {
		t.Fatal(err)
	}
	for _, mode := range []string{"self", "cert-manager"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			s := newLoad(t, admin, scheme, c, mode)
			if mode == "self" {
				s.selfManaged()
			} else {
				s.certManaged()
			}
		})
	}
}

// certManagerCRDs is the directory of cert-manager's CRDs, in the module that the program is built with.
func certManagerCRDs(t *testing.T) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "go", "list", "-m", "-f", "{{.Dir}}", "github.com/cert-manager/cert-manager").Output()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(strings.TrimSpace(string(out)), "deploy", "crds")
}

// load is a control plane of two replicas and all that calls it.
type load struct {
	t        *testing.T
	c        client.Client
	cfg      Config
	replicas [2]*Manager
	// stopManager ends the manager of a replica, with its part of leadership; what it serves goes on.
	stopManager [2]func()
	elected     [2]<-chan struct{}

	handshakes atomic.Int64 // that succeeded
	stopLoad   func()
}

func newLoad(t *testing.T, admin *rest.Config, scheme *runtime.Scheme, c client.Client, mode string) *load {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	t.Cleanup(func() {
		cancel()
		running.Wait()
	})
	s := &load{t: t, c: c, cfg: Config{
		Namespace: "control-plane-" + mode, SecretName: "mysocket-certificates", MutatingWebhook: "pods-" + mode, DNSNames: []string{"localhost"},
		LeafLifetime: loadLeaf, CALifetime: loadCA, Overlap: loadOverlap, Interval: 100 * time.Millisecond,
	}}
	if mode == "cert-manager" {
		s.cfg.Certificate = testCertificate
	}
	apps := "apps-" + mode
	caConfigMap := "ca-" + mode
	for _, o := range []client.Object{
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: s.cfg.Namespace}},
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: apps, Labels: map[string]string{annotations.NamespaceInjection: annotations.NamespaceInjectionEnabled}}},
		&corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: apps, Name: "app"}},
		&corev1.Service{
			ObjectMeta: metav1.ObjectMeta{Namespace: apps, Name: "web", Annotations: map[string]string{annotations.Enabled: "true", annotations.SocketID: "7d444840-9dc0-11d1-b245-5ffdce74fad2"}},
			Spec:       corev1.ServiceSpec{Selector: map[string]string{"app": "web"}, Ports: []corev1.ServicePort{{Port: 80}}},
		},
	} {
		s.create(o)
	}

	informers, err := cache.New(admin, cache.Options{Scheme: scheme})
	if err != nil {
		t.Fatal(err)
	}
	if err := admission.RegisterIndex(ctx, informers); err != nil {
		t.Fatal(err)
	}
	changes := &gateway.Changes{}
	running.Go(func() { _ = informers.Start(ctx) })
	if err := changes.Watch(ctx, informers); err != nil {
		t.Fatal(err)
	}
	if !informers.WaitForCacheSync(ctx) {
		t.Fatal("the cache did not start")
	}

	sidecar := inject.Config{Image: "example.com/sidecar", GatewayURL: "https://gateway.mysocket-system.svc:443"}
	var webhooks, gateways []string
	for i := range s.replicas {
		m := newManager(t, s.cfg, c)
		s.replicas[i] = m
		running.Go(func() { _ = m.Start(ctx) })

		mutator, err := admission.NewPodMutator(admission.Options{Services: informers, LiveServices: c, Sidecar: sidecar})
		if err != nil {
			t.Fatal(err)
		}
		mux := http.NewServeMux()
		mux.Handle("/mutate-pod", &webhookadmission.Webhook{Handler: mutator})
		var protocols http.Protocols
		protocols.SetHTTP1(true)
		hook := &http.Server{
			Handler: mux, TLSConfig: &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: m.GetCertificate}, Protocols: &protocols,
			ReadHeaderTimeout: 10 * time.Second, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelError),
		}
		hook.SetKeepAlivesEnabled(false) // so that each admission is a handshake
		listener := listen(t)
		webhooks = append(webhooks, listener.Addr().String())
		running.Go(func() { _ = hook.ServeTLS(listener, "", "") })
		running.Go(func() { <-ctx.Done(); _ = hook.Close() })

		server, err := gateway.New(gateway.Config{Cache: informers, Live: c, Changes: changes, EdgeAddress: "edge.example.com:22", Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		gate := listen(t)
		gateways = append(gateways, gate.Addr().String())
		running.Go(func() {
			_ = server.Serve(ctx, gate, &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: m.GetCertificate})
		})

		mgr, err := ctrl.NewManager(admin, ctrl.Options{
			Scheme: scheme, Metrics: metricsserver.Options{BindAddress: "0"}, Controller: config.Controller{SkipNameValidation: ptr.To(true)},
			LeaderElection: true, LeaderElectionID: "lease", LeaderElectionNamespace: s.cfg.Namespace, LeaderElectionReleaseOnCancel: true,
			LeaseDuration: ptr.To(10 * time.Second), RenewDeadline: ptr.To(8 * time.Second), RetryPeriod: ptr.To(200 * time.Millisecond),
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := mgr.Add(m.Leader()); err != nil {
			t.Fatal(err)
		}
		ca := &controller.GatewayCAReconciler{Client: mgr.GetClient(), Namespace: s.cfg.Namespace, ConfigMap: caConfigMap, Bundle: m.CABundle, Changed: m.Subscribe()}
		if err := ca.SetupWithManager(mgr); err != nil {
			t.Fatal(err)
		}
		s.elected[i] = mgr.Elected()
		s.stopManager[i] = run(t, mgr)
		t.Cleanup(s.stopManager[i])
	}
	webhookAddress, gatewayAddress := balance(ctx, t, &running, webhooks), balance(ctx, t, &running, gateways)
	s.startLoad(apps, caConfigMap, "https://"+gatewayAddress) // waits for what follows
	t.Cleanup(s.stopLoad)
	s.create(&admissionregistrationv1.MutatingWebhookConfiguration{
		ObjectMeta: metav1.ObjectMeta{Name: s.cfg.MutatingWebhook},
		Webhooks: []admissionregistrationv1.MutatingWebhook{{
			Name: "pods.mysocket.io", AdmissionReviewVersions: []string{"v1"},
			SideEffects:       ptr.To(admissionregistrationv1.SideEffectClassNone),
			FailurePolicy:     ptr.To(admissionregistrationv1.Fail), // hides nothing
			ClientConfig:      admissionregistrationv1.WebhookClientConfig{URL: ptr.To("https://" + webhookAddress + "/mutate-pod")},
			NamespaceSelector: &metav1.LabelSelector{MatchLabels: map[string]string{corev1.LabelMetadataName: apps}},
			Rules: []admissionregistrationv1.RuleWithOperations{{
				Operations: []admissionregistrationv1.OperationType{admissionregistrationv1.Create},
				Rule:       admissionregistrationv1.Rule{APIGroups: []string{""}, APIVersions: []string{"v1"}, Resources: []string{"pods"}},
			}},
		}},
	})
	return s
}

func (s *load) create(o client.Object) {
	s.t.Helper()
	if err := s.c.Create(s.t.Context(), o); err != nil {
		s.t.Fatal(err)
	}
}

func listen(t *testing.T) net.Listener {
	t.Helper()
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// balance spreads connections over the backends, as a Service does, and returns its address by the name that is in the
// certificates.
func balance(ctx context.Context, t *testing.T, running *sync.WaitGroup, backends []string) string {
	t.Helper()
	l := listen(t)
	running.Go(func() { <-ctx.Done(); _ = l.Close() })
	running.Go(func() {
		for n := 0; ; n++ {
			front, err := l.Accept()
			if err != nil {
				return
			}
			back, err := (&net.Dialer{}).DialContext(ctx, "tcp", backends[n%len(backends)])
			if err != nil {
				_ = front.Close()
				continue
			}
			var ends sync.Once
			end := func() { ends.Do(func() { _ = front.Close(); _ = back.Close() }) }
			stop := context.AfterFunc(ctx, end)
			running.Go(func() { defer end(); _, _ = io.Copy(back, front) })
			running.Go(func() { defer stop(); defer end(); _, _ = io.Copy(front, back) })
		}
	})
	_, port, err := net.SplitHostPort(l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	return net.JoinHostPort("localhost", port)
}

// startLoad creates pods and follows streams, when both replicas are ready, until stopLoad.
func (s *load) startLoad(apps, caConfigMap, gatewayURL string) {
	t := s.t
	dir := t.TempDir()
	caFile := filepath.Join(dir, "ca.crt")
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	s.stopLoad = sync.OnceFunc(func() {
		cancel()
		running.Wait()
	})
	begin := make(chan struct{})
	every := func(pause time.Duration, do func()) {
		running.Go(func() {
			select {
			case <-begin:
			case <-ctx.Done():
				return
			}
			for ctx.Err() == nil {
				do()
				select {
				case <-ctx.Done():
				case <-time.After(pause):
				}
			}
		})
	}
	running.Go(func() {
		// The kubelet: what it brings to the pods is half a second old when it comes, and a second before the next.
		for begun := false; ; {
			cm := &corev1.ConfigMap{}
			err := s.c.Get(ctx, client.ObjectKey{Namespace: apps, Name: caConfigMap}, cm)
			select {
			case <-ctx.Done():
				return
			case <-time.After(500 * time.Millisecond):
			}
			if err != nil {
				continue
			}
			if err := os.WriteFile(caFile+".new", []byte(cm.Data[controller.CAKey]), 0o600); err != nil {
				t.Error(err)
			}
			if err := os.Rename(caFile+".new", caFile); err != nil {
				t.Error(err)
			}
			if !begun && s.replicas[0].Ready() == nil && s.replicas[1].Ready() == nil && s.admits(ctx, apps) == nil {
				close(begin)
				begun = true
			}
		}
	})
	for range 2 {
		every(50*time.Millisecond, func() {
			if err := s.admits(ctx, apps); err != nil && ctx.Err() == nil {
				t.Errorf("an admission at %s: %v", time.Now().Format(time.TimeOnly), err)
				return
			}
			s.handshakes.Add(1)
		})
	}
	for i := range loadSidecars {
		name := fmt.Sprint("web-", i)
		client := s.sidecar(apps, name, filepath.Join(dir, name), caFile, gatewayURL)
		pause, length := 2*time.Second, 100*time.Millisecond
		if i == 0 {
			pause, length = 0, time.Hour // its stream goes through everything
		}
		every(pause, func() { s.stream(ctx, client, length) })
	}
}

// admits creates a pod, and says why it did not get its sidecar.
func (s *load) admits(ctx context.Context, apps string) error {
	pod := webPod(apps, "new")
	if err := s.c.Create(ctx, pod, client.DryRunAll); err != nil {
		return err
	}
	if !inject.HasSidecar(pod) {
		return errors.New("the pod has no sidecar")
	}
	return nil
}

func webPod(namespace, name string) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: map[string]string{"app": "web"}},
		Spec:       corev1.PodSpec{ServiceAccountName: "app", Containers: []corev1.Container{{Name: "app", Image: "example.com/app"}}},
	}
}

// sidecar makes a pod and its client of the gateway.
func (s *load) sidecar(apps, name, tokenFile, caFile, url string) *gatewayclient.Client {
	s.t.Helper()
	pod := webPod(apps, name)
	s.create(pod)
	pod.Status.Phase = corev1.PodRunning
	if err := s.c.Status().Update(s.t.Context(), pod); err != nil {
		s.t.Fatal(err)
	}
	request := &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{
		Audiences: []string{gatewayapi.Audience}, BoundObjectRef: &authenticationv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: name, UID: pod.UID},
	}}
	account := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: apps, Name: "app"}}
	if err := s.c.SubResource("token").Create(s.t.Context(), account, request); err != nil {
		s.t.Fatal(err)
	}
	if err := os.WriteFile(tokenFile, []byte(request.Status.Token), 0o600); err != nil {
		s.t.Fatal(err)
	}
	g, err := gatewayclient.New(gatewayclient.Config{URL: url, TokenFile: tokenFile, CAFile: caFile, UserAgent: "test", Clock: retry.System()})
	if err != nil {
		s.t.Fatal(err)
	}
	return g
}

// stream follows the assignments for a while from the first snapshot on.
func (s *load) stream(ctx context.Context, g *gatewayclient.Client, length time.Duration) {
	streaming, cancel := context.WithCancel(ctx)
	defer cancel()
	defer g.Close() // so that the next is a handshake
	var timer *time.Timer
	ended := false
	err := g.Assignments(streaming, func(e gatewayclient.Event) {
		if e.Err != nil || len(e.Snapshot.Assignments) != 1 {
			s.t.Errorf("a snapshot %+v, %v", e.Snapshot, e.Err)
		}
		if timer == nil {
			s.handshakes.Add(1)
			timer = time.AfterFunc(length, cancel)
		}
	})
	if timer != nil {
		ended = !timer.Stop()
	}
	if ctx.Err() == nil && !ended {
		s.t.Errorf("a stream at %s: %v", time.Now().Format(time.TimeOnly), err)
	}
}

// seen is what was served.
type seen struct{ cas, leaves map[string]bool }

// until watches what is served until ok, which is given all that has been seen.
func (s *load) until(what string, seen *seen, ok func() bool) {
	s.t.Helper()
	deadline := time.After(90 * time.Second)
	for {
		for i, m := range s.replicas {
			if served, err := m.GetCertificate(nil); err == nil {
				if seen.cas == nil {
					seen.cas, seen.leaves = map[string]bool{}, map[string]bool{}
				}
				seen.cas[string(served.Leaf.AuthorityKeyId)] = true
				seen.leaves[served.Leaf.SerialNumber.String()] = true
				if err := m.Ready(); err != nil && s.handshakes.Load() > 0 {
					s.t.Errorf("replica %d is not ready any more: %v", i, err)
				}
			}
		}
		if s.t.Failed() {
			s.t.FailNow()
		}
		if ok() {
			return
		}
		select {
		case <-deadline:
			s.t.Fatalf("not within 90 s: %s; %d CAs and %d certificates were in use, %d handshakes", what, len(seen.cas), len(seen.leaves), s.handshakes.Load())
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (s *load) settled() bool {
	for _, m := range s.replicas {
		m.mu.Lock()
		settled := m.material != nil && len(m.material.others) == 0
		m.mu.Unlock()
		if !settled {
			return false
		}
	}
	return true
}

func (s *load) selfManaged() {
	seen := &seen{}
	s.until("two certificates", seen, func() bool { return len(seen.leaves) >= 2 && s.handshakes.Load() > 20 })
	// A CA that somebody made necessary, while the leader changes.
	secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: s.cfg.Namespace, Name: s.cfg.SecretName}}
	if err := s.c.Delete(s.t.Context(), secret); err != nil {
		s.t.Fatal(err)
	}
	s.until("a new CA", seen, func() bool { return !s.settled() })
	s.stopManager[s.leader()]()
	s.until("the new CA in use", seen, func() bool { return len(seen.cas) >= 2 && s.settled() })
	s.until("a CA that is due", seen, func() bool { return len(seen.cas) >= 3 && len(seen.leaves) >= 5 && s.settled() })
	s.report(seen)
}

func (s *load) certManaged() {
	seen := &seen{}
	s.create(&certmanagerv1.Certificate{
		ObjectMeta: metav1.ObjectMeta{Namespace: s.cfg.Namespace, Name: testCertificate},
		Spec:       certmanagerv1.CertificateSpec{SecretName: testIssuedSecret, DNSNames: s.cfg.DNSNames, IssuerRef: cmmeta.IssuerReference{Name: "ca"}},
	})
	cm := &certManager{newIssuer(s.t, time.Now(), s.cfg.DNSNames...), s.c, s.cfg.Namespace}
	renew := func() {
		s.t.Helper()
		cm.put(cm.secret(time.Now(), time.Minute))
		cm.say(ready(cmmeta.ConditionTrue, "Ready", "Certificate is up to date and has not expired"))
	}
	renew()
	s.until("a certificate", seen, func() bool { return len(seen.leaves) == 1 && s.handshakes.Load() > 20 })
	renew()
	s.until("a renewed certificate", seen, func() bool { return len(seen.leaves) == 2 })
	cm.newCA(time.Now())
	renew()
	s.until("a new CA", seen, func() bool { return !s.settled() })
	s.stopManager[s.leader()]()
	s.until("the new CA in use", seen, func() bool { return len(seen.cas) == 2 && s.settled() })
	cm.newCA(time.Now())
	renew()
	s.until("another CA in use", seen, func() bool { return len(seen.cas) == 3 && s.settled() })
	s.report(seen)
}

// leader is the number of the replica that leads. It can be asked once: a manager that was stopped has been elected, too.
func (s *load) leader() int {
	s.t.Helper()
	select {
	case <-s.elected[0]:
		return 0
	case <-s.elected[1]:
		return 1
	default:
		s.t.Fatal("nobody leads")
		return 0
	}
}

func (s *load) report(seen *seen) {
	s.stopLoad()
	s.t.Logf("%d CAs and %d certificates were in use; %d handshakes, none failed", len(seen.cas), len(seen.leaves), s.handshakes.Load())
}
