package controller

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	ctrl "sigs.k8s.io/controller-runtime"

	"github.com/mysocketio/mysocket-injector/internal/annotations"
	"github.com/mysocketio/mysocket-injector/internal/mysocket"
)

// errNotAgreed means that the Services that share a socket ask for different settings.
var errNotAgreed = errors.New("")

// agree decides whether a Service may use a socket as it asks to, when others use it, too:
//
//	what the Service asks for       the socket                        done
//	the same as all others          any                               the socket is changed, by whoever comes first
//	other than some                 is as the Service asks            used as it is
//	other than some                 is not, and names the Service     its tag gets the new digest; nothing else is changed
//	other than some                 is not, and does not name it      nothing: it does not use the socket
//
// So no owner overwrites what another asks for, and a change is made when the last one has asked for it. The password of a
// protected socket is not compared: Mysocket does not tell it, and a digest of it is nothing to write down.
func (r *ServiceReconciler) agree(ctx context.Context, me owner, spec annotations.Spec, want wanted, socket mysocket.Socket) error {
	others, mine := othersOf(socket, me), want.settings()
	differ := slices.DeleteFunc(slices.Collect(maps.Keys(others)), func(o owner) bool { return others[o] == mine })
	if len(differ) == 0 || settingsOf(socket) == mine {
		return nil
	}
	first := slices.MinFunc(differ, func(a, b owner) int { return strings.Compare(a.tag(), b.tag()) })
	who := fmt.Sprintf("Service %s/%s of %s", first.namespace, first.service, clusterOf(first, me))
	if more := len(differ) - 1; more > 0 {
		who += fmt.Sprintf(" and %d more", more)
	}
	what := strings.Join(want.differences(socket), ", ")
	if _, uses := ownersOf(socket)[me]; !uses {
		return fmt.Errorf("%wthe socket %q is used by %s and has other settings (%s): ask for the same here, or for another name", errNotAgreed, socket.Name, who, what)
	}
	if claim := claimOf(spec, want); socket.Tags[me.tag()] != claim {
		socket.Tags = me.claim(socket, claim)
		if want.protection != nil && want.guarded(socket, annotations.Protection) {
			want.addPassword(&socket)
		}
		if _, err := r.API.UpdateSocket(ctx, socket); err != nil {
			return err
		}
		ctrl.LoggerFrom(ctx).Info("socket keeps its settings, since not all that share it ask for others", "socket", socket.Name, "id", socket.ID)
	}
	return fmt.Errorf("%wthe socket %q is shared with %s, which asks for other settings (%s): it stays as it is until all ask for the same", errNotAgreed, socket.Name, who, what)
}

func clusterOf(o, me owner) string {
	if o.cluster == me.cluster {
		return "this cluster"
	}
	return "the cluster whose namespace kube-system has the UID " + o.cluster
}

// settings is a digest of what is asked for, to be compared with what other owners of the socket ask for, and with what the
// socket has. Without what a Service says of its pods alone, and without the password.
func (w wanted) settings() string {
	access, upstream := deref(w.access), deref(w.upstream)
	if !access.CloudAuth {
		access = mysocket.Access{}
	}
	username := ""
	if w.protection != nil {
		username = w.protection.username
	}
	all := fmt.Sprintf("%q %t %q %q %q %q %t %q", w.kind, access.CloudAuth, folded(access.AllowedEmails), folded(access.AllowedDomains),
		upstreamKind(upstream), strings.ToLower(upstream.UpstreamHTTPHostname), w.protection != nil, username)
	sum := sha256.Sum256([]byte(all))
	return hex.EncodeToString(sum[:6])
}

// inForce is what a socket has, as if a Service asked for it.
func inForce(socket mysocket.Socket) wanted {
	w := wanted{kind: socket.Type, access: socket.Access, upstream: socket.Upstream}
	if socket.Protected {
		w.protection = &credentials{username: socket.ProtectedUsername}
	}
	return w
}

func settingsOf(socket mysocket.Socket) string { return inForce(socket).settings() }

// differences names the annotations by which what is asked for differs from what a socket has.
func (w wanted) differences(socket mysocket.Socket) []string {
	has := inForce(socket)
	var out []string
	for _, part := range []struct {
		annotation string
		of         func(wanted) wanted
	}{
		{annotations.Type, func(w wanted) wanted { return wanted{kind: w.kind} }},
		{annotations.AllowedEmails + " or " + annotations.AllowedEmailDomains, func(w wanted) wanted { return wanted{access: w.access} }},
		{annotations.UpstreamType + " or " + annotations.UpstreamHTTPHostname, func(w wanted) wanted { return wanted{upstream: w.upstream} }},
		{annotations.ProtectedSecret, func(w wanted) wanted { return wanted{protection: w.protection} }},
	} {
		if part.of(w).settings() != part.of(has).settings() {
			out = append(out, part.annotation)
		}
	}
	return out
}
