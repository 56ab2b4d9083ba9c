//go:build cluster

package tests

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mysocketio/mysocket-injector/e2e/lab"
)

// testBadInput writes what users get wrong. The webhook refuses it. When it has got in all the same, the
// Service says what is wrong, there is no socket, and it works once it is mended. All the Services
// select the same pod: it serves them with one sidecar.
func testBadInput(t *testing.T) {
	s := newStage(t, injectable)
	named := func(name string, oldNew ...string) string {
		return s.demoApp("service.yaml", append([]string{"name: web", "name: " + name}, oldNew...)...)
	}
	cases := []struct {
		name     string
		manifest string
		annotate []string
		reason   string
		words    []string
		mend     func(name string)
	}{
		{
			name: "type-unknown", annotate: []string{enabled, "mysocket.io/type=htpp"}, reason: "InvalidAnnotation",
			words: []string{"mysocket.io/type", `"htpp"`, "http, https, tcp, tls"},
			mend:  func(name string) { s.annotate(name, "mysocket.io/type=http") },
		},
		{
			name: "annotation-unknown", annotate: []string{enabled, "mysocket.io/prot=8000"}, reason: "InvalidAnnotation",
			words: []string{`"mysocket.io/prot"`, "mysocket.io/port"},
			mend:  func(name string) { s.annotate(name, "mysocket.io/prot-") },
		},
		{
			name: "enabled-unclear", annotate: []string{"mysocket.io/enabled=yes"}, reason: "InvalidAnnotation",
			words: []string{"mysocket.io/enabled", `"yes"`, `"true" or "false"`},
			mend:  func(name string) { s.annotate(name, enabled) },
		},
		{
			name: "port-unknown", annotate: []string{enabled, "mysocket.io/port=9999"}, reason: "PortNotFound",
			words: []string{"mysocket.io/port", `"9999"`, "8000 (http)"},
			mend:  func(name string) { s.annotate(name, "mysocket.io/port=http") },
		},
		{
			name: "no-selector", manifest: named("no-selector", "  selector: {app: web}\n", ""), annotate: []string{enabled}, reason: "NoSelector",
			words: []string{"spec.selector"},
			mend: func(name string) {
				s.kube("patch", "service", name, "--type=merge", "-p", `{"spec":{"selector":{"app":"web"}}}`)
			},
		},
		{
			name: "setting-refused", annotate: []string{enabled, "mysocket.io/allowed-emails=ann@example.com"}, reason: "SocketRefused",
			words: []string{"cloud authentication", "is not supported by this edge"},
			mend:  func(name string) { s.annotate(name, "mysocket.io/allowed-emails-") },
		},
	}
	refusedBefore := apiCalls(s, `endpoint="POST /socket",status="400"`)
	for _, tc := range cases {
		if tc.manifest == "" {
			tc.manifest = named(tc.name)
		}
		s.apply(tc.manifest)
		if tc.reason == "SocketRefused" { // which only the edge can tell
			s.annotate(tc.name, tc.annotate...)
			continue
		}
		said, err := s.tryAnnotate(tc.name, tc.annotate...)
		if err == nil {
			t.Errorf("%s: kubectl annotate goes through", tc.name)
		}
		if err := containsAll(said, append(tc.words, `admission webhook "services.mysocket.io" denied the request: `)); err != nil {
			t.Errorf("%s: %v", tc.name, err)
		}
		s.letIn(tc.name, tc.annotate...)
	}
	s.deploy(1)
	for _, tc := range cases {
		s.awaitCondition(tc.name, socketReady, "False", tc.reason, tc.words...)
		s.awaitEvent(tc.name, "Warning", tc.reason, tc.words...)
		if k, ok := s.socket(tc.name); ok {
			t.Errorf("%s: the edge has a socket for it: %+v", tc.name, k)
		}
		if url := s.url(tc.name); url != "" {
			t.Errorf("%s: the Service is annotated with the URL %s", tc.name, url)
		}
	}
	if refused := apiCalls(s, `endpoint="POST /socket",status="400"`).since(refusedBefore); refused < 1 || refused > 3 {
		t.Errorf("the socket that the edge refuses was asked for %d times in these seconds", refused)
	}
	for _, tc := range cases {
		tc.mend(tc.name)
	}
	restart := slices.IndexFunc(s.events("enabled-unclear"), func(e event) bool { return e.Reason == "Restarted" })
	if restart >= 0 {
		t.Error("the workload was restarted, though its pod has the sidecar")
	}
	for _, tc := range cases {
		s.awaitConnected(tc.name, 1)
		s.awaitAnswer(tc.name)
	}
	if p := s.pods(); len(p) != 1 || len(p[s.somePod()].Spec.InitContainers) != 1 {
		t.Errorf("there are not one pod with one sidecar: %+v", p)
	}

	// A port that only the pods lack is seen only when there are pods. The Service has its name by then.
	s.apply(named("target-unknown", "targetPort: http", "targetPort: web"))
	s.annotate("target-unknown", enabled)
	s.awaitCondition("target-unknown", tunnelsReady, "False", "PortNotFound", "0 of 1 pods connected", `"web"`, "no container")
	s.awaitEvent("target-unknown", "Warning", "PortNotFound", "no container")
	s.apply(named("target-unknown"))
	s.awaitConnected("target-unknown", 1)
	s.awaitAnswer("target-unknown")
}

// letIn annotates a Service past the webhook, as if it had been down. It asks nothing of the control plane's own
// ServiceAccount.
func (s *stage) letIn(service string, annotations ...string) {
	s.t.Helper()
	s.annotate(service, append(annotations, "--as=system:serviceaccount:"+lab.Namespace+":mysocket-injector")...)
}

// tryAnnotate annotates a Service and returns all that kubectl prints.
func (s *stage) tryAnnotate(service string, annotations ...string) (string, error) {
	s.t.Helper()
	out, err := env.Kubectl(s.ctx, append([]string{"-n", s.ns, "annotate", "--overwrite", "service", service}, annotations...)...).CombinedOutput()
	return string(out), err
}

// testWarnings reads what kubectl prints of what the webhook says about changes that are right, and shows that a manifest
// with a wrong one changes nothing.
func testWarnings(t *testing.T) {
	s := newStage(t)
	s.deploy(2)
	s.rolledOut()
	s.apply(s.demoApp("service.yaml"))
	warned := func(words []string, annotations ...string) {
		t.Helper()
		said, err := s.tryAnnotate(web, annotations...)
		if err != nil {
			t.Fatalf("%v: %s", err, said)
		}
		if err := containsAll(said, words); err != nil {
			t.Error(err)
		}
		if len(words) == 0 && strings.Contains(said, "Warning") {
			t.Errorf("it warns: %s", said)
		}
	}
	// The control plane learns of pods and namespaces through a watch.
	s.await(patience, "the warnings", func() error {
		said, err := s.tryAnnotate(web, enabled, "--dry-run=server")
		if err != nil {
			return fmt.Errorf("%w: %s", err, said)
		}
		return containsAll(said, []string{"Warning: mysocket: namespace " + s.ns + " is not labelled", "Deployment web"})
	})
	warned([]string{
		"Warning: mysocket: namespace " + s.ns + " is not labelled for injection; run: kubectl label namespace " + s.ns + " " + injectable,
		"Warning: mysocket: will be restarted to get the tunnel sidecar once the namespace is labelled: Deployment web",
	}, enabled)
	s.awaitCondition(web, tunnelsReady, "False", "NamespaceNotLabelled")
	warned([]string{`Warning: mysocket: mysocket.io/rollout is "never", so restart yourself to get the tunnel sidecar: Deployment web`}, "mysocket.io/rollout=never")

	cmd(t, "label", "namespace", s.ns, injectable)
	s.awaitCondition(web, tunnelsReady, "False", "RestartIsOff")
	warned([]string{"Warning: mysocket: will be restarted to get the tunnel sidecar, unless paused or OnDelete: Deployment web"}, "mysocket.io/rollout=auto")
	s.awaitConnected(web, 2)
	s.await(patience, "an end of the warnings", func() error {
		said, err := s.tryAnnotate(web, "mysocket.io/type=http", "--dry-run=server")
		if err == nil && strings.Contains(said, "Warning") {
			err = errors.New(said)
		}
		return err
	})
	warned(nil, "mysocket.io/type=http")

	id := s.service(web).Metadata.Annotations["mysocket.io/socket-id"]
	warned([]string{"Warning: mysocket: mysocket.io/socket-id is written by the control plane and will be put right"}, "mysocket.io/socket-id=another")
	s.await(patience, "the socket's id", func() error {
		if got := s.service(web).Metadata.Annotations["mysocket.io/socket-id"]; got != id {
			return fmt.Errorf("it is %q, and was %q", got, id)
		}
		return nil
	})

	before := s.service(web).Metadata.Annotations
	manifest := s.demoApp("service.yaml", "  name: web\n", "  name: web\n  annotations: {mysocket.io/enabled: \"true\", mysocket.io/port: \"9999\"}\n")
	err := env.Apply(s.ctx, s.ns, manifest)
	if err == nil {
		t.Fatal("kubectl apply goes through")
	}
	if err := containsAll(err.Error(), []string{`denied the request: annotation mysocket.io/port: the Service has no TCP port "9999"; it has 8000 (http)`}); err != nil {
		t.Error(err)
	}
	if after := s.service(web).Metadata.Annotations; !maps.Equal(before, after) {
		t.Errorf("the annotations are %v, and were %v", after, before)
	}
	s.awaitConnected(web, 2)
	s.awaitAnswer(web)
}

// testOrder does all in the wrong order: pods, annotation, and the namespace's label last.
func testOrder(t *testing.T) {
	s := newStage(t)
	s.deploy(2)
	s.rolledOut()
	s.apply(s.demoApp("service.yaml"))
	s.annotate(web, enabled)
	s.awaitCondition(web, socketReady, "True", "Ready", "https://")
	c := s.awaitCondition(web, tunnelsReady, "False", "NamespaceNotLabelled", "0 of 2 pods connected", "2 waiting for a restart")
	s.awaitEvent(web, "Warning", "NamespaceNotLabelled", s.ns)
	before := s.pods()
	s.holds(3*time.Second, "the pods before the label", func() error {
		for name := range s.pods() {
			if before[name].Metadata.Name == "" {
				return fmt.Errorf("pod %s was made", name)
			}
		}
		return nil
	})
	// The condition says what to do. It is taken at its word.
	_, command, ok := strings.Cut(c.Message, "run: kubectl ")
	if !ok {
		t.Fatalf("the condition names no command: %s", c)
	}
	cmd(t, strings.Fields(command)...)
	s.awaitConnected(web, 2)
	s.awaitAnswer(web)
}

// testRestricted has the strictest namespace and an awkward pod.
func testRestricted(t *testing.T) {
	s := newStage(t, injectable, "pod-security.kubernetes.io/enforce=restricted", "pod-security.kubernetes.io/warn=restricted")
	s.apply(s.demoApp("service.yaml"))
	s.annotate(web, enabled)
	s.deploy(1, "    spec:\n      containers:", "    spec:\n      automountServiceAccountToken: false\n      securityContext: {runAsUser: 1234, runAsGroup: 4321, fsGroup: 5678}\n      containers:")
	s.rolledOut()
	s.awaitConnected(web, 1)
	s.awaitAnswer(web)
}
