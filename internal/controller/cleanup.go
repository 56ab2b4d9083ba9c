package controller

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/go-logr/logr"
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	apimeta "k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/events"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/mysocketio/mysocket-injector/api/v1alpha1"
	"github.com/mysocketio/mysocket-injector/internal/annotations"
)

const (
	cleanupPoll = time.Second
	// cleanupStop is how long the control plane's pods may take to end. Their grace period is 30 s.
	cleanupStop = 45 * time.Second
)

// Cleanup makes an uninstallation leave nothing that nobody would ever remove: it ends the control plane, then releases
// every Service in its place, as the controllers do when one is disabled. In this order:
//
//	webhook configurations   deleted: with failurePolicy Fail, the API server would refuse what follows
//	Deployment               scaled to 0, and its pods waited for: they would put finalizers on again
//	Services, Tunnels        released: sockets deleted or retained, finalizers, annotations and conditions removed
//	what is left at the end  let go without Mysocket, with an Event and a line in the log: nothing may stay in Terminating
type Cleanup struct {
	// Client reads and writes without a cache.
	Client client.Client
	API    MysocketAPI
	Events events.EventRecorder
	Log    *slog.Logger
	// Namespace is the control plane's own, Cluster the cluster's name in socket names. Who may use which other name does not
	// matter here: what is whose at Mysocket is said there.
	Namespace, Cluster string
	// Deployment and WebhookConfiguration are the names of what is stopped first.
	Deployment, WebhookConfiguration string
	// Patience is how long Mysocket may take for all. What is left then is let go without it.
	Patience time.Duration
}

// Run does it. It returns an error only when the cluster itself failed: a second run goes on from there.
func (c *Cleanup) Run(ctx context.Context) error {
	ctx = ctrl.LoggerInto(ctx, logr.FromSlogHandler(c.Log.Handler()))
	if err := c.stop(ctx); err != nil {
		return err
	}
	return c.release(ctx)
}

func (c *Cleanup) stop(ctx context.Context) error {
	name := metav1.ObjectMeta{Name: c.WebhookConfiguration}
	for _, o := range []client.Object{
		&admissionregistrationv1.MutatingWebhookConfiguration{ObjectMeta: name},
		&admissionregistrationv1.ValidatingWebhookConfiguration{ObjectMeta: name},
	} {
		if err := c.Client.Delete(ctx, o); client.IgnoreNotFound(err) != nil {
			return fmt.Errorf("delete the webhook configuration %s: %w", c.WebhookConfiguration, err)
		}
	}
	d := &appsv1.Deployment{}
	if err := c.Client.Get(ctx, client.ObjectKey{Namespace: c.Namespace, Name: c.Deployment}, d); err != nil {
		if apierrors.IsNotFound(err) {
			return nil
		}
		return fmt.Errorf("read the Deployment %s/%s: %w", c.Namespace, c.Deployment, err)
	}
	before := d.DeepCopy()
	none := int32(0)
	d.Spec.Replicas = &none
	if err := c.Client.Patch(ctx, d, client.MergeFrom(before)); client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("scale the Deployment %s/%s to 0: %w", c.Namespace, c.Deployment, err)
	}
	selector, err := metav1.LabelSelectorAsSelector(d.Spec.Selector)
	if err != nil {
		return fmt.Errorf("the selector of the Deployment %s/%s: %w", c.Namespace, c.Deployment, err)
	}
	left := 0
	err = poll(ctx, cleanupStop, func(ctx context.Context) (bool, error) {
		var pods corev1.PodList
		if err := c.Client.List(ctx, &pods, client.InNamespace(c.Namespace), client.MatchingLabelsSelector{Selector: selector}); err != nil {
			return false, fmt.Errorf("list the pods of the Deployment %s/%s: %w", c.Namespace, c.Deployment, err)
		}
		left = 0
		for i := range pods.Items {
			if phase := pods.Items[i].Status.Phase; phase != corev1.PodSucceeded && phase != corev1.PodFailed {
				left++
			}
		}
		return left == 0, nil
	})
	if errors.Is(err, errPatience) {
		c.Log.WarnContext(ctx, "pods of the control plane have not ended; their node may be lost. Going on without them", "pods", left)
		return nil
	}
	if err == nil {
		c.Log.InfoContext(ctx, "the control plane has ended")
	}
	return err
}

func (c *Cleanup) release(ctx context.Context) error {
	services := &ServiceReconciler{Client: c.Client, API: c.API, Events: c.Events, Namespace: c.Namespace, Names: annotations.Names{Cluster: c.Cluster}}
	tunnels := &TunnelReconciler{Client: c.Client, API: c.API}
	var left []client.Object
	var failure error // of the last round
	err := poll(ctx, c.Patience, func(polite context.Context) (bool, error) {
		var err error
		if left, err = c.remaining(ctx); err != nil {
			return false, err
		}
		failure = nil
		for _, o := range left {
			var err error
			switch o := o.(type) {
			case *corev1.Service:
				_, err = services.release(polite, o)
			case *v1alpha1.Tunnel:
				if err = client.IgnoreNotFound(c.Client.Delete(ctx, o)); err == nil {
					_, err = tunnels.Reconcile(polite, reconcile.Request{NamespacedName: client.ObjectKeyFromObject(o)})
				}
			}
			if err != nil && polite.Err() == nil {
				failure = errors.Join(failure, err)
				if forbidden(err) {
					return false, err // no patience helps
				}
			}
		}
		left, err = c.remaining(ctx)
		return len(left) == 0, err
	})
	if err == nil {
		c.Log.InfoContext(ctx, "all Services and Tunnels are released")
		return nil
	}
	if !errors.Is(err, errPatience) {
		return err
	}
	if left, err = c.remaining(ctx); err != nil {
		return err
	}
	c.Log.WarnContext(ctx, "Mysocket did not take all back in time; the rest is let go and stays there", "objects", len(left), "err", short(failure))
	for _, o := range left {
		if err := c.letGo(ctx, services, o); err != nil {
			return err
		}
	}
	return nil
}

// remaining lists what still bears our finalizer or conditions: Services first, since most tunnels go with their socket.
func (c *Cleanup) remaining(ctx context.Context) ([]client.Object, error) {
	var out []client.Object
	var services corev1.ServiceList
	if err := c.Client.List(ctx, &services); err != nil {
		return nil, fmt.Errorf("list Services: %w", err)
	}
	for i := range services.Items {
		if svc := &services.Items[i]; controllerutil.ContainsFinalizer(svc, annotations.Finalizer) || hasConditions(svc) {
			out = append(out, svc)
		}
	}
	var tunnels v1alpha1.TunnelList
	if err := c.Client.List(ctx, &tunnels); err != nil && !apimeta.IsNoMatchError(err) {
		return nil, fmt.Errorf("list Tunnels: %w", err)
	}
	for i := range tunnels.Items {
		out = append(out, &tunnels.Items[i])
	}
	return out, nil
}

// letGo releases an object whatever there is at Mysocket.
func (c *Cleanup) letGo(ctx context.Context, services *ServiceReconciler, o client.Object) error {
	switch o := o.(type) {
	case *corev1.Service:
		if !controllerutil.ContainsFinalizer(o, annotations.Finalizer) {
			return services.clearConditions(ctx, o)
		}
		name := cmp.Or(o.Annotations[annotations.SocketName], annotations.DefaultSocketName(c.Cluster, o.Namespace, o.Name))
		why := "it was not asked in time"
		if cond := apimeta.FindStatusCondition(o.Status.Conditions, annotations.SocketReady); cond != nil && cond.Reason != reasonReady {
			why = cond.Message
		}
		c.Log.WarnContext(ctx, "socket left at Mysocket", "service", o.Namespace+"/"+o.Name, "socket", name, "err", why)
		services.tell(ctx, o, corev1.EventTypeWarning, "SocketLeft", "mysocket-injector was uninstalled, and the socket %q (public name %s) stays at Mysocket: %.700s", name, o.Annotations[annotations.DNSName], why)
		if _, err := services.letGo(ctx, o); err != nil {
			return err
		}
		left := &corev1.Service{}
		if err := c.Client.Get(ctx, client.ObjectKeyFromObject(o), left); err != nil {
			return client.IgnoreNotFound(err)
		}
		if controllerutil.ContainsFinalizer(left, annotations.Finalizer) { // somebody changed it meanwhile
			_, err := services.letGo(ctx, left)
			return err
		}
	case *v1alpha1.Tunnel:
		if err := c.Client.Delete(ctx, o); client.IgnoreNotFound(err) != nil {
			return fmt.Errorf("delete Tunnel %s/%s: %w", o.Namespace, o.Name, err)
		}
		before := o.DeepCopy()
		controllerutil.RemoveFinalizer(o, annotations.Finalizer)
		if err := c.Client.Patch(ctx, o, client.MergeFrom(before)); client.IgnoreNotFound(err) != nil {
			return fmt.Errorf("release Tunnel %s/%s: %w", o.Namespace, o.Name, err)
		}
	}
	return nil
}

// errPatience ends a poll that took too long.
var errPatience = errors.New("not in time")

// poll asks until the answer is yes, an error, or late: errPatience. The context it asks with ends when it is late.
func poll(ctx context.Context, atMost time.Duration, done func(context.Context) (bool, error)) error {
	limited, cancel := context.WithTimeoutCause(ctx, atMost, errPatience)
	defer cancel()
	tick := time.NewTicker(cleanupPoll)
	defer tick.Stop()
	for {
		ok, err := done(limited)
		switch {
		case limited.Err() != nil && ctx.Err() == nil && !ok:
			return errPatience
		case ok || err != nil:
			return err
		}
		select {
		case <-limited.Done():
			return context.Cause(limited)
		case <-tick.C:
		}
	}
}

func forbidden(err error) bool { return apierrors.IsForbidden(err) || apierrors.IsUnauthorized(err) }

// short is what a log line needs of many joined errors.
func short(err error) string {
	if err == nil {
		return ""
	}
	return fmt.Sprintf("%.500s", err.Error())
}
