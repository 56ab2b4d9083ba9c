package cluster

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"
)

// apiClient asks the API server what the harness must know. It is plain HTTP on purpose: the
// harness has no Kubernetes dependency.
type apiClient struct{ http *http.Client }

func newAPIClient(pkiDir string) (*apiClient, error) {
	cert, err := tls.LoadX509KeyPair(filepath.Join(pkiDir, "admin.crt"), filepath.Join(pkiDir, "admin.key"))
	if err != nil {
		return nil, err
	}
	ca, err := os.ReadFile(filepath.Join(pkiDir, "ca.crt"))
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(ca) {
		return nil, fmt.Errorf("%s/ca.crt holds no certificate", pkiDir)
	}
	return &apiClient{http: &http.Client{
		Timeout: 5 * time.Second,
		Transport: &http.Transport{
			TLSClientConfig:   &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12},
			DialContext:       (&net.Dialer{Timeout: 2 * time.Second}).DialContext,
			ForceAttemptHTTP2: true,
			// A cluster that was taken down and up again is another server with another CA.
			DisableKeepAlives: true,
		},
	}}, nil
}

// get fetches a path and decodes its JSON into what into points to, unless that is nil.
func (a *apiClient) get(ctx context.Context, path string, into any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+NodeIP+":6443"+path, nil)
	if err != nil {
		return err
	}
	res, err := a.http.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = res.Body.Close() }()
	b, err := io.ReadAll(io.LimitReader(res.Body, 8<<20))
	if err != nil {
		return fmt.Errorf("GET %s: %w", path, err)
	}
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("GET %s: %s: %.200s", path, res.Status, b)
	}
	if into == nil {
		return nil
	}
	if err := json.Unmarshal(b, into); err != nil {
		return fmt.Errorf("GET %s: %w", path, err)
	}
	return nil
}

func (a *apiClient) ready(ctx context.Context) error { return a.get(ctx, "/readyz", nil) }

type condition struct {
	Type    string `json:"type"`
	Status  string `json:"status"`
	Message string `json:"message"`
}

func (a *apiClient) nodeReady(ctx context.Context) error {
	var node struct {
		Status struct {
			Conditions []condition `json:"conditions"`
		} `json:"status"`
	}
	if err := a.get(ctx, "/api/v1/nodes/"+NodeName, &node); err != nil {
		return err
	}
	for _, c := range node.Status.Conditions {
		if c.Type == "Ready" {
			if c.Status == "True" {
				return nil
			}
			return fmt.Errorf("node %s is not Ready: %s", NodeName, c.Message)
		}
	}
	return fmt.Errorf("node %s does not say yet whether it is Ready", NodeName)
}

func (a *apiClient) defaultServiceAccount(ctx context.Context) error {
	return a.get(ctx, "/api/v1/namespaces/default/serviceaccounts/default", nil)
}

func (a *apiClient) coreDNSAvailable(ctx context.Context) error {
	var deployment struct {
		Status struct {
			AvailableReplicas int `json:"availableReplicas"`
		} `json:"status"`
	}
	if err := a.get(ctx, "/apis/apps/v1/namespaces/kube-system/deployments/coredns", &deployment); err != nil {
		return err
	}
	if deployment.Status.AvailableReplicas < 1 {
		return errors.New("no CoreDNS pod is available")
	}
	return nil
}

// resolves asks the cluster's DNS for the API server's Service: the answer has passed CoreDNS,
// kube-proxy and the routes of the host.
func resolves(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	dialer := &net.Dialer{}
	r := &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return dialer.DialContext(ctx, network, net.JoinHostPort(DNSIP, "53"))
	}}
	const name = "kubernetes.default.svc.cluster.local."
	addrs, err := r.LookupHost(ctx, name)
	if err != nil {
		return err
	}
	if len(addrs) != 1 || addrs[0] != apiServiceIP {
		return fmt.Errorf("cluster DNS says %s is at %v, not %s", name, addrs, apiServiceIP)
	}
	return nil
}
