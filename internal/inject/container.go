package inject

import (
	"maps"
	"strconv"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/utils/ptr"

	"github.com/mysocketio/mysocket-injector/internal/gatewayapi"
)

const (
	minAdminPort = 1024
	maxAdminPort = 65535

	// sidecarUser is the uid and gid that distroless images call nonroot.
	sidecarUser = 65532

	// drainReserve is the part of the pod's grace period that is left after draining, for the sidecar to end its
	// tunnels in order.
	drainReserve = 5 // seconds
	// maxDrain keeps a grace period of any length within what time.ParseDuration reads: 2^63 ns are 292 years.
	maxDrain = 1 << 31 // seconds

	// tokenLifetime of the projected token. The kubelet renews it at 80 %.
	tokenLifetime = 3600 // seconds

	// volumeMode lets any uid read: the kubelet makes the files of a pod whose containers run as different users
	// root's. Only the sidecar mounts the volume.
	volumeMode = 0o444
)

// sidecar returns the container for the pod. Fields that the API server would default are set to its defaults, so that
// a reinvocation finds nothing to change.
func sidecar(pod *corev1.Pod, cfg Config) corev1.Container {
	port := adminPort(&pod.Spec, cfg.AdminPort)
	return corev1.Container{
		Name:            ContainerName,
		Image:           cfg.Image,
		ImagePullPolicy: cfg.ImagePullPolicy,
		RestartPolicy:   ptr.To(corev1.ContainerRestartPolicyAlways),
		Command:         []string{SidecarCommand},
		Args:            arguments(pod, cfg, port),
		Env:             environment(cfg.Resources),
		Ports:           []corev1.ContainerPort{{Name: AdminPortName, ContainerPort: port, Protocol: corev1.ProtocolTCP}},
		Resources:       resources(pod.Spec.Resources, cfg.Resources),
		// The kubelet runs preStop when the deletion begins, and sends a native sidecar its SIGTERM only after the app's
		// containers have ended: drain first, exit last.
		Lifecycle:      &corev1.Lifecycle{PreStop: &corev1.LifecycleHandler{Exec: &corev1.ExecAction{Command: []string{SidecarCommand, "drain"}}}},
		ReadinessProbe: probe("/readyz", port, 2, 2),
		LivenessProbe:  probe("/livez", port, 10, 5),
		// No startup probe: init containers and the app would wait for it.
		TerminationMessagePath:   corev1.TerminationMessagePathDefault,
		TerminationMessagePolicy: corev1.TerminationMessageFallbackToLogsOnError,
		SecurityContext: &corev1.SecurityContext{
			RunAsNonRoot:             ptr.To(true),
			RunAsUser:                ptr.To(user(&pod.Spec)),
			RunAsGroup:               ptr.To[int64](sidecarUser),
			AllowPrivilegeEscalation: ptr.To(false),
			ReadOnlyRootFilesystem:   ptr.To(true),
			Capabilities:             &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}},
			SeccompProfile:           &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault},
		},
		VolumeMounts: []corev1.VolumeMount{{Name: VolumeName, MountPath: MountPath, ReadOnly: true}},
	}
}

func arguments(pod *corev1.Pod, cfg Config, port int32) []string {
	args := []string{
		"run",
		"--gateway=" + cfg.GatewayURL,
		"--admin-address=:" + strconv.Itoa(int(port)),
		"--drain-timeout=" + strconv.FormatInt(drainSeconds(&pod.Spec), 10) + "s",
		"--ready-grace=" + cfg.ReadyGrace.Round(time.Millisecond).String(),
		"--log-level=" + cfg.LogLevel,
		"--log-format=" + cfg.LogFormat,
	}
	if cfg.EdgeProxy != "" {
		args = append(args, "--edge-proxy="+cfg.EdgeProxy)
	}
	return args
}

func environment(r corev1.ResourceRequirements) []corev1.EnvVar {
	env := []corev1.EnvVar{fieldEnv("POD_NAME", "metadata.name"), fieldEnv("POD_NAMESPACE", "metadata.namespace"), fieldEnv("POD_IP", "status.podIP")}
	if limit, ok := r.Limits[corev1.ResourceMemory]; ok && limit.Value() >= 10 {
		// The garbage collector works harder near the limit instead of having the kernel kill the process.
		env = append(env, corev1.EnvVar{Name: "GOMEMLIMIT", Value: strconv.FormatInt(limit.Value()/10*9, 10)})
	}
	return env
}

func fieldEnv(name, path string) corev1.EnvVar {
	return corev1.EnvVar{Name: name, ValueFrom: &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{APIVersion: "v1", FieldPath: path}}}
}

func probe(path string, port, period, timeout int32) *corev1.Probe {
	return &corev1.Probe{
		ProbeHandler:     corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: path, Port: intstr.FromInt32(port), Scheme: corev1.URISchemeHTTP}},
		PeriodSeconds:    period,
		TimeoutSeconds:   timeout,
		SuccessThreshold: 1,
		FailureThreshold: 3,
	}
}

// resources are the configured ones, less those that the pod budgets as a whole: the API server refuses a pod whose
// containers together request more than the pod does, and one more container would tip a pod that adds up exactly.
func resources(pod *corev1.ResourceRequirements, ours corev1.ResourceRequirements) corev1.ResourceRequirements {
	if pod == nil {
		return *ours.DeepCopy()
	}
	without := func(list corev1.ResourceList) corev1.ResourceList {
		list = maps.Clone(list)
		maps.DeleteFunc(list, func(name corev1.ResourceName, _ resource.Quantity) bool {
			_, requested := pod.Requests[name]
			_, limited := pod.Limits[name]
			return requested || limited
		})
		if len(list) == 0 {
			return nil
		}
		return list
	}
	return corev1.ResourceRequirements{Requests: without(ours.Requests), Limits: without(ours.Limits)}
}

func drainSeconds(spec *corev1.PodSpec) int64 {
	grace := int64(corev1.DefaultTerminationGracePeriodSeconds)
	if spec.TerminationGracePeriodSeconds != nil {
		grace = *spec.TerminationGracePeriodSeconds
	}
	return min(max(grace, drainReserve+1)-drainReserve, maxDrain)
}

// adminPort returns the first port from want upwards (going round to the lowest unprivileged one) that no other
// container of the pod is known to listen on.
func adminPort(spec *corev1.PodSpec, want int32) int32 {
	used := map[int32]bool{}
	for _, list := range [][]corev1.Container{spec.InitContainers, spec.Containers} {
		for i := range list {
			if !isOurContainer(list[i]) {
				addPorts(used, &list[i])
			}
		}
	}
	const ports = maxAdminPort - minAdminPort + 1
	for i := range int32(ports) {
		if port := minAdminPort + (want-minAdminPort+i)%ports; !used[port] {
			return port
		}
	}
	return want
}

// addPorts adds the TCP ports that the container declares or is probed on.
func addPorts(used map[int32]bool, c *corev1.Container) {
	for _, p := range c.Ports {
		if p.Protocol == "" || p.Protocol == corev1.ProtocolTCP {
			used[p.ContainerPort] = true
		}
	}
	for _, p := range []*corev1.Probe{c.ReadinessProbe, c.LivenessProbe, c.StartupProbe} {
		switch {
		case p == nil:
		case p.HTTPGet != nil:
			used[p.HTTPGet.Port.IntVal] = true
		case p.TCPSocket != nil:
			used[p.TCPSocket.Port.IntVal] = true
		case p.GRPC != nil:
			used[p.GRPC.Port] = true
		}
	}
}

func gatewayVolume(cfg Config) corev1.Volume {
	return corev1.Volume{Name: VolumeName, VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{
		DefaultMode: ptr.To[int32](volumeMode),
		Sources: []corev1.VolumeProjection{
			{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{
				Audience:          gatewayapi.Audience,
				ExpirationSeconds: ptr.To[int64](tokenLifetime),
				Path:              TokenFile,
			}},
			{ConfigMap: &corev1.ConfigMapProjection{
				LocalObjectReference: corev1.LocalObjectReference{Name: cfg.CAConfigMap},
				// The pod may be created before its namespace has the ConfigMap; the file appears later.
				Optional: ptr.To(true),
				Items:    []corev1.KeyToPath{{Key: CAKey, Path: CAKey}},
			}},
		},
	}}}
}
