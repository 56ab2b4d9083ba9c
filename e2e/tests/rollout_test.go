//go:build cluster

package tests

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/mysocketio/mysocket-injector/e2e/lab"
)

// TestRolloutHalts restarts two workloads, of which the first does not get healthy: the second waits, also under another
// leader, until the first is mended. It holds up all restarts of the cluster, and so runs alone.
func TestRolloutHalts(t *testing.T) {
	const broken = "broken"
	checkControlPlaneLog(t)
	s := newStage(t, injectable)
	s.kube("create", "configmap", "gate", "--from-literal=OPEN=1")
	s.apply(s.demoApp("service.yaml"), s.demoApp("service.yaml", "web", broken), s.demoApp("deployment.yaml", "web", broken,
		"replicas: 3", "replicas: 1\n  progressDeadlineSeconds: 10",
		"ports: [{name: http", "envFrom: [{configMapRef: {name: gate}}]\n        ports: [{name: http"))
	s.deploy(2)
	s.rolledOut()
	s.kube("rollout", "status", "deployment/"+broken, "--timeout="+patience.String())
	before := s.pods()
	s.kube("delete", "configmap", "gate") // what runs does not notice; a new pod can't start without it

	s.annotate(broken, enabled)
	s.awaitCondition(broken, tunnelsReady, "False", "RolloutHalted", "Deployment "+broken+" has not become healthy since it was restarted")
	s.awaitEvent(broken, "Warning", "RolloutHalted", "Deployment "+broken)
	s.annotate(web, enabled)
	s.awaitCondition(web, tunnelsReady, "False", "WaitingForRestart", "2 waiting for a restart", "restarts are halted")

	cmd(t, "delete", "pods", "-n", lab.Namespace, "-l", controlPlaneSelector, "--wait=false")
	awaitControlPlane(s, controlPlaneReplicas)
	s.holds(15*time.Second, "meanwhile", func() error {
		if c := s.service(broken).condition(tunnelsReady); c.Reason != "RolloutHalted" {
			return errors.New("the condition turned to " + c.String())
		}
		if now := s.pods(); len(now) != len(before) {
			return fmt.Errorf("the other workload has %d pods", len(now))
		}
		for name, p := range s.pods() {
			if p.Metadata.UID != before[name].Metadata.UID {
				return fmt.Errorf("pod %s of the other workload is new", name)
			}
		}
		return nil
	})

	s.kube("create", "configmap", "gate", "--from-literal=OPEN=1")
	s.awaitConnected(broken, 1)
	s.awaitConnected(web, 2)
	s.awaitEvent(web, "Normal", "Restarted", "Deployment "+web)
	s.await(patience, "the labels to go", func() error {
		if out := s.kube("get", "deployments", "-l", "mysocket.io/restarting", "-o", "name"); out != "" {
			return errors.New("they are still on " + out)
		}
		return nil
	})
	checkControlPlaneLog(t)
}
