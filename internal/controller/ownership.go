package controller

import (
	"context"
	"fmt"
	"maps"
	"strings"
	"sync"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/mysocketio/mysocket-injector/internal/annotations"
	"github.com/mysocketio/mysocket-injector/internal/mysocket"
)

// ownerPrefix starts the tags by which a socket says whose it is: one for each Service, with its deletion policy.
const ownerPrefix = "mysocket-injector/"

// owner is a Service of some cluster. Names of sockets say little: two clusters of one account may have a Service of the
// same name each. So what is deleted at Mysocket is decided by the owners that are recorded there, on the socket itself.
type owner struct {
	cluster            string // the UID of the namespace kube-system, which no two clusters have in common
	namespace, service string
}

func (o owner) tag() string {
	return ownerPrefix + o.cluster + "/" + o.namespace + "/" + o.service
}

// claim returns the socket's tags with the owner among them. Those of the socket may be shared with a list, and stay as
// they are.
func (o owner) claim(s mysocket.Socket, policy string) map[string]string {
	tags := maps.Clone(s.Tags)
	if tags == nil {
		tags = map[string]string{}
	}
	tags[o.tag()] = policy
	return tags
}

// without returns the socket's tags without the owner.
func (o owner) without(s mysocket.Socket) map[string]string {
	tags := maps.Clone(s.Tags)
	delete(tags, o.tag())
	return tags
}

// clusterID returns what tells this cluster from all others.
func clusterID(ctx context.Context, reader client.Reader) (string, error) {
	ns := &corev1.Namespace{}
	if err := reader.Get(ctx, client.ObjectKey{Name: metav1.NamespaceSystem}, ns); err != nil {
		return "", fmt.Errorf("read the namespace %s, whose UID tells clusters apart: %w", metav1.NamespaceSystem, err)
	}
	return string(ns.UID), nil
}

func ownerOf(ctx context.Context, reader client.Reader, svc *corev1.Service) (owner, error) {
	id, err := clusterID(ctx, reader)
	return owner{id, svc.Namespace, svc.Name}, err
}

// claimValue is the value of an owner's tag: its deletion policy and, as long as it uses the socket, the digest of the
// settings that it asks for.
func claimValue(policy, settings string) string { return policy + " " + settings }

func claimOf(spec annotations.Spec, want wanted) string {
	return claimValue(spec.DeletionPolicy, want.settings())
}

// ownersOf reads the owners that a socket names, each with its deletion policy.
func ownersOf(s mysocket.Socket) map[owner]string {
	var out map[owner]string
	for o, value := range claimsOf(s) {
		if out == nil {
			out = map[owner]string{}
		}
		out[o], _, _ = strings.Cut(value, " ")
	}
	return out
}

// othersOf reads who else uses a socket, each with the digest of what it asks for. Not among them is who has left and wants
// the socket kept.
func othersOf(s mysocket.Socket, me owner) map[owner]string {
	var out map[owner]string
	for o, value := range claimsOf(s) {
		if _, settings, uses := strings.Cut(value, " "); uses && o != me {
			if out == nil {
				out = map[owner]string{}
			}
			out[o] = settings
		}
	}
	return out
}

// claimsOf reads the owners that a socket names, each with the value of its tag.
func claimsOf(s mysocket.Socket) map[owner]string {
	var out map[owner]string
	for tag, policy := range s.Tags {
		rest, ok := strings.CutPrefix(tag, ownerPrefix)
		if !ok {
			continue
		}
		if part := strings.Split(rest, "/"); len(part) == 3 {
			if out == nil {
				out = map[owner]string{}
			}
			out[owner{part[0], part[1], part[2]}] = policy
		}
	}
	return out
}

// untagged remembers the sockets on which the API keeps no tags, so that it is not asked again and again. The zero value
// is ready.
type untagged struct {
	mu  sync.Mutex
	ids map[string]bool
}

func (u *untagged) has(id string) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.ids[id]
}

func (u *untagged) add(id string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.ids == nil {
		u.ids = map[string]bool{}
	}
	u.ids[id] = true
}

// releaseSockets ends what a Service owns at Mysocket:
//
//	the socket                              deletion-policy delete      retain
//	names the Service alone, or nobody      deleted                     kept, and says so
//	names others, too                       the Service's tag removed   kept, and says so
//	names others alone                      left alone                  left alone
//	is a second one of its name             deleted, or the tag removed, whatever the policy: its public name was never told
//	names nobody, and the Service asked     kept, and says so           kept, and says so
//	  for its name
//
// Of a socket that says already that it is to be kept, Mysocket is not asked.
func (r *ServiceReconciler) releaseSockets(ctx context.Context, svc *corev1.Service) error {
	policy := policyOf(svc)
	if policy == annotations.PolicyRetain && annotations.AppliedOf(svc).InForce(annotations.Retain) {
		return nil
	}
	me, err := ownerOf(ctx, r.Client, svc)
	if err != nil {
		return err
	}
	all, err := r.API.Sockets(ctx, 0)
	if err != nil {
		return err
	}
	// A name that the Service asks for and may not have is nobody's; what the Service owns of other names is found by tags.
	name, _ := r.Names.Of(svc)
	_, named := svc.Annotations[annotations.SocketName]
	chosen, found := choose(all, svc, me, name)
	for _, s := range all {
		owners := ownersOf(s)
		used := found && s.ID == chosen.ID
		_, mine := owners[me]
		if !mine && (!used || len(owners) > 0) {
			continue
		}
		if !mine && named {
			// The API keeps no tags, so others may use it just as well.
			r.tellReleased(ctx, svc, "SocketRetained", "the public name %s was kept: %s gave the socket its name, and Mysocket does not say who else uses it", s.DNSName, annotations.SocketName)
			continue
		}
		if policy == annotations.PolicyRetain && (used || s.Name != chosen.Name) {
			if mine && s.Tags[me.tag()] != policy { // without what it asked for: it uses the socket no more
				s.Tags = me.claim(s, policy)
				if _, err := r.API.UpdateSocket(ctx, s); err != nil {
					return err
				}
			}
			continue
		}
		deleted, err := disown(ctx, r.API, s, me)
		if err != nil {
			return err
		}
		log := ctrl.LoggerFrom(ctx).WithValues("service", svc.Namespace+"/"+svc.Name, "socket", s.Name, "id", s.ID)
		if !deleted {
			log.Info("socket left to its other owners", "owners", len(owners)-1)
			r.tellReleased(ctx, svc, "SocketStillOwned", "the public name %s stays, since %d others own the socket, too", s.DNSName, len(owners)-1)
			continue
		}
		log.Info("socket deleted")
		if used || s.ID == svc.Annotations[annotations.SocketID] {
			r.tellReleased(ctx, svc, "SocketDeleted", "the public name %s was deleted", s.DNSName)
		}
	}
	return nil
}

// policyOf returns what becomes of a Service's socket. A policy that can't be read keeps it: a name that was kept can be
// deleted later, not the reverse.
func policyOf(svc *corev1.Service) string {
	if policy, set := svc.Annotations[annotations.DeletionPolicy]; set && policy != annotations.PolicyDelete {
		return annotations.PolicyRetain
	}
	return annotations.PolicyDelete
}

// disown ends a Service's part in a socket. The socket is deleted when it names nobody else, be that a Service that is
// gone and wants it kept.
func disown(ctx context.Context, api MysocketAPI, s mysocket.Socket, me owner) (deleted bool, err error) {
	owners := ownersOf(s)
	delete(owners, me)
	if len(owners) == 0 {
		return true, api.DeleteSocket(ctx, s.ID)
	}
	s.Tags = me.without(s)
	_, err = api.UpdateSocket(ctx, s)
	return false, err
}
