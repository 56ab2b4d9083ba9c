//go:build cluster

package tests

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/mysocketio/mysocket-injector/e2e/lab"
)

const (
	// repairInterval is how long a pod may be without a sidecar that was made in the moment of a kill: the lease runs out, the
	// new leader restarts the workload, and that rolls out.
	repairInterval = 2 * time.Minute
	// killWindow is how long after a kill pods may come bare: until a replica that the API server knows of gets all the questions.
	killWindow = 30 * time.Second
	// handOver is how long a leader that is told to end may still lead: it goes on for 5 seconds, and gives up the lease when
	// it ends. A lease that nobody gives up lasts 15 seconds from its last renewal, so 18 at least.
	handOver = 15 * time.Second
)

// TestReplicasKilled takes each replica of the control plane away in every way, and once both, while pods are created in a steady
// pace, visitors come, and a Deployment gets its pods in the very moment. No creation fails, no visitor notices, and what came
// without a sidecar is repaired.
func TestReplicasKilled(t *testing.T) {
	checkControlPlaneLog(t)
	s := newStage(t, injectable)
	awaitControlPlane(s, controlPlaneReplicas)
	awaitBudget(s)
	visitors := s.startLoad(s.publish(2))
	for _, tc := range []struct {
		name   string
		victim func(*stage) pod
		kill   func(*stage, pod)
		// ordered is an end that the control plane is told of: then no pod comes bare, not even for a moment.
		ordered bool
		leads   bool
		// all are taken away at once, so that pods come bare for certain.
		all bool
	}{
		{"leader-sigkill", leader, killReplica, false, true, false},
		{"follower-forced", follower, func(s *stage, p pod) {
			cmd(s.t, "delete", "pod", p.Metadata.Name, "-n", lab.Namespace, "--grace-period=0", "--force")
		}, false, false, false},
		{"both-forced", leader, func(s *stage, _ pod) {
			cmd(s.t, "delete", "pods", "-n", lab.Namespace, "-l", controlPlaneSelector, "--grace-period=0", "--force", "--wait=false")
		}, false, true, true},
		{"leader-deleted", leader, deleteReplica, true, true, false},
		{"follower-deleted", follower, deleteReplica, true, false, false},
	} {
		ok := t.Run(tc.name, func(t *testing.T) {
			step := *s
			step.t = t
			s := &step
			victim, was := tc.victim(s), leaseHolder(s)
			creations := s.startCreations()
			s.await(patience, "the creations", func() error { return creations.atLeast(10) })
			s.apply(s.demoApp("service.yaml", "web", tc.name), s.demoApp("deployment.yaml", "web", tc.name, "replicas: 3", "replicas: 0"))
			s.annotate(tc.name, enabled)
			s.awaitCondition(tc.name, socketReady, "True", "Ready")

			at := time.Now()
			tc.kill(s, victim)
			if tc.all { // the programs may still answer for a second
				s.await(patience, "a pod without a sidecar", creations.oneBare)
			}
			s.scale(tc.name, 2)
			if tc.leads {
				s.await(patience, "another leader", func() error {
					if now := leaseHolder(s); now == was || now == "" {
						return errors.New("the lease is still held by " + was)
					}
					return nil
				})
				took := time.Since(at).Round(100 * time.Millisecond)
				t.Logf("another leads %s after the kill", took)
				if tc.ordered && took > handOver {
					t.Errorf("the lease was not given up: another leads only after %s", took)
				}
			}
			bare, left := bareTimes(s, tc.name, at)
			if len(left) > 0 {
				t.Errorf("pods without a sidecar %s after the kill: %v", repairInterval, left)
			}
			s.awaitConnected(tc.name, 2)
			awaitControlPlane(s, controlPlaneReplicas)
			s.await(patience, "the creations", func() error { return creations.atLeast(100) })
			creations.end(s, at, tc.ordered)
			t.Logf("pods of the Deployment that came without a sidecar, and for how long: %v", bare)
			if tc.all && len(bare) == 0 {
				t.Error("with no replica there, the pods had their sidecar all the same: nothing was repaired")
			}
			if tc.ordered && len(bare) > 0 {
				t.Error("a replica that is told to end must not cost a pod its sidecar")
			}
		})
		if !ok {
			break
		}
	}
	s.endLoad(visitors, time.Time{})
	checkControlPlaneLog(t)
}

// awaitBudget waits until the control plane's PodDisruptionBudget counts both replicas and lets one go.
func awaitBudget(s *stage) {
	s.t.Helper()
	s.await(patience, "the PodDisruptionBudget", func() error {
		var l list[struct {
			Status struct {
				Allowed  int `json:"disruptionsAllowed"`
				Expected int `json:"expectedPods"`
			} `json:"status"`
		}]
		if err := env.api.get(s.ctx, "/apis/policy/v1/namespaces/"+lab.Namespace+"/poddisruptionbudgets", &l); err != nil {
			return err
		}
		if len(l.Items) != 1 || l.Items[0].Status.Allowed != 1 || l.Items[0].Status.Expected != controlPlaneReplicas {
			return fmt.Errorf("they are %+v", l.Items)
		}
		return nil
	})
}

// leaseHolder is who leads, as the Lease names it: the pod's name, an underscore, and a part that is new with every process.
func leaseHolder(s *stage) string {
	s.t.Helper()
	var l struct {
		Spec struct {
			Holder string `json:"holderIdentity"`
		} `json:"spec"`
	}
	s.get("/apis/coordination.k8s.io/v1/namespaces/"+lab.Namespace+"/leases/mysocket-injector", &l)
	return l.Spec.Holder
}

func leader(s *stage) pod   { return replica(s, true) }
func follower(s *stage) pod { return replica(s, false) }

func replica(s *stage, leads bool) pod {
	s.t.Helper()
	holder := leaseHolder(s)
	for _, p := range controlPlanePods(s) {
		if strings.HasPrefix(holder, p.Metadata.Name+"_") == leads {
			return p
		}
	}
	s.t.Fatalf("no such replica; %s leads", holder)
	return pod{}
}

func deleteReplica(s *stage, p pod) {
	cmd(s.t, "delete", "pod", p.Metadata.Name, "-n", lab.Namespace, "--wait=false")
}

func killReplica(s *stage, p pod) { killProcess(s, p, "webhook") }

// killProcess kills a program in a pod as the kernel does when memory is short, and returns its directory below /proc. The
// cluster runs in namespaces of this machine, so its processes are seen from here, each in the control group of its pod.
func killProcess(s *stage, p pod, program string) string {
	s.t.Helper()
	groups, err := filepath.Glob("/proc/[0-9]*/cgroup")
	if err != nil {
		s.t.Fatal(err)
	}
	for _, file := range groups {
		b, err := os.ReadFile(file)
		if err != nil || !strings.Contains(string(b), p.Metadata.UID) {
			continue // of another pod, or has just ended
		}
		dir := filepath.Dir(file)
		if comm, err := os.ReadFile(filepath.Join(dir, "comm")); err != nil || strings.TrimSpace(string(comm)) != program {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil {
			s.t.Fatal(err)
		}
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			s.t.Fatal(err)
		}
		return dir
	}
	s.t.Fatalf("pod %s has no process that could be killed", p.Metadata.Name)
	return ""
}

// scale sets the replicas of a Deployment, sooner than kubectl is started.
func (s *stage) scale(deployment string, replicas int) {
	s.t.Helper()
	var answer struct{}
	err := env.api.do(s.ctx, http.MethodPut, "/apis/apps/v1/namespaces/"+s.ns+"/deployments/"+deployment+"/scale",
		fmt.Sprintf(`{"apiVersion":"autoscaling/v1","kind":"Scale","metadata":{"name":%q,"namespace":%q},"spec":{"replicas":%d}}`, deployment, s.ns, replicas), &answer)
	if err != nil {
		s.t.Fatal(err)
	}
}

// bareTimes follows the pods of a Deployment that had none until all that are wanted are there with a sidecar. It returns for how long after
// the kill pods without one were seen, and which are still there when the repair is overdue.
func bareTimes(s *stage, app string, killed time.Time) (bare map[string]time.Duration, left []string) {
	s.t.Helper()
	bare = map[string]time.Duration{}
	err := lab.WaitFor(s.ctx, repairInterval-time.Since(killed), func() error {
		all, err := pods(s.ctx, s.ns, "app="+app)
		if err != nil {
			return err
		}
		left = nil
		injected := 0
		for _, p := range all {
			switch {
			case p.hasSidecar():
				injected++
			case p.Metadata.Deleted == "":
				bare[p.Metadata.Name] = time.Since(killed).Round(100 * time.Millisecond)
				left = append(left, p.Metadata.Name)
			}
		}
		if injected < 2 || len(left) > 0 {
			return fmt.Errorf("%d pods with a sidecar, %d without", injected, len(left))
		}
		return nil
	})
	if err != nil && len(left) == 0 {
		s.t.Fatalf("the Deployment %s: %v", app, err)
	}
	return bare, left
}

// creation is one pod that was created, up to the point where it would be stored.
type creation struct {
	at       time.Time
	took     time.Duration
	err      error
	injected bool
}

// creations asks the API server for pods in a steady pace, without storing them: the webhook is asked all the same.
type creations struct {
	stop func()
	done sync.WaitGroup

	mu  sync.Mutex
	all []creation
}

const createEvery = 100 * time.Millisecond

// startCreations creates pods until the test ends, or before by end.
func (s *stage) startCreations() *creations {
	ctx, cancel := context.WithCancel(s.ctx)
	c := &creations{stop: cancel}
	s.t.Cleanup(func() { cancel(); c.done.Wait() })
	c.done.Go(func() {
		tick := time.NewTicker(createEvery)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			// On its own, since one that waits must not slow the pace.
			c.done.Go(func() {
				one := creation{at: time.Now()}
				var p pod
				one.err = env.api.do(context.WithoutCancel(ctx), http.MethodPost, s.path("pods?dryRun=All"),
					`{"apiVersion":"v1","kind":"Pod","metadata":{"generateName":"asked-","labels":{"app":"web"}},"spec":{"containers":[{"name":"app","image":"example.com/app"}]}}`, &p)
				one.took, one.injected = time.Since(one.at), p.hasSidecar()
				c.mu.Lock()
				defer c.mu.Unlock()
				c.all = append(c.all, one)
			})
		}
	})
	return c
}

func (c *creations) atLeast(n int) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.all) < n {
		return fmt.Errorf("%d pods were created", len(c.all))
	}
	return nil
}

func (c *creations) oneBare() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !slices.ContainsFunc(c.all, func(one creation) bool { return one.err == nil && !one.injected }) {
		return errors.New("all came with one")
	}
	return nil
}

// end ends the creations and judges them: none failed, and none was bare but in the moment of a kill that nobody was told of.
func (c *creations) end(s *stage, killed time.Time, ordered bool) {
	s.t.Helper()
	c.stop()
	c.done.Wait()
	var slowest time.Duration
	bare, failed, tooLate := 0, 0, 0
	for _, one := range c.all {
		slowest = max(slowest, one.took)
		switch after := one.at.Sub(killed); {
		case one.err != nil:
			if failed++; failed <= 5 {
				s.t.Errorf("a creation failed %s after the kill: %v", after, one.err)
			}
		case !one.injected:
			bare++
			if (ordered || after < -time.Second || after > killWindow) && tooLate < 5 {
				tooLate++
				s.t.Errorf("a pod came without a sidecar %s after the kill", after)
			}
		}
	}
	s.t.Logf("%d creations, %d failed, %d without a sidecar; the slowest took %s", len(c.all), failed, bare, slowest.Round(time.Millisecond))
}
