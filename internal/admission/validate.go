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
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/webhook/admission"

	"github.com/mysocketio/mysocket-injector/internal/annotations"
)

// Reasons of admissions of Services that are not those of a problem.
const (
	serviceNotAService  = "NotAService"
	serviceDeleting     = "Deleting"
	serviceControlPlane = "ControlPlane"
	serviceUntouched    = "Untouched"
	serviceNotEnabled   = "NotEnabled"
)

// ValidatorOptions is what a [ServiceValidator] needs.
type ValidatorOptions struct {
	// Cluster is the informer cache, with pods and namespaces.
	Cluster client.Reader
	// Namespace is the control plane's own.
	Namespace string
	// Names is what the sockets of Services are called, and who may ask for which name.
	Names annotations.Names
	// Log may be nil, for none.
	Log *slog.Logger
	// Registerer takes the metrics, as controller-runtime's metrics.Registry.
	Registerer prometheus.Registerer
}

// ServiceValidator refuses a change that makes a Service wrong in our sense, and tells what a right one will lead to. It
// implements [admission.Handler].
//
//	the change                                                   answer
//	not of a Service, of one being deleted, by the control plane allowed
//	touches nothing that we read                                 allowed, whatever is wrong already
//	leaves the Service off                                       allowed; warned of annotations that have no effect
//	is in a namespace that is never injected                     allowed, with a warning
//	brings a problem, or touches one that is there               refused
//	leaves a problem that is there as it is                      allowed, with a warning
//	leaves all right                                             allowed, with warnings of what follows
type ServiceValidator struct {
	cluster   client.Reader
	namespace string
	names     annotations.Names
	decoder   admission.Decoder
	metrics   *serviceMetrics
	log       *slog.Logger
}

var _ admission.Handler = (*ServiceValidator)(nil)

// NewServiceValidator returns a ServiceValidator, or says what is wrong with the options.
func NewServiceValidator(o ValidatorOptions) (*ServiceValidator, error) {
	if o.Cluster == nil || o.Namespace == "" {
		return nil, errors.New("service validator: a reader of the cluster and the control plane's own namespace are required")
	}
	if o.Registerer == nil {
		o.Registerer = prometheus.NewRegistry()
	}
	m, err := newServiceMetrics(o.Registerer)
	if err != nil {
		return nil, err
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	decoder, err := newDecoder()
	if err != nil {
		return nil, fmt.Errorf("service validator: %w", err)
	}
	return &ServiceValidator{cluster: o.Cluster, namespace: o.Namespace, names: o.Names, decoder: decoder, metrics: m, log: o.Log}, nil
}

// verdict is all that is known about the admission of one Service once it is decided.
type verdict struct {
	result   result
	reason   string // of what was skipped, refused or let through though it is wrong
	message  string // of refused
	warnings []string
	err      error // of failed and malformed
}

func (v verdict) response() admission.Response {
	switch v.result {
	case resultMalformed:
		return admission.Errored(http.StatusBadRequest, v.err)
	case resultRefused:
		return admission.Denied(v.message)
	}
	return admission.Allowed("").WithWarnings(v.warnings...)
}

// Handle answers one admission request. A fault of ours refuses nothing.
func (s *ServiceValidator) Handle(ctx context.Context, req admission.Request) admission.Response {
	start := time.Now()
	v := s.decide(ctx, req)
	s.metrics.observe(v, time.Since(start))
	s.logVerdict(ctx, req, v)
	return v.response()
}

func (s *ServiceValidator) decide(ctx context.Context, req admission.Request) (v verdict) {
	defer func() {
		// The webhook server would answer a panic with an error, which refuses the Service.
		if p := recover(); p != nil {
			v = verdict{result: resultFailed, reason: string(reasonInternal), err: fmt.Errorf("panic: %v\n%s", p, debug.Stack())}
		}
	}()
	created := req.Operation == admissionv1.Create
	if !created && req.Operation != admissionv1.Update || req.SubResource != "" || req.Resource.Group != "" || req.Resource.Resource != "services" {
		// Only a webhook configuration that somebody changed sends these.
		return skipped(serviceNotAService)
	}
	svc, was := &corev1.Service{}, &corev1.Service{}
	if err := s.decoder.DecodeRaw(req.Object, svc); err != nil {
		return malformed("object", err)
	}
	if !created {
		if err := s.decoder.DecodeRaw(req.OldObject, was); err != nil {
			return malformed("old object", err)
		}
	}
	svc.Namespace, was.Namespace = req.Namespace, req.Namespace
	// It must be possible to take a finalizer from a Service that is being deleted, and for the control plane to do its work.
	if svc.DeletionTimestamp != nil {
		return skipped(serviceDeleting)
	}
	if strings.HasPrefix(req.UserInfo.Username, "system:serviceaccount:"+s.namespace+":") {
		return skipped(serviceControlPlane)
	}
	c := compare(was, svc)
	if c.nothing() {
		return skipped(serviceUntouched)
	}
	if !annotations.IsOurs(svc) {
		return s.off(c, "")
	}
	spec, err := annotations.Parse(svc, s.names)
	var problem *annotations.Problem
	if err != nil && !errors.As(err, &problem) {
		return verdict{result: resultFailed, reason: string(reasonInternal), err: err}
	}
	switch {
	case svc.Annotations[annotations.Enabled] == "false":
		if problem == nil || problem.Reason != annotations.ReasonInvalidAnnotation {
			return s.off(change{}, "")
		}
		return s.off(c, problem.Message)
	case annotations.NeverInjected(req.Namespace, s.namespace):
		return verdict{result: resultAllowed, warnings: []string{neverInjectedWarning(req.Namespace)}}
	case problem == nil:
		return verdict{result: resultAllowed, warnings: s.consequences(ctx, svc, spec, c)}
	case created || c.touches(problem) || !s.wasWrong(was):
		return verdict{result: resultRefused, reason: problem.Reason, message: problem.Message}
	}
	return verdict{result: resultAllowed, reason: problem.Reason, warnings: []string{warning("the Service is still not public: " + problem.Message)}}
}

// off is the answer to a change that leaves a Service switched off. It is the way out of every problem, so it is never
// refused; that annotations which were just written have no effect, or would not be understood, is worth a word.
func (s *ServiceValidator) off(c change, problem string) verdict {
	v := skipped(serviceNotEnabled)
	switch {
	case len(c.set) == 0:
	case problem != "":
		v.warnings = []string{warning(problem)}
	default:
		v.warnings = []string{warning(fmt.Sprintf("%s has no effect, since the Service has no annotation %s", strings.Join(c.set, ", "), annotations.Enabled))}
	}
	return v
}

func (s *ServiceValidator) wasWrong(was *corev1.Service) bool {
	_, err := annotations.Parse(was, s.names)
	return annotations.IsOurs(was) && err != nil
}

func skipped(reason string) verdict { return verdict{result: resultSkipped, reason: reason} }

func malformed(what string, err error) verdict {
	return verdict{result: resultMalformed, reason: string(reasonUndecodable), err: fmt.Errorf("the request's %s is not a Service: %w", what, err)}
}

func (s *ServiceValidator) logVerdict(ctx context.Context, req admission.Request, v verdict) {
	level, text := slog.LevelDebug, "change of a Service admitted"
	switch v.result {
	case resultRefused:
		level, text = slog.LevelInfo, "change of a Service refused"
	case resultFailed:
		level, text = slog.LevelError, "change of a Service admitted unseen after an error"
	case resultMalformed:
		level, text = slog.LevelError, "admission request refused"
	}
	attrs := []slog.Attr{slog.String("service", req.Namespace+"/"+req.Name), slog.String("result", string(v.result))}
	if v.reason != "" {
		attrs = append(attrs, slog.String("reason", v.reason))
	}
	if v.message != "" {
		attrs = append(attrs, slog.String("message", v.message))
	}
	if v.err != nil {
		attrs = append(attrs, slog.Any("err", v.err))
	}
	s.log.LogAttrs(ctx, level, text, attrs...)
}
