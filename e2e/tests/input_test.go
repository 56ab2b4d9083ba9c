//go:build cluster

package tests

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// testBadInput writes what users get wrong. Each is told on the Service, makes no socket, and works
// once it is mended. All the Services select the same pod: it serves them with one sidecar.
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
			name: "type-refused", annotate: []string{enabled, "mysocket.io/type=tls"}, reason: "SocketRefused",
			words: []string{`"tls" is not supported by this edge`, "http, https and tcp"},
			mend:  func(name string) { s.annotate(name, "mysocket.io/type-") },
		},
	}
	refusedBefore := apiCalls(s, `endpoint="POST /socket",status="400"`)
	for _, tc := range cases {
		if tc.manifest == "" {
			tc.manifest = named(tc.name)
		}
		s.apply(tc.manifest)
		s.annotate(tc.name, tc.annotate...)
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
	if refused := apiCalls(s, `endpoint="POST /socket",status="400"`) - refusedBefore; refused < 1 || refused > 3 {
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
