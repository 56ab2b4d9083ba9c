//go:build cluster

package tests

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"
)

// testLiveChange changes what a Service says of its pods, and adds a second Service, while the pods run: none is restarted.
func testLiveChange(t *testing.T) {
	const second = "second"
	s := newStage(t, injectable)
	s.publish(2)
	before := s.pods()
	patch := func(patch string) { s.kube("patch", "service", web, "--type=json", "-p", patch) }

	at := time.Now()
	s.apply(s.demoApp("service.yaml", "name: web", "name: "+second))
	s.annotate(second, enabled)
	s.awaitConnected(second, 2)
	t.Logf("a second Service was connected %s after it was made", time.Since(at).Round(100*time.Millisecond))
	s.awaitAnswer(second)

	patch(`[{"op":"replace","path":"/spec/ports/0/targetPort","value":8001}]`) // where nobody listens
	s.await(patience, "the condition", func() error {
		if c := s.service(web).condition(tunnelsReady); c.Status != "False" {
			return errors.New("it says " + c.String())
		}
		return nil
	})
	patch(`[{"op":"replace","path":"/spec/ports/0/targetPort","value":"http"}]`)
	s.awaitConnected(web, 2)
	s.awaitAnswer(web)

	patch(`[{"op":"replace","path":"/spec/selector","value":{"app":"nothing"}}]`)
	s.awaitCondition(web, tunnelsReady, "False", "NoPods")
	s.await(patience, "the tunnels", func() error {
		if k, _ := s.socket(web); len(k.Tunnels) != 0 || k.Registered != 0 {
			return fmt.Errorf("%d are connected and %d registered", len(k.Tunnels), k.Registered)
		}
		return nil
	})
	s.awaitAnswer(second) // the other one does not notice
	patch(`[{"op":"replace","path":"/spec/selector","value":{"app":"web"}}]`)
	s.awaitConnected(web, 2)
	s.awaitAnswer(web)
	s.samePods(before)
}

// testSkippedPods has pods that can have no sidecar beside others that have one: their Deployment hears why.
func testSkippedPods(t *testing.T) {
	const aside = "aside"
	s := newStage(t, injectable)
	s.publish(1)
	s.apply(s.demoApp("deployment.yaml", "name: web", "name: "+aside, "replicas: 3", "replicas: 1",
		"matchLabels: {app: web}", "matchLabels: {app: web, part: aside}", "labels: {app: web}", `labels: {app: web, part: aside, mysocket.io/inject: "false"}`))
	s.await(patience, "an Event on Deployment "+aside, func() error {
		var l list[event]
		s.get(s.path("events"), &l)
		if n := len(slices.DeleteFunc(l.Items, func(e event) bool {
			return e.Involved.Kind != "Deployment" || e.Involved.Name != aside || e.Reason != "OptedOut" || e.Type != "Normal"
		})); n != 1 {
			return fmt.Errorf("%d of %+v", n, l.Items)
		}
		return nil
	})
	s.awaitCondition(web, tunnelsReady, "True", "AllConnected", "1 of 1 pods connected, 1 can have no tunnel (OptedOut")
}
