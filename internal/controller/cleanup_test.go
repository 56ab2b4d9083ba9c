package controller

import (
	"context"
	"io"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"github.com/mysocketio/mysocket-injector/api/v1alpha1"
	"github.com/mysocketio/mysocket-injector/internal/annotations"
	"github.com/mysocketio/mysocket-injector/internal/mysocket"
	"github.com/mysocketio/mysocket-injector/internal/mysocket/mysockettest"
)

// cleanupClient sees the test's own namespace alone: a cleanup is for a whole cluster, and the tests share one.
func (s *stage) cleanupClient() client.Client {
	s.t.Helper()
	return interceptor.NewClient(withWatch(s.t), interceptor.Funcs{
		List: func(ctx context.Context, c client.WithWatch, list client.ObjectList, opts ...client.ListOption) error {
			return c.List(ctx, list, append(opts, client.InNamespace(s.ns))...)
		},
	})
}

func (s *stage) cleanup() *Cleanup {
	return &Cleanup{
		Client: s.cleanupClient(), API: s.api, Events: s.events, Log: slog.New(slog.NewTextHandler(io.Discard, nil)),
		Namespace: s.ns, Deployment: "mysocket-injector", WebhookConfiguration: "mysocket-injector." + s.ns, Patience: 20 * time.Second,
	}
}

// live is a Service that has its socket and a pod with its tunnel.
func (s *stage) live(name string, more ...string) (*corev1.Service, *v1alpha1.Tunnel) {
	s.t.Helper()
	svc := s.service(enabled(more...), func(svc *corev1.Service) {
		svc.Name, svc.Spec.Selector = name, map[string]string{"app": name}
	})
	s.mustReconcile(svc)
	remote, err := s.api.CreateTunnel(s.t.Context(), svc.Annotations[annotations.SocketID])
	if err != nil {
		s.t.Fatal(err)
	}
	pod := s.pod(name+"-1", injected, func(pod *corev1.Pod) { pod.Labels["app"] = name })
	return svc, s.tunnel(svc, pod, v1alpha1.TunnelStatus{TunnelID: remote.ID, State: "Connected"})
}

func (s *stage) isGone(o client.Object) bool {
	s.t.Helper()
	err := cluster.Client.Get(s.t.Context(), client.ObjectKeyFromObject(o), o)
	if client.IgnoreNotFound(err) != nil {
		s.t.Fatal(err)
	}
	return err != nil
}

func TestCleanup(t *testing.T) {
	s := newStage(t)
	deleted, deletedTunnel := s.live("deleted")
	retained, retainedTunnel := s.live("retained", annotations.DeletionPolicy, "retain")
	ending, _ := s.live("ending")
	cluster.Delete(t, ending) // in Terminating, since there is nobody to release it
	invalid := s.service(enabled(annotations.Type, "x"), func(svc *corev1.Service) { svc.Name = "invalid" })
	s.mustReconcile(invalid)
	stranger := s.service(nil, func(svc *corev1.Service) { svc.Name = "stranger" })
	version := stranger.ResourceVersion
	s.events.take()

	labels := map[string]string{"app": "control-plane"}
	d := &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Namespace: s.ns, Name: "mysocket-injector"},
		Spec:       appsv1.DeploymentSpec{Replicas: ptr.To[int32](2), Selector: &metav1.LabelSelector{MatchLabels: labels}, Template: template()},
	}
	d.Spec.Template.Labels = labels
	cluster.Create(t, d)
	controlPlane := s.pod("control-plane", func(pod *corev1.Pod) { pod.Labels = labels })
	c := s.cleanup()
	for _, o := range []client.Object{
		&admissionregistrationv1.MutatingWebhookConfiguration{ObjectMeta: metav1.ObjectMeta{Name: c.WebhookConfiguration}},
		&admissionregistrationv1.ValidatingWebhookConfiguration{ObjectMeta: metav1.ObjectMeta{Name: c.WebhookConfiguration}},
	} {
		if err := cluster.Client.Create(t.Context(), o); err != nil {
			t.Fatal(err)
		}
		defer func() {
			if !s.isGone(o) {
				t.Errorf("%T is still there", o)
			}
		}()
	}

	done := make(chan error, 1)
	go func() { done <- c.Run(t.Context()) }()
	eventually(t, "the Deployment to be scaled to 0", func(ctx context.Context) bool {
		return cluster.Client.Get(ctx, client.ObjectKeyFromObject(d), d) == nil && *d.Spec.Replicas == 0
	})
	if cluster.Get(t, deleted); !hasFinalizer(deleted) {
		t.Error("a Service was released while the control plane was running")
	}
	cluster.Delete(t, controlPlane)
	if err := <-done; err != nil {
		t.Fatal(err)
	}

	for _, svc := range []*corev1.Service{deleted, retained, invalid} {
		cluster.Get(t, svc)
		wantUntouched(t, svc)
		if svc.Annotations[annotations.Enabled] != "true" {
			t.Errorf("Service %s lost what its owner wrote: %v", svc.Name, svc.Annotations)
		}
	}
	for _, o := range []client.Object{ending, deletedTunnel, retainedTunnel} {
		if !s.isGone(o) {
			t.Errorf("%s is still there", o.GetName())
		}
	}
	if cluster.Get(t, stranger); stranger.ResourceVersion != version {
		t.Error("somebody else's Service was changed")
	}
	list := s.sockets()
	if len(list) != 1 || list[0].Name != "k8s "+s.ns+".retained" || len(list[0].Tunnels) != 0 {
		t.Errorf("sockets %+v, want the retained one without tunnels", list)
	}
	events := strings.Join(s.events.take(), "\n")
	if strings.Count(events, "Normal SocketDeleted") != 2 || strings.Count(events, "Normal SocketRetained") != 1 || strings.Contains(events, "Warning") {
		t.Errorf("events %s", events)
	}

	if err := s.cleanup().Run(t.Context()); err != nil { // nothing is left to do, which is no error
		t.Error(err)
	}
}

// TestCleanupWithoutMysocket: nothing is stuck even then.
func TestCleanupWithoutMysocket(t *testing.T) {
	for name, spoil := range map[string]func(*stage){
		"unreachable": func(s *stage) { s.proxy.FailAlways("GET /socket", mysockettest.Refused) },
		"wrong password": func(s *stage) {
			s.api = s.proxy.ClientOf(s.t, mysocket.Account{Email: s.edge.Email, Password: "wrong wrong wrong"})
		},
		"silent": func(s *stage) {
			s.proxy.FailAlways("GET /socket", mysockettest.Answer(429, "", "Retry-After", "1000"))
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStage(t)
			svc, tunnel := s.live("web")
			ending, _ := s.live("ending")
			cluster.Delete(t, ending)
			s.events.take()
			spoil(s)
			s.proxy.FailAlways("DELETE /socket/{}/tunnel/{}", mysockettest.Answer(500, ""))
			c := s.cleanup()
			c.Patience = 2 * cleanupPoll
			if err := c.Run(t.Context()); err != nil {
				t.Fatal(err)
			}
			cluster.Get(t, svc)
			wantUntouched(t, svc)
			if !s.isGone(tunnel) || !s.isGone(ending) {
				t.Error("the Tunnel or the Service that was being deleted is still there")
			}
			events := strings.Join(s.events.take(), "\n")
			if strings.Count(events, `Warning SocketLeft: mysocket-injector was uninstalled, and the socket "k8s `+s.ns+`.web" (public name `) != 1 || !strings.Contains(events, "stays at Mysocket: the socket could not be deleted yet") {
				t.Errorf("events %s", events)
			}
		})
	}
}

// TestCleanupWithoutRights fails at once and says what is missing.
func TestCleanupWithoutRights(t *testing.T) {
	s := newStage(t)
	svc, _ := s.live("web")
	c := s.cleanup()
	c.Client = interceptor.NewClient(withWatch(t), interceptor.Funcs{
		List: func(ctx context.Context, c client.WithWatch, list client.ObjectList, opts ...client.ListOption) error {
			return c.List(ctx, list, append(opts, client.InNamespace(s.ns))...)
		},
		Patch: func(_ context.Context, _ client.WithWatch, o client.Object, _ client.Patch, _ ...client.PatchOption) error {
			return apierrors.NewForbidden(corev1.Resource("services"), o.GetName(), nil)
		},
	})
	if err := c.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "forbidden") {
		t.Errorf("got %v", err)
	}
	if cluster.Get(t, svc); !hasFinalizer(svc) {
		t.Error("released all the same")
	}
}

// TestDeletedWhileNobodyWasThere has a namespace's objects deleted while no controller runs, as a namespace's deletion does.
func TestDeletedWhileNobodyWasThere(t *testing.T) {
	s := newStage(t)
	svc, tunnel := s.live("web")
	pods := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: s.ns, Name: "web-1"}}
	for _, o := range []client.Object{svc, tunnel, pods, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: s.ns}}} {
		cluster.Delete(t, o)
	}
	if s.isGone(svc) || s.isGone(tunnel) {
		t.Fatal("gone without us")
	}
	start(t, s.ns, func(m managed) []setup {
		return []setup{
			&ServiceReconciler{Client: m.GetClient(), API: s.api, Events: s.events, Outdated: outdated},
			&TunnelReconciler{Client: m.GetClient(), API: s.api},
		}
	})
	eventually(t, "all to go", func(context.Context) bool { return s.isGone(svc) && s.isGone(tunnel) && len(s.sockets()) == 0 })
	for _, e := range s.events.take() {
		if strings.Contains(e, "Warning") {
			t.Errorf("event %s", e)
		}
	}
}

func TestDirectEvents(t *testing.T) {
	s := newStage(t)
	svc := s.service(nil)
	e := &DirectEvents{Client: cluster.Client, Log: slog.New(slog.NewTextHandler(t.Output(), nil)), Instance: "cleanup-1"}
	e.Eventf(svc, nil, corev1.EventTypeWarning, "SocketLeft", "Release", "%s", strings.Repeat("é", maxMessage))
	e.Eventf(svc, nil, corev1.EventTypeNormal, "SocketDeleted", "Release", "the name %s", "x")
	var list eventsv1.EventList
	if err := cluster.Client.List(t.Context(), &list, client.InNamespace(s.ns)); err != nil {
		t.Fatal(err)
	}
	// The API server itself tells of a new Service whose address its repair loop does not know yet.
	list.Items = slices.DeleteFunc(list.Items, func(e eventsv1.Event) bool { return e.ReportingController != "mysocket-injector" })
	if len(list.Items) != 2 {
		t.Fatalf("%d Events", len(list.Items))
	}
	for _, got := range list.Items {
		if got.Regarding.Kind != "Service" || got.Regarding.APIVersion != "v1" || got.Regarding.Name != "web" || got.Regarding.UID != svc.UID ||
			got.Reason == "SocketDeleted" && got.Note != "the name x" || got.Reason == "SocketLeft" && len(got.Note) > maxMessage {
			t.Errorf("Event %+v", got)
		}
	}
	e.Eventf(&metav1.Status{}, nil, corev1.EventTypeNormal, "X", "X", "of nothing")
}
