// Package gatewayapi holds the messages that a sidecar and the gateway exchange over HTTPS, and nothing else.
// It must not know Kubernetes, SSH or the Mysocket API, so that the sidecar links none of what the control plane needs.
//
// Every request carries the pod's projected ServiceAccount token as "Authorization: Bearer <token>"; the token's bound
// pod is the caller. All bodies are JSON. A refusal is an [Error] with the matching status code.
//
//	GET    /v1/assignments                             a stream of [Snapshot], one JSON object a line
//	PUT    /v1/sockets/{socket}/status                 [StatusReport] -> 204, before registering too
//	POST   /v1/sockets/{socket}/tunnels                [RegisterRequest] -> [Registration]
//	POST   /v1/sockets/{socket}/tunnels/{tunnel}/certificate  [RegisterRequest] -> [Registration]
//	DELETE /v1/sockets/{socket}/tunnels/{tunnel}       -> 204; deleting what is gone is no error
//
// A pod may be asked to keep several connections for one socket, each with a tunnel of its own. Every path of a socket
// then takes the number of the connection, from 0, as the query parameter [ConnectionParameter]; without it, it is 0.
package gatewayapi

import "time"

const (
	// AssignmentsPath is the path of the assignment stream.
	AssignmentsPath = "/v1/assignments"
	// SocketsPath is the prefix of all per-socket paths.
	SocketsPath = "/v1/sockets/"
	// Audience is the audience of the projected ServiceAccount token that the gateway accepts, and no other.
	Audience = "mysocket-gateway"
	// Heartbeat is how often the gateway writes an empty line on an idle assignment stream. A sidecar that has read
	// nothing for three of them may take the stream for dead.
	Heartbeat = 10 * time.Second
	// MaxBodyBytes bounds every request body and every line of the assignment stream.
	MaxBodyBytes = 64 << 10
	// MaxAssignments bounds the sockets that one pod serves at once.
	MaxAssignments = 64
	// MaxConnections bounds the connections that one pod keeps for one socket.
	MaxConnections = 4
	// ConnectionParameter is the query parameter with the number of a connection, 0 to MaxConnections-1.
	ConnectionParameter = "connection"
)

// Snapshot is all that one pod should serve at this moment. A later snapshot replaces the earlier one whole;
// an assignment that is missing from it is to be withdrawn.
type Snapshot struct {
	Assignments []Assignment `json:"assignments"`
}

// Assignment is one socket that the pod is to serve.
type Assignment struct {
	// SocketID is the Mysocket id of the socket, a UUID.
	SocketID string `json:"socketID"`
	// SocketName is the socket's name, for logs.
	SocketName string `json:"socketName"`
	// Service is the name of the Kubernetes Service (in the pod's namespace) that asked for it.
	Service string `json:"service"`
	// URL is the public address, for logs.
	URL string `json:"url"`
	// Port is the port in this pod that the Service's port leads to; the sidecar dials the pod's own IP on it.
	Port int32 `json:"port"`
	// PublishNotReady is the Service's publishNotReadyAddresses: register without waiting for the app.
	PublishNotReady bool `json:"publishNotReady,omitempty"`
	// Connections is how many connections to keep, each with its own tunnel; 0 means 1. At most MaxConnections.
	Connections int `json:"connections,omitempty"`
	// ProxyProtocol is the version of the PROXY protocol header that the app expects before a visitor's bytes: one of the
	// constants below, or empty for none.
	ProxyProtocol string `json:"proxyProtocol,omitempty"`
	// Probe is the readiness probe of the app's container, which then decides whether this replica gets visitors. Without
	// one, an app that takes connections is ready.
	Probe *Probe `json:"probe,omitempty"`
	// EdgeAddress is where the edge is now. A registration that names another address is to be renewed before it is used
	// again. May be empty, when any address is good.
	EdgeAddress string `json:"edgeAddress,omitempty"`
}

// The versions of the PROXY protocol.
const (
	ProxyV1 = "v1"
	ProxyV2 = "v2"
)

// The kinds of a probe. A probe that runs a command has no kind: it can't be run outside of its container.
const (
	ProbeHTTP  = "http"
	ProbeHTTPS = "https"
	ProbeTCP   = "tcp"
	ProbeGRPC  = "grpc"
)

// Probe is a container's readiness probe as its author wrote it, with the API server's defaults.
type Probe struct {
	// Kind is one of the constants above.
	Kind string `json:"kind"`
	Port int32  `json:"port"`
	// Host, Path and Headers are of http and https. An empty host is the pod's own IP; of tcp there is a host, too.
	Host    string   `json:"host,omitempty"`
	Path    string   `json:"path,omitempty"`
	Headers []Header `json:"headers,omitempty"`
	// Service is what grpc asks for; it may be empty.
	Service string `json:"service,omitempty"`
	// Thresholds count answers in a row.
	PeriodSeconds    int32 `json:"periodSeconds"`
	TimeoutSeconds   int32 `json:"timeoutSeconds"`
	SuccessThreshold int32 `json:"successThreshold"`
	FailureThreshold int32 `json:"failureThreshold"`
}

// Header is a header of an HTTP probe.
type Header struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

// RegisterRequest asks for a tunnel, or for a new certificate of one.
type RegisterRequest struct {
	// PublicKey is the sidecar's in-memory SSH public key, one line in authorized_keys form.
	PublicKey string `json:"publicKey"`
}

// Registration is all that is needed to log in at the edge. Registering twice from one pod for one connection of a socket
// gives the same tunnel, with a new certificate.
type Registration struct {
	// TunnelID is the Mysocket id of this replica's tunnel.
	TunnelID string `json:"tunnelID"`
	// Certificate is the signed SSH user certificate, one line in authorized_keys form. Its validity is inside it;
	// while it lasts the sidecar may log in again without asking.
	Certificate string `json:"certificate"`
	// User is the SSH user name.
	User string `json:"user"`
	// EdgeAddress is the edge's SSH server, host:port.
	EdgeAddress string `json:"edgeAddress"`
	// HostKeys are the edge's SSH host keys in authorized_keys form, never empty; any other key is refused.
	HostKeys []string `json:"hostKeys"`
	// ForwardHost and ForwardPort are what to ask for with tcpip-forward. The port may be 0.
	ForwardHost string `json:"forwardHost"`
	ForwardPort uint32 `json:"forwardPort"`
}

// State is where one tunnel of a sidecar is in its life.
type State string

// The states of a tunnel, in the order in which a healthy one goes through them.
const (
	StateWaitingForApp State = "WaitingForApp"
	StateRegistering   State = "Registering"
	StateConnecting    State = "Connecting"
	StateConnected     State = "Connected"
	StateDraining      State = "Draining"
)

// Valid tells whether s is one of the states above.
func (s State) Valid() bool {
	switch s {
	case StateWaitingForApp, StateRegistering, StateConnecting, StateConnected, StateDraining:
		return true
	}
	return false
}

// MaxMessageBytes bounds [StatusReport.Message].
const MaxMessageBytes = 512

// StatusReport says where a tunnel is. A sidecar sends it when the state changes, not periodically.
type StatusReport struct {
	State State `json:"state"`
	// Message is one sentence for a person; empty when all is well. At most MaxMessageBytes.
	Message string `json:"message,omitempty"`
}

// Reason is the machine-readable part of an [Error].
type Reason string

// The reasons of refusals.
const (
	ReasonUnauthenticated Reason = "Unauthenticated" // 401: no token, a wrong one, or one for another audience
	ReasonForbidden       Reason = "Forbidden"       // 403: this pod may not act for this socket
	ReasonInvalid         Reason = "Invalid"         // 400: the request itself is wrong
	ReasonNotFound        Reason = "NotFound"        // 404: no such tunnel of this pod; register again
	ReasonTooMany         Reason = "TooManyRequests" // 429, with Retry-After
	ReasonUpstream        Reason = "Upstream"        // 502: the Mysocket API refused or failed
	ReasonUnavailable     Reason = "Unavailable"     // 503: the gateway can't answer now, with Retry-After
)

// Error is the body of every refusal.
type Error struct {
	Reason Reason `json:"reason"`
	// Message names the thing, the value and what is allowed. It never holds a secret.
	Message string `json:"message"`
}
