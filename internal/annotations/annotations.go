// Package annotations is the user's contract: it turns the annotations of a Service into a validated [Spec] and knows
// every name that users and we write on Services, pods and namespaces. Every other package works with Spec and never
// reads an annotation itself. It does no I/O.
package annotations

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
)

// Prefix starts every annotation and label of ours.
const Prefix = "mysocket.io/"

// Annotations that users write on a Service.
const (
	Enabled              = Prefix + "enabled"
	Type                 = Prefix + "type"
	Port                 = Prefix + "port"
	ProtectedSecret      = Prefix + "protected-secret"
	AllowedEmails        = Prefix + "allowed-emails"
	AllowedEmailDomains  = Prefix + "allowed-email-domains"
	UpstreamType         = Prefix + "upstream-type"
	UpstreamHTTPHostname = Prefix + "upstream-http-hostname"
	Connections          = Prefix + "connections"
	ProxyProtocol        = Prefix + "proxy-protocol"
	RolloutMode          = Prefix + "rollout"
	DeletionPolicy       = Prefix + "deletion-policy"
	SocketName           = Prefix + "socket-name"
)

// Annotations that the service controller writes back on a Service.
const (
	SocketID = Prefix + "socket-id"
	DNSName  = Prefix + "dnsname"
	URL      = Prefix + "url"
	// Applied lists the settings of the socket that come from the Service and are in force; see AppliedSettings.
	Applied = Prefix + "applied"
)

// LoadBalancerClass is the loadBalancerClass of a Service of type LoadBalancer that asks for what Enabled does, and gets its
// public name in its status too.
const LoadBalancerClass = Prefix + "edge"

// Names on other objects.
const (
	// NamespaceInjection is the namespace label that opts a namespace in, with the value NamespaceInjectionEnabled.
	NamespaceInjection        = Prefix + "injection"
	NamespaceInjectionEnabled = "enabled"
	// PodInject is the pod label that opts a pod out, with the value "false".
	PodInject = Prefix + "inject"
	// PodPreStopSleep is the pod annotation that says for how many seconds the pod's containers without a preStop hook are to sleep
	// before they are told to end.
	PodPreStopSleep = Prefix + "prestop-sleep"
	// PodInjected is the pod annotation that injection leaves: a hash of what was injected.
	PodInjected = Prefix + "injected"
	// RestartedAt is the pod template annotation that the rollout controller sets, as kubectl rollout restart does.
	RestartedAt = Prefix + "restarted-at"
	// Restarting is the label of a workload whose restart by us is not over: a hash of the pod template as we left it.
	Restarting = Prefix + "restarting"
	// Restarts is the workload annotation that counts its restarts for one and the same sidecar: "<its hash> <number>".
	Restarts = Prefix + "restarts"
	// Finalizer keeps Services and Tunnels until what they stand for at Mysocket is gone.
	Finalizer = Prefix + "cleanup"
)

// Conditions that the service controller writes in a Service's status.
const (
	// SocketReady says whether the Service has its public name.
	SocketReady = Prefix + "SocketReady"
	// TunnelsReady says how many of the Service's pods are connected.
	TunnelsReady = Prefix + "TunnelsReady"
)

// Values of the annotations.
const (
	TypeHTTP  = "http"
	TypeHTTPS = "https"
	TypeTCP   = "tcp"
	TypeTLS   = "tls"

	ProxyV1 = "v1"
	ProxyV2 = "v2"

	RolloutAuto  = "auto"
	RolloutNever = "never"

	PolicyDelete = "delete"
	PolicyRetain = "retain"
)

// MaxConnections is the most connections to the edge that one replica may be asked to keep.
const MaxConnections = 4

var (
	userAnnotations = []string{Enabled, Type, Port, SocketName, ProtectedSecret, AllowedEmails, AllowedEmailDomains, UpstreamType, UpstreamHTTPHostname, Connections, ProxyProtocol, RolloutMode, DeletionPolicy}
	ownAnnotations  = []string{SocketID, DNSName, URL, Applied}
)

// Own returns the annotations that the service controller writes on a Service, and removes when it is released.
func Own() []string { return slices.Clone(ownAnnotations) }

// Spec is what a user asked for with a Service's annotations, with defaults filled in.
type Spec struct {
	// SocketName is the name of the Mysocket socket: "k8s <namespace>.<service>", "k8s <cluster> <namespace>.<service>", or
	// one that the Service asks for and may have.
	SocketName string
	// SocketType is one of http, https, tcp, tls.
	SocketType string
	// ServicePort is the port of the Service that is made public.
	ServicePort corev1.ServicePort
	// ProtectedSecret is the name of the Secret with the username and password that visitors must know; empty for none.
	ProtectedSecret string
	// AllowedEmails and AllowedDomains are who may come in, each separated by commas and in order; empty for everybody.
	AllowedEmails, AllowedDomains string
	// UpstreamType is http or https, how the edge speaks to the app, and UpstreamHostname the host name that it uses. Empty
	// for what the edge does by itself.
	UpstreamType, UpstreamHostname string
	// Connections is how many connections to the edge each replica keeps, 1 to MaxConnections.
	Connections int
	// ProxyProtocol is ProxyV1, ProxyV2, or empty for none.
	ProxyProtocol string
	// Rollout is RolloutAuto or RolloutNever.
	Rollout string
	// DeletionPolicy is PolicyDelete or PolicyRetain.
	DeletionPolicy string
	// PublishNotReady is the Service's publishNotReadyAddresses.
	PublishNotReady bool
}

// Problem is one thing wrong with a Service, in words for its owner.
type Problem struct {
	// Reason is a CamelCase word, used as the reason of the condition and the Event.
	Reason string
	// Message names the thing, the value and what is allowed.
	Message string
}

// Reasons of problems.
const (
	ReasonInvalidAnnotation = "InvalidAnnotation"
	ReasonPortNotFound      = "PortNotFound"
	ReasonNoSelector        = "NoSelector"
)

// Error returns the message.
func (p *Problem) Error() string { return p.Message }

// IsEnabled tells whether the Service asks to be public, by annotation or as a load balancer of ours. The annotation wins. A
// value other than "true" and "false" is not enabled; Parse says what is wrong with it.
func IsEnabled(svc *corev1.Service) bool {
	if v, set := svc.Annotations[Enabled]; set {
		return v == "true"
	}
	return HasClass(svc)
}

// IsOurs tells whether the Service mentions us at all, rightly or wrongly: only then is it looked at.
func IsOurs(svc *corev1.Service) bool {
	_, ok := svc.Annotations[Enabled]
	return ok || HasClass(svc)
}

// HasClass tells whether the Service is a load balancer of our class.
func HasClass(svc *corev1.Service) bool {
	return svc.Spec.Type == corev1.ServiceTypeLoadBalancer && svc.Spec.LoadBalancerClass != nil && *svc.Spec.LoadBalancerClass == LoadBalancerClass
}

// IsWrittenByUs tells whether an annotation is one that the service controller writes.
func IsWrittenByUs(annotation string) bool { return slices.Contains(ownAnnotations, annotation) }

// Parse validates a Service that [IsOurs]. names is the operator's configuration. The error is always a *Problem, the first
// in the order in which a user would mend them.
func Parse(svc *corev1.Service, names Names) (Spec, error) {
	a := svc.Annotations
	spec := Spec{PublishNotReady: svc.Spec.PublishNotReadyAddresses}
	if v, set := a[Enabled]; v != "true" && v != "false" && (set || !HasClass(svc)) {
		return Spec{}, wrong(Enabled, v, `"true" or "false"`)
	}
	for _, k := range sortedKeys(a) {
		if strings.HasPrefix(k, Prefix) && !slices.Contains(userAnnotations, k) && !slices.Contains(ownAnnotations, k) {
			return Spec{}, &Problem{ReasonInvalidAnnotation, fmt.Sprintf("annotation %s is not known; known are %s", quote(k), strings.Join(userAnnotations, ", "))}
		}
	}
	for _, f := range []struct {
		annotation string
		into       *string
		allowed    []string // the first is the default
	}{
		{Type, &spec.SocketType, []string{TypeHTTP, TypeHTTPS, TypeTCP, TypeTLS}},
		{RolloutMode, &spec.Rollout, []string{RolloutAuto, RolloutNever}},
		{DeletionPolicy, &spec.DeletionPolicy, []string{PolicyDelete, PolicyRetain}},
	} {
		v, set := a[f.annotation]
		if !set {
			v = f.allowed[0]
		}
		if !slices.Contains(f.allowed, v) {
			return Spec{}, wrong(f.annotation, v, strings.Join(f.allowed, ", "))
		}
		*f.into = v
	}
	var err error
	if spec.SocketName, err = names.Of(svc); err != nil {
		return Spec{}, err
	}
	if err := spec.parseSettings(a); err != nil {
		return Spec{}, err
	}
	spec.Connections = 1
	if v, set := a[Connections]; set {
		// Only the plain digit, so that there is one way to write it.
		if len(v) != 1 || v[0] < '1' || v[0] > '0'+MaxConnections {
			return Spec{}, wrong(Connections, v, fmt.Sprintf("1 to %d", MaxConnections))
		}
		spec.Connections = int(v[0] - '0')
	}
	if v, set := a[ProxyProtocol]; set {
		if v != ProxyV1 && v != ProxyV2 {
			return Spec{}, wrong(ProxyProtocol, v, ProxyV1+", "+ProxyV2)
		}
		spec.ProxyProtocol = v
	}
	if svc.Spec.Type == corev1.ServiceTypeExternalName {
		return Spec{}, &Problem{ReasonNoSelector, "a Service of type ExternalName has no pods of its own and can't be made public; use a Service with a selector"}
	}
	if len(svc.Spec.Selector) == 0 {
		return Spec{}, &Problem{ReasonNoSelector, "the Service has no selector, so there are no pods to put a tunnel into; set spec.selector"}
	}
	port, err := servicePort(svc)
	if err != nil {
		return Spec{}, err
	}
	spec.ServicePort = port
	return spec, nil
}

func servicePort(svc *corev1.Service) (corev1.ServicePort, error) {
	want, set := svc.Annotations[Port]
	var have []string
	for _, p := range svc.Spec.Ports {
		if p.Protocol != "" && p.Protocol != corev1.ProtocolTCP {
			continue // another port of the same number may be TCP
		}
		name := strconv.Itoa(int(p.Port))
		if p.Name != "" {
			name += " (" + p.Name + ")"
		}
		have = append(have, name)
		if !set || (p.Name != "" && want == p.Name) || want == strconv.Itoa(int(p.Port)) {
			return p, nil
		}
	}
	if len(have) == 0 {
		return corev1.ServicePort{}, &Problem{ReasonPortNotFound, "the Service has no TCP port; only TCP can be made public"}
	}
	const most = 10 // a Service may have hundreds, and the message goes into a condition and an Event
	if more := len(have) - most; more > 0 {
		have = append(have[:most], fmt.Sprintf("and %d more", more))
	}
	return corev1.ServicePort{}, &Problem{ReasonPortNotFound,
		fmt.Sprintf("annotation %s: the Service has no TCP port %s; it has %s", Port, quote(want), strings.Join(have, ", "))}
}

// Selects tells whether the Service selects a pod with these labels. A Service without a selector selects none.
func Selects(svc *corev1.Service, podLabels map[string]string) bool {
	for key, value := range svc.Spec.Selector {
		if got, ok := podLabels[key]; !ok || got != value {
			return false
		}
	}
	return len(svc.Spec.Selector) > 0
}

// TargetPort returns the port in the pod that the Service's port leads to, as kube-proxy would have it. A named
// target that no container of the pod has is a *Problem.
func TargetPort(port corev1.ServicePort, pod *corev1.PodSpec) (int32, error) {
	if port.TargetPort.StrVal == "" {
		if port.TargetPort.IntVal != 0 {
			return port.TargetPort.IntVal, nil
		}
		return port.Port, nil
	}
	name := port.TargetPort.StrVal
	for _, c := range slices.Concat(pod.Containers, restartable(pod.InitContainers)) {
		for _, p := range c.Ports {
			if p.Name == name && (p.Protocol == corev1.ProtocolTCP || p.Protocol == "") {
				return p.ContainerPort, nil
			}
		}
	}
	return 0, &Problem{ReasonPortNotFound, fmt.Sprintf("port %d of the Service has the target port %s, and no container of the pod has a port of that name", port.Port, quote(name))}
}

func restartable(init []corev1.Container) []corev1.Container {
	return slices.DeleteFunc(slices.Clone(init), func(c corev1.Container) bool {
		return !IsNativeSidecar(&c)
	})
}

// IsNativeSidecar tells whether an init container runs beside the others for the life of the pod.
func IsNativeSidecar(init *corev1.Container) bool {
	return init.RestartPolicy != nil && *init.RestartPolicy == corev1.ContainerRestartPolicyAlways
}

func wrong(annotation, value, allowed string) *Problem {
	return &Problem{ReasonInvalidAnnotation, fmt.Sprintf("annotation %s has the value %s; allowed: %s", annotation, quote(value), allowed)}
}

// quote quotes what a stranger wrote, at a length that fits a condition.
func quote(s string) string {
	const most = 64
	if len(s) > most {
		s = strings.ToValidUTF8(s[:most], "") + "..."
	}
	return strconv.Quote(s)
}

func sortedKeys(m map[string]string) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
