package inject

import (
	"fmt"
	"strconv"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/utils/ptr"

	"github.com/mysocketio/mysocket-injector/internal/annotations"
)

// MaxPreStopSleep is the longest sleep that may be asked for, in seconds.
const MaxPreStopSleep = 60

// addPreStop gives the pod's own containers that have no preStop hook one that sleeps: the app then still takes what an edge
// that does not retry sends it while the tunnel leaves the rotation. It is the kubelet's sleep, which needs no program in
// the image. Native sidecars end after the app by themselves, so init containers are left alone.
func addPreStop(pod *corev1.Pod, cfg Config) {
	seconds := preStopSleep(pod, cfg)
	if seconds <= 0 {
		return
	}
	for i := range pod.Spec.Containers {
		c := &pod.Spec.Containers[i]
		if c.Lifecycle != nil && c.Lifecycle.PreStop != nil {
			continue
		}
		if c.Lifecycle == nil {
			c.Lifecycle = &corev1.Lifecycle{}
		}
		c.Lifecycle.PreStop = &corev1.LifecycleHandler{Sleep: &corev1.SleepAction{Seconds: seconds}}
	}
}

// preStopSleep returns how many seconds the pod's containers are to sleep. It is less than the grace period, which the
// sleep is part of: the API server refuses a longer one, and an app needs some time to end.
func preStopSleep(pod *corev1.Pod, cfg Config) int64 {
	seconds := int64(cfg.PreStopSleep)
	if asked, ok, err := askedPreStopSleep(pod); ok && err == nil {
		seconds = asked
	}
	grace := ptr.Deref(pod.Spec.TerminationGracePeriodSeconds, corev1.DefaultTerminationGracePeriodSeconds)
	return min(seconds, grace-1)
}

// askedPreStopSleep reads the pod's annotation; ok is false when there is none.
func askedPreStopSleep(pod *corev1.Pod) (seconds int64, ok bool, err error) {
	text, ok := pod.Annotations[annotations.PodPreStopSleep]
	if !ok {
		return 0, false, nil
	}
	n, err := strconv.ParseUint(text, 10, 16)
	if err != nil || n > MaxPreStopSleep {
		return 0, true, fmt.Errorf("annotation %s has the value %.40q; allowed: 0 to %d, in seconds", annotations.PodPreStopSleep, text, MaxPreStopSleep)
	}
	return int64(n), true, nil
}

// Problem says what is wrong with the pod's own wishes about its injection, nil for nothing. The pod is injected all the same,
// as if it had not uttered them.
func Problem(pod *corev1.Pod) error {
	_, _, err := askedPreStopSleep(pod)
	return err
}
