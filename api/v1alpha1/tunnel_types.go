package v1alpha1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// Tunnel is one connection of a replica to the edge. The gateway makes it when a sidecar registers; its owner is the pod, so
// that it goes when the pod goes, by whatever way, and its finalizer then deletes the tunnel at Mysocket.
// Nobody needs to write one by hand.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:categories=mysocket
// +kubebuilder:printcolumn:name="Pod",type=string,JSONPath=`.spec.podName`
// +kubebuilder:printcolumn:name="Service",type=string,JSONPath=`.spec.serviceName`
// +kubebuilder:printcolumn:name="Socket",type=string,JSONPath=`.spec.socketName`
// +kubebuilder:printcolumn:name="State",type=string,JSONPath=`.status.state`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:printcolumn:name="Message",type=string,priority=1,JSONPath=`.status.message`
// +kubebuilder:printcolumn:name="Connection",type=integer,priority=1,JSONPath=`.spec.connection`
// +kubebuilder:printcolumn:name="Tunnel",type=string,priority=1,JSONPath=`.status.tunnelID`
type Tunnel struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec   TunnelSpec   `json:"spec"`
	Status TunnelStatus `json:"status,omitempty"`
}

// TunnelSpec says whose tunnel it is. It never changes.
//
// +kubebuilder:validation:XValidation:rule="self == oldSelf",message="a Tunnel's spec can't change"
type TunnelSpec struct {
	// PodName is the replica that serves the tunnel, a pod in the same namespace.
	// +kubebuilder:validation:MinLength=1
	PodName string `json:"podName"`
	// ServiceName is the Service that asked for the socket, in the same namespace.
	// +kubebuilder:validation:MinLength=1
	ServiceName string `json:"serviceName"`
	// SocketID is the Mysocket id of the socket.
	// +kubebuilder:validation:MinLength=1
	SocketID string `json:"socketID"`
	// SocketName is the name of the socket at Mysocket.
	SocketName string `json:"socketName"`
	// Connection is the number of the connection, from 0, when the Service asks for several for each pod.
	// +optional
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=3
	Connection int32 `json:"connection,omitempty"`
}

// TunnelStatus is what is known of the tunnel.
type TunnelStatus struct {
	// TunnelID is the Mysocket id of the tunnel; empty until it has been made there.
	// +optional
	TunnelID string `json:"tunnelID,omitempty"`
	// LocalPort is the port that the sidecar asks the edge to forward.
	// +optional
	LocalPort int32 `json:"localPort,omitempty"`
	// State is where the sidecar is: WaitingForApp, Registering, Connecting, Connected or Draining.
	// +optional
	State string `json:"state,omitempty"`
	// Message is one sentence on what keeps the tunnel from being connected; empty when all is well.
	// +optional
	Message string `json:"message,omitempty"`
	// LastTransitionTime is when State changed last.
	// +optional
	LastTransitionTime *metav1.Time `json:"lastTransitionTime,omitempty"`
}

// TunnelList is a list of Tunnels.
//
// +kubebuilder:object:root=true
type TunnelList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []Tunnel `json:"items"`
}
