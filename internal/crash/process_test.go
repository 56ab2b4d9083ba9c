package crash

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net/http"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"github.com/mysocketio/mysocket-injector/internal/annotations"
	"github.com/mysocketio/mysocket-injector/internal/controller"
	"github.com/mysocketio/mysocket-injector/internal/gateway"
	"github.com/mysocketio/mysocket-injector/internal/gatewayapi"
	"github.com/mysocketio/mysocket-injector/internal/mysocket"
)

// fate is what happens at one call of a process.
type fate string

const (
	none       fate = "nothing"
	diesBefore fate = "dies before it takes effect"
	diesAfter  fate = "dies after it took effect"
	fails      fate = "fails"
	answerLost fate = "takes effect and its answer is lost"
)

// fates are those that make a difference for a call. One that only reads has no effect, so that to die at it is to die
// after the call before it. A reconciler that fails is run again, as after a death; the gateway instead takes back what it did.
func fates(call string) []fate {
	switch {
	case strings.HasPrefix(call, "GET "), strings.HasPrefix(call, "POST /login"):
		return []fate{fails}
	case strings.Contains(call, "/"), strings.HasSuffix(call, "Tunnel"):
		return []fate{diesBefore, diesAfter, fails, answerLost}
	default:
		return []fate{diesBefore, diesAfter}
	}
}

var errDead, errFailed, errLost = errors.New("the process is dead"), errors.New("the call failed"), errors.New("the answer was lost")

// process is one life of the control plane: all its parts, and a count of what they ask of others. Writes to the
// Kubernetes API and all requests to the Mysocket API count.
type process struct {
	client.WithWatch // what the parts use

	ctx  context.Context
	kill context.CancelFunc
	api  *mysocket.Client

	services *controller.ServiceReconciler
	tunnels  *controller.TunnelReconciler
	sweeper  *controller.Sweeper
	names    annotations.Names

	at   int // the call that meets its fate, from 1
	fate fate

	mu     sync.Mutex
	dead   bool
	calls  []string
	writes int
}

// start begins a life in which the call number at meets its fate; 0 for none.
func (w *world) start(at int, what fate) *process {
	w.t.Helper()
	p := &process{at: at, fate: what}
	p.ctx, p.kill = context.WithCancel(w.t.Context())
	w.t.Cleanup(p.kill)
	p.WithWatch = p.kubernetes(w.t, w.ns)
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: w.edge.CAPool(), MinVersion: tls.VersionTLS12}}
	w.t.Cleanup(transport.CloseIdleConnections)
	var err error
	p.api, err = mysocket.New(mysocket.Config{
		BaseURL: w.edge.APIURL,
		Credentials: func() (mysocket.Account, error) {
			return mysocket.Account{Email: w.edge.Email, Password: w.edge.Password}, nil
		},
		Transport: &countedTransport{p, transport},
		Version:   "test",
	})
	if err != nil {
		w.t.Fatal(err)
	}
	p.names = annotations.Names{Allowed: map[string][]string{"shop": {w.ns}}}
	p.services = &controller.ServiceReconciler{Client: p, Names: p.names, API: p.api, Events: noEvents{}, Outdated: func(*corev1.Pod) bool { return false }, Secrets: p}
	p.tunnels = &controller.TunnelReconciler{Client: p, API: p.api}
	p.sweeper = &controller.Sweeper{Client: p, Live: p, API: p.api, Names: p.names, Now: func() time.Time { return w.now }}
	return p
}

// gateway returns the gateway's handler. Each request gets its own: nothing tells it here when a Service has changed.
func (p *process) gateway(t *testing.T, w *world) http.Handler {
	t.Helper()
	g, err := gateway.New(gateway.Config{
		Cache: p, Live: p, Reviews: reviews{p}, API: p.api, Changes: &gateway.Changes{}, Names: p.names,
		EdgeAddress: w.edge.SSHAddress, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// call makes a call that counts.
func (p *process) call(name string, write bool, do func() error) error {
	p.mu.Lock()
	if p.dead {
		p.mu.Unlock()
		return errDead
	}
	p.calls = append(p.calls, name)
	if write {
		p.writes++
	}
	what := none
	if len(p.calls) == p.at {
		what = p.fate
	}
	if what == diesBefore || what == diesAfter {
		p.dead = true
	}
	p.mu.Unlock()
	switch what {
	case diesBefore:
		p.kill()
		return errDead
	case diesAfter:
		_ = do()
		p.kill()
		return errDead
	case fails:
		return errFailed
	case answerLost:
		_ = do()
		return errLost
	default:
		return do()
	}
}

func (p *process) isDead() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.dead
}

func (p *process) written() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.writes
}

// met returns the call that met its fate.
func (p *process) met() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.at < 1 || p.at > len(p.calls) {
		return ""
	}
	return p.calls[p.at-1]
}

// kubernetes is the way to the API server. It sees one namespace: cases share a cluster.
func (p *process) kubernetes(t *testing.T, ns string) client.WithWatch {
	t.Helper()
	c, err := client.NewWithWatch(cluster.Config, client.Options{Scheme: cluster.Scheme, Mapper: cluster.Client.RESTMapper()})
	if err != nil {
		t.Fatal(err)
	}
	write := func(verb string, o client.Object, do func(client.Object) error) error {
		clone, ok := o.DeepCopyObject().(client.Object)
		if !ok {
			t.Fatalf("%T is no object", o)
		}
		kind := strings.TrimPrefix(strings.TrimPrefix(typeName(o), "*v1alpha1."), "*v1.")
		err := p.call(verb+" "+kind, true, func() error { return do(clone) })
		if err == nil {
			copyInto(o, clone) // of an answer that is lost, nothing is known
		}
		return err
	}
	return interceptor.NewClient(c, interceptor.Funcs{
		Get: func(ctx context.Context, c client.WithWatch, key client.ObjectKey, o client.Object, opts ...client.GetOption) error {
			if p.isDead() {
				return errDead
			}
			return c.Get(ctx, key, o, opts...)
		},
		List: func(ctx context.Context, c client.WithWatch, list client.ObjectList, opts ...client.ListOption) error {
			if p.isDead() {
				return errDead
			}
			switch list.(type) {
			case *appsv1.DeploymentList, *appsv1.StatefulSetList, *appsv1.DaemonSetList:
				return nil // there are none, and a third of all requests asks for them
			}
			return c.List(ctx, list, append(opts, client.InNamespace(ns))...)
		},
		Create: func(ctx context.Context, c client.WithWatch, o client.Object, opts ...client.CreateOption) error {
			return write("create", o, func(o client.Object) error { return c.Create(ctx, o, opts...) })
		},
		Update: func(ctx context.Context, c client.WithWatch, o client.Object, opts ...client.UpdateOption) error {
			return write("update", o, func(o client.Object) error { return c.Update(ctx, o, opts...) })
		},
		Patch: func(ctx context.Context, c client.WithWatch, o client.Object, patch client.Patch, opts ...client.PatchOption) error {
			return write("patch", o, func(o client.Object) error { return c.Patch(ctx, o, patch, opts...) })
		},
		Delete: func(ctx context.Context, c client.WithWatch, o client.Object, opts ...client.DeleteOption) error {
			return write("delete", o, func(o client.Object) error { return c.Delete(ctx, o, opts...) })
		},
		SubResourcePatch: func(ctx context.Context, c client.Client, sub string, o client.Object, patch client.Patch, opts ...client.SubResourcePatchOption) error {
			return write("patch "+sub+" of", o, func(o client.Object) error { return c.SubResource(sub).Patch(ctx, o, patch, opts...) })
		},
		SubResourceUpdate: func(ctx context.Context, c client.Client, sub string, o client.Object, opts ...client.SubResourceUpdateOption) error {
			return write("update "+sub+" of", o, func(o client.Object) error { return c.SubResource(sub).Update(ctx, o, opts...) })
		},
	})
}

// countedTransport is the way to the Mysocket API.
type countedTransport struct {
	p    *process
	next http.RoundTripper
}

var id = regexp.MustCompile(`[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}`)

// RoundTrip implements http.RoundTripper.
func (c *countedTransport) RoundTrip(r *http.Request) (resp *http.Response, err error) {
	name := r.Method + " " + id.ReplaceAllString(r.URL.Path, "{}")
	write := r.Method != http.MethodGet && !strings.HasSuffix(name, "/login") && !strings.HasSuffix(name, "/signkey")
	err = c.p.call(name, write, func() error {
		// What the API has been asked, it does, whether or not the process is still there.
		resp, err = c.next.RoundTrip(r.WithContext(context.WithoutCancel(r.Context())))
		return err
	})
	if err != nil && resp != nil {
		_ = resp.Body.Close()
		resp = nil
	}
	return resp, err
}

// reviews stands for the API server's reviews of tokens. A token is "namespace/pod/uid" here.
type reviews struct{ client.Writer }

// Create implements client.Writer.
func (reviews) Create(_ context.Context, o client.Object, _ ...client.CreateOption) error {
	r, ok := o.(*authenticationv1.TokenReview)
	if !ok {
		return errors.New("not a review")
	}
	part := strings.Split(r.Spec.Token, "/")
	r.Status = authenticationv1.TokenReviewStatus{
		Authenticated: true, Audiences: []string{gatewayapi.Audience},
		User: authenticationv1.UserInfo{
			Username: "system:serviceaccount:" + part[0] + ":app",
			Extra: map[string]authenticationv1.ExtraValue{
				"authentication.kubernetes.io/pod-name": {part[1]}, "authentication.kubernetes.io/pod-uid": {part[2]},
			},
		},
	}
	return nil
}

type noEvents struct{}

// Eventf implements events.EventRecorder.
func (noEvents) Eventf(runtime.Object, runtime.Object, string, string, string, string, ...any) {}
