//go:build cluster

package tests

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/mysocketio/mysocket-injector/e2e/lab"
)

const controlPlaneReplicas = 2

// controlPlanePods are the control plane's pods that are not on their way out.
func controlPlanePods(s *stage) []pod {
	s.t.Helper()
	all, err := pods(s.ctx, lab.Namespace, controlPlaneSelector)
	if err != nil {
		s.t.Fatal(err)
	}
	var out []pod
	for _, p := range all {
		if p.Metadata.Deleted == "" {
			out = append(out, p)
		}
	}
	return out
}

// awaitControlPlane waits until exactly the wanted pods are there, all ready.
func awaitControlPlane(s *stage, replicas int) {
	s.t.Helper()
	s.await(patience, "the control plane", func() error {
		all, err := pods(s.ctx, lab.Namespace, controlPlaneSelector)
		if err != nil {
			return err
		}
		if len(all) != replicas {
			return fmt.Errorf("it has %d pods, want %d", len(all), replicas)
		}
		for _, p := range all {
			if !p.ready() {
				return fmt.Errorf("pod %s is not ready", p.Metadata.Name)
			}
		}
		return nil
	})
}

// controlPlaneWell says whether a pod of the control plane was started again.
func controlPlaneWell(s *stage) error {
	s.t.Helper()
	for _, p := range controlPlanePods(s) {
		if n := p.restarts(); n > 0 {
			return fmt.Errorf("pod %s of the control plane was restarted %d times", p.Metadata.Name, n)
		}
	}
	return nil
}

// calls are requests by the control plane's pod that made them.
type calls map[string]int

func (c calls) total() (n int) {
	for _, of := range c {
		n += of
	}
	return n
}

// since counts those that came after earlier. A pod of then that has ended meanwhile takes nothing from them.
func (c calls) since(earlier calls) (n int) {
	for pod, of := range c {
		n += of - earlier[pod]
	}
	return n
}

// apiCalls counts the control plane's requests to the Mysocket API in its own metrics; labels are
// some of the metric's labels as they stand in it, empty for all.
func apiCalls(s *stage, labels string) calls {
	s.t.Helper()
	made := calls{}
	for _, p := range controlPlanePods(s) {
		text, err := fetch(s.ctx, "http://"+p.Status.PodIP+":8080/metrics")
		if err != nil {
			s.t.Fatal(err)
		}
		for line := range strings.Lines(text) {
			rest, ok := strings.CutPrefix(line, "mysocket_api_request_duration_seconds_count{")
			if !ok || !strings.Contains(rest, labels) {
				continue
			}
			n, err := strconv.Atoi(strings.TrimSpace(rest[strings.LastIndexByte(rest, ' ')+1:]))
			if err != nil {
				s.t.Fatal(err)
			}
			made[p.Metadata.Name] += n
		}
	}
	return made
}

func fetch(ctx context.Context, url string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return "", err
	}
	defer func() { _ = res.Body.Close() }()
	body, err := io.ReadAll(res.Body)
	return string(body), err
}

func controlPlaneLog(t *testing.T) string {
	t.Helper()
	return cmd(t, "logs", "-n", lab.Namespace, "-l", controlPlaneSelector, "--prefix", "--tail=-1")
}

// checkControlPlaneLog fails the test for what must never be in the control plane's log. Call it
// before its pods go.
func checkControlPlaneLog(t *testing.T) {
	t.Helper()
	for line := range strings.Lines(controlPlaneLog(t)) {
		for _, bad := range []string{
			"forbidden: User", // a right that the chart does not give
			"panic",
			"DATA RACE",
		} {
			if strings.Contains(line, bad) {
				t.Errorf("the control plane logs: %s", strings.TrimSpace(line))
			}
		}
	}
}
