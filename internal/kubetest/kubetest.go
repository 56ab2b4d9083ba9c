// Package kubetest runs a real API server and etcd for the tests of a package: one pair for all of them, with our CRDs,
// and without any other part of Kubernetes. What kubelet and controllers would do, a test does itself.
package kubetest

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/go-logr/logr"
	"go.uber.org/goleak"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	apiruntime "k8s.io/apimachinery/pkg/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/envtest"

	"github.com/mysocketio/mysocket-injector/api/v1alpha1"
)

// Patience is how long Eventually waits.
const Patience = 15 * time.Second

// assets names the directory of the binaries.
const assets = "KUBEBUILDER_ASSETS"

// Cluster is an API server. The zero value is none, until Main has started it.
type Cluster struct {
	Config *rest.Config
	Scheme *apiruntime.Scheme
	// Client reads and writes without a cache.
	Client client.Client
}

// Main runs a package's tests with a cluster, for use in TestMain, and returns the exit code. Without KUBEBUILDER_ASSETS there
// is none. Goroutines that are left when all has ended are a failure, too.
func Main(m *testing.M, c *Cluster) int {
	code := run(m, c)
	if code != 0 {
		return code
	}
	if err := goleak.Find(); err != nil {
		return failed(err)
	}
	return 0
}

// run stops the cluster before it returns.
func run(m *testing.M, c *Cluster) (code int) {
	ctrl.SetLogger(logr.Discard())
	if os.Getenv(assets) == "" {
		return m.Run()
	}
	c.Scheme = apiruntime.NewScheme()
	for _, add := range []func(*apiruntime.Scheme) error{clientgoscheme.AddToScheme, v1alpha1.AddToScheme} {
		if err := add(c.Scheme); err != nil {
			return failed(err)
		}
	}
	env := &envtest.Environment{
		CRDDirectoryPaths:        []string{filepath.Join(root(), "charts", "mysocket-injector", "crds")},
		ErrorIfCRDPathMissing:    true,
		ControlPlaneStartTimeout: time.Minute,
		ControlPlaneStopTimeout:  time.Minute,
	}
	config, err := env.Start()
	defer func() {
		if err := env.Stop(); err != nil {
			code = failed(err)
		}
	}()
	if err != nil {
		return failed(err)
	}
	config.QPS = -1
	c.Config = config
	if c.Client, err = client.New(config, client.Options{Scheme: c.Scheme}); err != nil {
		return failed(err)
	}
	return m.Run()
}

func failed(err error) int {
	fmt.Fprintln(os.Stderr, "kubetest:", err)
	return 1
}

// root is the root of the repository.
func root() string {
	_, file, _, _ := runtime.Caller(0)
	return filepath.Dir(filepath.Dir(filepath.Dir(file)))
}

// Require skips the test when there is no cluster.
func (c *Cluster) Require(t testing.TB) {
	t.Helper()
	// Asked for here, too: go test notes what a test reads from the environment, but not what TestMain does, and would
	// take a result of skipped tests from its cache after the variable was set.
	if os.Getenv(assets) == "" || c.Client == nil {
		t.Skip(assets + " is not set: this test needs the binaries of etcd and kube-apiserver (make test sets it)")
	}
}

// Namespace makes a namespace of the test's own, labelled as it likes.
func (c *Cluster) Namespace(t testing.TB, labels map[string]string) string {
	t.Helper()
	c.Require(t)
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "test-", Labels: labels}}
	c.Create(t, ns)
	return ns.Name
}

// Create makes an object, and gives it the status that it has in the argument.
func (c *Cluster) Create(t testing.TB, obj client.Object) {
	t.Helper()
	withStatus, ok := obj.DeepCopyObject().(client.Object)
	if !ok {
		t.Fatalf("%T is no object", obj)
	}
	if err := c.Client.Create(t.Context(), obj); err != nil {
		t.Fatalf("create %T %s: %v", obj, obj.GetName(), err)
	}
	switch obj.(type) {
	case *corev1.Namespace, *corev1.Secret, *corev1.ConfigMap, *corev1.ServiceAccount:
		return
	}
	withStatus.SetName(obj.GetName())
	withStatus.SetResourceVersion(obj.GetResourceVersion())
	withStatus.SetUID(obj.GetUID())
	if err := c.Client.Status().Update(t.Context(), withStatus); err != nil {
		t.Fatalf("write the status of %T %s: %v", obj, obj.GetName(), err)
	}
	c.Get(t, obj)
}

// Get reads an object anew.
func (c *Cluster) Get(t testing.TB, obj client.Object) {
	t.Helper()
	if err := c.Client.Get(t.Context(), client.ObjectKeyFromObject(obj), obj); err != nil {
		t.Fatalf("read %T %s: %v", obj, obj.GetName(), err)
	}
}

// Change reads an object, changes it and writes it back.
func (c *Cluster) Change(t testing.TB, obj client.Object, change func()) {
	t.Helper()
	c.Get(t, obj)
	before, ok := obj.DeepCopyObject().(client.Object)
	if !ok {
		t.Fatalf("%T is no object", obj)
	}
	change()
	if err := c.Client.Patch(t.Context(), obj, client.MergeFrom(before)); err != nil {
		t.Fatalf("change %T %s: %v", obj, obj.GetName(), err)
	}
}

// Delete deletes an object, a pod at once.
func (c *Cluster) Delete(t testing.TB, obj client.Object) {
	t.Helper()
	if err := c.Client.Delete(t.Context(), obj, client.GracePeriodSeconds(0)); err != nil {
		t.Fatalf("delete %T %s: %v", obj, obj.GetName(), err)
	}
}

// Eventually waits until a condition holds.
func Eventually(t testing.TB, what string, condition func(context.Context) bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), Patience)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !condition(ctx) {
		select {
		case <-ctx.Done():
			t.Fatalf("waited %s for: %s", Patience, what)
		case <-tick.C:
		}
	}
}
