package api

import (
	"cmp"
	"crypto/hmac"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"strings"

	"github.com/mysocketio/mysocket-injector/internal/edge/store"
)

const (
	maxDescription = 1024
	maxTags        = 64
	maxTagLength   = 256
	// maxPortConflicts bounds how often another edge may take the port of a new socket away.
	maxPortConflicts = 20
)

// socketForm is what a client may send of a socket. A field that is absent (or null) is left as it is by an update, and
// has its default in a new socket.
type socketForm struct {
	Name                 *string            `json:"name"`
	Description          *string            `json:"description"`
	Type                 *string            `json:"socket_type"`
	Protected            *bool              `json:"protected_socket"`
	ProtectedUsername    *string            `json:"protected_username"`
	ProtectedPassword    *string            `json:"protected_password"`
	Private              *bool              `json:"private_socket"`
	CloudAuth            *bool              `json:"cloud_authentication_enabled"`
	AllowedEmails        []string           `json:"cloud_authentication_email_allowed_addressses"`
	AllowedDomains       []string           `json:"cloud_authentication_email_allowed_domains"`
	UpstreamType         *string            `json:"upstream_type"`
	UpstreamHTTPHostname *string            `json:"upstream_http_hostname"`
	UpstreamUsername     *string            `json:"upstream_username"`
	UpstreamPassword     *string            `json:"upstream_password"`
	CustomDomains        []string           `json:"custom_domains"`
	PolicyNames          []string           `json:"policy_names"`
	Tags                 *map[string]string `json:"tags"`
}

type socketAnswer struct {
	SocketID             string            `json:"socket_id"`
	Name                 string            `json:"name"`
	Description          string            `json:"description"`
	DNSName              string            `json:"dnsname"`
	Type                 string            `json:"socket_type"`
	TCPPorts             []int             `json:"socket_tcp_ports"`
	UserName             string            `json:"user_name"`
	Tunnels              []tunnelAnswer    `json:"tunnels"`
	Protected            bool              `json:"protected_socket"`
	ProtectedUsername    string            `json:"protected_username"`
	ProtectedPassword    string            `json:"protected_password"`
	Private              bool              `json:"private_socket"`
	CloudAuth            bool              `json:"cloud_authentication_enabled"`
	AllowedEmails        []string          `json:"cloud_authentication_email_allowed_addressses"`
	AllowedDomains       []string          `json:"cloud_authentication_email_allowed_domains"`
	UpstreamType         string            `json:"upstream_type"`
	UpstreamHTTPHostname string            `json:"upstream_http_hostname"`
	UpstreamUsername     string            `json:"upstream_username"`
	UpstreamPassword     string            `json:"upstream_password"`
	CustomDomains        []string          `json:"custom_domains"`
	PolicyNames          []string          `json:"policy_names"`
	Tags                 map[string]string `json:"tags"`
}

func (a *API) answerSocket(k store.Socket, tunnels []store.Tunnel) socketAnswer {
	ans := socketAnswer{
		SocketID: k.ID, Name: k.Name, Description: k.Description, DNSName: k.DNSName, Type: string(k.Type),
		TCPPorts: a.cfg.WebPorts, UserName: sshUser(k.UserID), Tunnels: a.answerTunnels(tunnels),
		AllowedEmails: []string{}, AllowedDomains: []string{}, CustomDomains: []string{}, PolicyNames: []string{},
		UpstreamHTTPHostname: k.UpstreamHTTPHostname, Tags: k.Tags,
	}
	if k.TCPPort != 0 {
		ans.TCPPorts = []int{k.TCPPort}
	}
	if k.Type.Web() {
		ans.UpstreamType = cmp.Or(k.UpstreamType, "http")
	}
	if k.Protection != nil {
		ans.Protected, ans.ProtectedUsername = true, k.Protection.Username
	}
	if ans.Tags == nil {
		ans.Tags = map[string]string{}
	}
	return ans
}

// socketOf finds the socket of the request's path, if it is the user's.
func (a *API) socketOf(r *http.Request, user store.User) (store.Socket, error) {
	id := r.PathValue("id")
	if !validID(id) {
		return store.Socket{}, store.ErrNotFound
	}
	k, err := a.cfg.Store.Socket(id)
	if err != nil {
		return store.Socket{}, err
	}
	if k.UserID != user.ID {
		return store.Socket{}, store.ErrNotFound
	}
	return k, nil
}

func (a *API) listSockets(_ *http.Request, user store.User) (any, error) {
	answers := []socketAnswer{}
	for _, k := range a.cfg.Store.Sockets(user.ID) {
		answers = append(answers, a.answerSocket(k, a.cfg.Store.Tunnels(k.ID)))
	}
	return answers, nil
}

func (a *API) getSocket(r *http.Request, user store.User) (any, error) {
	k, err := a.socketOf(r, user)
	if err != nil {
		return nil, err
	}
	return a.answerSocket(k, a.cfg.Store.Tunnels(k.ID)), nil
}

func (a *API) createSocket(r *http.Request, user store.User) (any, error) {
	return a.newSocket(r, user, 0)
}

// connect makes a socket and a tunnel of it in one step.
func (a *API) connect(r *http.Request, user store.User) (any, error) {
	return a.newSocket(r, user, 1)
}

func (a *API) newSocket(r *http.Request, user store.User, tunnels int) (any, error) {
	var form socketForm
	if err := decode(r, &form); err != nil {
		return nil, err
	}
	created, made, err := a.makeSocket(user, form, func(k store.Socket) (store.Socket, []store.Tunnel, error) {
		return a.cfg.Store.CreateSocket(k, a.cfg.Domain, tunnels)
	})
	if err != nil {
		return nil, err
	}
	return a.answerSocket(created, made), nil
}

// makeSocket checks a form, has the socket stored, and tells the rest of the edge.
func (a *API) makeSocket(user store.User, form socketForm, put func(store.Socket) (store.Socket, []store.Tunnel, error)) (store.Socket, []store.Tunnel, error) {
	k := store.Socket{UserID: user.ID, Type: store.TypeHTTP}
	if form.Type != nil && *form.Type != "" {
		k.Type = store.SocketType(*form.Type)
		switch k.Type {
		case store.TypeHTTP, store.TypeHTTPS, store.TypeTCP, store.TypeTLS:
		default:
			return store.Socket{}, nil, badRequest("socket_type %q is not supported by this edge; it supports http, https, tcp and tls", truncate(*form.Type, 50))
		}
	}
	if err := form.apply(&k); err != nil {
		return store.Socket{}, nil, err
	}
	if k.Name == "" {
		return store.Socket{}, nil, badRequest("name is missing: give the socket a name")
	}
	created, made, err := a.putSocket(k, put)
	// Another edge may give the same port away at the same moment. Now that its socket is known here, the port is not free any more.
	for range maxPortConflicts {
		if !errors.Is(err, store.ErrPortTaken) {
			break
		}
		created, made, err = a.putSocket(k, put)
	}
	if errors.Is(err, store.ErrPortTaken) {
		return store.Socket{}, nil, fmt.Errorf("%w: other edges give them away faster", ErrNoPort)
	}
	if err != nil {
		return store.Socket{}, nil, err
	}
	a.cfg.Log.Info("socket created", "socket", created.ID, "dnsname", created.DNSName, "type", created.Type)
	return created, made, nil
}

// putSocket has a socket stored, with a port of its own unless it is a web socket.
func (a *API) putSocket(k store.Socket, put func(store.Socket) (store.Socket, []store.Tunnel, error)) (store.Socket, []store.Tunnel, error) {
	if k.Type.Web() {
		return put(k)
	}
	port, err := a.cfg.Hooks.ReservePort()
	if err != nil {
		return store.Socket{}, nil, err
	}
	k.TCPPort = port
	created, made, err := put(k)
	if err != nil {
		a.cfg.Hooks.PortReleased(port)
	}
	return created, made, err
}

func (a *API) updateSocket(r *http.Request, user store.User) (any, error) {
	k, err := a.socketOf(r, user)
	if err != nil {
		return nil, err
	}
	var form socketForm
	if err := decode(r, &form); err != nil {
		return nil, err
	}
	updated, err := a.cfg.Store.UpdateSocket(k.ID, form.change)
	if err != nil {
		return nil, err
	}
	return a.answerSocket(updated, a.cfg.Store.Tunnels(k.ID)), nil
}

// change is an update of a socket there is.
func (f *socketForm) change(k *store.Socket) error {
	if f.Type != nil && *f.Type != "" && store.SocketType(*f.Type) != k.Type {
		return badRequest("socket_type cannot change from %s to %q; make a new socket", k.Type, truncate(*f.Type, 50))
	}
	if f.Name != nil && *f.Name == "" {
		return badRequest("name must not be empty")
	}
	return f.apply(k)
}

func (a *API) deleteSocket(r *http.Request, user store.User) (any, error) {
	k, err := a.socketOf(r, user)
	if err != nil {
		return nil, err
	}
	return a.removeSocket(k)
}

func (a *API) removeSocket(k store.Socket) (any, error) {
	if _, err := a.cfg.Store.DeleteSocket(k.ID); err != nil {
		return nil, err
	}
	a.cfg.Log.Info("socket deleted", "socket", k.ID, "dnsname", k.DNSName)
	return nil, nil
}

// apply checks a form and puts what it says into a socket. What this edge does not do is refused rather than ignored:
// somebody who asks for access rules must not get a socket without them.
func (f *socketForm) apply(k *store.Socket) error {
	if err := f.refuseUnsupported(); err != nil {
		return err
	}
	texts := []struct {
		field string
		value *string
		limit int
		into  *string
	}{
		{"name", f.Name, maxNameLength, &k.Name},
		{"description", f.Description, maxDescription, &k.Description},
	}
	for _, t := range texts {
		if t.value == nil {
			continue
		}
		if err := checkText(t.field, *t.value, t.limit); err != nil {
			return err
		}
		*t.into = *t.value
	}
	if f.UpstreamHTTPHostname != nil {
		if err := checkHostname(*f.UpstreamHTTPHostname, k.Type); err != nil {
			return err
		}
		k.UpstreamHTTPHostname = *f.UpstreamHTTPHostname
	}
	if err := f.applyUpstreamType(k); err != nil {
		return err
	}
	if f.Tags != nil {
		if len(*f.Tags) > maxTags {
			return badRequest("tags: there are %d, and %d are allowed", len(*f.Tags), maxTags)
		}
		for key, value := range *f.Tags {
			if err := errors.Join(checkText("tags: a key", key, maxTagLength), checkText("tags: a value", value, maxTagLength)); err != nil {
				return badRequest("tags: keys and values must be printable, with %d characters at most", maxTagLength)
			}
		}
		if err := checkSticky(*f.Tags, k.Type); err != nil {
			return err
		}
		k.Tags = *f.Tags
	}
	return f.applyProtection(k)
}

func (f *socketForm) refuseUnsupported() error {
	switch {
	case isTrue(f.CloudAuth) || hasText(f.AllowedEmails...) || hasText(f.AllowedDomains...):
		return badRequest("cloud authentication (allowed e-mail addresses and domains) is not supported by this edge; protected_socket with a username and password is")
	case isTrue(f.Private):
		return badRequest("private_socket is not supported by this edge: its sockets are public, and may be protected with protected_socket")
	case hasText(f.CustomDomains...):
		return badRequest("custom_domains are not supported by this edge: a socket has the name in its dnsname")
	case hasText(f.PolicyNames...):
		return badRequest("policy_names are not supported by this edge")
	case f.UpstreamUsername != nil && *f.UpstreamUsername != "" || f.UpstreamPassword != nil && *f.UpstreamPassword != "":
		return badRequest("upstream_username and upstream_password are not supported by this edge")
	}
	return nil
}

// applyUpstreamType sets what the edge speaks to the app.
func (f *socketForm) applyUpstreamType(k *store.Socket) error {
	if f.UpstreamType == nil {
		return nil
	}
	switch *f.UpstreamType {
	case "", "http":
		k.UpstreamType = ""
	case store.UpstreamHTTPS:
		if !k.Type.Web() {
			return badRequest("upstream_type https is for http and https sockets; this one is %s", k.Type)
		}
		k.UpstreamType = store.UpstreamHTTPS
	default:
		return badRequest("upstream_type %q is not supported by this edge; http and https are", truncate(*f.UpstreamType, 50))
	}
	return nil
}

func isTrue(b *bool) bool { return b != nil && *b }

// hasText says whether there is more than the empty strings that some clients send for nothing.
func hasText(values ...string) bool {
	for _, v := range values {
		if strings.TrimSpace(v) != "" {
			return true
		}
	}
	return false
}

var hostnamePattern = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?(:[0-9]{1,5})?$`)

func checkHostname(name string, kind store.SocketType) error {
	if name == "" {
		return nil
	}
	if !kind.Web() {
		return badRequest("upstream_http_hostname is for http and https sockets; this one is %s", kind)
	}
	if !hostnamePattern.MatchString(name) {
		return badRequest("upstream_http_hostname %q is not a host name", truncate(name, 100))
	}
	return nil
}

// applyProtection sets, changes or removes basic authentication. An update without a password keeps the one there is,
// because answers never carry it and clients send back what they got.
func (f *socketForm) applyProtection(k *store.Socket) error {
	if f.Protected == nil {
		if f.ProtectedUsername != nil && *f.ProtectedUsername != "" || f.ProtectedPassword != nil && *f.ProtectedPassword != "" {
			return badRequest("protected_username and protected_password need protected_socket: true")
		}
		return nil
	}
	if !*f.Protected {
		k.Protection = nil
		return nil
	}
	if !k.Type.Web() {
		return badRequest("protected_socket is for http and https sockets; this one is %s", k.Type)
	}
	p := store.Protection{}
	if k.Protection != nil {
		p = *k.Protection
	}
	if f.ProtectedUsername != nil && *f.ProtectedUsername != "" {
		if err := checkText("protected_username", *f.ProtectedUsername, maxNameLength); err != nil {
			return err
		}
		if strings.Contains(*f.ProtectedUsername, ":") {
			return badRequest("protected_username must not hold a colon")
		}
		p.Username = *f.ProtectedUsername
	}
	if f.ProtectedPassword != nil && *f.ProtectedPassword != "" {
		if err := checkText("protected_password", *f.ProtectedPassword, maxNameLength); err != nil {
			return err
		}
		salt, err := newSalt()
		if err != nil {
			return err
		}
		p.Salt, p.Hash = salt, HashProtection(salt, *f.ProtectedPassword)
	}
	if p.Username == "" || len(p.Hash) == 0 {
		return badRequest("protected_socket needs protected_username and protected_password")
	}
	k.Protection = &p
	return nil
}

// HashProtection hashes a socket's password. It is checked for every request of a visitor, so it is a fast hash: the
// state file, which also holds the edge's private keys, is what keeps it secret.
func HashProtection(salt []byte, password string) []byte {
	mac := hmac.New(sha256.New, salt)
	_, _ = mac.Write([]byte(password))
	return mac.Sum(nil)
}
