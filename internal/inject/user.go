package inject

import (
	"slices"

	corev1 "k8s.io/api/core/v1"
)

// user returns the uid that the sidecar runs as: sidecarUser, unless that would take a token away from the app.
//
// The kubelet decides per pod who may read projected tokens (pkg/volume/projected collectData, pkg/volume/util
// FsUserFrom and SetVolumeOwnership):
//
//   - the pod has fsGroup: 0600, then 0640 with that group, and every container is in the group;
//   - all containers run as one known uid: 0600, owned by it;
//   - otherwise: the volume's defaultMode, owned by root.
//
// So our own token is readable in each case, since volumeMode is for everyone. But a sidecar with a uid of its own moves
// a pod from the second case to the third, and there an app that isn't root loses a token whose defaultMode isn't
// readable by others. In such a pod, and no other, the sidecar runs as the app's user.
func user(spec *corev1.PodSpec) int64 {
	if spec.SecurityContext != nil && spec.SecurityContext.FSGroup != nil {
		return sidecarUser
	}
	app, ok := commonUser(spec)
	if !ok || app == 0 || !slices.ContainsFunc(spec.Volumes, hasPrivateToken) {
		return sidecarUser
	}
	return app
}

// commonUser returns the uid that all containers of the app run as, as the kubelet's FsUserFrom finds it.
func commonUser(spec *corev1.PodSpec) (uid int64, ok bool) {
	for _, c := range slices.Concat(spec.InitContainers, spec.Containers) {
		if isOurContainer(c) {
			continue
		}
		var u *int64
		if spec.SecurityContext != nil {
			u = spec.SecurityContext.RunAsUser
		}
		if c.SecurityContext != nil && c.SecurityContext.RunAsUser != nil {
			u = c.SecurityContext.RunAsUser
		}
		if u == nil || ok && *u != uid {
			return 0, false
		}
		uid, ok = *u, true
	}
	return uid, ok
}

// hasPrivateToken tells whether the volume holds a credential of the app's that its defaultMode hides from others.
func hasPrivateToken(v corev1.Volume) bool {
	p := v.Projected
	if isOurVolume(v) || p == nil || p.DefaultMode == nil || *p.DefaultMode&0o004 != 0 {
		return false
	}
	return slices.ContainsFunc(p.Sources, func(s corev1.VolumeProjection) bool {
		return s.ServiceAccountToken != nil || s.PodCertificate != nil || s.ClusterTrustBundle != nil
	})
}
