package controller

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"

	"github.com/mysocketio/mysocket-injector/api/v1alpha1"
	"github.com/mysocketio/mysocket-injector/internal/annotations"
	"github.com/mysocketio/mysocket-injector/internal/mysocket"
)

const (
	// sweepEvery is how often the account is compared with the cluster when nothing hints at a difference.
	sweepEvery = 10 * time.Minute
	// sweepGrace is how long something must have been seen without an owner before it is deleted. A registration, the
	// longest way from a change at Mysocket to its record in the cluster, ends after 40 seconds.
	sweepGrace = 2 * time.Minute
	// sweepPause is the least time between two looks: an API that fails makes every registration ask for one.
	sweepPause = 30 * time.Second
)

// Sweeper deletes what is left over. Usually nothing is: finalizers and objects that exist before what they stand for see
// to that. But an answer of the API may be lost, and finalizers can be removed by hand:
//
//	found                                                     what is done
//	tunnel at Mysocket that no Tunnel object names            deleted
//	socket that names a Service of this cluster which
//	  is gone or not public                                   kept if its deletion policy there is retain, with the tag saying
//	                                                          that it is used no more; else as in disown
//	  uses another socket                                     likewise; a second one of the same name is not kept
//	  may not have the name that it asks for                  kept, with the tag saying that it is used no more
//	Tunnel object whose Service is not public, or uses        deleted
//	  another socket
//
// It touches only sockets that name a Service of this cluster, and tunnels only where no other cluster is named: nobody
// can tell whose a tunnel is. What is found is deleted when it is still so after the grace period, and when the API server
// itself, not the informers, says so. Everything starts over when the leader changes, which costs time alone.
type Sweeper struct {
	// Client reads from the informers, and writes. Live asks the API server.
	Client client.Client
	Live   client.Reader
	API    MysocketAPI
	// Names is what the sockets of Services are called.
	Names annotations.Names
	Now   func() time.Time

	mu    sync.Mutex
	wake  chan struct{}
	since map[string]time.Time // what was found, by kind and id
}

// NeedLeaderElection has the manager run it on the leader alone.
func (s *Sweeper) NeedLeaderElection() bool { return true }

// Start sweeps until ctx ends.
func (s *Sweeper) Start(ctx context.Context) error {
	log := ctrl.LoggerFrom(ctx).WithName("sweep")
	ctx = ctrl.LoggerInto(ctx, log)
	for {
		again, err := s.Sweep(ctx)
		if err != nil && ctx.Err() == nil {
			log.Info("what is left over at Mysocket could not be looked for, or not be deleted; it is tried again", "err", err.Error(), "after", again.String())
		}
		if !wait(ctx, sweepPause, nil) || !wait(ctx, again-sweepPause, s.woken()) {
			return nil
		}
	}
}

// wait waits until the time is over or there is a value; false when ctx ends.
func wait(ctx context.Context, d time.Duration, or <-chan struct{}) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-or:
	case <-timer.C:
	}
	return true
}

// Wake has it look soon: something was asked of the API, and it is not known whether that was done.
func (s *Sweeper) Wake() {
	select {
	case s.woken() <- struct{}{}:
	default:
	}
}

func (s *Sweeper) woken() chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.wake == nil {
		s.wake = make(chan struct{}, 1)
	}
	return s.wake
}

// finding is something that should not be there.
type finding struct {
	key  string // kind and id
	drop func(context.Context) error
}

// Sweep looks once, and deletes what it has found before and long enough ago. It returns when to look again.
func (s *Sweeper) Sweep(ctx context.Context) (time.Duration, error) {
	found, err := s.look(ctx)
	if err != nil {
		return max(jitter(slowRetry), mysocket.RetryAfter(err)), err
	}
	now, again := s.Now(), jitter(sweepEvery)
	since := map[string]time.Time{}
	var failed error
	for _, f := range found {
		first, seen := s.since[f.key]
		if !seen {
			first = now
		}
		since[f.key] = first
		if wait := sweepGrace - now.Sub(first); wait > 0 {
			again = min(again, wait)
			continue
		}
		if err := f.drop(ctx); err != nil {
			failed = errors.Join(failed, err)
			again = min(again, max(jitter(slowRetry), mysocket.RetryAfter(err)))
			if mysocket.RetryAfter(err) > 0 || ctx.Err() != nil {
				break // the API asks for a pause
			}
		}
	}
	if failed != nil { // keep those that were not come to
		for _, f := range found {
			if first, seen := s.since[f.key]; seen {
				since[f.key] = first
			}
		}
	}
	s.since = since
	return again, failed
}

// look lists what has no owner. The API is asked first: what the cluster knows must not be older than what is found there.
func (s *Sweeper) look(ctx context.Context) ([]finding, error) {
	id, err := clusterID(ctx, s.Client)
	if err != nil {
		return nil, err
	}
	sockets, err := s.API.Sockets(ctx, 0)
	if err != nil {
		return nil, err
	}
	var services corev1.ServiceList
	if err := s.Client.List(ctx, &services, client.UnsafeDisableDeepCopy); err != nil {
		return nil, fmt.Errorf("list Services: %w", err)
	}
	var tunnels v1alpha1.TunnelList
	if err := s.Client.List(ctx, &tunnels, client.UnsafeDisableDeepCopy); err != nil {
		return nil, fmt.Errorf("list Tunnels: %w", err)
	}
	byKey := map[client.ObjectKey]*corev1.Service{}
	for i := range services.Items {
		byKey[client.ObjectKeyFromObject(&services.Items[i])] = &services.Items[i]
	}
	named := map[string]bool{}
	var out []finding
	for i := range tunnels.Items {
		t := &tunnels.Items[i]
		named[t.Status.TunnelID] = true
		if s.stale(t, byKey[client.ObjectKey{Namespace: t.Namespace, Name: t.Spec.ServiceName}]) {
			out = append(out, finding{"object " + string(t.UID), func(ctx context.Context) error { return s.dropObject(ctx, t) }})
		}
	}
	for _, k := range sockets {
		owners := ownersOf(k)
		alone := len(owners) > 0
		for o := range owners {
			if o.cluster != id {
				alone = false
				continue
			}
			if s.abandoned(k, o, byKey[client.ObjectKey{Namespace: o.namespace, Name: o.service}], sockets) {
				out = append(out, finding{"socket " + k.ID + " " + o.tag(), func(ctx context.Context) error { return s.dropSocket(ctx, k, o) }})
			} else if s.left(k, o, byKey[client.ObjectKey{Namespace: o.namespace, Name: o.service}]) {
				out = append(out, finding{"claim " + k.ID + " " + o.tag(), func(ctx context.Context) error { return s.dropClaim(ctx, k, o) }})
			}
		}
		if !alone {
			continue
		}
		for _, t := range k.Tunnels {
			if !named[t.ID] {
				out = append(out, finding{"tunnel " + t.ID, func(ctx context.Context) error { return s.dropTunnel(ctx, k, t) }})
			}
		}
	}
	return out, nil
}

// stale tells whether a Tunnel object is of a Service that has no use for it: one that a registration made while the
// Service was being released, say.
func (s *Sweeper) stale(t *v1alpha1.Tunnel, svc *corev1.Service) bool {
	if t.DeletionTimestamp != nil {
		return false
	}
	if svc == nil || !annotations.IsEnabled(svc) {
		return true
	}
	id := svc.Annotations[annotations.SocketID]
	return id != "" && id != t.Spec.SocketID
}

// released tells whether a Service, nil when it is gone, uses no socket at all.
func released(svc *corev1.Service) bool {
	return svc == nil || !controllerutil.ContainsFinalizer(svc, annotations.Finalizer) && !annotations.IsEnabled(svc)
}

// left tells whether a Service that uses no socket is still counted among those that use this one: it went, and wanted the
// socket kept, without a word to Mysocket, or it may have the name that it asks for no more, and so serves nothing. Others
// that share the socket would ask in vain for its consent.
func (s *Sweeper) left(k mysocket.Socket, o owner, svc *corev1.Service) bool {
	if _, uses := othersOf(k, owner{})[o]; !uses {
		return false
	}
	if released(svc) {
		return true
	}
	_, err := s.Names.Of(svc)
	return err != nil
}

// abandoned tells whether a socket names a Service that does not use it.
func (s *Sweeper) abandoned(k mysocket.Socket, o owner, svc *corev1.Service, all []mysocket.Socket) bool {
	if released(svc) {
		return ownersOf(k)[o] != annotations.PolicyRetain
	}
	// It has another one, which names it, too. A retained one that is not its own any more stays.
	i := slices.IndexFunc(all, func(other mysocket.Socket) bool { return other.ID == svc.Annotations[annotations.SocketID] })
	if i < 0 || all[i].ID == k.ID || svc.DeletionTimestamp != nil {
		return false
	}
	_, its := ownersOf(all[i])[o]
	name, err := s.Names.Of(svc)
	return err == nil && its && all[i].Name == name && (k.Name == name || ownersOf(k)[o] != annotations.PolicyRetain)
}

func (s *Sweeper) dropObject(ctx context.Context, t *v1alpha1.Tunnel) error {
	svc, err := s.service(ctx, client.ObjectKey{Namespace: t.Namespace, Name: t.Spec.ServiceName})
	if err != nil || !s.stale(t, svc) {
		return err
	}
	if err := s.Client.Delete(ctx, t, client.Preconditions{UID: &t.UID}); client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("delete Tunnel %s/%s: %w", t.Namespace, t.Name, err)
	}
	ctrl.LoggerFrom(ctx).Info("Tunnel deleted, since its Service has no use for it", "tunnel", t.Namespace+"/"+t.Name, "service", t.Spec.ServiceName)
	return nil
}

func (s *Sweeper) dropSocket(ctx context.Context, k mysocket.Socket, o owner) error {
	svc, err := s.service(ctx, client.ObjectKey{Namespace: o.namespace, Name: o.service})
	if err != nil {
		return err
	}
	all, err := s.API.Sockets(ctx, time.Second) // as another owner may just have come
	if err != nil {
		return err
	}
	i := slices.IndexFunc(all, func(now mysocket.Socket) bool { return now.ID == k.ID })
	if i < 0 {
		return nil
	}
	if _, still := ownersOf(all[i])[o]; !still || !s.abandoned(all[i], o, svc, all) {
		return nil
	}
	deleted, err := disown(ctx, s.API, all[i], o)
	if err != nil {
		return fmt.Errorf("release socket %s, which Service %s/%s does not use: %w", k.ID, o.namespace, o.service, err)
	}
	ctrl.LoggerFrom(ctx).Info("socket released, since the Service that it names does not use it", "service", o.namespace+"/"+o.service, "socket", k.Name, "id", k.ID, "deleted", deleted)
	return nil
}

func (s *Sweeper) dropClaim(ctx context.Context, k mysocket.Socket, o owner) error {
	svc, err := s.service(ctx, client.ObjectKey{Namespace: o.namespace, Name: o.service})
	if err != nil {
		return err
	}
	all, err := s.API.Sockets(ctx, time.Second)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(all, func(now mysocket.Socket) bool { return now.ID == k.ID })
	if i < 0 || !s.left(all[i], o, svc) || s.abandoned(all[i], o, svc, all) {
		return nil
	}
	k = all[i]
	k.Tags = o.claim(k, ownersOf(k)[o])
	if _, err := s.API.UpdateSocket(ctx, k); err != nil {
		return fmt.Errorf("say on socket %s that Service %s/%s uses it no more: %w", k.ID, o.namespace, o.service, err)
	}
	return nil
}

func (s *Sweeper) dropTunnel(ctx context.Context, k mysocket.Socket, t mysocket.Tunnel) error {
	asked := map[string]bool{}
	for o := range ownersOf(k) {
		if asked[o.namespace] {
			continue
		}
		asked[o.namespace] = true
		var list v1alpha1.TunnelList
		if err := s.Live.List(ctx, &list, client.InNamespace(o.namespace)); err != nil {
			return fmt.Errorf("list the Tunnels of %s: %w", o.namespace, err)
		}
		if slices.ContainsFunc(list.Items, func(object v1alpha1.Tunnel) bool { return object.Status.TunnelID == t.ID }) {
			return nil
		}
	}
	if err := s.API.DeleteTunnel(ctx, k.ID, t.ID); err != nil {
		return fmt.Errorf("delete tunnel %s, which no Tunnel object names: %w", t.ID, err)
	}
	ctrl.LoggerFrom(ctx).Info("tunnel deleted at Mysocket, since no Tunnel object names it", "socket", k.Name, "tunnel", t.ID)
	return nil
}

// service asks the API server for a Service; nil if there is none.
func (s *Sweeper) service(ctx context.Context, key client.ObjectKey) (*corev1.Service, error) {
	svc := &corev1.Service{}
	err := s.Live.Get(ctx, key, svc)
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read Service %s: %w", key, err)
	}
	return svc, nil
}
