package gateway

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/mysocketio/mysocket-injector/api/v1alpha1"
	"github.com/mysocketio/mysocket-injector/internal/annotations"
	"github.com/mysocketio/mysocket-injector/internal/gatewayapi"
	"github.com/mysocketio/mysocket-injector/internal/mysocket"
)

// socketListAge is how old the list of sockets may be against which a Service's socket id is checked.
const socketListAge = 30 * time.Second

// register makes the caller's tunnel for a socket, or finds the one it has, and signs its key.
func (s *Server) register(r *http.Request, caller identity) (any, error) {
	var req gatewayapi.RegisterRequest
	if err := decode(r, &req); err != nil {
		return nil, err
	}
	key, err := publicKey(req.PublicKey)
	if err != nil {
		return nil, err
	}
	n, err := connection(r)
	if err != nil {
		return nil, err
	}
	pod, a, err := s.authorize(r.Context(), caller, r.PathValue("socket"), n)
	if err != nil {
		return nil, err
	}
	t, err := s.ensureTunnel(r.Context(), pod, a, n)
	if err != nil {
		return nil, err
	}
	registration, err := s.sign(r.Context(), t, key)
	if errors.Is(err, errTunnelGone) {
		// It was deleted at Mysocket behind our back: make it anew, unless another request has done so.
		if _, err := s.setTunnelID(r.Context(), t, mysocket.Tunnel{}); err != nil {
			return nil, err
		}
		if t, err = s.ensureTunnel(r.Context(), pod, a, n); err != nil {
			return nil, err
		}
		registration, err = s.sign(r.Context(), t, key)
	}
	if err != nil {
		return nil, upstream(err)
	}
	s.Log.Info("replica registered", "pod", caller.String(), "service", a.Service, "socket", a.SocketName, "connection", n, "tunnel", t.Status.TunnelID)
	return registration, nil
}

// renew signs the caller's key for the tunnel it has.
func (s *Server) renew(r *http.Request, caller identity) (any, error) {
	var req gatewayapi.RegisterRequest
	if err := decode(r, &req); err != nil {
		return nil, err
	}
	key, err := publicKey(req.PublicKey)
	if err != nil {
		return nil, err
	}
	n, err := connection(r)
	if err != nil {
		return nil, err
	}
	if _, _, err := s.authorize(r.Context(), caller, r.PathValue("socket"), n); err != nil {
		return nil, err
	}
	t, err := s.tunnelOf(r, caller)
	if err != nil {
		return nil, err
	}
	registration, err := s.sign(r.Context(), t, key)
	if errors.Is(err, errTunnelGone) {
		return nil, refuse(http.StatusNotFound, gatewayapi.ReasonNotFound, "the tunnel does not exist at Mysocket any more; register again")
	}
	if err != nil {
		return nil, upstream(err)
	}
	return registration, nil
}

// report writes the state of the caller's tunnel into its status. A pod that has not registered yet (its app does not
// answer, say) is reported too: its Tunnel object is made here, still without a tunnel at Mysocket.
func (s *Server) report(r *http.Request, caller identity) (any, error) {
	var req gatewayapi.StatusReport
	if err := decode(r, &req); err != nil {
		return nil, err
	}
	if !req.State.Valid() || len(req.Message) > gatewayapi.MaxMessageBytes {
		return nil, refuse(http.StatusBadRequest, gatewayapi.ReasonInvalid, "the state is not one of ours, or the message is longer than %d bytes", gatewayapi.MaxMessageBytes)
	}
	n, err := connection(r)
	if err != nil {
		return nil, err
	}
	socketID := r.PathValue("socket")
	t := &v1alpha1.Tunnel{}
	key := client.ObjectKey{Namespace: caller.namespace, Name: tunnelName(caller.pod, string(caller.uid), socketID, n)}
	err = s.Live.Get(r.Context(), key, t)
	if apierrors.IsNotFound(err) {
		pod, a, claimErr := s.claim(r.Context(), caller, socketID, n)
		if claimErr != nil {
			return nil, claimErr
		}
		t, err = s.ensureObject(r.Context(), pod, a, n)
	}
	if err != nil {
		return nil, fmt.Errorf("read or create Tunnel %s: %w", key, err)
	}
	before := t.DeepCopy()
	if t.Status.State != string(req.State) {
		now := metav1.Now()
		t.Status.LastTransitionTime = &now
	}
	t.Status.State, t.Status.Message = string(req.State), strings.ToValidUTF8(req.Message, "?")
	if err := s.Live.Status().Patch(r.Context(), t, client.MergeFrom(before)); client.IgnoreNotFound(err) != nil {
		return nil, fmt.Errorf("write the status of Tunnel %s/%s: %w", t.Namespace, t.Name, err)
	}
	return nil, nil
}

// withdraw deletes the Tunnel object; the tunnel controller then deletes the tunnel at Mysocket.
func (s *Server) withdraw(r *http.Request, caller identity) (any, error) {
	t, err := s.tunnelOf(r, caller)
	if e, ok := err.(*refusal); ok && e.status == http.StatusNotFound { //nolint:errorlint // ours, never wrapped
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if err := s.Live.Delete(r.Context(), t, client.Preconditions{UID: &t.UID}); client.IgnoreNotFound(err) != nil {
		return nil, fmt.Errorf("delete Tunnel %s/%s: %w", t.Namespace, t.Name, err)
	}
	return nil, nil
}

// claim checks that an enabled Service of the caller's namespace selects it now, is annotated with this socket, and asks
// for a connection of this number.
func (s *Server) claim(ctx context.Context, caller identity, socketID string, n int) (*corev1.Pod, gatewayapi.Assignment, error) {
	pod, err := s.podOf(ctx, caller)
	if err != nil {
		return nil, gatewayapi.Assignment{}, err
	}
	if pod.DeletionTimestamp != nil {
		return nil, gatewayapi.Assignment{}, forbidden("pod %s is being deleted and gets no new tunnel", caller)
	}
	list, err := s.assignedTo(ctx, pod)
	if err != nil {
		return nil, gatewayapi.Assignment{}, err
	}
	i := slices.IndexFunc(list, func(a gatewayapi.Assignment) bool { return a.SocketID == socketID })
	if i < 0 {
		return nil, gatewayapi.Assignment{}, forbidden("no enabled Service of namespace %s that selects pod %s has the socket %s", caller.namespace, caller.pod, socketID)
	}
	if want := list[i].Connections; n >= want {
		return nil, gatewayapi.Assignment{}, forbidden("Service %s/%s asks for %d connections for each pod, and connection %d is beyond them (annotation %s)", caller.namespace, list[i].Service, want, n, annotations.Connections)
	}
	return pod, list[i], nil
}

// authorize decides whether the caller may act for a socket now. What the Service is annotated with is only a claim (its
// owner can edit it), so the socket's name is checked at Mysocket: an id stolen from another namespace has another name.
func (s *Server) authorize(ctx context.Context, caller identity, socketID string, n int) (*corev1.Pod, gatewayapi.Assignment, error) {
	pod, a, err := s.claim(ctx, caller, socketID, n)
	if err != nil {
		return nil, a, err
	}
	for _, age := range []time.Duration{socketListAge, time.Second} {
		sockets, err := s.API.Sockets(ctx, age)
		if err != nil {
			return nil, a, upstream(err)
		}
		j := slices.IndexFunc(sockets, func(k mysocket.Socket) bool { return k.ID == socketID })
		if j < 0 {
			continue // perhaps newer than the list
		}
		if sockets[j].Name != a.SocketName {
			return nil, a, forbidden("annotation %s of Service %s/%s names the socket %s, which is not the Service's own", annotations.SocketID, caller.namespace, a.Service, socketID)
		}
		return pod, a, nil
	}
	return nil, a, forbidden("socket %s of Service %s/%s does not exist at Mysocket", socketID, caller.namespace, a.Service)
}

// tunnelName is the name of the Tunnel object of one pod, socket and connection: the same whenever the pod registers again.
func tunnelName(pod string, uid string, socketID string, n int) string {
	of := uid + "/" + socketID
	if n > 0 { // the first has the name that it had when there was only one
		of += "/" + strconv.Itoa(n)
	}
	sum := sha256.Sum256([]byte(of))
	return strings.TrimRight(pod[:min(len(pod), 240)], "-.") + "-" + hex.EncodeToString(sum[:5])
}

// tunnelOf reads the caller's Tunnel object for the socket, tunnel and connection that the request names. It is found by the
// caller's own name and UID, so no pod can reach another's.
func (s *Server) tunnelOf(r *http.Request, caller identity) (*v1alpha1.Tunnel, error) {
	n, err := connection(r)
	if err != nil {
		return nil, err
	}
	t := &v1alpha1.Tunnel{}
	key := client.ObjectKey{Namespace: caller.namespace, Name: tunnelName(caller.pod, string(caller.uid), r.PathValue("socket"), n)}
	err = s.Live.Get(r.Context(), key, t)
	if apierrors.IsNotFound(err) || err == nil && (t.Status.TunnelID != r.PathValue("tunnel") || t.DeletionTimestamp != nil) {
		return nil, refuse(http.StatusNotFound, gatewayapi.ReasonNotFound, "pod %s has no tunnel %s; register again", caller, r.PathValue("tunnel"))
	}
	if err != nil {
		return nil, fmt.Errorf("read Tunnel %s: %w", key, err)
	}
	return t, nil
}

// ensureObject returns the Tunnel object of a pod, socket and connection.
func (s *Server) ensureObject(ctx context.Context, pod *corev1.Pod, a gatewayapi.Assignment, n int) (*v1alpha1.Tunnel, error) {
	t := &v1alpha1.Tunnel{
		ObjectMeta: metav1.ObjectMeta{
			Namespace:  pod.Namespace,
			Name:       tunnelName(pod.Name, string(pod.UID), a.SocketID, n),
			Finalizers: []string{annotations.Finalizer},
			OwnerReferences: []metav1.OwnerReference{
				{APIVersion: "v1", Kind: "Pod", Name: pod.Name, UID: pod.UID},
			},
		},
		Spec: v1alpha1.TunnelSpec{
			PodName: pod.Name, ServiceName: a.Service, SocketID: a.SocketID, SocketName: a.SocketName,
			Connection: int32(n), //nolint:gosec // below MaxConnections
		},
	}
	err := s.Live.Create(ctx, t)
	if apierrors.IsAlreadyExists(err) {
		err = s.Live.Get(ctx, client.ObjectKeyFromObject(t), t)
	}
	if err != nil {
		return nil, fmt.Errorf("create Tunnel %s/%s: %w", t.Namespace, t.Name, err)
	}
	if t.DeletionTimestamp != nil {
		return nil, unavailable("the pod's former tunnel of this socket is still being deleted; try again")
	}
	return t, nil
}

// ensureTunnel returns the Tunnel object of a pod, socket and connection with a tunnel at Mysocket behind it. The object, with its
// finalizer, exists before the tunnel does, so that a tunnel always has someone to delete it.
func (s *Server) ensureTunnel(ctx context.Context, pod *corev1.Pod, a gatewayapi.Assignment, n int) (*v1alpha1.Tunnel, error) {
	t, err := s.ensureObject(ctx, pod, a, n)
	if err != nil {
		return nil, err
	}
	if t.Status.TunnelID != "" {
		return t, nil
	}
	made, err := s.API.CreateTunnel(ctx, a.SocketID)
	if err != nil {
		var answer *mysocket.APIError
		if !errors.As(err, &answer) || answer.Status >= http.StatusInternalServerError {
			s.leftOver() // it may have been made all the same
		}
		return nil, upstream(err)
	}
	recorded, err := s.setTunnelID(ctx, t, made)
	if recorded {
		return t, nil
	}
	// Nobody would know of it: take it back. The request's time may be what ran out.
	undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	if undoErr := s.API.DeleteTunnel(undo, a.SocketID, made.ID); undoErr != nil {
		s.Log.Error("a tunnel was made at Mysocket that could be neither recorded nor deleted; the leader will find it", "socket", a.SocketName, "tunnel", made.ID, "err", undoErr)
		s.leftOver()
	}
	if err != nil {
		return nil, err
	}
	// Another request of this pod was first, or it has withdrawn.
	if t, err = s.ensureObject(ctx, pod, a, n); err != nil {
		return nil, err
	}
	if t.Status.TunnelID == "" {
		return nil, unavailable("another request is registering this pod for the same socket; try again")
	}
	return t, nil
}

func (s *Server) leftOver() {
	if s.LeftOver != nil {
		s.LeftOver()
	}
}

// setTunnelID records a tunnel, and tells whether it did: not if the object has got another one meanwhile, or is going.
// t is then as it was read last.
func (s *Server) setTunnelID(ctx context.Context, t *v1alpha1.Tunnel, made mysocket.Tunnel) (bool, error) {
	former := t.Status.TunnelID
	for range 10 {
		before := t.DeepCopy()
		t.Status.TunnelID, t.Status.LocalPort = made.ID, int32(made.LocalPort) //nolint:gosec // the client checked the range
		err := s.Live.Status().Patch(ctx, t, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{}))
		if err == nil {
			return true, nil
		}
		if apierrors.IsConflict(err) {
			// As a rule it is the sidecar's report of its state, which comes at the same time.
			fresh := &v1alpha1.Tunnel{}
			if err = s.Live.Get(ctx, client.ObjectKeyFromObject(t), fresh); err == nil {
				gone := fresh.UID != t.UID || fresh.DeletionTimestamp != nil
				*t = *fresh
				if gone || t.Status.TunnelID != former {
					return false, nil
				}
				continue
			}
		}
		if apierrors.IsNotFound(err) {
			return false, nil
		}
		return false, fmt.Errorf("record tunnel %s in Tunnel %s/%s: %w", made.ID, t.Namespace, t.Name, err)
	}
	return false, unavailable("Tunnel %s/%s changes too often to be written; try again", t.Namespace, t.Name)
}

// errTunnelGone means that Mysocket does not know the tunnel (any more).
var errTunnelGone = errors.New("the tunnel does not exist at Mysocket")

// sign has the caller's key signed for a tunnel and puts together all it needs to log in.
func (s *Server) sign(ctx context.Context, t *v1alpha1.Tunnel, key string) (*gatewayapi.Registration, error) {
	user, err := s.API.Login(ctx)
	if err != nil {
		return nil, err
	}
	signed, err := s.API.SignKey(ctx, t.Spec.SocketID, t.Status.TunnelID, key)
	if mysocket.IsNotFound(err) {
		return nil, fmt.Errorf("%w: %w", errTunnelGone, err)
	}
	if err != nil {
		return nil, err
	}
	hostKeys := s.EdgeHostKeys
	if len(hostKeys) == 0 {
		line, err := hostKeyLine(signed.HostKey)
		if err != nil {
			return nil, err
		}
		hostKeys = []string{line}
	}
	return &gatewayapi.Registration{
		TunnelID:    t.Status.TunnelID,
		Certificate: strings.TrimSpace(signed.Certificate),
		User:        user,
		EdgeAddress: s.EdgeAddress,
		HostKeys:    hostKeys,
		ForwardHost: "localhost",
		ForwardPort: uint32(t.Status.LocalPort), //nolint:gosec // never negative
	}, nil
}

// hostKeyLine turns the host_key of a signing answer (base64 of the wire form) into an authorized_keys line.
func hostKeyLine(wire string) (string, error) {
	if wire == "" {
		return "", fmt.Errorf("the Mysocket API gives no SSH host key, and none is pinned: set the chart's value mysocket.sshHostKeys")
	}
	raw, err := base64.StdEncoding.DecodeString(wire)
	if err != nil {
		return "", fmt.Errorf("the Mysocket API's host_key is not base64")
	}
	key, err := ssh.ParsePublicKey(raw)
	if err != nil {
		return "", fmt.Errorf("the Mysocket API's host_key is not an SSH public key")
	}
	return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(key))), nil
}

// publicKey validates a key that a sidecar wants signed and returns it in its plain form.
func publicKey(line string) (string, error) {
	key, _, options, rest, err := ssh.ParseAuthorizedKey([]byte(line))
	if err != nil || len(options) > 0 || len(rest) > 0 {
		return "", refuse(http.StatusBadRequest, gatewayapi.ReasonInvalid, "publicKey is not one SSH public key in authorized_keys form")
	}
	switch key.Type() {
	case ssh.KeyAlgoED25519, ssh.KeyAlgoECDSA256, ssh.KeyAlgoECDSA384, ssh.KeyAlgoECDSA521:
		return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(key))), nil
	}
	return "", refuse(http.StatusBadRequest, gatewayapi.ReasonInvalid, "publicKey has the type %s; allowed: ssh-ed25519, ecdsa-sha2-nistp256, -384, -521", key.Type())
}
