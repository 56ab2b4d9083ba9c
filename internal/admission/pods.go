// Package admission answers the API server's questions about new pods and changed Services. It is thin over packages
// inject and annotations: it knows when a pod is to have a sidecar, not what one looks like, and when to look at a
// Service, not what is wrong with it. It must never call Mysocket, has no side effects (so a dry-run needs no care), and
// never fails an object for a fault of ours: a pod that slips through without a sidecar is repaired by the rollout
// controller, and what is wrong with a Service that slips through stands in its conditions.
package admission

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"runtime/debug"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	admissionv1 "k8s.io/api/admission/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/webhook/admission"

	"github.com/mysocketio/mysocket-injector/internal/inject"
)

const (
	reasonLookupFailed inject.Reason = "LookupFailed"
	reasonInternal     inject.Reason = "InternalError"
	reasonUndecodable  inject.Reason = "Undecodable"
	reasonNotAPod      inject.Reason = "NotAPod"
)

// warningLimit keeps a warning within what kubectl shows on a line or two; the API server cuts off at 256 when an
// answer has many.
const warningLimit = 250

// warningPrefix begins every warning, since kubectl does not say who warns.
const warningPrefix = "mysocket: "

// Options is what a [PodMutator] needs.
type Options struct {
	// Services is the informer cache, with the index of RegisterIndex.
	Services client.Reader
	// LiveServices reads Services from the API server, without a cache.
	LiveServices client.Reader
	// Sidecar is what to inject. It must be valid.
	Sidecar inject.Config
	// Log may be nil, for none.
	Log *slog.Logger
	// Registerer takes the metrics, as controller-runtime's metrics.Registry.
	Registerer prometheus.Registerer
}

// PodMutator puts the sidecar into new pods that an enabled Service selects. It implements [admission.Handler]; serve
// it as &admission.Webhook{Handler: mutator}.
type PodMutator struct {
	services *services
	sidecar  inject.Config
	decoder  admission.Decoder
	metrics  *metrics
	log      *slog.Logger
}

var _ admission.Handler = (*PodMutator)(nil)

// NewPodMutator returns a PodMutator, or says what is wrong with the options.
func NewPodMutator(o Options) (*PodMutator, error) {
	if o.Services == nil || o.LiveServices == nil {
		return nil, errors.New("pod mutator: both readers of Services are required")
	}
	if err := o.Sidecar.Validate(); err != nil {
		return nil, fmt.Errorf("pod mutator: %w", err)
	}
	if o.Registerer == nil {
		o.Registerer = prometheus.NewRegistry()
	}
	m, err := newMetrics(o.Registerer)
	if err != nil {
		return nil, err
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	decoder, err := newDecoder()
	if err != nil {
		return nil, fmt.Errorf("pod mutator: %w", err)
	}
	return &PodMutator{
		services: newServices(o.Services, o.LiveServices),
		sidecar:  o.Sidecar.Prepared(),
		decoder:  decoder,
		metrics:  m,
		log:      o.Log,
	}, nil
}

func newDecoder() (admission.Decoder, error) {
	scheme := runtime.NewScheme()
	if err := corev1.AddToScheme(scheme); err != nil {
		return nil, err
	}
	return admission.NewDecoder(scheme), nil
}

// outcome is all that is known about the admission of one pod once it is decided.
type outcome struct {
	result   result
	reason   inject.Reason // empty for injected and unchanged
	response admission.Response
	err      error    // of failed and malformed
	services []string // that select the pod, as far as known
}

// Handle answers one admission request. Every answer but the one to a request that isn't an API server's is "allowed".
func (m *PodMutator) Handle(ctx context.Context, req admission.Request) admission.Response {
	start := time.Now()
	pod := &corev1.Pod{}
	o := m.recovered(func() outcome { return m.decide(ctx, req, pod) })
	m.metrics.observe(o, time.Since(start))
	m.logOutcome(ctx, req, pod, o)
	return o.response
}

// recovered makes a panic an outcome. The webhook server would answer one with an error, which refuses the pod.
func (m *PodMutator) recovered(decide func() outcome) (o outcome) {
	defer func() {
		if p := recover(); p != nil {
			o = failed(reasonInternal, fmt.Errorf("panic: %v\n%s", p, debug.Stack()), "the injector hit a fault of its own, see its log")
		}
	}()
	return decide()
}

func (m *PodMutator) decide(ctx context.Context, req admission.Request, pod *corev1.Pod) outcome {
	if req.Operation != admissionv1.Create || req.SubResource != "" || req.Resource.Group != "" || req.Resource.Resource != "pods" {
		// Only a webhook configuration that somebody changed sends these. Refusing them could block other things than pods.
		return outcome{result: resultSkipped, reason: reasonNotAPod, response: admission.Allowed("")}
	}
	if err := m.decoder.DecodeRaw(req.Object, pod); err != nil {
		err = fmt.Errorf("the request's object is not a pod: %w", err)
		return outcome{result: resultMalformed, reason: reasonUndecodable, err: err, response: admission.Errored(http.StatusBadRequest, err)}
	}

	selecting, err := m.services.fromCache(ctx, req.Namespace, pod.Labels)
	if err != nil {
		m.log.WarnContext(ctx, "look for Services in the cache", "namespace", req.Namespace, "err", err)
	}
	if skip := inject.Check(pod); skip != nil {
		o := outcome{result: resultSkipped, reason: skip.Reason, response: admission.Allowed(""), services: selecting}
		if len(selecting) > 0 { // nobody waits for a tunnel into any other pod
			o.response = o.response.WithWarnings(warning(fmt.Sprintf("no tunnel for this pod (%s): %s", skip.Reason, skip.Message)))
		}
		return o
	}
	if len(selecting) == 0 {
		// A Service that was created a moment ago, with the pod, looks the same as no Service.
		if selecting, err = m.services.fromServer(ctx, req.Namespace, pod.Labels); err != nil {
			m.metrics.observeLive(nil, err)
			return failed(reasonLookupFailed, err, "the Services of the namespace can't be listed")
		}
		m.metrics.observeLive(selecting, nil)
	}
	if len(selecting) == 0 {
		return outcome{result: resultSkipped, reason: inject.ReasonNoService, response: admission.Allowed("")}
	}

	injected, skip := inject.Inject(pod, m.sidecar)
	if skip != nil { // Check has said otherwise
		return failed(reasonInternal, errors.New(skip.String()), skip.Message)
	}
	o := outcome{result: resultUnchanged, response: admission.Allowed(""), services: selecting}
	if ops := patch(pod, injected); len(ops) > 0 {
		o.result, o.response = resultInjected, admission.Patched("", ops...)
	}
	if err := inject.Problem(pod); err != nil {
		o.response = o.response.WithWarnings(warning(fmt.Sprintf("%v; it is ignored", err)))
	}
	return o
}

func failed(reason inject.Reason, err error, why string) outcome {
	return outcome{
		result:   resultFailed,
		reason:   reason,
		err:      err,
		response: admission.Allowed("").WithWarnings(warning(fmt.Sprintf("no tunnel for this pod yet (%s): %s", reason, why))),
	}
}

func warning(s string) string {
	s = warningPrefix + s
	if len(s) > warningLimit {
		s = strings.ToValidUTF8(s[:warningLimit-3], "") + "..."
	}
	return s
}

func (m *PodMutator) logOutcome(ctx context.Context, req admission.Request, pod *corev1.Pod, o outcome) {
	name := pod.Name
	if name == "" && pod.GenerateName != "" {
		name = pod.GenerateName + "*" // the rest is made up after admission
	}
	level, text := slog.LevelInfo, "pod admitted with a tunnel sidecar"
	switch o.result {
	case resultFailed:
		level, text = slog.LevelError, "pod admitted without a tunnel sidecar after an error"
	case resultMalformed:
		level, text = slog.LevelError, "admission request refused"
	case resultUnchanged:
		level, text = slog.LevelDebug, "pod has its tunnel sidecar already"
	case resultSkipped:
		text = "pod admitted without a tunnel sidecar"
		if len(o.services) == 0 {
			level = slog.LevelDebug
		}
	}
	attrs := []slog.Attr{slog.String("namespace", req.Namespace), slog.String("pod", name)}
	if len(o.services) > 0 {
		attrs = append(attrs, slog.String("service", strings.Join(o.services, ",")))
	}
	if o.reason != "" {
		attrs = append(attrs, slog.String("reason", string(o.reason)))
	}
	if o.err != nil {
		attrs = append(attrs, slog.Any("err", o.err))
	}
	m.log.LogAttrs(ctx, level, text, attrs...)
}
