//go:build cluster

package tests

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/mysocketio/mysocket-injector/e2e/lab"
)

// The fields of Kubernetes objects that the tests look at.
type (
	metadata struct {
		Name        string            `json:"name"`
		Namespace   string            `json:"namespace"`
		UID         string            `json:"uid"`
		Annotations map[string]string `json:"annotations"`
		Finalizers  []string          `json:"finalizers"`
		Deleted     string            `json:"deletionTimestamp"`
	}
	condition struct {
		Type    string `json:"type"`
		Status  string `json:"status"`
		Reason  string `json:"reason"`
		Message string `json:"message"`
	}
	service struct {
		Metadata metadata `json:"metadata"`
		Spec     struct {
			ClusterIP string `json:"clusterIP"`
		} `json:"spec"`
		Status struct {
			Conditions []condition `json:"conditions"`
		} `json:"status"`
	}
	containerStatus struct {
		Name         string `json:"name"`
		ContainerID  string `json:"containerID"`
		RestartCount int    `json:"restartCount"`
	}
	pod struct {
		Metadata metadata `json:"metadata"`
		Spec     struct {
			InitContainers []struct {
				Name string `json:"name"`
			} `json:"initContainers"`
			Containers []struct {
				Name      string `json:"name"`
				Lifecycle struct {
					PreStop struct {
						Sleep struct {
							Seconds int `json:"seconds"`
						} `json:"sleep"`
					} `json:"preStop"`
				} `json:"lifecycle"`
			} `json:"containers"`
		} `json:"spec"`
		Status struct {
			Phase          string            `json:"phase"`
			PodIP          string            `json:"podIP"`
			Conditions     []condition       `json:"conditions"`
			InitContainers []containerStatus `json:"initContainerStatuses"`
			Containers     []containerStatus `json:"containerStatuses"`
		} `json:"status"`
	}
	tunnel struct {
		Metadata metadata `json:"metadata"`
		Spec     struct {
			PodName     string `json:"podName"`
			ServiceName string `json:"serviceName"`
		} `json:"spec"`
		Status struct {
			TunnelID string `json:"tunnelID"`
			State    string `json:"state"`
			Message  string `json:"message"`
		} `json:"status"`
	}
	event struct {
		Type     string `json:"type"`
		Reason   string `json:"reason"`
		Message  string `json:"message"`
		Involved struct {
			Kind string `json:"kind"`
			Name string `json:"name"`
		} `json:"involvedObject"`
	}
	list[T any] struct {
		Items []T `json:"items"`
	}
)

func (s service) condition(kind string) condition {
	for _, c := range s.Status.Conditions {
		if c.Type == kind {
			return c
		}
	}
	return condition{}
}

func (c condition) String() string {
	if c.Type == "" {
		return "no condition"
	}
	return fmt.Sprintf("%s=%s, %s: %q", c.Type, c.Status, c.Reason, c.Message)
}

func (p pod) hasSidecar() bool {
	for _, c := range p.Spec.InitContainers {
		if c.Name == sidecarName {
			return true
		}
	}
	return false
}

func (p pod) ready() bool {
	for _, c := range p.Status.Conditions {
		if c.Type == "Ready" {
			return c.Status == "True"
		}
	}
	return false
}

func (p pod) containers() []containerStatus {
	return append(append([]containerStatus{}, p.Status.InitContainers...), p.Status.Containers...)
}

func (p pod) restarts() int {
	n := 0
	for _, c := range p.containers() {
		n += c.RestartCount
	}
	return n
}

// apiReader reads objects from the API server. kubectl does all that a user would do; but starting
// it for every look of a waiting test would keep a core busy.
type apiReader struct {
	server string
	http   *http.Client
}

func newAPIReader(ctx context.Context, l *lab.Lab) (*apiReader, error) {
	out, err := l.Kube(ctx, "config", "view", "--raw", "--minify", "--flatten", "-o", "json")
	if err != nil {
		return nil, err
	}
	var config struct {
		Clusters []struct {
			Cluster struct {
				Server string `json:"server"`
				CA     []byte `json:"certificate-authority-data"`
			} `json:"cluster"`
		} `json:"clusters"`
		Users []struct {
			User struct {
				Certificate []byte `json:"client-certificate-data"`
				Key         []byte `json:"client-key-data"`
			} `json:"user"`
		} `json:"users"`
	}
	if err := json.Unmarshal([]byte(out), &config); err != nil {
		return nil, err
	}
	if len(config.Clusters) != 1 || len(config.Users) != 1 {
		return nil, errors.New("the kubeconfig has not one cluster and one user")
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(config.Clusters[0].Cluster.CA) {
		return nil, errors.New("the kubeconfig has no CA")
	}
	certificate, err := tls.X509KeyPair(config.Users[0].User.Certificate, config.Users[0].User.Key)
	if err != nil {
		return nil, err
	}
	return &apiReader{server: config.Clusters[0].Cluster.Server, http: &http.Client{
		Timeout: 10 * time.Second,
		Transport: &http.Transport{
			TLSClientConfig: &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{certificate}, MinVersion: tls.VersionTLS12},
		},
	}}, nil
}

// get reads the object or list at a path.
func (a *apiReader) get(ctx context.Context, path string, into any) error {
	return a.do(ctx, http.MethodGet, path, "", into)
}

// do sends a request with a JSON body, if it is not empty, and reads the answer.
func (a *apiReader) do(ctx context.Context, method, path, body string, into any) error {
	req, err := http.NewRequestWithContext(ctx, method, a.server+path, strings.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	res, err := a.http.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = res.Body.Close() }()
	answer, err := io.ReadAll(res.Body)
	if err != nil {
		return err
	}
	if res.StatusCode/100 != 2 {
		return fmt.Errorf("%s %s: %s: %s", method, path, res.Status, strings.TrimSpace(string(answer)))
	}
	return json.Unmarshal(answer, into)
}

func pods(ctx context.Context, namespace, selector string) ([]pod, error) {
	var l list[pod]
	err := env.api.get(ctx, "/api/v1/namespaces/"+namespace+"/pods?labelSelector="+url.QueryEscape(selector), &l)
	return l.Items, err
}
