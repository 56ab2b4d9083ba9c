package gateway

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/uuid"
	"golang.org/x/crypto/ssh"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mysocketio/mysocket-injector/api/v1alpha1"
	"github.com/mysocketio/mysocket-injector/internal/annotations"
	"github.com/mysocketio/mysocket-injector/internal/gatewayapi"
	"github.com/mysocketio/mysocket-injector/internal/kubetest"
	"github.com/mysocketio/mysocket-injector/internal/mysocket/mysockettest"
)

func TestRegister(t *testing.T) {
	s := newStage(t)
	pod, token := s.pod(s.ns, "web-1")
	mine := newKey(t)
	reg := s.register(token, mine)
	if reg.EdgeAddress != s.edge.SSHAddress || reg.HostKeys[0] != strings.TrimSpace(s.edge.HostKey) || reg.ForwardHost != "localhost" || reg.User != strings.ReplaceAll(s.edge.UserID, "-", "") {
		t.Errorf("registration %+v", reg)
	}
	if list := s.atEdge(); len(list) != 1 || list[0].ID != reg.TunnelID || list[0].LocalPort != int(reg.ForwardPort) {
		t.Errorf("at the edge %+v, registered %+v", list, reg)
	}
	obj, err := s.object(pod)
	if err != nil {
		t.Fatal(err)
	}
	if len(obj.OwnerReferences) != 1 || obj.OwnerReferences[0].UID != pod.UID || obj.OwnerReferences[0].Kind != "Pod" || len(obj.Finalizers) != 1 || obj.Finalizers[0] != annotations.Finalizer ||
		obj.Spec.PodName != pod.Name || obj.Spec.ServiceName != "web" || obj.Spec.SocketID != s.socket.ID || obj.Spec.SocketName != s.socket.Name || obj.Status.TunnelID != reg.TunnelID {
		t.Errorf("object %+v", obj)
	}
	mine.connect(t, reg)

	// Again, as after a restart of the sidecar, with another key: the same tunnel, another certificate.
	second := newKey(t)
	again := s.register(token, second)
	if again.TunnelID != reg.TunnelID || again.ForwardPort != reg.ForwardPort || again.Certificate == reg.Certificate || len(s.atEdge()) != 1 {
		t.Errorf("again %+v, at the edge %v", again, s.atEdge())
	}
	second.connect(t, again)

	// Renewed.
	renewed := s.registration(s.call(token, http.MethodPost, s.certificatePath(reg.TunnelID), second.request()))
	if renewed.TunnelID != reg.TunnelID || renewed.Certificate == again.Certificate {
		t.Errorf("renewed %+v", renewed)
	}
	second.connect(t, renewed)
	s.call(token, http.MethodPost, s.certificatePath(uuid.NewString()), second.request()).want(t, http.StatusNotFound, gatewayapi.ReasonNotFound, "register again")

	// A second pod has a tunnel of its own.
	_, otherToken := s.pod(s.ns, "web-2")
	if other := s.register(otherToken, newKey(t)); other.TunnelID == reg.TunnelID || len(s.atEdge()) != 2 {
		t.Errorf("two pods, at the edge %v", s.atEdge())
	}

	// Withdrawn, twice; and registered again before the controller has cleaned up.
	for range 2 {
		if a := s.call(token, http.MethodDelete, s.tunnelsPath(s.socket.ID)+"/"+reg.TunnelID, nil); a.status != http.StatusNoContent || len(a.body) != 0 {
			t.Errorf("withdrawn: %d %s", a.status, a.body)
		}
	}
	if obj, err = s.object(pod); err != nil || obj.DeletionTimestamp == nil {
		t.Errorf("object %+v, %v", obj, err)
	}
	a := s.call(token, http.MethodPost, s.tunnelsPath(s.socket.ID), mine.request())
	a.want(t, http.StatusServiceUnavailable, gatewayapi.ReasonUnavailable, "still being deleted")
	if a.header.Get("Retry-After") != "2" {
		t.Errorf("Retry-After %q", a.header.Get("Retry-After"))
	}
	s.call(token, http.MethodPost, s.certificatePath(reg.TunnelID), mine.request()).want(t, http.StatusNotFound, gatewayapi.ReasonNotFound, "")
	cluster.Change(t, obj, func() { obj.Finalizers = nil })
	if fresh := s.register(token, mine); fresh.TunnelID == reg.TunnelID {
		t.Error("the withdrawn tunnel came back")
	}
}

// TestSeveralConnections are several tunnels of one pod, as many as the Service asks for, and no more.
func TestSeveralConnections(t *testing.T) {
	s := newStage(t)
	s.svc, s.socket = s.service("wide", map[string]string{annotations.Connections: "2"})
	pod, token := s.pod(s.ns, "web-1")
	_, other := s.pod(s.ns, "web-2")
	kubetest.Eventually(t, "the gateway knows the Service", func(context.Context) bool {
		return s.call(token, http.MethodPost, s.tunnelsPath(s.socket.ID), newKey(t).request()).status == http.StatusOK
	})
	first := s.register(token, newKey(t))
	path := s.tunnelsPath(s.socket.ID) + "?connection=1"
	mine := newKey(t)
	second := s.registration(s.call(token, http.MethodPost, path, mine.request()))
	if again := s.registration(s.call(token, http.MethodPost, path, mine.request())); again.TunnelID != second.TunnelID || again.TunnelID == first.TunnelID || len(s.atEdge()) != 2 {
		t.Errorf("registered %s, %s and again %s; at the edge %v", first.TunnelID, second.TunnelID, again.TunnelID, s.atEdge())
	}
	mine.connect(t, second)
	if a := s.call(token, http.MethodPut, gatewayapi.SocketsPath+s.socket.ID+"/status?connection=1", gatewayapi.StatusReport{State: gatewayapi.StateConnected}); a.status != http.StatusNoContent {
		t.Errorf("report: %d %s", a.status, a.body)
	}
	obj := &v1alpha1.Tunnel{ObjectMeta: metav1.ObjectMeta{Namespace: s.ns, Name: tunnelName(pod.Name, string(pod.UID), s.socket.ID, 1)}}
	cluster.Get(t, obj)
	if obj.Spec.Connection != 1 || obj.Status.TunnelID != second.TunnelID || obj.Status.State != "Connected" {
		t.Errorf("object %+v %+v", obj.Spec, obj.Status)
	}
	if obj, err := s.object(pod); err != nil || obj.Spec.Connection != 0 || obj.Status.TunnelID != first.TunnelID || obj.Status.State != "" {
		t.Errorf("the first connection's object %+v, %v", obj, err)
	}

	// A tunnel is found only under its own connection, and only by its own pod.
	renew := s.certificatePath(second.TunnelID)
	s.registration(s.call(token, http.MethodPost, renew+"?connection=1", mine.request()))
	s.call(token, http.MethodPost, renew, mine.request()).want(t, http.StatusNotFound, gatewayapi.ReasonNotFound, "register again")
	s.call(other, http.MethodPost, renew+"?connection=1", mine.request()).want(t, http.StatusNotFound, gatewayapi.ReasonNotFound, "register again")

	// Beyond what is asked for, and what is no number of a connection.
	s.call(token, http.MethodPost, s.tunnelsPath(s.socket.ID)+"?connection=2", mine.request()).want(t, http.StatusForbidden, gatewayapi.ReasonForbidden, "asks for 2 connections")
	s.call(token, http.MethodPut, gatewayapi.SocketsPath+s.socket.ID+"/status?connection=2", gatewayapi.StatusReport{State: gatewayapi.StateConnected}).want(t, http.StatusForbidden, gatewayapi.ReasonForbidden, "asks for 2 connections")
	for _, n := range []string{"4", "-1", "", "x", "01", "+1", "1&connection=1", "99999999999999999999"} {
		s.call(token, http.MethodPost, s.tunnelsPath(s.socket.ID)+"?connection="+n, mine.request()).want(t, http.StatusBadRequest, gatewayapi.ReasonInvalid, "one number from 0 to 3")
	}

	// Lowered: no certificate for what is too many, but it may be withdrawn.
	cluster.Change(t, s.svc, func() { s.svc.Annotations[annotations.Connections] = "1" })
	kubetest.Eventually(t, "the gateway knows the change", func(context.Context) bool {
		return s.call(token, http.MethodPost, renew+"?connection=1", mine.request()).status == http.StatusForbidden
	})
	if a := s.call(token, http.MethodDelete, s.tunnelsPath(s.socket.ID)+"/"+second.TunnelID+"?connection=1", nil); a.status != http.StatusNoContent {
		t.Errorf("withdrawn: %d %s", a.status, a.body)
	}
	cluster.Get(t, obj)
	if obj.DeletionTimestamp == nil {
		t.Error("the second connection's object stays")
	}
	if obj, err := s.object(pod); err != nil || obj.DeletionTimestamp != nil {
		t.Errorf("the first connection's object %+v, %v", obj, err)
	}
}

// TestPinnedHostKeys come before those of the API.
func TestPinnedHostKeys(t *testing.T) {
	s := newStage(t)
	_, token := s.pod(s.ns, "web-1")
	pinned := newKey(t).line()
	s.server.EdgeHostKeys = []string{pinned}
	if reg := s.register(token, newKey(t)); len(reg.HostKeys) != 1 || reg.HostKeys[0] != pinned {
		t.Errorf("host keys %q", reg.HostKeys)
	}
	s.server.EdgeHostKeys = nil
	for body, message := range map[string]string{
		`{"signed_ssh_cert":"x"}`:                   "none is pinned: set the chart's value mysocket.sshHostKeys",
		`{"signed_ssh_cert":"x","host_key":"%"}`:    "host_key is not base64",
		`{"signed_ssh_cert":"x","host_key":"AAAA"}`: "host_key is not an SSH public key",
	} {
		s.proxy.Fail("POST /socket/{}/tunnel/{}/signkey", mysockettest.Answer(200, body))
		s.call(token, http.MethodPost, s.tunnelsPath(s.socket.ID), newKey(t).request()).want(t, http.StatusBadGateway, gatewayapi.ReasonUpstream, message)
	}
}

func TestConcurrentRegisters(t *testing.T) {
	s := newStage(t)
	_, token := s.pod(s.ns, "web-1")
	var wg sync.WaitGroup
	answers := make(chan answer, 10)
	for range cap(answers) {
		wg.Go(func() { answers <- s.call(token, http.MethodPost, s.tunnelsPath(s.socket.ID), newKey(t).request()) })
	}
	wg.Wait()
	close(answers)
	ids := map[string]bool{}
	for a := range answers {
		ids[s.registration(a).TunnelID] = true
	}
	if list := s.atEdge(); len(ids) != 1 || len(list) != 1 || !ids[list[0].ID] {
		t.Errorf("registered %v, at the edge %v", ids, list)
	}
}

// TestTunnelThatMayBeLeftOver is told to the sweep: the API may have made it without us knowing its id.
func TestTunnelThatMayBeLeftOver(t *testing.T) {
	for name, tc := range map[string]struct {
		create, withdraw mysockettest.Fault
		object           bool // is deleted meanwhile
		told             int32
	}{
		"answer lost":                  {create: mysockettest.LostAnswer, told: 1},
		"no connection":                {create: mysockettest.Refused, told: 1},
		"500":                          {create: mysockettest.Answer(500, ""), told: 1},
		"refused":                      {create: mysockettest.Answer(400, "")},
		"too many":                     {create: mysockettest.Answer(429, "", "Retry-After", "1")},
		"neither recorded nor deleted": {object: true, withdraw: mysockettest.Answer(500, ""), told: 1},
		"not recorded, but deleted":    {object: true},
		"all is well":                  {},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStage(t)
			var told atomic.Int32
			s.server.LeftOver = func() { told.Add(1) }
			pod, token := s.pod(s.ns, "web-1")
			create := tc.create
			if tc.object {
				create = func(w http.ResponseWriter, r *http.Request, forward http.Handler) {
					if object, err := s.object(pod); err != nil {
						t.Error(err)
					} else {
						cluster.Delete(t, object) // the finalizer keeps it
					}
					forward.ServeHTTP(w, r)
				}
			}
			s.proxy.Fail("POST /socket/{}/tunnel", create)
			s.proxy.Fail("DELETE /socket/{}/tunnel/{}", tc.withdraw)
			if a := s.call(token, http.MethodPost, s.tunnelsPath(s.socket.ID), newKey(t).request()); (a.status == http.StatusOK) != (name == "all is well") {
				t.Errorf("answer %d %s", a.status, a.body)
			}
			if got := told.Load(); got != tc.told {
				t.Errorf("told %d times, want %d", got, tc.told)
			}
		})
	}
}

// TestReportDuringRegister is what every sidecar does: it reports Registering while it registers. The report must not make
// the registration start over.
func TestReportDuringRegister(t *testing.T) {
	s := newStage(t)
	pod, token := s.pod(s.ns, "web-1")
	s.proxy.Fail("POST /socket/{}/tunnel", func(w http.ResponseWriter, r *http.Request, forward http.Handler) {
		if a := s.call(token, http.MethodPut, gatewayapi.SocketsPath+s.socket.ID+"/status", gatewayapi.StatusReport{State: gatewayapi.StateRegistering}); a.status != http.StatusNoContent {
			t.Errorf("report: %d %s", a.status, a.body)
		}
		forward.ServeHTTP(w, r)
	})
	reg := s.register(token, newKey(t))
	if obj, err := s.object(pod); err != nil || obj.Status.TunnelID != reg.TunnelID || obj.Status.State != "Registering" {
		t.Errorf("status %+v, %v", obj.Status, err)
	}
	if n := s.proxy.Requests("POST /socket/{}/tunnel"); n != 1 {
		t.Errorf("%d tunnels made", n)
	}
}

// TestWithdrawDuringRegister leaves no tunnel that nobody knows of.
func TestWithdrawDuringRegister(t *testing.T) {
	s := newStage(t)
	pod, token := s.pod(s.ns, "web-1")
	s.proxy.Fail("POST /socket/{}/tunnel", func(w http.ResponseWriter, r *http.Request, forward http.Handler) {
		obj, err := s.object(pod)
		if err != nil {
			t.Error(err)
		} else {
			cluster.Delete(t, obj)
		}
		forward.ServeHTTP(w, r)
	})
	s.call(token, http.MethodPost, s.tunnelsPath(s.socket.ID), newKey(t).request()).want(t, http.StatusServiceUnavailable, gatewayapi.ReasonUnavailable, "still being deleted")
	if list := s.atEdge(); len(list) != 0 {
		t.Errorf("at the edge %v", list)
	}
}

func TestTunnelDeletedAtMysocket(t *testing.T) {
	s := newStage(t)
	pod, token := s.pod(s.ns, "web-1")
	reg := s.register(token, newKey(t))
	if err := s.api.DeleteTunnel(t.Context(), s.socket.ID, reg.TunnelID); err != nil {
		t.Fatal(err)
	}
	s.call(token, http.MethodPost, s.certificatePath(reg.TunnelID), newKey(t).request()).want(t, http.StatusNotFound, gatewayapi.ReasonNotFound, "register again")
	again := s.register(token, newKey(t))
	obj, err := s.object(pod)
	if err != nil || again.TunnelID == reg.TunnelID || obj.Status.TunnelID != again.TunnelID || len(s.atEdge()) != 1 {
		t.Errorf("registered %s after %s, object %+v, %v", again.TunnelID, reg.TunnelID, obj.Status, err)
	}
}

func TestMysocketFails(t *testing.T) {
	const create, sign = "POST /socket/{}/tunnel", "POST /socket/{}/tunnel/{}/signkey"
	for name, tc := range map[string]struct {
		endpoint string
		fault    mysockettest.Fault
		status   int
		reason   gatewayapi.Reason
		message  string
		retry    string
	}{
		"list: 500":       {"GET /socket", mysockettest.Answer(500, ""), 502, gatewayapi.ReasonUpstream, "GET /socket with 500", ""},
		"create: refused": {create, mysockettest.Answer(400, `{"error_message":"an account may have 1 tunnel"}`), 502, gatewayapi.ReasonUpstream, "an account may have 1 tunnel", ""},
		"create: 429":     {create, mysockettest.Answer(429, "", "Retry-After", "9"), 429, gatewayapi.ReasonTooMany, "429 Too Many Requests", "9"},
		"create: garbage": {create, mysockettest.Answer(200, "<html>"), 502, gatewayapi.ReasonUpstream, "not the expected JSON", ""},
		"create: broken":  {create, mysockettest.Refused, 502, gatewayapi.ReasonUpstream, "EOF", ""},
		"sign: 503":       {sign, mysockettest.Answer(503, "", "Retry-After", "4"), 502, gatewayapi.ReasonUpstream, "signkey with 503", "4"},
		"sign: empty":     {sign, mysockettest.Answer(200, "{}"), 502, gatewayapi.ReasonUpstream, "without signed_ssh_cert", ""},
		"login: refused":  {"POST /login", mysockettest.Answer(401, ""), 502, gatewayapi.ReasonUpstream, "check the e-mail and password", ""},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStage(t)
			_, token := s.pod(s.ns, "web-1")
			s.server.API = s.proxy.Client(t) // which has to log in
			s.proxy.Fail(tc.endpoint, tc.fault)
			a := s.call(token, http.MethodPost, s.tunnelsPath(s.socket.ID), newKey(t).request())
			a.want(t, tc.status, tc.reason, tc.message)
			if a.header.Get("Retry-After") != tc.retry {
				t.Errorf("Retry-After %q, want %q", a.header.Get("Retry-After"), tc.retry)
			}
			if strings.Contains(string(a.body), s.edge.Password) {
				t.Error("the answer shows the password")
			}
			s.server.API = s.proxy.Client(t)
			s.register(token, newKey(t))
			if n := len(s.atEdge()); n != 1 {
				t.Errorf("%d tunnels at the edge", n)
			}
		})
	}
}

func TestReport(t *testing.T) {
	s := newStage(t)
	pod, token := s.pod(s.ns, "web-1")
	path := gatewayapi.SocketsPath + s.socket.ID + "/status"
	report := func(state gatewayapi.State, message string) {
		t.Helper()
		if a := s.call(token, http.MethodPut, path, gatewayapi.StatusReport{State: state, Message: message}); a.status != http.StatusNoContent || len(a.body) != 0 {
			t.Errorf("report: %d %s", a.status, a.body)
		}
	}
	// Before registering: the object appears, without a tunnel at Mysocket.
	report(gatewayapi.StateWaitingForApp, "nothing answers on port 8000")
	obj, err := s.object(pod)
	if err != nil || obj.Status.State != "WaitingForApp" || obj.Status.Message != "nothing answers on port 8000" || obj.Status.TunnelID != "" || obj.Status.LastTransitionTime == nil || len(s.atEdge()) != 0 {
		t.Fatalf("object %+v, %v", obj, err)
	}
	// Another message is no transition.
	past := metav1.Unix(1000000000, 0)
	obj.Status.LastTransitionTime = &past
	if err := cluster.Client.Status().Update(t.Context(), obj); err != nil {
		t.Fatal(err)
	}
	report(gatewayapi.StateWaitingForApp, "still nothing")
	if obj, err = s.object(pod); err != nil || !obj.Status.LastTransitionTime.Equal(&past) || obj.Status.Message != "still nothing" {
		t.Errorf("status %+v, %v", obj.Status, err)
	}
	reg := s.register(token, newKey(t))
	report(gatewayapi.StateConnected, "")
	if obj, err = s.object(pod); err != nil || obj.Status.LastTransitionTime.Equal(&past) || obj.Status.State != "Connected" || obj.Status.Message != "" || obj.Status.TunnelID != reg.TunnelID {
		t.Errorf("status %+v, %v", obj.Status, err)
	}
	for body, message := range map[string]string{
		`{"state":"Dancing"}`: "not one of ours",
		`{"state":""}`:        "not one of ours",
		`null`:                "not one of ours",
		`{"state":"Connected","message":"` + strings.Repeat("x", gatewayapi.MaxMessageBytes+1) + `"}`: "longer than 512 bytes",
		`{"state":7}`: "not the expected JSON",
	} {
		s.call(token, http.MethodPut, path, body).want(t, http.StatusBadRequest, gatewayapi.ReasonInvalid, message)
	}
}

func TestBadRequests(t *testing.T) {
	s := newStage(t)
	_, token := s.pod(s.ns, "web-1")
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	rsaPublic, err := ssh.NewPublicKey(&rsaKey.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	good := newKey(t)
	certificate := &ssh.Certificate{Key: good.signer.PublicKey(), CertType: ssh.UserCert, ValidPrincipals: []string{"x"}, ValidBefore: ssh.CertTimeInfinity}
	if err := certificate.SignCert(rand.Reader, good.signer); err != nil {
		t.Fatal(err)
	}
	keyed := func(line string) string {
		text, err := json.Marshal(gatewayapi.RegisterRequest{PublicKey: line})
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	const notOne = "publicKey is not one SSH public key"
	for name, tc := range map[string]struct {
		body    string
		status  int
		message string
	}{
		"too large":     {keyed(strings.Repeat("x", gatewayapi.MaxBodyBytes)), http.StatusRequestEntityTooLarge, "larger than 65536 bytes"},
		"nothing":       {"", http.StatusBadRequest, "not the expected JSON"},
		"no JSON":       {"{", http.StatusBadRequest, "not the expected JSON"},
		"two values":    {"{} {}", http.StatusBadRequest, "not the expected JSON"},
		"a list":        {"[]", http.StatusBadRequest, "not the expected JSON"},
		"null":          {"null", http.StatusBadRequest, notOne},
		"no key":        {"{}", http.StatusBadRequest, notOne},
		"garbage":       {keyed("ssh-ed25519 AAAA"), http.StatusBadRequest, notOne},
		"options":       {keyed(`command="sh" ` + good.line()), http.StatusBadRequest, notOne},
		"two keys":      {keyed(good.line() + "\n" + newKey(t).line()), http.StatusBadRequest, notOne},
		"RSA":           {keyed(string(ssh.MarshalAuthorizedKey(rsaPublic))), http.StatusBadRequest, "publicKey has the type ssh-rsa; allowed: ssh-ed25519"},
		"a certificate": {keyed(string(ssh.MarshalAuthorizedKey(certificate))), http.StatusBadRequest, "ssh-ed25519-cert-v01@openssh.com; allowed"},
	} {
		t.Run(name, func(t *testing.T) {
			for _, path := range []string{s.tunnelsPath(s.socket.ID), s.certificatePath(uuid.NewString())} {
				s.call(token, http.MethodPost, path, tc.body).want(t, tc.status, gatewayapi.ReasonInvalid, tc.message)
			}
		})
	}
	for _, id := range []string{"x", "%2e%2e", strings.ReplaceAll(s.socket.ID, "-", ""), "{" + s.socket.ID + "}", "urn:uuid:" + s.socket.ID, strings.Repeat("a", 5000)} {
		s.call(token, http.MethodPost, s.tunnelsPath(id), good.request()).want(t, http.StatusBadRequest, gatewayapi.ReasonInvalid, "the socket id in the path is not a UUID")
		s.call(token, http.MethodPost, s.certificatePath(id), good.request()).want(t, http.StatusBadRequest, gatewayapi.ReasonInvalid, "the tunnel id in the path is not a UUID")
	}
	if len(s.atEdge()) != 0 {
		t.Error("a tunnel was made")
	}
}

func TestTunnelName(t *testing.T) {
	long := strings.Repeat("a", 239) + "." + strings.Repeat("b", 13) // as long as a pod's name can be, and cut at the dot
	seen := map[string]bool{}
	for _, k := range [][3]string{{"web", "1", "s"}, {"web", "2", "s"}, {"web", "1", "t"}, {long, "1", "s"}} {
		for n := range gatewayapi.MaxConnections {
			name := tunnelName(k[0], k[1], k[2], n)
			if seen[name] || len(name) > 253 || strings.Contains(name, ".-") || name != tunnelName(k[0], k[1], k[2], n) {
				t.Errorf("%v connection %d: %s", k, n, name)
			}
			seen[name] = true
		}
	}
	// Tunnels that were made before there were several connections are found again.
	if name := tunnelName("web", "1", "s", 0); name != "web-1abe9f1e71" {
		t.Errorf("the first connection's object is %s", name)
	}
}
