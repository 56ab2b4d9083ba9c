package gateway

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/mysocketio/mysocket-injector/internal/gatewayapi"
)

// Keys that the API server sets in a TokenReview for a token that is bound to a pod (KEP-1205).
const (
	extraPodName = "authentication.kubernetes.io/pod-name"
	extraPodUID  = "authentication.kubernetes.io/pod-uid"
)

// identity is the pod that a token is bound to.
type identity struct {
	namespace, pod string
	uid            types.UID
}

func (i identity) String() string { return i.namespace + "/" + i.pod }

// authenticated finds out who calls, and whether it may call again so soon, before h answers. The pod must exist now.
func (s *Server) authenticated(as kind, h func(http.ResponseWriter, *http.Request, identity)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(s.limits.request)) // of the body
		c := connOf(r)
		caller, err := s.identify(r)
		if err == nil {
			if c != nil && c.isKnown(string(caller.uid)) {
				w.Header().Set("Connection", "close")
			}
			err = s.allow(as, caller)
		} else {
			w.Header().Set("Connection", "close")
			if e, ok := errors.AsType[*refusal](err); ok && e.status == http.StatusUnauthorized && (c == nil || !c.isStranger()) {
				s.failing.take(sourceOf(r.RemoteAddr)) // a stranger's connection is counted when it closes
			}
		}
		if err == nil {
			_, err = s.podOf(r.Context(), caller)
		}
		if err != nil {
			s.fail(w, r, caller, err)
			return
		}
		h(w, r, caller)
	})
}

// allow counts one call of a pod.
func (s *Server) allow(as kind, caller identity) error {
	wait := s.allowances[as].take(string(caller.uid))
	if wait == 0 {
		return nil
	}
	s.metrics.limited.WithLabelValues(string(as)).Inc()
	return &refusal{http.StatusTooManyRequests, gatewayapi.ReasonTooMany, fmt.Sprintf("pod %s asks too often", caller), wait}
}

func (s *Server) identify(r *http.Request) (identity, error) {
	token, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if !ok || token == "" {
		return identity{}, refuse(http.StatusUnauthorized, gatewayapi.ReasonUnauthenticated, "the request has no bearer token")
	}
	return s.reviews.identify(r.Context(), token, func() error {
		wait := s.failing.wait(sourceOf(r.RemoteAddr))
		if wait == 0 {
			return nil
		}
		s.metrics.limited.WithLabelValues("source").Inc()
		return &refusal{http.StatusTooManyRequests, gatewayapi.ReasonTooMany, "too many requests without a valid token came from this address", wait}
	})
}

// review has the API server review a token.
func (s *Server) review(ctx context.Context, token string) (identity, error) {
	review := &authenticationv1.TokenReview{Spec: authenticationv1.TokenReviewSpec{Token: token, Audiences: []string{gatewayapi.Audience}}}
	by := s.Reviews
	if by == nil {
		by = s.Live
	}
	if err := by.Create(ctx, review); err != nil {
		// An API server's error may quote the object, and so the token.
		return identity{}, unavailable("the gateway could not have the token reviewed (%s)", apierrors.ReasonForError(err))
	}
	return identityOf(&review.Status)
}

// identityOf reads the bound pod out of a review.
func identityOf(st *authenticationv1.TokenReviewStatus) (identity, error) {
	unauthenticated := func(why string) (identity, error) {
		return identity{}, refuse(http.StatusUnauthorized, gatewayapi.ReasonUnauthenticated, "%s", why)
	}
	if !st.Authenticated || !slices.Contains(st.Audiences, gatewayapi.Audience) {
		return unauthenticated(fmt.Sprintf("the token is not valid for the audience %q", gatewayapi.Audience))
	}
	account, ok := strings.CutPrefix(st.User.Username, "system:serviceaccount:")
	namespace, _, found := strings.Cut(account, ":")
	name, uid := st.User.Extra[extraPodName], st.User.Extra[extraPodUID]
	if !ok || !found || namespace == "" || len(name) != 1 || len(uid) != 1 || name[0] == "" || uid[0] == "" {
		return unauthenticated("the token is not bound to a pod")
	}
	return identity{namespace: namespace, pod: name[0], uid: types.UID(uid[0])}, nil
}

// podOf returns the caller's pod, which must not be changed. One that is too new for the informer is read live.
func (s *Server) podOf(ctx context.Context, caller identity) (*corev1.Pod, error) {
	key := client.ObjectKey{Namespace: caller.namespace, Name: caller.pod}
	for _, from := range []client.Reader{s.Cache, s.Live} {
		pod := &corev1.Pod{}
		err := from.Get(ctx, key, pod, client.UnsafeDisableDeepCopy)
		if err == nil && pod.UID == caller.uid {
			return pod, nil
		}
		if client.IgnoreNotFound(err) != nil {
			return nil, fmt.Errorf("read pod %s: %w", caller, err)
		}
	}
	return nil, refuse(http.StatusUnauthorized, gatewayapi.ReasonUnauthenticated, "pod %s (uid %s) does not exist any more", caller, caller.uid)
}
