package annotations

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
)

// Names decides what the sockets of Services are called. It is the operator's, and the zero value is right for a cluster
// without a name whose Services may not ask for names.
type Names struct {
	// Cluster is part of every name that is made of a Service's own; may be empty.
	Cluster string
	// Allowed lists the names that Services may ask for with the annotation SocketName, each with the namespaces that may. A
	// name stands for traffic: whoever may use it gets a part of it.
	Allowed map[string][]string
}

// made starts the names that we make, at either dialect of the API.
const made = "k8s"

var namePattern = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

// CheckSocketName tells what is wrong with a name for the annotation SocketName; nil if nothing. What is allowed is the
// same name at both dialects of the API, and is never one that we make of a Service's own.
func CheckSocketName(name string) error {
	switch {
	case !namePattern.MatchString(name):
		return fmt.Errorf("socket name %s: allowed are up to 63 small letters, digits and dashes, beginning and ending with a letter or digit", quote(name))
	case strings.Contains(name, "--"):
		return fmt.Errorf("socket name %s: two dashes side by side are not allowed", quote(name))
	case name == made || strings.HasPrefix(name, made+"-"):
		return fmt.Errorf("socket name %s: %s and what begins with %s- are names that are made for Services", quote(name), made, made)
	}
	return nil
}

// DefaultSocketName returns the name of the socket of a Service that asks for none. cluster may be empty.
func DefaultSocketName(cluster, namespace, name string) string {
	if cluster != "" {
		cluster += " "
	}
	return made + " " + cluster + namespace + "." + name
}

// Of returns the name of a Service's socket. The error, always a *Problem, says that the Service may not have the name
// that it asks for.
func (n Names) Of(svc *corev1.Service) (string, error) {
	name, set := svc.Annotations[SocketName]
	if !set {
		return DefaultSocketName(n.Cluster, svc.Namespace, svc.Name), nil
	}
	if slices.Contains(n.Allowed[name], svc.Namespace) {
		return name, nil
	}
	allowed := []string{}
	for _, other := range slices.Sorted(maps.Keys(n.Allowed)) {
		if slices.Contains(n.Allowed[other], svc.Namespace) {
			allowed = append(allowed, other)
		}
	}
	what := "none; whoever runs mysocket-injector lists names and their namespaces in the chart's value socketNames"
	if len(allowed) > 0 {
		what = strings.Join(allowed, ", ")
	}
	return "", wrong(SocketName, name, fmt.Sprintf("in namespace %s %s", svc.Namespace, what))
}
