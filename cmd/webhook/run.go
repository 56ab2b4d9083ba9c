package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"runtime/debug"
	"strconv"
	"time"

	certmanagerv1 "github.com/cert-manager/cert-manager/pkg/apis/certmanager/v1"
	"github.com/go-logr/logr"
	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/klog/v2"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/healthz"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/metrics"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"
	"sigs.k8s.io/controller-runtime/pkg/webhook"
	webhookadmission "sigs.k8s.io/controller-runtime/pkg/webhook/admission"

	"github.com/mysocketio/mysocket-injector/api/v1alpha1"
	"github.com/mysocketio/mysocket-injector/internal/admission"
	"github.com/mysocketio/mysocket-injector/internal/certs"
	"github.com/mysocketio/mysocket-injector/internal/controller"
	"github.com/mysocketio/mysocket-injector/internal/gateway"
	"github.com/mysocketio/mysocket-injector/internal/inject"
	"github.com/mysocketio/mysocket-injector/internal/mysocket"
)

// schemes are the kinds of objects that the program knows.
var schemes = []func(*runtime.Scheme) error{clientgoscheme.AddToScheme, v1alpha1.AddToScheme, certmanagerv1.AddToScheme}

// run builds the parts, joins them and runs them until ctx ends.
func run(ctx context.Context, o *options) error {
	if o.memoryLimit > 0 {
		// The garbage collector works harder near the limit instead of having the kernel kill the process. It does not count
		// the pages of the program file, some 30 MiB that the container's limit counts.
		debug.SetMemoryLimit(o.memoryLimit / 10 * 8)
	}
	log := newLogger(o)
	ctrl.SetLogger(logr.FromSlogHandler(log.Handler()))
	klog.SetSlogLogger(log) // client-go's
	scheme := runtime.NewScheme()
	for _, add := range schemes {
		if err := add(scheme); err != nil {
			return err
		}
	}
	rest, err := ctrl.GetConfig()
	if err != nil {
		return fmt.Errorf("find the cluster: %w", err)
	}
	// client-go's own 5 requests a second would throttle token reviews when many pods start at once.
	rest.QPS, rest.Burst = 100, 200
	live, err := client.New(rest, client.Options{Scheme: scheme})
	if err != nil {
		return fmt.Errorf("connect to the cluster: %w", err)
	}
	certificates, err := certs.New(certs.Config{
		Namespace:         o.namespace,
		SecretName:        o.certificateSecret,
		Certificate:       o.certificate,
		Overlap:           o.certificateOverlap,
		DNSNames:          serviceNames(o.namespace, o.webhookService, o.gatewayService),
		MutatingWebhook:   o.webhookConfiguration,
		ValidatingWebhook: o.webhookConfiguration,
		Log:               log.With("component", "certificates"),
		Registerer:        metrics.Registry,
	}, live)
	if err != nil {
		return err
	}
	serving := func(c *tls.Config) {
		c.GetCertificate = certificates.GetCertificate
		c.MinVersion = tls.VersionTLS12
	}
	shutdown := shutdownTimeout
	mgr, err := ctrl.NewManager(rest, ctrl.Options{
		Scheme:                        scheme,
		Cache:                         cacheOptions(),
		Metrics:                       metricsserver.Options{BindAddress: o.metricsAddress},
		HealthProbeBindAddress:        o.healthAddress,
		WebhookServer:                 webhook.NewServer(webhook.Options{Port: o.webhookPort, TLSOpts: []func(*tls.Config){serving}}),
		LeaderElection:                true,
		LeaderElectionID:              o.lease,
		LeaderElectionNamespace:       o.namespace,
		LeaderElectionReleaseOnCancel: true,
		GracefulShutdownTimeout:       &shutdown,
	})
	if err != nil {
		return err
	}
	api, err := newAPI(o, metrics.Registry)
	if err != nil {
		return err
	}
	if err := addAdmission(ctx, mgr, live, o, log); err != nil {
		return err
	}
	sweeper := &controller.Sweeper{Client: mgr.GetClient(), Live: live, API: api, Names: o.names, Now: time.Now}
	if err := addGateway(ctx, mgr, live, api, certificates, serving, sweeper.Wake, o, log); err != nil {
		return err
	}
	if err := addControllers(mgr, live, api, certificates, sweeper.Wake, o); err != nil {
		return err
	}
	for _, r := range []manager.Runnable{certificates, certificates.Leader(), sweeper} {
		if err := mgr.Add(r); err != nil {
			return err
		}
	}
	if err := mgr.AddHealthzCheck("ping", healthz.Ping); err != nil {
		return err
	}
	for name, check := range map[string]healthz.Checker{
		"certificates": func(*http.Request) error { return certificates.Ready() },
		"webhook":      mgr.GetWebhookServer().StartedChecker(),
	} {
		if err := mgr.AddReadyzCheck(name, check); err != nil {
			return err
		}
	}
	log.Info("control plane starts", "version", version, "api", o.apiURL, "ssh", o.sshAddress, "sidecar", o.sidecar.Image)
	later, cancel := lingering(ctx, o.shutdownDelay)
	defer cancel()
	return mgr.Start(later)
}

func newLogger(o *options) *slog.Logger {
	opts := &slog.HandlerOptions{Level: o.logLevel}
	if o.logFormat == "json" {
		return slog.New(slog.NewJSONHandler(os.Stderr, opts))
	}
	return slog.New(slog.NewTextHandler(os.Stderr, opts))
}

func serviceNames(namespace string, services ...string) []string {
	var out []string
	for _, s := range services {
		out = append(out, s+"."+namespace+".svc", s+"."+namespace+".svc.cluster.local")
	}
	return out
}

// cacheOptions keeps the informers small: of pods only what the program reads, once for pods that are alike, of ConfigMaps only ours, of workloads only
// those that are being restarted.
func cacheOptions() cache.Options {
	byObject := controller.RestartingOnly()
	byObject[&corev1.Pod{}] = cache.ByObject{Transform: newPodSlimmer(sharedKinds).slim}
	byObject[&corev1.ConfigMap{}] = cache.ByObject{Field: fields.OneTermEqualSelector(metav1.ObjectNameField, inject.DefaultCAConfigMap)}
	return cache.Options{DefaultTransform: cache.TransformStripManagedFields(), ByObject: byObject}
}

func newAPI(o *options, registry prometheus.Registerer) (*mysocket.Client, error) {
	requests := prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name:    "mysocket_api_request_duration_seconds",
		Help:    "Requests to the Mysocket API by endpoint and HTTP status (0: no answer).",
		Buckets: prometheus.ExponentialBuckets(0.005, 2, 12),
	}, []string{"endpoint", "status"})
	if err := registry.Register(requests); err != nil {
		return nil, err
	}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.TLSClientConfig = &tls.Config{RootCAs: o.apiCA, MinVersion: tls.VersionTLS12}
	transport.DialContext = (&net.Dialer{Timeout: 5 * time.Second}).DialContext
	return mysocket.New(mysocket.Config{
		BaseURL:     o.apiURL,
		Credentials: o.credentials,
		Transport:   transport,
		Version:     version,
		Observe: func(endpoint string, status int, took time.Duration) {
			requests.WithLabelValues(endpoint, strconv.Itoa(status)).Observe(took.Seconds())
		},
	})
}

func addAdmission(ctx context.Context, mgr manager.Manager, live client.Client, o *options, log *slog.Logger) error {
	if err := admission.RegisterIndex(ctx, mgr.GetFieldIndexer()); err != nil {
		return err
	}
	mutator, err := admission.NewPodMutator(admission.Options{
		Services:     mgr.GetClient(),
		LiveServices: live,
		Sidecar:      o.sidecar,
		Log:          log.With("component", "admission"),
		Registerer:   metrics.Registry,
	})
	if err != nil {
		return err
	}
	validator, err := admission.NewServiceValidator(admission.ValidatorOptions{
		Cluster:    mgr.GetClient(),
		Namespace:  o.namespace,
		Names:      o.names,
		Log:        log.With("component", "admission"),
		Registerer: metrics.Registry,
	})
	if err != nil {
		return err
	}
	mgr.GetWebhookServer().Register("/mutate-pod", closing(ctx, &webhookadmission.Webhook{Handler: mutator}))
	mgr.GetWebhookServer().Register("/validate-service", closing(ctx, &webhookadmission.Webhook{Handler: validator}))
	return nil
}

func addGateway(ctx context.Context, mgr manager.Manager, live client.Client, api *mysocket.Client, certificates *certs.Manager, serving func(*tls.Config), leftOver func(), o *options, log *slog.Logger) error {
	changes := &gateway.Changes{}
	if err := changes.Watch(ctx, mgr.GetCache()); err != nil {
		return err
	}
	// When a replica ends, the sidecars of half the cluster come to the other one at once.
	forReviews := rest.CopyConfig(mgr.GetConfig())
	forReviews.RateLimiter, forReviews.QPS, forReviews.Burst = nil, 300, 600
	reviews, err := client.New(forReviews, client.Options{Scheme: mgr.GetScheme()})
	if err != nil {
		return fmt.Errorf("connect to the cluster: %w", err)
	}
	server, err := gateway.New(gateway.Config{
		Cache:        mgr.GetClient(),
		Live:         live,
		Reviews:      reviews,
		API:          api,
		Changes:      changes,
		Names:        o.names,
		LeftOver:     leftOver,
		EdgeAddress:  o.sshAddress,
		EdgeHostKeys: o.hostKeys,
		Log:          log.With("component", "gateway"),
		Registerer:   metrics.Registry,
	})
	if err != nil {
		return err
	}
	return mgr.Add(onEveryReplica(func(ctx context.Context) error {
		_ = certificates.Wait(ctx) // fails only when we are told to stop before we began; Serve then ends at once
		listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", net.JoinHostPort("", strconv.Itoa(o.gatewayPort)))
		if err != nil {
			return fmt.Errorf("gateway: %w", err)
		}
		c := &tls.Config{MinVersion: tls.VersionTLS12}
		serving(c)
		return server.Serve(ctx, listener, c)
	}))
}

func addControllers(mgr manager.Manager, live client.Client, api *mysocket.Client, certificates *certs.Manager, leftOver func(), o *options) error {
	sidecar := o.sidecar.Prepared() // asked about for every pod
	outdated := func(pod *corev1.Pod) bool { return !inject.IsCurrent(pod, sidecar) }
	rollout := &controller.RolloutReconciler{
		Client:         mgr.GetClient(),
		Live:           live,
		Events:         mgr.GetEventRecorder("mysocket-injector"),
		Namespace:      o.namespace,
		Names:          o.names,
		MaxConcurrent:  o.rolloutMaxConcurrent,
		SidecarHash:    o.sidecar.Hash(),
		AdmissionReady: admissionReady(live, certificates.Published, o.namespace, o.webhookService, time.Now),
		Now:            time.Now,
	}
	if o.rolloutOutdated {
		rollout.Outdated = outdated
	}
	for _, r := range []interface{ SetupWithManager(ctrl.Manager) error }{
		&controller.ServiceReconciler{
			Client:    mgr.GetClient(),
			API:       api,
			Events:    mgr.GetEventRecorder("mysocket-injector"),
			Namespace: o.namespace,
			Names:     o.names,
			LeftOver:  leftOver,
			Secrets:   live,
			Outdated:  outdated,
		},
		&controller.TunnelReconciler{Client: mgr.GetClient(), API: api},
		rollout,
		&controller.GatewayCAReconciler{
			Client:    mgr.GetClient(),
			Namespace: o.namespace,
			ConfigMap: inject.DefaultCAConfigMap,
			Bundle:    certificates.CABundle,
			Changed:   certificates.Subscribe(),
		},
	} {
		if err := r.SetupWithManager(mgr); err != nil {
			return err
		}
	}
	return nil
}

// onEveryReplica is a runnable that needs no leadership. The manager starts it after the informers are in step, which
// matters: a gateway that answered from an empty cache would have every tunnel withdrawn.
type onEveryReplica func(context.Context) error

func (f onEveryReplica) Start(ctx context.Context) error { return f(ctx) }
func (onEveryReplica) NeedLeaderElection() bool          { return false }
