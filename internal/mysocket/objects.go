package mysocket

import (
	"net"
	"slices"
	"strconv"
)

// Socket is the public endpoint, as the API has it. Fields that this project does not set are left out; the API keeps
// its defaults for them.
type Socket struct {
	ID          string   `json:"socket_id,omitempty"`
	Name        string   `json:"name"`
	Description string   `json:"description,omitempty"`
	DNSName     string   `json:"dnsname,omitempty"`
	Type        string   `json:"socket_type"`
	Ports       []int    `json:"socket_tcp_ports,omitempty"`
	UserName    string   `json:"user_name,omitempty"`
	Tunnels     []Tunnel `json:"tunnels,omitempty"`
	// The API wants these on every write, set or not.
	Protected         bool   `json:"protected_socket"`
	ProtectedUsername string `json:"protected_username"`
	ProtectedPassword string `json:"protected_password"`
	Private           bool   `json:"private_socket"`
	// Tags are kept by the API for its clients. None are not sent, which leaves those there are.
	Tags map[string]string `json:"tags,omitempty"`
	// Groups of settings; a group that is nil is not sent.
	*Access
	*Upstream
}

// Access is the cloud authentication of a socket: who may come in, after they have logged in at the edge.
type Access struct {
	CloudAuth bool `json:"cloud_authentication_enabled"`
	// The wire has three s.
	AllowedEmails  []string `json:"cloud_authentication_email_allowed_addressses"`
	AllowedDomains []string `json:"cloud_authentication_email_allowed_domains"`
}

// Upstream is how the edge speaks to the app behind a socket.
type Upstream struct {
	// UpstreamType is http or https; empty is http.
	UpstreamType string `json:"upstream_type"`
	// UpstreamHTTPHostname is the Host header that the app gets; empty for the visitor's.
	UpstreamHTTPHostname string `json:"upstream_http_hostname"`
}

// URL is the socket's public address: https://<dnsname> for http and https sockets (with the port when it is not the
// scheme's own), tcp://<dnsname>:<port> or tls://<dnsname>:<port> for the others.
func (s Socket) URL() string {
	switch s.Type {
	case "http", "https":
		for _, p := range []struct {
			scheme string
			port   int
		}{{"https", 443}, {"http", 80}} {
			if len(s.Ports) == 0 || slices.Contains(s.Ports, p.port) {
				return p.scheme + "://" + s.DNSName
			}
		}
		// An edge on other ports lists the plain one first and the TLS one last.
		scheme := "https"
		if len(s.Ports) == 1 {
			scheme = "http"
		}
		return scheme + "://" + net.JoinHostPort(s.DNSName, strconv.Itoa(s.Ports[len(s.Ports)-1]))
	default:
		if len(s.Ports) == 0 {
			return s.Type + "://" + s.DNSName
		}
		return s.Type + "://" + net.JoinHostPort(s.DNSName, strconv.Itoa(s.Ports[0]))
	}
}

// Tunnel is one way from the edge to an origin.
type Tunnel struct {
	ID        string `json:"tunnel_id"`
	LocalPort int    `json:"local_port"`
	// Server is the edge's SSH server for this tunnel, a host or host:port; may be empty.
	Server string `json:"tunnel_server,omitempty"`
}

// SignedKey is the answer to a signing request.
type SignedKey struct {
	// Certificate is one line in authorized_keys form.
	Certificate string `json:"signed_ssh_cert"`
	// HostKey is the edge's host key, base64 of the SSH wire form; edges before 2022-09 leave it out.
	HostKey string `json:"host_key,omitempty"`
}
