// Package v1alpha1 holds the project's own Kubernetes types, group mysocket.io. It must import nothing of the project.
//
// +kubebuilder:object:generate=true
// +groupName=mysocket.io
package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// GroupVersion is the group and version of every type in this package.
var GroupVersion = schema.GroupVersion{Group: "mysocket.io", Version: "v1alpha1"}

// AddToScheme adds the types of this package to a scheme.
func AddToScheme(s *runtime.Scheme) error {
	s.AddKnownTypes(GroupVersion, &Tunnel{}, &TunnelList{})
	metav1.AddToGroupVersion(s, GroupVersion)
	return nil
}
