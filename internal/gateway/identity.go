package gateway

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"

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

// authenticated finds out who calls before h answers.
func (s *Server) authenticated(h func(http.ResponseWriter, *http.Request, identity)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		caller, err := s.identify(r)
		if err != nil {
			s.fail(w, r, caller, err)
			return
		}
		h(w, r, caller)
	})
}

func (s *Server) identify(r *http.Request) (identity, error) {
	token, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if !ok || token == "" {
		return identity{}, refuse(http.StatusUnauthorized, gatewayapi.ReasonUnauthenticated, "the request has no bearer token")
	}
	ctx, cancel := context.WithTimeout(r.Context(), requestTimeout)
	defer cancel()
	review := &authenticationv1.TokenReview{Spec: authenticationv1.TokenReviewSpec{Token: token, Audiences: []string{gatewayapi.Audience}}}
	if err := s.Live.Create(ctx, review); err != nil {
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

// podOf returns the caller's pod. A pod that is too new for the informer is read live.
func (s *Server) podOf(ctx context.Context, caller identity) (*corev1.Pod, error) {
	key := client.ObjectKey{Namespace: caller.namespace, Name: caller.pod}
	for _, from := range []client.Reader{s.Cache, s.Live} {
		pod := &corev1.Pod{}
		err := from.Get(ctx, key, pod)
		if err == nil && pod.UID == caller.uid {
			return pod, nil
		}
		if client.IgnoreNotFound(err) != nil {
			return nil, fmt.Errorf("read pod %s: %w", caller, err)
		}
	}
	return nil, refuse(http.StatusUnauthorized, gatewayapi.ReasonUnauthenticated, "pod %s (uid %s) does not exist any more", caller, caller.uid)
}
