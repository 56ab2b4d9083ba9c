package annotations

import (
	"errors"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/utils/ptr"
)

// service is an enabled Service shop/web with the ports 80 (http) and 9000 (admin).
func service(changes ...func(*corev1.Service)) *corev1.Service {
	svc := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "web", Annotations: map[string]string{Enabled: "true"}},
		Spec: corev1.ServiceSpec{
			Selector: map[string]string{"app": "web"},
			Ports: []corev1.ServicePort{
				{Name: "http", Port: 80, TargetPort: intstr.FromString("web"), Protocol: corev1.ProtocolTCP},
				{Name: "admin", Port: 9000},
			},
		},
	}
	for _, change := range changes {
		change(svc)
	}
	return svc
}

func with(annotation, value string) func(*corev1.Service) {
	return func(svc *corev1.Service) { svc.Annotations[annotation] = value }
}

func ports(list ...corev1.ServicePort) func(*corev1.Service) {
	return func(svc *corev1.Service) { svc.Spec.Ports = list }
}

func TestParseFillsInDefaults(t *testing.T) {
	got, err := Parse(service(), Names{})
	if err != nil {
		t.Fatal(err)
	}
	want := Spec{
		SocketName: "k8s shop.web", SocketType: TypeHTTP, Rollout: RolloutAuto, DeletionPolicy: PolicyDelete, Connections: 1,
		ServicePort: service().Spec.Ports[0],
	}
	if got != want {
		t.Errorf("got %+v\nwant %+v", got, want)
	}
}

func TestParseTakesWhatIsAsked(t *testing.T) {
	svc := service(with(Type, "tcp"), with(Port, "admin"), with(Connections, "4"), with(ProxyProtocol, "v2"), with(RolloutMode, "never"), with(DeletionPolicy, "retain"),
		with(SocketID, "an id"), with(DNSName, "a name"), with(URL, "a URL"),
		func(svc *corev1.Service) { svc.Spec.PublishNotReadyAddresses = true })
	got, err := Parse(svc, Names{Cluster: "north"})
	if err != nil {
		t.Fatal(err)
	}
	want := Spec{
		SocketName: "k8s north shop.web", SocketType: TypeTCP, Connections: 4, ProxyProtocol: ProxyV2, Rollout: RolloutNever, DeletionPolicy: PolicyRetain,
		ServicePort: svc.Spec.Ports[1], PublishNotReady: true,
	}
	if got != want {
		t.Errorf("got %+v\nwant %+v", got, want)
	}
}

func TestParseAcceptsEveryAllowedValue(t *testing.T) {
	for annotation, values := range map[string][]string{
		Enabled:        {"true", "false"},
		Type:           {"http", "https", "tcp", "tls"},
		Port:           {"http", "80", "admin", "9000"},
		Connections:    {"1", "2", "3", "4"},
		ProxyProtocol:  {"v1", "v2"},
		RolloutMode:    {"auto", "never"},
		DeletionPolicy: {"delete", "retain"},
	} {
		for _, value := range values {
			if _, err := Parse(service(with(annotation, value)), Names{}); err != nil {
				t.Errorf("%s=%s: %v", annotation, value, err)
			}
		}
	}
}

// known is what a sentence about an unknown annotation ends with.
const known = "mysocket.io/enabled, mysocket.io/type, mysocket.io/port, mysocket.io/socket-name, mysocket.io/protected-secret, mysocket.io/allowed-emails, mysocket.io/allowed-email-domains, " +
	"mysocket.io/upstream-type, mysocket.io/upstream-http-hostname, mysocket.io/connections, mysocket.io/proxy-protocol, mysocket.io/rollout, mysocket.io/deletion-policy"

func TestParseSaysWhatIsWrong(t *testing.T) {
	for _, tc := range []struct {
		name            string
		svc             *corev1.Service
		reason, message string
	}{
		{"enabled is another word", service(with(Enabled, "yes")), ReasonInvalidAnnotation,
			`annotation mysocket.io/enabled has the value "yes"; allowed: "true" or "false"`},
		{"enabled in capitals", service(with(Enabled, "True")), ReasonInvalidAnnotation,
			`annotation mysocket.io/enabled has the value "True"; allowed: "true" or "false"`},
		{"enabled is empty", service(with(Enabled, "")), ReasonInvalidAnnotation,
			`annotation mysocket.io/enabled has the value ""; allowed: "true" or "false"`},
		{"unknown annotation", service(with(Prefix+"prot", "80")), ReasonInvalidAnnotation,
			`annotation "mysocket.io/prot" is not known; known are ` + known},
		{"the first unknown one in order", service(with(Prefix+"z", ""), with(Prefix+"a", "")), ReasonInvalidAnnotation,
			`annotation "mysocket.io/a" is not known; known are ` + known},
		{"an annotation of pods", service(with(PodInjected, "x")), ReasonInvalidAnnotation,
			`annotation "mysocket.io/injected" is not known; known are ` + known},
		{"type", service(with(Type, "udp")), ReasonInvalidAnnotation,
			`annotation mysocket.io/type has the value "udp"; allowed: http, https, tcp, tls`},
		{"type is empty", service(with(Type, "")), ReasonInvalidAnnotation,
			`annotation mysocket.io/type has the value ""; allowed: http, https, tcp, tls`},
		{"type is long", service(with(Type, strings.Repeat("x", 1000))), ReasonInvalidAnnotation,
			`annotation mysocket.io/type has the value "` + strings.Repeat("x", 64) + `..."; allowed: http, https, tcp, tls`},
		{"type is cut inside a letter", service(with(Type, strings.Repeat("x", 63)+"éé")), ReasonInvalidAnnotation,
			`annotation mysocket.io/type has the value "` + strings.Repeat("x", 63) + `..."; allowed: http, https, tcp, tls`},
		{"type with a line break", service(with(Type, "http\nx")), ReasonInvalidAnnotation,
			`annotation mysocket.io/type has the value "http\nx"; allowed: http, https, tcp, tls`},
		{"no connections", service(with(Connections, "0")), ReasonInvalidAnnotation,
			`annotation mysocket.io/connections has the value "0"; allowed: 1 to 4`},
		{"too many connections", service(with(Connections, "5")), ReasonInvalidAnnotation,
			`annotation mysocket.io/connections has the value "5"; allowed: 1 to 4`},
		{"connections with a zero in front", service(with(Connections, "02")), ReasonInvalidAnnotation,
			`annotation mysocket.io/connections has the value "02"; allowed: 1 to 4`},
		{"connections in words", service(with(Connections, "")), ReasonInvalidAnnotation,
			`annotation mysocket.io/connections has the value ""; allowed: 1 to 4`},
		{"PROXY protocol by another name", service(with(ProxyProtocol, "2")), ReasonInvalidAnnotation,
			`annotation mysocket.io/proxy-protocol has the value "2"; allowed: v1, v2`},
		{"PROXY protocol is empty", service(with(ProxyProtocol, "")), ReasonInvalidAnnotation,
			`annotation mysocket.io/proxy-protocol has the value ""; allowed: v1, v2`},
		{"rollout", service(with(RolloutMode, "off")), ReasonInvalidAnnotation,
			`annotation mysocket.io/rollout has the value "off"; allowed: auto, never`},
		{"deletion policy", service(with(DeletionPolicy, "keep")), ReasonInvalidAnnotation,
			`annotation mysocket.io/deletion-policy has the value "keep"; allowed: delete, retain`},
		{"ExternalName", service(func(svc *corev1.Service) { svc.Spec.Type = corev1.ServiceTypeExternalName }), ReasonNoSelector,
			"a Service of type ExternalName has no pods of its own and can't be made public; use a Service with a selector"},
		{"no selector", service(func(svc *corev1.Service) { svc.Spec.Selector = nil }), ReasonNoSelector,
			"the Service has no selector, so there are no pods to put a tunnel into; set spec.selector"},
		{"port by a number that is not there", service(with(Port, "8080")), ReasonPortNotFound,
			`annotation mysocket.io/port: the Service has no TCP port "8080"; it has 80 (http), 9000 (admin)`},
		{"port by a name that is not there", service(with(Port, "web")), ReasonPortNotFound,
			`annotation mysocket.io/port: the Service has no TCP port "web"; it has 80 (http), 9000 (admin)`},
		{"port is empty", service(with(Port, ""), ports(corev1.ServicePort{Port: 80})), ReasonPortNotFound,
			`annotation mysocket.io/port: the Service has no TCP port ""; it has 80`},
		{"port with a sign", service(with(Port, "+80")), ReasonPortNotFound,
			`annotation mysocket.io/port: the Service has no TCP port "+80"; it has 80 (http), 9000 (admin)`},
		{"port of a Service with many", service(with(Port, "1"), ports(slices.Repeat([]corev1.ServicePort{{Port: 80}}, 200)...)), ReasonPortNotFound,
			`annotation mysocket.io/port: the Service has no TCP port "1"; it has ` + strings.Repeat("80, ", 10) + "and 190 more"},
		{"no ports at all", service(ports()), ReasonPortNotFound, "the Service has no TCP port; only TCP can be made public"},
		{"only UDP", service(ports(corev1.ServicePort{Port: 53, Protocol: corev1.ProtocolUDP})), ReasonPortNotFound,
			"the Service has no TCP port; only TCP can be made public"},
		{"the UDP port by its number", service(with(Port, "53"), ports(corev1.ServicePort{Port: 53, Protocol: corev1.ProtocolUDP}, corev1.ServicePort{Port: 80})), ReasonPortNotFound,
			`annotation mysocket.io/port: the Service has no TCP port "53"; it has 80`},
		{"what to mend first: enabled before the rest", service(with(Enabled, "x"), with(Type, "x"), ports()), ReasonInvalidAnnotation,
			`annotation mysocket.io/enabled has the value "x"; allowed: "true" or "false"`},
		{"what to mend first: the selector before the port", service(with(Port, "x"), func(svc *corev1.Service) { svc.Spec.Selector = nil }), ReasonNoSelector,
			"the Service has no selector, so there are no pods to put a tunnel into; set spec.selector"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			spec, err := Parse(tc.svc, Names{})
			var p *Problem
			if !errors.As(err, &p) {
				t.Fatalf("got %v, want a *Problem", err)
			}
			if p.Reason != tc.reason || p.Message != tc.message || p.Error() != p.Message {
				t.Errorf("got  %s: %s\nwant %s: %s", p.Reason, p.Message, tc.reason, tc.message)
			}
			if spec != (Spec{}) {
				t.Errorf("a Spec besides the problem: %+v", spec)
			}
		})
	}
}

func TestParseFindsTheTCPPort(t *testing.T) {
	udp := corev1.ServicePort{Name: "dns", Port: 53, Protocol: corev1.ProtocolUDP}
	tcp := corev1.ServicePort{Name: "dns-tcp", Port: 53, Protocol: corev1.ProtocolTCP}
	for name, svc := range map[string]*corev1.Service{
		"the first TCP one":             service(ports(udp, tcp)),
		"of a number that UDP has, too": service(ports(udp, tcp), with(Port, "53")),
		"by name":                       service(ports(udp, tcp), with(Port, "dns-tcp")),
	} {
		if got, err := Parse(svc, Names{}); err != nil || got.ServicePort != tcp {
			t.Errorf("%s: got %+v, %v", name, got.ServicePort, err)
		}
	}
}

func TestIsEnabledAndIsOurs(t *testing.T) {
	for value, want := range map[string]bool{"true": true, "false": false, "": false, "True": false, "1": false} {
		svc := service(with(Enabled, value))
		if IsEnabled(svc) != want || !IsOurs(svc) {
			t.Errorf("%q: IsEnabled %v, IsOurs %v", value, IsEnabled(svc), IsOurs(svc))
		}
	}
	class := func(class *string, kind corev1.ServiceType) func(*corev1.Service) {
		return func(svc *corev1.Service) {
			delete(svc.Annotations, Enabled)
			svc.Spec.Type, svc.Spec.LoadBalancerClass = kind, class
		}
	}
	for name, tc := range map[string]struct {
		svc           *corev1.Service
		enabled, ours bool
	}{
		"our class":                            {service(class(ptr.To(LoadBalancerClass), corev1.ServiceTypeLoadBalancer)), true, true},
		"our class, no annotations at all":     {service(class(ptr.To(LoadBalancerClass), corev1.ServiceTypeLoadBalancer), func(svc *corev1.Service) { svc.Annotations = nil }), true, true},
		"our class, and switched off":          {service(class(ptr.To(LoadBalancerClass), corev1.ServiceTypeLoadBalancer), with(Enabled, "false")), false, true},
		"our class, and an unclear word":       {service(class(ptr.To(LoadBalancerClass), corev1.ServiceTypeLoadBalancer), with(Enabled, "yes")), false, true},
		"another class":                        {service(class(ptr.To("example.com/lb"), corev1.ServiceTypeLoadBalancer)), false, false},
		"another class, and annotated":         {service(class(ptr.To("example.com/lb"), corev1.ServiceTypeLoadBalancer), with(Enabled, "true")), true, true},
		"no class":                             {service(class(nil, corev1.ServiceTypeLoadBalancer)), false, false},
		"our class on what is no LoadBalancer": {service(class(ptr.To(LoadBalancerClass), corev1.ServiceTypeClusterIP)), false, false},
	} {
		if IsEnabled(tc.svc) != tc.enabled || IsOurs(tc.svc) != tc.ours {
			t.Errorf("%s: IsEnabled %v, IsOurs %v", name, IsEnabled(tc.svc), IsOurs(tc.svc))
		}
		if _, err := Parse(tc.svc, Names{}); tc.enabled && err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, svc := range map[string]*corev1.Service{
		"no annotations":     {},
		"another of ours":    service(func(svc *corev1.Service) { svc.Annotations = map[string]string{Type: "http"} }),
		"of somebody else's": service(func(svc *corev1.Service) { svc.Annotations = map[string]string{"example.com/enabled": "true"} }),
	} {
		if IsEnabled(svc) || IsOurs(svc) {
			t.Errorf("%s: IsEnabled %v, IsOurs %v", name, IsEnabled(svc), IsOurs(svc))
		}
	}
}

// TestSocketNamesAreOneToOne is what keeps one Service from taking another's socket: authorization compares names.
func TestSocketNamesAreOneToOne(t *testing.T) {
	seen := map[string][3]string{}
	for _, k := range [][3]string{
		{"", "shop", "web"}, {"north", "shop", "web"}, {"shop", "web", "web"}, {"", "north", "web"}, {"north", "web", "shop"},
	} {
		name := DefaultSocketName(k[0], k[1], k[2])
		if other, ok := seen[name]; ok {
			t.Errorf("%v and %v are both %q", other, k, name)
		}
		seen[name] = k
	}
}

func TestSelects(t *testing.T) {
	pod := map[string]string{"app": "web", "tier": "front"}
	for _, tc := range []struct {
		name     string
		selector map[string]string
		want     bool
	}{
		{"one label", map[string]string{"app": "web"}, true},
		{"all labels", map[string]string{"app": "web", "tier": "front"}, true},
		{"one of two differs", map[string]string{"app": "web", "tier": "back"}, false},
		{"a label that is missing", map[string]string{"zone": "a"}, false},
		{"a missing label is not an empty one", map[string]string{"zone": ""}, false},
		{"nil selects none", nil, false},
		{"empty selects none", map[string]string{}, false},
	} {
		svc := service(func(svc *corev1.Service) { svc.Spec.Selector = tc.selector })
		if got := Selects(svc, pod); got != tc.want {
			t.Errorf("%s: %v", tc.name, got)
		}
	}
}

func TestTargetPort(t *testing.T) {
	always := ptr.To(corev1.ContainerRestartPolicyAlways)
	pod := &corev1.PodSpec{
		InitContainers: []corev1.Container{
			{Name: "setup", Ports: []corev1.ContainerPort{{Name: "setup", ContainerPort: 1}}},
			{Name: "proxy", RestartPolicy: always, Ports: []corev1.ContainerPort{{Name: "proxy", ContainerPort: 15000}, {Name: "web", ContainerPort: 15001}}},
		},
		Containers: []corev1.Container{
			{Name: "app", Ports: []corev1.ContainerPort{{Name: "quic", ContainerPort: 8443, Protocol: corev1.ProtocolUDP}, {Name: "web", ContainerPort: 8080, Protocol: corev1.ProtocolTCP}}},
			{Name: "second", Ports: []corev1.ContainerPort{{Name: "web", ContainerPort: 9090}, {Name: "quic", ContainerPort: 8444}}},
		},
	}
	for _, tc := range []struct {
		name   string
		target intstr.IntOrString
		want   int32
	}{
		{"none is the port itself", intstr.IntOrString{}, 80},
		{"a number", intstr.FromInt32(3000), 3000},
		{"a name: the first container that has it, before init containers", intstr.FromString("web"), 8080},
		{"a name that UDP has, too", intstr.FromString("quic"), 8444},
		{"a name in a native sidecar", intstr.FromString("proxy"), 15000},
	} {
		got, err := TargetPort(corev1.ServicePort{Port: 80, TargetPort: tc.target}, pod)
		if err != nil || got != tc.want {
			t.Errorf("%s: got %d, %v; want %d", tc.name, got, err, tc.want)
		}
	}
	for _, name := range []string{"setup", "nowhere"} {
		_, err := TargetPort(corev1.ServicePort{Port: 80, TargetPort: intstr.FromString(name)}, pod)
		var p *Problem
		want := `port 80 of the Service has the target port "` + name + `", and no container of the pod has a port of that name`
		if !errors.As(err, &p) || p.Reason != ReasonPortNotFound || p.Message != want {
			t.Errorf("%s: got %v", name, err)
		}
	}
	if len(pod.InitContainers) != 2 || pod.InitContainers[0].Name != "setup" {
		t.Error("TargetPort changed the pod")
	}
}

func FuzzParse(f *testing.F) {
	f.Add("true", "http", "80", "1", "v1", "auto", "delete", "", "app", "http", int32(80), "TCP", "")
	f.Add("false", "tls", "http", "4", "v2", "never", "retain", "north", "", "", int32(0), "UDP", "ExternalName")
	f.Add("yes", "\xff\xfe", "\x00", "9", "v3", "", strings.Repeat("é", 200), " ", "app", "http", int32(-1), "SCTP", "ClusterIP")
	f.Fuzz(func(t *testing.T, enabled, kind, port, connections, proxy, rollout, policy, cluster, selector, portName string, number int32, protocol, serviceType string) {
		svc := service(with(Enabled, enabled), with(Type, kind), with(Port, port), with(Connections, connections), with(ProxyProtocol, proxy), with(RolloutMode, rollout), with(DeletionPolicy, policy),
			ports(corev1.ServicePort{Name: portName, Port: number, Protocol: corev1.Protocol(protocol)}))
		svc.Spec.Type = corev1.ServiceType(serviceType)
		svc.Spec.Selector = map[string]string{}
		if selector != "" {
			svc.Spec.Selector[selector] = "x"
		}
		spec, err := Parse(svc, Names{Cluster: cluster})
		if err != nil {
			p, ok := err.(*Problem) //nolint:errorlint // never wrapped: that is the promise
			if !ok || p.Message == "" || !slices.Contains([]string{ReasonInvalidAnnotation, ReasonPortNotFound, ReasonNoSelector}, p.Reason) {
				t.Fatalf("error %#v", err)
			}
			return
		}
		if !slices.Contains([]string{TypeHTTP, TypeHTTPS, TypeTCP, TypeTLS}, spec.SocketType) ||
			!slices.Contains([]string{RolloutAuto, RolloutNever}, spec.Rollout) ||
			!slices.Contains([]string{PolicyDelete, PolicyRetain}, spec.DeletionPolicy) ||
			spec.Connections < 1 || spec.Connections > MaxConnections || spec.ProxyProtocol != proxy || !slices.Contains([]string{ProxyV1, ProxyV2}, proxy) ||
			spec.ServicePort != svc.Spec.Ports[0] || protocol != "" && protocol != "TCP" ||
			selector == "" || spec.SocketName != DefaultSocketName(cluster, "shop", "web") {
			t.Fatalf("accepted %+v of %+v", spec, svc)
		}
	})
}
