package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"
)

const account = "bench@example.com"

// edge is the API that the control plane uses.
type edge struct {
	*process
	url, ssh string
	caFile   string
	// accountDir has the files email and password.
	accountDir string
	client     *http.Client
	token      string
}

func startEdge(ctx context.Context, dir string, log io.Writer) (*edge, error) {
	state := filepath.Join(dir, "edge.db")
	e := &edge{accountDir: filepath.Join(dir, "account"), caFile: filepath.Join(dir, "edge-ca.pem")}
	password := rand.Text()
	if err := os.Mkdir(e.accountDir, 0o700); err != nil {
		return nil, err
	}
	for name, text := range map[string]string{"email": account, "password": password} {
		if err := os.WriteFile(filepath.Join(e.accountDir, name), []byte(text), 0o600); err != nil {
			return nil, err
		}
	}
	program := filepath.Join(dir, "mysocket-edge")
	add := exec.CommandContext(ctx, program, "user", "add", "--state", state, "--email", account, "--password-file", filepath.Join(e.accountDir, "password")) //nolint:gosec // our own program
	if out, err := add.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("make an account at the edge: %w: %s", err, out)
	}
	var at [5]string
	for i := range at {
		port, err := freePort()
		if err != nil {
			return nil, err
		}
		at[i] = "127.0.0.1:" + strconv.Itoa(port)
	}
	e.url, e.ssh = "https://"+at[0], at[1]
	var err error
	e.process, err = start("the edge", log, nil, program, "serve", "--state", state, "--domain", "edge.mysocket.test", "--log-level", "warn",
		"--api-address", at[0], "--ssh-address", at[1], "--http-address", at[2], "--https-address", at[3], "--admin-address", at[4], "--ca-out", e.caFile)
	if err != nil {
		return nil, err
	}
	if err := e.login(ctx, password); err != nil {
		e.stop()
		return nil, err
	}
	return e, nil
}

func (e *edge) login(ctx context.Context, password string) error {
	return waitFor(ctx, 30*time.Second, "the edge", func(ctx context.Context) error {
		if err := e.running(); err != nil {
			return err
		}
		pem, err := os.ReadFile(e.caFile)
		if err != nil {
			return err
		}
		roots := x509.NewCertPool()
		roots.AppendCertsFromPEM(pem)
		e.client = &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: 16, TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}}}
		var answer struct {
			Token string `json:"token"`
		}
		err = e.post(ctx, "/login", map[string]string{"email": account, "password": password}, &answer)
		e.token = answer.Token
		return err
	})
}

func (e *edge) post(ctx context.Context, path string, in, out any) error {
	body, err := json.Marshal(in)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, e.url+path, bytes.NewReader(body)) //nolint:gosec // our own edge
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	if e.token != "" {
		req.Header.Set("x-access-token", e.token)
	}
	resp, err := e.client.Do(req) //nolint:gosec // our own edge
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("POST %s: the edge answers %s", path, resp.Status)
	}
	return json.Unmarshal(answer, out)
}

// socket makes the socket that the control plane would make for a Service, which then adopts it: its own requests are limited
// to 20 a second, and that is not what is to be measured.
func (e *edge) socket(ctx context.Context, namespace, service string) (id string, err error) {
	var made struct {
		ID string `json:"socket_id"`
	}
	err = e.post(ctx, "/socket", map[string]any{"name": "k8s " + namespace + "." + service, "description": "made by mysocket-injector", "socket_type": "http"}, &made)
	return made.ID, err
}

// tunnel makes a tunnel of a socket, as the gateway does for a replica.
func (e *edge) tunnel(ctx context.Context, socket string) (id string, err error) {
	var made struct {
		ID string `json:"tunnel_id"`
	}
	err = e.post(ctx, "/socket/"+socket+"/tunnel", struct{}{}, &made)
	return made.ID, err
}
