//go:build cluster

package tests

import (
	"errors"
	"net/http"
	"strconv"
	"strings"
	"testing"

	"github.com/mysocketio/mysocket-injector/e2e/lab"
)

// testGatewayLimits has one pod ask without end: it is told to wait, its neighbour is not, its tunnel serves on, and the
// gateway's metrics show it.
func testGatewayLimits(t *testing.T) {
	s := newStage(t, injectable)
	s.publish(2)
	var names []string
	for name := range s.pods() {
		names = append(names, name)
	}
	k, _ := s.socket(web)
	gateway := newGatewayCaller(s)
	path := "/v1/sockets/" + k.ID + "/tunnels"
	mad, calm := s.token(gatewayAudience, names[0]), s.token(gatewayAudience, names[1])
	// A body that is refused costs the edge nothing, and is counted all the same. There are two replicas, each with its own count.
	wrong := map[string]string{"publicKey": "none"}
	limited := false
	for n := 0; n < 1000 && !limited; n++ {
		status, answer, err := gateway.call(s.ctx, http.MethodPost, path, mad, wrong)
		switch {
		case err == nil && status == http.StatusTooManyRequests && strings.Contains(answer, "asks too often"):
			limited = true
		case err != nil || status != http.StatusBadRequest:
			t.Fatalf("answer %d: %d %s, %v", n, status, answer, err)
		}
	}
	if !limited {
		t.Error("a pod may ask without end")
	}
	if status, answer, err := gateway.call(s.ctx, http.MethodPost, path, calm, map[string]string{"publicKey": sshPublicKey(t)}); err != nil || status != http.StatusOK {
		t.Errorf("its neighbour gets %d %s, %v", status, answer, err)
	}
	s.awaitAnswer(web)

	for metric, least := range map[string]int{
		"mysocket_gateway_streams ":                                        2,
		"mysocket_gateway_connections ":                                    2,
		`mysocket_gateway_limited_total{limit="pod_registrations"} `:       1,
		`mysocket_gateway_token_reviews_total{result="cached"} `:           1,
		`mysocket_gateway_token_reviews_total{result="valid"} `:            1,
		`mysocket_gateway_requests_total{code="429",endpoint="register"} `: 1,
	} {
		total := 0
		for _, p := range controlPlanePods(s) {
			text, err := fetch(s.ctx, "http://"+p.Status.PodIP+":8080/metrics")
			if err != nil {
				t.Fatal(err)
			}
			for line := range strings.Lines(text) {
				if value, ok := strings.CutPrefix(line, metric); ok {
					n, err := strconv.Atoi(strings.TrimSpace(value))
					if err != nil {
						t.Fatal(err)
					}
					total += n
				}
			}
		}
		if total < least {
			t.Errorf("%s is %d; it is at least %d", metric, total, least)
		}
	}
	// Prometheus finds the replicas behind the Service.
	var slices struct {
		Items []struct {
			Ports []struct {
				Name string `json:"name"`
				Port int    `json:"port"`
			} `json:"ports"`
			Endpoints []struct{} `json:"endpoints"`
		} `json:"items"`
	}
	s.await(patience, "the endpoints of the metrics Service", func() error {
		s.get("/apis/discovery.k8s.io/v1/namespaces/"+lab.Namespace+"/endpointslices?labelSelector=kubernetes.io/service-name%3Dmysocket-injector-metrics", &slices)
		if len(slices.Items) != 1 || len(slices.Items[0].Endpoints) < controlPlaneReplicas || len(slices.Items[0].Ports) != 1 ||
			slices.Items[0].Ports[0].Name != "metrics" || slices.Items[0].Ports[0].Port != 8080 {
			return errors.New("they are not the control plane's replicas")
		}
		return nil
	})
}
