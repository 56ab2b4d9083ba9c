// Package gatewayclient speaks with the gateway on behalf of one pod: it follows the assignments, and registers, renews,
// reports and deletes tunnels.
//
// It must not know what a tunnel does. Retrying is the caller's; this package says with typed errors what there is to know for that.
package gatewayclient

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/mysocketio/mysocket-injector/internal/gatewayapi"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/retry"
)

const (
	// callTimeout bounds one call. The gateway asks the Mysocket API before it answers, so it is generous.
	callTimeout   = 30 * time.Second
	dialTimeout   = 5 * time.Second
	maxFileBytes  = 256 << 10
	maxErrorBytes = 8 << 10
)

// Config says where the gateway is and how to trust it and be trusted.
type Config struct {
	// URL is the gateway's address, https://host:port.
	URL string
	// TokenFile and CAFile are read anew whenever they are needed: both rotate.
	TokenFile, CAFile string
	// UserAgent names the program.
	UserAgent string
	Clock     retry.Clock
	// Observe, when set, is told about every finished call: the operation, and the status code or "error".
	Observe func(operation, code string)
}

// Client speaks with the gateway. It is safe for concurrent use.
type Client struct {
	cfg  Config
	base *url.URL
	http *http.Client
}

// New returns a client, or an error that says what is wrong with the address.
func New(cfg Config) (*Client, error) {
	base, err := url.Parse(cfg.URL)
	switch {
	case err != nil:
		return nil, fmt.Errorf("the gateway's address %q is not a URL; it must look like https://host:port", cfg.URL)
	case base.Scheme != "https" || base.Host == "" || base.User != nil || strings.Trim(base.Path, "/") != "" || base.RawQuery != "" || base.Fragment != "":
		return nil, fmt.Errorf("the gateway's address is %q; it must look like https://host:port", cfg.URL)
	}
	base.Path = ""
	c := &Client{cfg: cfg, base: base}
	c.http = &http.Client{
		Transport: &http.Transport{
			// No proxy: the gateway is inside the cluster.
			DialTLSContext:         c.dialTLS,
			MaxIdleConnsPerHost:    2,
			IdleConnTimeout:        30 * time.Second,
			ResponseHeaderTimeout:  callTimeout,
			MaxResponseHeaderBytes: 32 << 10,
			// One long answer of short lines and a few small calls: nothing that compression or larger buffers would help.
			DisableCompression: true,
			WriteBufferSize:    2 << 10,
			ReadBufferSize:     2 << 10,
		},
		// A redirect would carry the token to wherever it points.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return c, nil
}

// Close lets go of idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// CAMissingError says that the CA bundle is not there yet.
type CAMissingError struct{ File string }

func (e *CAMissingError) Error() string {
	return fmt.Sprintf("the gateway's CA bundle %s is not there yet: the control plane publishes it in the namespace, and the kubelet mounts it within about a minute", e.File)
}

// CAAvailable tells whether the CA bundle exists.
func (c *Client) CAAvailable() bool {
	_, err := os.Stat(c.cfg.CAFile)
	return err == nil
}

// dialTLS opens a connection that trusts what the CA bundle says at this moment.
func (c *Client) dialTLS(ctx context.Context, network, address string) (net.Conn, error) {
	pem, err := readFile(c.cfg.CAFile)
	if errors.Is(err, os.ErrNotExist) {
		return nil, &CAMissingError{c.cfg.CAFile}
	}
	if err != nil {
		return nil, fmt.Errorf("the gateway's CA bundle can't be read: %w", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("the gateway's CA bundle %s holds no PEM certificate", c.cfg.CAFile)
	}
	dialer := tls.Dialer{
		NetDialer: &net.Dialer{Timeout: dialTimeout},
		Config:    &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12},
	}
	ctx, cancel := context.WithTimeout(ctx, 2*dialTimeout)
	defer cancel()
	return dialer.DialContext(ctx, network, address)
}

func (c *Client) token() (string, error) {
	data, err := readFile(c.cfg.TokenFile)
	if err != nil {
		return "", fmt.Errorf("the pod's token can't be read: %w", err)
	}
	token := strings.TrimSpace(string(data))
	if token == "" || strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return "", fmt.Errorf("the pod's token file %s holds no token", c.cfg.TokenFile)
	}
	return token, nil
}

func readFile(name string) ([]byte, error) {
	file, err := os.Open(name) //nolint:gosec // the name is the operator's, from a flag
	if err != nil {
		return nil, err
	}
	defer func() { _ = file.Close() }()
	data, err := io.ReadAll(io.LimitReader(file, maxFileBytes+1))
	if err == nil && len(data) > maxFileBytes {
		err = fmt.Errorf("%s is larger than %d bytes", name, maxFileBytes)
	}
	return data, err
}

// RefusedError is a refusal by the gateway.
type RefusedError struct {
	Operation string
	Status    int
	Reason    gatewayapi.Reason
	Message   string
	// RetryAfter is what the gateway asked for, zero when it didn't.
	RetryAfter time.Duration
}

func (e *RefusedError) Error() string {
	return fmt.Sprintf("the gateway refused to %s: %d %s: %s", e.Operation, e.Status, e.Reason, e.Message)
}

// IsNotFound tells whether the gateway does not know, or no longer knows, what err is about.
func IsNotFound(err error) bool {
	refused, ok := errors.AsType[*RefusedError](err)
	return ok && refused.Status == http.StatusNotFound
}

// RetryAfter returns how long the gateway asked to wait, zero when it didn't.
func RetryAfter(err error) time.Duration {
	if refused, ok := errors.AsType[*RefusedError](err); ok {
		return refused.RetryAfter
	}
	return 0
}

// Connection names one of the connections that the pod keeps for a socket.
type Connection struct {
	SocketID string
	// Number is 0 for the first.
	Number int
}

// Register makes, or finds, this pod's tunnel of a connection and gets a certificate for the public key.
func (c *Client) Register(ctx context.Context, of Connection, publicKey string) (gatewayapi.Registration, error) {
	return c.registration(ctx, "register the tunnel", "register", of, []string{"tunnels"}, publicKey)
}

// Renew gets a new certificate for a tunnel.
func (c *Client) Renew(ctx context.Context, of Connection, tunnelID, publicKey string) (gatewayapi.Registration, error) {
	return c.registration(ctx, "renew the certificate", "renew", of, []string{"tunnels", tunnelID, "certificate"}, publicKey)
}

func (c *Client) registration(ctx context.Context, operation, name string, of Connection, path []string, publicKey string) (gatewayapi.Registration, error) {
	var registration gatewayapi.Registration
	err := c.call(ctx, operation, name, http.MethodPost, of, path, gatewayapi.RegisterRequest{PublicKey: publicKey}, &registration)
	return registration, err
}

// Report tells the gateway where the pod's tunnel of a connection is.
func (c *Client) Report(ctx context.Context, of Connection, report gatewayapi.StatusReport) error {
	return c.call(ctx, "take the tunnel's status", "report", http.MethodPut, of, []string{"status"}, report, nil)
}

// Delete deletes a tunnel. Deleting what is gone is no error.
func (c *Client) Delete(ctx context.Context, of Connection, tunnelID string) error {
	err := c.call(ctx, "delete the tunnel", "delete", http.MethodDelete, of, []string{"tunnels", tunnelID}, nil, nil)
	if IsNotFound(err) {
		return nil
	}
	return err
}

func (c *Client) call(ctx context.Context, operation, name, method string, of Connection, path []string, in, out any) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	var body []byte
	if in != nil {
		var err error
		if body, err = json.Marshal(in); err != nil {
			return fmt.Errorf("%s: %w", operation, err)
		}
	}
	target := gatewayapi.SocketsPath + url.PathEscape(of.SocketID)
	for _, part := range path {
		target += "/" + url.PathEscape(part)
	}
	if of.Number > 0 {
		target += "?" + gatewayapi.ConnectionParameter + "=" + strconv.Itoa(of.Number)
	}
	response, err := c.send(ctx, operation, name, method, target, body)
	if err != nil {
		return err
	}
	defer func() { _ = response.Body.Close() }()
	if out == nil {
		return nil
	}
	data, err := io.ReadAll(io.LimitReader(response.Body, gatewayapi.MaxBodyBytes+1))
	switch {
	case err != nil:
		return fmt.Errorf("%s: the gateway's answer broke off: %w", operation, err)
	case len(data) > gatewayapi.MaxBodyBytes:
		return fmt.Errorf("%s: the gateway's answer is larger than %d bytes", operation, gatewayapi.MaxBodyBytes)
	}
	if err := json.Unmarshal(data, out); err != nil {
		return fmt.Errorf("%s: the gateway's answer is not what was expected: %w", operation, err)
	}
	return nil
}

// send sends one request and returns its successful response, whose body the caller closes.
func (c *Client) send(ctx context.Context, operation, name, method, path string, body []byte) (*http.Response, error) {
	code := "error"
	defer func() {
		if c.cfg.Observe != nil {
			c.cfg.Observe(name, code)
		}
	}()
	token, err := c.token()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", operation, err)
	}
	request, err := http.NewRequestWithContext(ctx, method, c.base.String()+path, bytes.NewReader(body))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", operation, err)
	}
	request.Header.Set("Authorization", "Bearer "+token)
	request.Header.Set("User-Agent", c.cfg.UserAgent)
	if body != nil {
		request.Header.Set("Content-Type", "application/json")
	}
	response, err := c.http.Do(request)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", operation, unwrapURL(ctx, err))
	}
	code = strconv.Itoa(response.StatusCode)
	if response.StatusCode/100 == 2 {
		return response, nil
	}
	defer func() { _ = response.Body.Close() }()
	return nil, c.refusal(operation, response)
}

// unwrapURL takes the method and URL off an error, which the operation's name already says, and says why a context ended.
func unwrapURL(ctx context.Context, err error) error {
	if wrapped, ok := errors.AsType[*url.Error](err); ok {
		err = wrapped.Err
	}
	if cause := context.Cause(ctx); cause != nil && errors.Is(err, ctx.Err()) {
		err = cause
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("the gateway did not answer in time: %w", err)
	}
	return fmt.Errorf("the gateway can't be reached: %w", err)
}

func (c *Client) refusal(operation string, response *http.Response) error {
	refused := &RefusedError{Operation: operation, Status: response.StatusCode, RetryAfter: c.retryAfter(response.Header.Get("Retry-After"))}
	data, err := io.ReadAll(io.LimitReader(response.Body, maxErrorBytes))
	var said gatewayapi.Error
	if err == nil && json.Unmarshal(data, &said) == nil && said.Message != "" {
		refused.Reason, refused.Message = said.Reason, said.Message
		return refused
	}
	refused.Message = fmt.Sprintf("%s (the answer is none of the gateway's: is something else at %s?)", http.StatusText(response.StatusCode), c.base.Host)
	return refused
}

func (c *Client) retryAfter(value string) time.Duration {
	if seconds, err := strconv.Atoi(value); err == nil && seconds > 0 {
		// Bounded here so that the multiplication can't overflow; Backoff bounds it further.
		return time.Duration(min(seconds, 24*3600)) * time.Second
	}
	if at, err := http.ParseTime(value); err == nil {
		return max(0, at.Sub(c.cfg.Clock.Now()))
	}
	return 0
}
