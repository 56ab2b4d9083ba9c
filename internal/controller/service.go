package controller

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/client-go/tools/events"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/mysocketio/mysocket-injector/api/v1alpha1"
	"github.com/mysocketio/mysocket-injector/internal/annotations"
	"github.com/mysocketio/mysocket-injector/internal/index"
	"github.com/mysocketio/mysocket-injector/internal/mysocket"
)

// Reasons of the SocketReady condition, beside those of annotations.Problem.
const (
	reasonReady         = "Ready"
	reasonAccount       = "AccountRefused"
	reasonSocketRefused = "SocketRefused"
	reasonAPIFailed     = "APIUnavailable"
	reasonDeleteFailed  = "SocketNotDeleted"
	reasonSecret        = "ProtectedSecretUnavailable"
	reasonNotAgreed     = "SharedSettingsDiffer"
)

// ServiceReconciler gives an enabled Service its socket, and takes it away again:
//
//	Service                                   what is done
//	enabled, invalid                          SocketReady=False with the reason; an existing socket is left as it is
//	enabled, valid, Mysocket does not answer  SocketReady=False with the reason; no finalizer yet, so that it can be deleted
//	enabled, valid, its Secret can't be used  SocketReady=False with the reason; nothing is made, and what is open is not served
//	enabled, valid, no socket of its name     finalizer first, then the socket is created
//	enabled, valid, socket of its name        adopted (finalizer first); new settings are asked for, which the edge may refuse
//	  that others use, with other settings    SocketReady=False with the reason; the socket stays as it is (see agree)
//	  a guard that is asked for is missing    noted before anything else, and no pod serves it until the edge has the guard
//	not enabled (or deleted), with finalizer  Tunnels deleted, socket deleted or retained, our annotations, conditions, finalizer removed
//
// A socket is found by its name, never by the annotation alone: names are made from namespace and Service, and the
// annotation can be edited by whoever may edit the Service.
type ServiceReconciler struct {
	Client client.Client
	API    MysocketAPI
	Events events.EventRecorder
	// Namespace is the control plane's own.
	Namespace string
	// Names is what the sockets of Services are called, and who may ask for which name.
	Names annotations.Names
	// LeftOver is told when a Service has gone over to another socket; may be nil.
	LeftOver func()
	// Outdated tells whether a pod's sidecar is not the one that would be injected today.
	Outdated func(*corev1.Pod) bool
	// Secrets reads the Secrets that Services name, without a cache: the control plane may read them only in some namespaces.
	Secrets client.Reader

	making    sync.Mutex // of sockets whose name was asked for, and of claims to them
	refused   refusals
	untagged  untagged
	surplus   surplus
	protected protections
}

// SetupWithManager registers the reconciler.
func (r *ServiceReconciler) SetupWithManager(mgr ctrl.Manager) error {
	const byPod index.Services = "mysocket.io/service"
	if err := byPod.Register(context.Background(), mgr.GetFieldIndexer()); err != nil { // nothing is waited for
		return err
	}
	return ctrl.NewControllerManagedBy(mgr).
		Named("service").
		For(&corev1.Service{}, builder.WithPredicates(changedBeyondStatus())).
		Watches(&v1alpha1.Tunnel{}, handler.EnqueueRequestsFromMapFunc(func(_ context.Context, o client.Object) []reconcile.Request {
			t, ok := o.(*v1alpha1.Tunnel)
			if !ok {
				return nil
			}
			return []reconcile.Request{{NamespacedName: client.ObjectKey{Namespace: t.Namespace, Name: t.Spec.ServiceName}}}
		})).
		Watches(&corev1.Pod{}, onPod(mgr.GetClient(), byPod)).
		Watches(&corev1.Namespace{}, handler.EnqueueRequestsFromMapFunc(servicesOfNamespace(mgr.GetClient()))).
		Watches(&appsv1.Deployment{}, handler.EnqueueRequestsFromMapFunc(servicesOfWorkload(mgr.GetClient()))).
		Watches(&appsv1.StatefulSet{}, handler.EnqueueRequestsFromMapFunc(servicesOfWorkload(mgr.GetClient()))).
		Watches(&appsv1.DaemonSet{}, handler.EnqueueRequestsFromMapFunc(servicesOfWorkload(mgr.GetClient()))).
		WithOptions(controller.Options{MaxConcurrentReconciles: 4, RateLimiter: rateLimiter()}).
		Complete(r)
}

// Reconcile implements reconcile.Reconciler.
func (r *ServiceReconciler) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	svc := &corev1.Service{}
	if err := r.Client.Get(ctx, req.NamespacedName, svc); err != nil {
		r.forget(req.NamespacedName)
		return reconcile.Result{}, client.IgnoreNotFound(err)
	}
	if svc.DeletionTimestamp != nil || !annotations.IsOurs(svc) || svc.Annotations[annotations.Enabled] == "false" {
		r.forget(req.NamespacedName)
		return r.release(ctx, svc)
	}
	spec, err := annotations.Parse(svc, r.Names)
	if err != nil {
		return r.invalid(ctx, svc, err)
	}
	protection, secretErr := r.credentialsOf(ctx, svc.Namespace, spec)
	if protection != nil {
		protection.atEdge = r.protected.known(req.NamespacedName, protection)
	}
	want := wantedOf(spec, protection)
	if err := r.refused.of(req.NamespacedName, want.key(spec.SocketName), time.Now()); err != nil {
		return r.failed(ctx, svc, reasonAPIFailed, err)
	}
	me, err := ownerOf(ctx, r.Client, svc)
	if err != nil {
		return reconcile.Result{}, err
	}
	socket, found, err := r.find(ctx, svc, me, spec.SocketName, 10*time.Second)
	claim := claimOf(spec, want)
	if _, named := svc.Annotations[annotations.SocketName]; named && (!found || socket.Tags[me.tag()] != claim) {
		// Two Services of this cluster that ask for one name must not both find that there is none, nor write their tags at the
		// same moment.
		r.making.Lock()
		defer r.making.Unlock()
	}
	if err == nil && (!found || len(othersOf(socket, me)) > 0 && (socket.Tags[me.tag()] != claim || want.changes(socket, annotations.AppliedOf(svc).Ours))) {
		// Names are not unique at Mysocket: before one is made, the list must be of now. So must it be before one is changed
		// that others change, too: all tags are written back.
		socket, found, err = r.find(ctx, svc, me, spec.SocketName, 0)
	}
	if err != nil {
		return r.failed(ctx, svc, reasonAPIFailed, err)
	}
	if err := r.retractClaims(ctx, svc, me, spec, socket, found); err != nil {
		return reconcile.Result{}, err
	}
	if secretErr != nil {
		// Nothing is made or opened without it. A socket that is protected already stays as it is. Nor is it agreed to anything:
		// what is known of what the Service asks for lacks the protection, and others would take that for its consent.
		return r.failed(ctx, svc, reasonSecret, secretErr)
	}
	if err := r.agree(ctx, me, spec, want, socket); err != nil {
		return r.failed(ctx, svc, reasonAPIFailed, protection.redact(err))
	}
	if controllerutil.AddFinalizer(svc, annotations.Finalizer) {
		// Before there is a socket, so that one is never left behind; but after Mysocket has answered, so that a wrong
		// password does not keep a Service from being deleted.
		before := svc.DeepCopy()
		controllerutil.RemoveFinalizer(before, annotations.Finalizer)
		if err := r.Client.Patch(ctx, svc, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{})); err != nil {
			return unlessConflict(fmt.Errorf("put a finalizer on Service %s: %w", req, err))
		}
	}
	claimed := !found || socket.Tags[me.tag()] == claim
	if socket, err = r.ensureSocket(ctx, svc, me, spec, want, socket, found); err != nil {
		err = protection.redact(err)
		if mysocket.IsRefused(err) || errors.Is(err, errIgnored) {
			// Shorter than the wait for the next attempt, which is not to find this.
			r.refused.remember(req.NamespacedName, want.key(spec.SocketName), err, time.Now().Add(slowRetry/2))
		}
		return r.failed(ctx, svc, reasonAPIFailed, err)
	}
	r.protected.remember(req.NamespacedName, protection)
	before := svc.Annotations[annotations.SocketID]
	applied := spec.Asked()
	if ownersOf(socket)[me] == annotations.PolicyRetain {
		applied = append(applied, annotations.Retain)
	}
	if err := r.annotate(ctx, svc, map[string]string{
		annotations.SocketID: socket.ID,
		annotations.DNSName:  socket.DNSName,
		annotations.URL:      socket.URL(),
		annotations.Applied:  annotations.AppliedValue(applied),
	}); err != nil {
		return reconcile.Result{}, err
	}
	r.tellSocket(svc, socket, found, before)
	if before != "" && before != socket.ID && r.LeftOver != nil {
		r.LeftOver() // the former one, if this Service was its last owner
	}
	if err := r.publishIngress(ctx, svc, socket.DNSName); err != nil {
		return reconcile.Result{}, err
	}
	tunnels, err := r.tunnelsReady(ctx, svc)
	if err != nil {
		return reconcile.Result{}, err
	}
	again := reconcile.Result{RequeueAfter: jitter(recheck)}
	switch tunnels.reason {
	case reasonWaitingForApp:
		again.RequeueAfter = appGrace // a pod that is waiting for its app makes no event when its time is over
	case reasonConnecting, reasonTunnelFailing, reasonWaitingRestart:
		again.RequeueAfter = jitter(unsettled) // nor does a restart
	}
	if !claimed && !r.untagged.has(socket.ID) {
		// Another cluster that wrote its own tag at the same moment has overwritten ours, and nobody was told.
		again.RequeueAfter = min(again.RequeueAfter, jitter(claimCheck))
	}
	wait, err := r.dropSurplus(ctx, req.NamespacedName, spec, socket.ID, time.Now())
	if err != nil {
		return reconcile.Result{}, err
	}
	if wait > 0 {
		again.RequeueAfter = min(again.RequeueAfter, wait)
	}
	if spec.ProtectedSecret != "" {
		again.RequeueAfter = min(again.RequeueAfter, jitter(secretPoll))
	}
	return again, r.setConditions(ctx, svc,
		condition{annotations.SocketReady, true, reasonReady, "the public name is " + socket.URL(), false}, tunnels)
}

// tellSocket records an Event when the Service has got another socket than the one with the id of before, which may be empty.
func (r *ServiceReconciler) tellSocket(svc *corev1.Service, socket mysocket.Socket, found bool, before string) {
	switch {
	case socket.ID == before:
	case found:
		r.Events.Eventf(svc, nil, corev1.EventTypeNormal, "SocketAdopted", "Reconcile", "the socket %q was there already and is used: its public name is %s", socket.Name, socket.DNSName)
	case before == "":
		r.Events.Eventf(svc, nil, corev1.EventTypeNormal, "SocketCreated", "Reconcile", "the socket %q was made: its public name is %s", socket.Name, socket.DNSName)
	default:
		r.Events.Eventf(svc, nil, corev1.EventTypeWarning, "SocketCreated", "Reconcile", "the socket %q was gone at Mysocket and was made anew: its public name is now %s", socket.Name, socket.DNSName)
	}
}

// forget drops what is remembered of a Service that is not public any more.
func (r *ServiceReconciler) forget(service client.ObjectKey) {
	r.refused.forget(service)
	r.surplus.seen(service, false, time.Time{})
	r.protected.remember(service, nil)
}

// ensureSocket creates the Service's socket, or brings the one that was found in line.
func (r *ServiceReconciler) ensureSocket(ctx context.Context, svc *corev1.Service, me owner, spec annotations.Spec, want wanted, socket mysocket.Socket, found bool) (mysocket.Socket, error) {
	if !found {
		made := mysocket.Socket{Name: spec.SocketName, Description: "made by mysocket-injector"}
		// Whatever the Service asks for: should the answer be lost and another one be made, nobody needs to keep this.
		made.Tags = me.claim(made, claimValue(annotations.PolicyDelete, want.settings()))
		want.fill(&made, func(annotations.Setting) bool { return false })
		made, err := r.API.CreateSocket(ctx, made)
		if err != nil {
			return mysocket.Socket{}, err
		}
		ctrl.LoggerFrom(ctx).Info("socket created", "service", svc.Namespace+"/"+svc.Name, "socket", made.Name, "id", made.ID, "url", made.URL())
		return made, want.check(made)
	}
	settled := !want.fill(&socket, annotations.AppliedOf(svc).Ours)
	claim := claimOf(spec, want)
	claimed := socket.Tags[me.tag()] == claim
	if settled && (claimed || r.untagged.has(socket.ID)) {
		return socket, nil
	}
	socket.Tags = me.claim(socket, claim)
	want.addPassword(&socket)
	changed, err := r.API.UpdateSocket(ctx, socket)
	if err != nil {
		return mysocket.Socket{}, err
	}
	if changed.Tags[me.tag()] != claim {
		r.untagged.add(changed.ID)
	}
	ctrl.LoggerFrom(ctx).Info("socket changed", "service", svc.Namespace+"/"+svc.Name, "socket", changed.Name, "id", changed.ID)
	return changed, want.check(changed)
}

// find looks for the socket of this name in the account.
func (r *ServiceReconciler) find(ctx context.Context, svc *corev1.Service, me owner, name string, maxAge time.Duration) (mysocket.Socket, bool, error) {
	all, err := r.API.Sockets(ctx, maxAge)
	if err != nil {
		return mysocket.Socket{}, false, err
	}
	socket, found := choose(all, svc, me, name)
	return socket, found, nil
}

// choose picks the Service's socket. Of several of its name, the one that the Service is annotated with is taken, else one
// that says that it is the Service's, else the one with the smallest id, so that every replica takes the same. Where one of
// them says that it is somebody else's, too, all have to come to the same, whatever each has: the one with the most owners,
// else the one with the smallest id. Two clusters that make one at the same moment meet there.
func choose(all []mysocket.Socket, svc *corev1.Service, me owner, name string) (mysocket.Socket, bool) {
	shared := slices.ContainsFunc(all, func(s mysocket.Socket) bool { return s.Name == name && len(othersOf(s, me)) > 0 })
	rank := func(s *mysocket.Socket) int {
		owners := ownersOf(*s)
		_, mine := owners[me]
		switch {
		case shared:
			return len(owners)
		case s.ID == svc.Annotations[annotations.SocketID]:
			return 2
		case mine:
			return 1
		default:
			return 0
		}
	}
	var best *mysocket.Socket
	for i := range all {
		s := &all[i]
		if s.Name == name && (best == nil || cmp.Or(cmp.Compare(rank(s), rank(best)), cmp.Compare(best.ID, s.ID)) > 0) {
			best = s
		}
	}
	if best == nil {
		return mysocket.Socket{}, false
	}
	return *best, true
}

// invalid says what is wrong with the Service. The gateway assigns it to no pod until it is mended, but its socket, if it
// has one, stays: a typing error must not cost a name.
func (r *ServiceReconciler) invalid(ctx context.Context, svc *corev1.Service, err error) (reconcile.Result, error) {
	var p *annotations.Problem
	if !errors.As(err, &p) {
		return reconcile.Result{}, err
	}
	// No retry: only an edit can mend it, and an edit is an event.
	want := []condition{{annotations.SocketReady, false, p.Reason, p.Message, true}}
	if apimeta.FindStatusCondition(svc.Status.Conditions, annotations.TunnelsReady) != nil {
		want = append(want, condition{annotations.TunnelsReady, false, p.Reason, "the pods serve nothing while the Service is not valid", false})
	}
	return reconcile.Result{}, r.setConditions(ctx, svc, want...)
}

// failed says what Mysocket answered and decides when to try again. reasonAPIFailed gives way to a more special reason.
func (r *ServiceReconciler) failed(ctx context.Context, svc *corev1.Service, reason string, err error) (reconcile.Result, error) {
	retry := time.Duration(0)
	special := func(r string) {
		retry = jitter(slowRetry)
		if reason == reasonAPIFailed {
			reason = r
		}
	}
	switch {
	case errors.Is(err, mysocket.ErrCredentials):
		special(reasonAccount)
	case mysocket.IsRefused(err), errors.Is(err, errIgnored):
		special(reasonSocketRefused)
	case isSecretError(err):
		special(reasonSecret)
	case errors.Is(err, errNotAgreed):
		special(reasonNotAgreed)
	case mysocket.RetryAfter(err) > 0:
		retry = mysocket.RetryAfter(err) + jitter(firstRetry)
	}
	if ctx.Err() != nil {
		return reconcile.Result{}, ctx.Err() // we are shutting down; the API is not to blame
	}
	want := []condition{{annotations.SocketReady, false, reason, err.Error(), true}}
	if reason != reasonDeleteFailed && svc.DeletionTimestamp == nil && annotations.IsEnabled(svc) && svc.Annotations[annotations.SocketID] != "" {
		if spec, err := annotations.Parse(svc, r.Names); err == nil && !spec.Guarded(svc) {
			// The gateway assigns it to no pod any more. A sidecar that has not heard of that must not keep it open.
			if err := r.deleteTunnels(ctx, svc); err != nil {
				return reconcile.Result{}, err
			}
		}
		// Tunnels that there are work on without the API.
		tunnels, err := r.tunnelsReady(ctx, svc)
		if err != nil {
			return reconcile.Result{}, err
		}
		want = append(want, tunnels)
	}
	if condErr := r.setConditions(ctx, svc, want...); condErr != nil {
		return reconcile.Result{}, condErr
	}
	if retry > 0 {
		return reconcile.Result{RequeueAfter: retry}, nil
	}
	return reconcile.Result{}, err
}

// release ends what a Service had: its Tunnels, its socket, and what we wrote on it.
func (r *ServiceReconciler) release(ctx context.Context, svc *corev1.Service) (reconcile.Result, error) {
	if !controllerutil.ContainsFinalizer(svc, annotations.Finalizer) {
		if !annotations.IsOurs(svc) && !hasConditions(svc) {
			return reconcile.Result{}, nil
		}
		return reconcile.Result{}, r.clearConditions(ctx, svc)
	}
	if err := r.deleteTunnels(ctx, svc); err != nil {
		return reconcile.Result{}, err
	}
	retain := policyOf(svc) == annotations.PolicyRetain
	if err := r.releaseSockets(ctx, svc); err != nil {
		what := "deleted"
		if retain {
			what = "marked as one to be kept"
		}
		return r.failed(ctx, svc, reasonDeleteFailed, fmt.Errorf("the socket could not be %s yet: %w", what, err))
	}
	if retain {
		r.tellReleased(ctx, svc, "SocketRetained", "the public name %s was kept, since %s is %q and not %q", svc.Annotations[annotations.DNSName], annotations.DeletionPolicy, svc.Annotations[annotations.DeletionPolicy], annotations.PolicyDelete)
	}
	return r.letGo(ctx, svc)
}

// letGo takes away all that we wrote on a Service, the finalizer last.
func (r *ServiceReconciler) letGo(ctx context.Context, svc *corev1.Service) (reconcile.Result, error) {
	if err := r.clearIngress(ctx, svc); err != nil {
		return reconcile.Result{}, err
	}
	if err := r.clearConditions(ctx, svc); err != nil {
		return reconcile.Result{}, err
	}
	before := svc.DeepCopy()
	controllerutil.RemoveFinalizer(svc, annotations.Finalizer)
	for _, a := range annotations.Own() {
		delete(svc.Annotations, a)
	}
	if err := r.Client.Patch(ctx, svc, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{})); client.IgnoreNotFound(err) != nil {
		return unlessConflict(fmt.Errorf("release Service %s/%s: %w", svc.Namespace, svc.Name, err))
	}
	return reconcile.Result{}, nil
}

// deleteTunnels ends all connections of a Service's socket.
func (r *ServiceReconciler) deleteTunnels(ctx context.Context, svc *corev1.Service) error {
	var tunnels v1alpha1.TunnelList
	if err := r.Client.List(ctx, &tunnels, client.InNamespace(svc.Namespace)); err != nil {
		return fmt.Errorf("list the Tunnels of %s: %w", svc.Namespace, err)
	}
	for i := range tunnels.Items {
		if t := &tunnels.Items[i]; t.Spec.ServiceName == svc.Name && t.DeletionTimestamp == nil {
			if err := r.Client.Delete(ctx, t); client.IgnoreNotFound(err) != nil {
				return fmt.Errorf("delete Tunnel %s/%s: %w", t.Namespace, t.Name, err)
			}
		}
	}
	return nil
}

func (r *ServiceReconciler) tellReleased(ctx context.Context, svc *corev1.Service, reason, format string, args ...any) {
	r.tell(ctx, svc, corev1.EventTypeNormal, reason, format, args...)
}

// tell records an Event of a release, unless the whole namespace goes: that takes no new objects, and the refusal of each
// would be an error in our log.
func (r *ServiceReconciler) tell(ctx context.Context, svc *corev1.Service, kind, reason, format string, args ...any) {
	ns := &corev1.Namespace{}
	if err := r.Client.Get(ctx, client.ObjectKey{Name: svc.Namespace}, ns); err == nil && ns.DeletionTimestamp != nil {
		return
	}
	r.Events.Eventf(svc, nil, kind, reason, "Release", format, args...)
}

// annotate sets our annotations where they differ, and touches nothing else. One without a value is removed.
func (r *ServiceReconciler) annotate(ctx context.Context, svc *corev1.Service, want map[string]string) error {
	before := svc.DeepCopy()
	for k, v := range want {
		if v == "" {
			delete(svc.Annotations, k)
			continue
		}
		if svc.Annotations == nil { // of a load balancer
			svc.Annotations = map[string]string{}
		}
		svc.Annotations[k] = v
	}
	if maps.Equal(before.Annotations, svc.Annotations) {
		return nil
	}
	if err := r.Client.Patch(ctx, svc, client.MergeFrom(before)); err != nil {
		return fmt.Errorf("annotate Service %s/%s: %w", svc.Namespace, svc.Name, err)
	}
	return nil
}
