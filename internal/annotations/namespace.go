package annotations

import (
	"fmt"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// NeverInjected tells whether the webhook configuration leaves a namespace out, whatever its labels say: the control
// plane's own, and the cluster's.
func NeverInjected(namespace, own string) bool {
	return namespace == own || namespace == metav1.NamespaceSystem
}

// InjectionEnabled tells whether pods of a namespace are injected. own is the control plane's namespace.
func InjectionEnabled(ns *corev1.Namespace, own string) bool {
	return !NeverInjected(ns.Name, own) && ns.Labels[NamespaceInjection] == NamespaceInjectionEnabled
}

// NotLabelled says that a namespace lacks the label, and what to do.
func NotLabelled(namespace string) string {
	return fmt.Sprintf("namespace %s is not labelled for injection; run: kubectl label namespace %s %s=%s",
		namespace, namespace, NamespaceInjection, NamespaceInjectionEnabled)
}
