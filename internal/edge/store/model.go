package store

import (
	"slices"
	"time"
)

// User is an account. The edge keeps no password, only its bcrypt hash.
type User struct {
	ID           string    `json:"id"`
	Name         string    `json:"name"`
	Email        string    `json:"email"`
	PasswordHash []byte    `json:"passwordHash"`
	SSHKey       string    `json:"sshKey,omitempty"`
	Created      time.Time `json:"created"`
	// PasswordChanged is when the password was last changed; zero when it is still the first.
	PasswordChanged time.Time `json:"passwordChanged,omitzero"`
}

// SocketType says what a socket speaks in public.
type SocketType string

// The types of socket that this edge serves.
const (
	TypeHTTP  SocketType = "http"
	TypeHTTPS SocketType = "https"
	TypeTCP   SocketType = "tcp"
	// TypeTLS is TCP to the app, and TLS to visitors.
	TypeTLS SocketType = "tls"
)

// Web says whether visitors reach the socket by host name on the HTTP and HTTPS fronts.
func (t SocketType) Web() bool { return t == TypeHTTP || t == TypeHTTPS }

// The tag of a socket that says how its visitors stick to a tunnel, and the only value it may have.
const (
	StickyTag    = "mysocket-edge/sticky"
	StickyCookie = "cookie"
)

// Socket is one public endpoint of an account.
type Socket struct {
	ID          string     `json:"id"`
	UserID      string     `json:"userID"`
	Name        string     `json:"name"`
	DisplayName string     `json:"displayName,omitempty"`
	Description string     `json:"description,omitempty"`
	DNSName     string     `json:"dnsName"`
	Type        SocketType `json:"type"`
	// TCPPort is the socket's own public port; 0 for web sockets, which share the ports of the fronts.
	TCPPort int `json:"tcpPort,omitempty"`
	// Protection asks visitors of a web socket for a name and a password; nil asks nothing.
	Protection           *Protection       `json:"protection,omitempty"`
	UpstreamHTTPHostname string            `json:"upstreamHTTPHostname,omitempty"`
	Tags                 map[string]string `json:"tags,omitempty"`
	Created              time.Time         `json:"created"`
}

// Protection is HTTP basic authentication in front of a socket. The password is kept as a salted hash.
type Protection struct {
	Username string `json:"username"`
	Salt     []byte `json:"salt"`
	Hash     []byte `json:"hash"`
}

// Tunnel is one way from the edge to an origin of a socket.
type Tunnel struct {
	ID       string `json:"id"`
	SocketID string `json:"socketID"`
	UserID   string `json:"userID"`
	// LocalPort is what the client asks for with tcpip-forward. It is unique in the account, so that a login that
	// names no tunnel (a registered key) finds its tunnel by it.
	LocalPort int       `json:"localPort"`
	Created   time.Time `json:"created"`
}

// AccessToken is what an account is used with instead of e-mail and password. The token itself is not kept: it is signed,
// and good while this record is there.
type AccessToken struct {
	ID      string    `json:"id"`
	UserID  string    `json:"userID"`
	Name    string    `json:"name"`
	Created time.Time `json:"created"`
	// Expires is zero when it never does.
	Expires time.Time `json:"expires,omitzero"`
}

func (s *Socket) clone() Socket {
	c := *s
	if s.Protection != nil {
		p := *s.Protection
		c.Protection = &p
	}
	if s.Tags != nil {
		c.Tags = make(map[string]string, len(s.Tags))
		for k, v := range s.Tags {
			c.Tags[k] = v
		}
	}
	return c
}

func (u *User) clone() User {
	c := *u
	c.PasswordHash = slices.Clone(u.PasswordHash)
	return c
}
