package annotations

import (
	"fmt"
	"regexp"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
)

// Setting is a group of a socket's settings that is asked for, applied and taken back together. Its name stands in the
// annotation Applied.
type Setting string

// The settings. Those that keep visitors out are guards: a Service that asks for one serves nothing until it is in force.
const (
	// Access is who may come in: allowed e-mail addresses and domains. A guard.
	Access Setting = "access"
	// Protection is the username and password that visitors must know. A guard.
	Protection Setting = "protection"
	// Upstream is how the edge speaks to the app.
	Upstream Setting = "upstream"
	// Retain is that the socket itself says that it is to be kept when the Service goes. Nothing has to be done then.
	Retain Setting = "retain"
)

// ending marks a setting in Applied that is being taken back: still ours, and nothing to rely on any more.
const ending = "-ending"

// Asked returns the settings that the Service asks for.
func (s Spec) Asked() []Setting {
	var out []Setting
	if s.AllowedEmails != "" || s.AllowedDomains != "" {
		out = append(out, Access)
	}
	if s.ProtectedSecret != "" {
		out = append(out, Protection)
	}
	if s.UpstreamType != "" || s.UpstreamHostname != "" {
		out = append(out, Upstream)
	}
	return out
}

// guards are the settings that keep visitors out.
var guards = []Setting{Access, Protection}

// Guards returns the settings that keep visitors out.
func Guards() []Setting { return slices.Clone(guards) }

// Guarded tells whether every guard that the Service asks for is in force at the edge, as far as the service controller
// has noted on it. Until then no pod may serve it.
func (s Spec) Guarded(svc *corev1.Service) bool {
	applied := AppliedOf(svc)
	return !slices.ContainsFunc(s.Asked(), func(g Setting) bool { return slices.Contains(guards, g) && !applied.InForce(g) })
}

// AppliedSettings is what the annotation Applied says: which settings of its socket come from the Service, so that they
// can be taken back when it asks for them no more, and those that somebody made at the edge are left alone.
type AppliedSettings []string

// AppliedOf reads the annotation.
func AppliedOf(svc *corev1.Service) AppliedSettings {
	if svc.Annotations[Applied] == "" {
		return nil
	}
	return strings.Split(svc.Annotations[Applied], ",")
}

// InForce tells whether a setting is in force at the edge.
func (a AppliedSettings) InForce(s Setting) bool { return slices.Contains(a, string(s)) }

// Ours tells whether a setting of the socket comes from the Service.
func (a AppliedSettings) Ours(s Setting) bool {
	return a.InForce(s) || slices.Contains(a, string(s)+ending)
}

// Ending returns the value of the annotation in which a setting is marked as being taken back.
func (a AppliedSettings) Ending(s Setting) AppliedSettings {
	out := slices.Clone(a)
	for i := range out {
		if out[i] == string(s) {
			out[i] += ending
		}
	}
	return out
}

// Without returns the value of the annotation in which a setting is not in force.
func (a AppliedSettings) Without(s Setting) AppliedSettings {
	return slices.DeleteFunc(slices.Clone(a), func(applied string) bool { return applied == string(s) })
}

// String is the value of the annotation.
func (a AppliedSettings) String() string { return strings.Join(a, ",") }

// AppliedValue is the value of the annotation when these settings are in force.
func AppliedValue(settings []Setting) string {
	var out AppliedSettings
	for _, s := range settings {
		out = append(out, string(s))
	}
	return out.String()
}

const (
	// maxAllowed bounds a list of addresses or domains.
	maxAllowed = 100
	maxDomain  = 253
)

var (
	localPart = regexp.MustCompile("^[A-Za-z0-9.!#$%&'*+/=?^_{|}~-]{1,64}$")
	domain    = regexp.MustCompile(`^([A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)*[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?$`)
	// secretName is what Kubernetes allows: a DNS subdomain.
	secretName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*$`)
	port       = regexp.MustCompile(`^:([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])$`)
)

// parseSettings reads the annotations that become settings of the socket.
func (s *Spec) parseSettings(a map[string]string) error {
	if v, set := a[ProtectedSecret]; set {
		if len(v) > maxDomain || !secretName.MatchString(v) {
			return wrong(ProtectedSecret, v, "the name of a Secret in the Service's namespace")
		}
		s.ProtectedSecret = v
	}
	if v, set := a[UpstreamType]; set {
		if v != TypeHTTP && v != TypeHTTPS {
			return wrong(UpstreamType, v, TypeHTTP+", "+TypeHTTPS)
		}
		s.UpstreamType = v
	}
	if v, set := a[UpstreamHTTPHostname]; set {
		name, suffix := v, ""
		if i := strings.LastIndexByte(v, ':'); i >= 0 {
			name, suffix = v[:i], v[i:]
		}
		if !isDomain(name) || suffix != "" && !port.MatchString(suffix) {
			return wrong(UpstreamHTTPHostname, v, "a host name such as shop.example.com, with :port if need be")
		}
		s.UpstreamHostname = v
	}
	for _, k := range []string{UpstreamType, UpstreamHTTPHostname} {
		if _, set := a[k]; set && s.SocketType != TypeHTTP && s.SocketType != TypeHTTPS {
			return &Problem{ReasonInvalidAnnotation, fmt.Sprintf("annotation %s is for sockets of the types http and https; this one is %s (annotation %s)", k, s.SocketType, Type)}
		}
	}
	for _, l := range []struct {
		annotation, what string
		into             *string
		valid            func(string) bool
	}{
		{AllowedEmails, "e-mail addresses", &s.AllowedEmails, isEmail},
		{AllowedEmailDomains, "domains such as example.com", &s.AllowedDomains, isDomain},
	} {
		v, set := a[l.annotation]
		if !set {
			continue
		}
		list := strings.Split(v, ",")
		if len(list) > maxAllowed {
			return &Problem{ReasonInvalidAnnotation, fmt.Sprintf("annotation %s has %d entries; allowed are %d", l.annotation, len(list), maxAllowed)}
		}
		for i := range list {
			list[i] = strings.TrimSpace(list[i])
			if !l.valid(list[i]) {
				return &Problem{ReasonInvalidAnnotation, fmt.Sprintf("annotation %s has the entry %s; allowed: %s, separated by commas", l.annotation, quote(list[i]), l.what)}
			}
		}
		slices.Sort(list)
		*l.into = strings.Join(slices.Compact(list), ",")
	}
	return nil
}

func isDomain(s string) bool { return len(s) <= maxDomain && domain.MatchString(s) }

func isEmail(s string) bool {
	local, of, found := strings.Cut(s, "@")
	return found && localPart.MatchString(local) && isDomain(of)
}
