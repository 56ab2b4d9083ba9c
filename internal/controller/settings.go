package controller

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/mysocketio/mysocket-injector/internal/annotations"
	"github.com/mysocketio/mysocket-injector/internal/mysocket"
)

// errIgnored means that the API took a setting without a word and did not apply it.
var errIgnored = errors.New("the Mysocket API accepted the request and did not do what it asks")

// wanted is what a Service asks of its socket, as the API has it. Groups that it does not ask for are nil.
type wanted struct {
	kind       string
	access     *mysocket.Access
	protection *credentials
	upstream   *mysocket.Upstream
}

func wantedOf(spec annotations.Spec, protection *credentials) wanted {
	w := wanted{kind: spec.SocketType, protection: protection}
	if spec.AllowedEmails != "" || spec.AllowedDomains != "" {
		w.access = &mysocket.Access{CloudAuth: true, AllowedEmails: split(spec.AllowedEmails), AllowedDomains: split(spec.AllowedDomains)}
	}
	if spec.UpstreamType != "" || spec.UpstreamHostname != "" {
		w.upstream = &mysocket.Upstream{UpstreamType: spec.UpstreamType, UpstreamHTTPHostname: spec.UpstreamHostname}
		if w.upstream.UpstreamType == "" {
			w.upstream.UpstreamType = annotations.TypeHTTP
		}
	}
	return w
}

// split returns the entries of a list; none, and not nil, of an empty one.
func split(list string) []string {
	if list == "" {
		return []string{}
	}
	return strings.Split(list, ",")
}

// key is all that is asked for, to be compared.
func (w wanted) key(name string) string {
	return fmt.Sprintf("%q %q %+v %+v %x", name, w.kind, deref(w.access), deref(w.upstream), w.protection.digest())
}

func deref[T any](p *T) T {
	if p == nil {
		var none T
		return none
	}
	return *p
}

// fill puts what is wanted into a socket. What the Service asked for before and asks for no more (ours tells) gets its
// default; other settings stay as they are. It tells whether that changes the socket.
func (w wanted) fill(socket *mysocket.Socket, ours func(annotations.Setting) bool) (changed bool) {
	if socket.Type != w.kind {
		socket.Type, socket.Ports, socket.Tunnels = w.kind, nil, nil // the ports go with the type
		changed = true
	}
	access, upstream := w.access, w.upstream
	if access == nil && ours(annotations.Access) {
		access = &mysocket.Access{AllowedEmails: []string{}, AllowedDomains: []string{}}
	}
	if access != nil && !sameAccess(socket.Access, access) {
		socket.Access, changed = access, true
	}
	if upstream == nil && ours(annotations.Upstream) {
		upstream = &mysocket.Upstream{UpstreamType: annotations.TypeHTTP}
	}
	if upstream != nil && !sameUpstream(socket.Upstream, upstream) {
		socket.Upstream, changed = upstream, true
	}
	if w.protection == nil && ours(annotations.Protection) && socket.Protected {
		socket.Protected, socket.ProtectedUsername, changed = false, "", true
	}
	if w.protection != nil && (!w.guarded(*socket, annotations.Protection) || !w.protection.atEdge) {
		changed = true
	}
	if changed {
		w.addPassword(socket)
	}
	return changed
}

// changes tells what fill does, without doing it.
func (w wanted) changes(socket mysocket.Socket, ours func(annotations.Setting) bool) bool {
	return w.fill(&socket, ours) // a copy, whose parts fill replaces and never changes
}

// addPassword makes a socket ready to be written: the API may take a write without the password for one that removes it.
func (w wanted) addPassword(socket *mysocket.Socket) {
	if w.protection != nil {
		socket.Protected, socket.ProtectedUsername, socket.ProtectedPassword = true, w.protection.username, w.protection.password
	}
}

// guarded tells whether the socket has a guard as it is wanted.
func (w wanted) guarded(socket mysocket.Socket, guard annotations.Setting) bool {
	switch guard {
	case annotations.Access:
		return w.access == nil || sameAccess(socket.Access, w.access)
	case annotations.Protection:
		return w.protection == nil || socket.Protected && socket.ProtectedUsername == w.protection.username
	default:
		return true
	}
}

// check tells whether the API did what was asked, as far as visitors are to be kept out.
func (w wanted) check(socket mysocket.Socket) error {
	if !w.guarded(socket, annotations.Access) {
		return fmt.Errorf("%w: socket %s is not limited to the e-mail addresses and domains of the Service's annotations", errIgnored, socket.DNSName)
	}
	if !w.guarded(socket, annotations.Protection) {
		return fmt.Errorf("%w: socket %s is not protected with the username and password of the Service's Secret", errIgnored, socket.DNSName)
	}
	return nil
}

func sameAccess(a, b *mysocket.Access) bool {
	same := func(x, y []string) bool { return slices.Equal(folded(x), folded(y)) }
	x, y := deref(a), deref(b)
	return x.CloudAuth == y.CloudAuth && same(x.AllowedEmails, y.AllowedEmails) && same(x.AllowedDomains, y.AllowedDomains)
}

// folded returns a list in lower case and in order, without what is empty or twice.
func folded(list []string) []string {
	out := []string{}
	for _, s := range list {
		if s = strings.ToLower(strings.TrimSpace(s)); s != "" {
			out = append(out, s)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

func sameUpstream(a, b *mysocket.Upstream) bool {
	x, y := deref(a), deref(b)
	return upstreamKind(x) == upstreamKind(y) && strings.EqualFold(x.UpstreamHTTPHostname, y.UpstreamHTTPHostname)
}

func upstreamKind(u mysocket.Upstream) string { return cmp.Or(u.UpstreamType, annotations.TypeHTTP) }

// retractClaims corrects what the annotation Applied says before the socket is changed: a guard that the socket does not
// have is not in force, and one that is about to be taken back is not to be relied on.
func (r *ServiceReconciler) retractClaims(ctx context.Context, svc *corev1.Service, me owner, spec annotations.Spec, socket mysocket.Socket, found bool) error {
	applied := annotations.AppliedOf(svc)
	asked := spec.Asked()
	for _, s := range annotations.Guards() {
		if !slices.Contains(asked, s) || !found || !guardStands(socket, s) {
			applied = applied.Ending(s)
		}
	}
	if spec.DeletionPolicy != annotations.PolicyRetain || !found || ownersOf(socket)[me] != annotations.PolicyRetain {
		applied = applied.Without(annotations.Retain)
	}
	return r.annotate(ctx, svc, map[string]string{annotations.Applied: applied.String()})
}

// guardStands tells whether a socket has a guard at all, if not as it is wanted.
func guardStands(socket mysocket.Socket, guard annotations.Setting) bool {
	switch guard {
	case annotations.Access:
		return deref(socket.Access).CloudAuth
	case annotations.Protection:
		return socket.Protected
	default:
		return true
	}
}
