package gateway

import (
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/google/uuid"

	"github.com/mysocketio/mysocket-injector/internal/annotations"
	"github.com/mysocketio/mysocket-injector/internal/edge"
	"github.com/mysocketio/mysocket-injector/internal/gatewayapi"
	"github.com/mysocketio/mysocket-injector/internal/mysocket"
	"github.com/mysocketio/mysocket-injector/internal/mysocket/mysockettest"
)

// withToken gives the stage an account with an access token, whose dialect has no tunnel objects.
func withToken(s *stage) { s.api = s.proxy.TokenClient(s.t) }

// TestWithoutTunnelObjects takes a replica through its life with such an account. What the sidecar sees is the same.
func TestWithoutTunnelObjects(t *testing.T) {
	s := newStage(t, withToken)
	pod, token := s.pod(s.ns, "web-1")
	mine := newKey(t)
	reg := s.register(token, mine)
	if reg.EdgeAddress != s.edge.SSHAddress || reg.HostKeys[0] != strings.TrimSpace(s.edge.HostKey) || reg.ForwardHost != "localhost" || reg.ForwardPort != 0 ||
		reg.User != strings.ReplaceAll(s.edge.UserID, "-", "") || uuid.Validate(reg.TunnelID) != nil {
		t.Errorf("registration %+v", reg)
	}
	if obj, err := s.object(pod); err != nil || obj.Status.TunnelID != reg.TunnelID || obj.Spec.SocketName != "k8s "+s.ns+".web" {
		t.Errorf("object %+v, %v", obj, err)
	}
	connected := func() int {
		i := slices.IndexFunc(s.edge.Tunnels(), func(k edge.DebugSocket) bool { return k.Socket == s.socket.ID })
		return len(s.edge.Tunnels()[i].Tunnels)
	}
	conn := mine.connect(t, reg)
	mysockettest.Eventually(t, "the replica is in the rotation", func() bool { return connected() == 1 })

	again := s.register(token, mine)
	renewed := s.registration(s.call(token, http.MethodPost, s.certificatePath(reg.TunnelID), mine.request()))
	if again.TunnelID != reg.TunnelID || renewed.TunnelID != reg.TunnelID || renewed.Certificate == again.Certificate {
		t.Errorf("again %+v, renewed %+v", again, renewed)
	}
	_, otherToken := s.pod(s.ns, "web-2")
	other := newKey(t)
	second := s.register(otherToken, other)
	other.connect(t, second)
	mysockettest.Eventually(t, "two replicas", func() bool { return connected() == 2 })

	// The withdrawal is the end of the connection; the object goes with the call, and nothing is asked of Mysocket.
	if err := conn.Close(); err != nil {
		t.Fatal(err)
	}
	mysockettest.Eventually(t, "one has left", func() bool { return connected() == 1 })
	if a := s.call(token, http.MethodDelete, s.tunnelsPath(s.socket.ID)+"/"+reg.TunnelID, nil); a.status != http.StatusNoContent {
		t.Errorf("withdrawn: %d %s", a.status, a.body)
	}

	// The pod of another namespace can't have it, whatever it is annotated with.
	victim := newKey(t)
	ns := cluster.Namespace(t, nil)
	_, strange := s.pod(ns, "web-1")
	s.call(strange, http.MethodPost, s.tunnelsPath(s.socket.ID), victim.request()).want(t, http.StatusForbidden, gatewayapi.ReasonForbidden, "no enabled Service")

	// The socket was deleted behind our back.
	if err := s.proxy.TokenClient(t).DeleteSocket(t.Context(), s.socket.ID); err != nil {
		t.Fatal(err)
	}
	s.call(otherToken, http.MethodPost, s.certificatePath(second.TunnelID), other.request()).want(t, http.StatusNotFound, gatewayapi.ReasonNotFound, "register again")
}

// TestAStolenSocket is annotated on a Service, in the dialect whose names are mapped: neither a name that looks the same
// when it is mapped, nor one that is only shown as the Service's, is the Service's own.
func TestAStolenSocket(t *testing.T) {
	s := newStage(t, withToken)
	_, token := s.pod(s.ns, "thief")
	for _, name := range []string{"k8s " + strings.ReplaceAll(s.ns, "-", ".") + "-web", "K8s " + s.ns + ".web", "k8s-" + s.ns + "-web"} {
		victim, err := s.api.CreateSocket(t.Context(), mysocket.Socket{Name: name, Type: "http"})
		if err != nil {
			t.Fatal(err)
		}
		cluster.Change(t, s.svc, func() { s.svc.Annotations[annotations.SocketID] = victim.ID })
		s.waitForSocket(victim.ID)
		s.call(token, http.MethodPost, s.tunnelsPath(victim.ID), newKey(t).request()).
			want(t, http.StatusForbidden, gatewayapi.ReasonForbidden, "which is not the Service's own")
	}
}
