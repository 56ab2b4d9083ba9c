package main

import (
	"context"
	"fmt"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/mysocketio/mysocket-injector/api/v1alpha1"
	"github.com/mysocketio/mysocket-injector/internal/annotations"
	"github.com/mysocketio/mysocket-injector/internal/gatewayapi"
)

const serviceAccount = "app"

// workers is how many objects are made at once.
const workers = 16

// inParallel calls do for 0 to n-1, and returns the first error.
func inParallel(ctx context.Context, n int, do func(ctx context.Context, i int) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	next := make(chan int)
	var all sync.WaitGroup
	for range min(workers, n) {
		all.Go(func() {
			for i := range next {
				if err := do(ctx, i); err != nil {
					cancel(err)
				}
			}
		})
	}
	for i := range n {
		select {
		case next <- i:
			continue
		case <-ctx.Done():
		}
		break
	}
	close(next)
	all.Wait()
	return context.Cause(ctx)
}

// namespace makes a namespace with a ServiceAccount for its pods.
func (l *lab) namespace(ctx context.Context, name string, labels map[string]string) error {
	if err := l.Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels}}); err != nil {
		return err
	}
	return l.Create(ctx, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: name, Name: serviceAccount}})
}

func appName(i int) string { return fmt.Sprintf("app-%04d", i) }

// service makes an enabled Service that selects the pods of an app, and the socket that it will adopt, whose id it returns.
func (l *lab) service(ctx context.Context, namespace, app string) (socket string, err error) {
	if socket, err = l.edge.socket(ctx, namespace, app); err != nil {
		return "", err
	}
	return socket, l.Create(ctx, &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: app, Labels: map[string]string{"app": app}, Annotations: map[string]string{annotations.Enabled: "true"}},
		Spec: corev1.ServiceSpec{
			Selector: map[string]string{"app": app},
			Ports:    []corev1.ServicePort{{Name: "http", Port: 80, TargetPort: intstr.FromInt32(8080)}},
		},
	})
}

// podOf is a pod such as a Deployment makes, of ordinary size: probes, environment, resources, the token of its
// ServiceAccount.
func podOf(namespace, name, app string) *corev1.Pod {
	probe := &corev1.Probe{ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: "/healthz", Port: intstr.FromString("http")}}, PeriodSeconds: 5}
	size := corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("100m"), corev1.ResourceMemory: resource.MustParse("128Mi")}
	c := corev1.Container{
		Name:           "app",
		Image:          "registry.example.com/shop/" + app + "@sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
		Ports:          []corev1.ContainerPort{{Name: "http", ContainerPort: 8080}},
		Resources:      corev1.ResourceRequirements{Requests: size, Limits: size},
		ReadinessProbe: probe,
		LivenessProbe:  probe.DeepCopy(),
		VolumeMounts:   []corev1.VolumeMount{{Name: "kube-api-access", MountPath: "/var/run/secrets/kubernetes.io/serviceaccount", ReadOnly: true}},
	}
	for i := range 10 {
		c.Env = append(c.Env, corev1.EnvVar{Name: fmt.Sprintf("SETTING_%d", i), Value: "a value of ordinary length for a setting"})
	}
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: namespace, Name: name,
			Labels:      map[string]string{"app": app, "pod-template-hash": "5d4f8c7b9", "app.kubernetes.io/part-of": "shop", "app.kubernetes.io/managed-by": "bench"},
			Annotations: map[string]string{"prometheus.io/scrape": "true", "prometheus.io/port": "8080"},
			OwnerReferences: []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: app + "-5d4f8c7b9", UID: "3c0ae9c8-6a3c-4f6f-9b5e-0d5b6e3b7a11",
				Controller: ptr.To(true), BlockOwnerDeletion: ptr.To(true)}},
		},
		Spec: corev1.PodSpec{
			ServiceAccountName: serviceAccount,
			Containers:         []corev1.Container{c},
			Volumes: []corev1.Volume{{Name: "kube-api-access", VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{Sources: []corev1.VolumeProjection{
				{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{Path: "token", ExpirationSeconds: ptr.To[int64](3607)}},
				{ConfigMap: &corev1.ConfigMapProjection{LocalObjectReference: corev1.LocalObjectReference{Name: "kube-root-ca.crt"}, Items: []corev1.KeyToPath{{Key: "ca.crt", Path: "ca.crt"}}}},
			}}}}},
		},
	}
}

// run gives a pod the status that a kubelet would.
func (l *lab) run(ctx context.Context, pod *corev1.Pod) error {
	now := metav1.Now()
	pod.Status = corev1.PodStatus{Phase: corev1.PodRunning, HostIP: "10.0.0.1", PodIP: "10.244.1.7", PodIPs: []corev1.PodIP{{IP: "10.244.1.7"}}, StartTime: &now, QOSClass: corev1.PodQOSBurstable}
	for _, c := range []corev1.PodConditionType{corev1.PodReadyToStartContainers, corev1.PodInitialized, corev1.PodReady, corev1.ContainersReady, corev1.PodScheduled} {
		pod.Status.Conditions = append(pod.Status.Conditions, corev1.PodCondition{Type: c, Status: corev1.ConditionTrue, LastTransitionTime: now})
	}
	status := func(c corev1.Container) corev1.ContainerStatus {
		return corev1.ContainerStatus{Name: c.Name, Image: c.Image, ImageID: c.Image, Ready: true, Started: ptr.To(true),
			ContainerID: "containerd://9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08", State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: now}}}
	}
	for _, c := range pod.Spec.InitContainers {
		pod.Status.InitContainerStatuses = append(pod.Status.InitContainerStatuses, status(c))
	}
	for _, c := range pod.Spec.Containers {
		pod.Status.ContainerStatuses = append(pod.Status.ContainerStatuses, status(c))
	}
	return l.Status().Update(ctx, pod)
}

// connect makes the tunnel of a pod at the edge, and the Tunnel object that says that it is connected.
func (l *lab) connect(ctx context.Context, pod *corev1.Pod, service, socket string) error {
	id, err := l.edge.tunnel(ctx, socket)
	if err != nil {
		return err
	}
	t := &v1alpha1.Tunnel{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: pod.Namespace, Name: pod.Name + "-4f6a5db900", Finalizers: []string{annotations.Finalizer},
			OwnerReferences: []metav1.OwnerReference{{APIVersion: "v1", Kind: "Pod", Name: pod.Name, UID: pod.UID}},
		},
		Spec: v1alpha1.TunnelSpec{PodName: pod.Name, ServiceName: service, SocketID: socket, SocketName: annotations.DefaultSocketName("", pod.Namespace, service)},
	}
	if err := l.Create(ctx, t); err != nil {
		return err
	}
	now := metav1.Now()
	t.Status = v1alpha1.TunnelStatus{TunnelID: id, LocalPort: 20000, State: string(gatewayapi.StateConnected), LastTransitionTime: &now}
	return l.Status().Update(ctx, t)
}

// deletePods deletes all pods of namespaces at once: no kubelet has to let go of them.
func (l *lab) deletePods(ctx context.Context, namespaces []string) error {
	for _, ns := range namespaces {
		if err := l.DeleteAllOf(ctx, &corev1.Pod{}, client.InNamespace(ns), client.GracePeriodSeconds(0)); err != nil {
			return err
		}
	}
	return nil
}

// took runs do and says how long it took.
func (l *lab) took(what string, do func() error) error {
	began := time.Now()
	err := do()
	if err == nil {
		l.say("  %s: %.1f s", what, time.Since(began).Seconds())
	}
	return err
}
