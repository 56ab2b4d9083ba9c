// Package probe asks an app whether it is ready, as the kubelet does for the same readiness probe: by HTTP, HTTPS, a TCP
// connection or the gRPC health protocol. It must not know tunnels, sockets or the gateway; how often to ask and what
// follows from the answers is its caller's business.
package probe

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/mysocketio/mysocket-injector/internal/gatewayapi"
)

const (
	maxRedirects = 10
	// maxAnswer bounds what is read of an answer. A health answer of gRPC has a few bytes.
	maxAnswer = 10 << 10
)

// Prober runs probes against one pod. It may be used by several goroutines.
type Prober struct {
	podIP, userAgent string
	web, grpc        *http.Client
}

// New returns a prober for the app that listens on an IP.
func New(podIP, version string) *Prober {
	var plain http.Protocols
	plain.SetUnencryptedHTTP2(true)
	return &Prober{
		podIP:     podIP,
		userAgent: "mysocket-sidecar-probe/" + version,
		web: &http.Client{
			Transport: &http.Transport{
				// As the kubelet: a probe shows that the app listens, not who it is; and each one connects anew.
				TLSClientConfig:    &tls.Config{InsecureSkipVerify: true}, //nolint:gosec // see above
				DisableKeepAlives:  true,
				DisableCompression: true,
			},
			CheckRedirect: sameHostOnly,
		},
		grpc: &http.Client{Transport: &http.Transport{Protocols: &plain, DisableKeepAlives: true}},
	}
}

// Run asks once and waits no longer than the probe's own timeout. It returns nil when the app is ready, and otherwise what
// it saw, which names the probe's address and path, and never its headers.
func (p *Prober) Run(ctx context.Context, of *gatewayapi.Probe) error {
	ctx, cancel := context.WithTimeout(ctx, time.Duration(of.TimeoutSeconds)*time.Second)
	defer cancel()
	var err error
	switch of.Kind {
	case gatewayapi.ProbeHTTP, gatewayapi.ProbeHTTPS:
		err = p.runHTTP(ctx, of)
	case gatewayapi.ProbeTCP:
		err = p.runTCP(ctx, of)
	case gatewayapi.ProbeGRPC:
		err = p.runGRPC(ctx, of)
	default:
		return fmt.Errorf("this sidecar knows no probe of the kind %q", of.Kind)
	}
	if err != nil && errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return fmt.Errorf("%s: no answer in %d s", describe(of), of.TimeoutSeconds)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", describe(of), err)
	}
	return nil
}

func describe(of *gatewayapi.Probe) string {
	switch of.Kind {
	case gatewayapi.ProbeHTTP, gatewayapi.ProbeHTTPS:
		return fmt.Sprintf("%s GET %s on port %d", of.Kind, of.Path, of.Port)
	case gatewayapi.ProbeGRPC:
		return fmt.Sprintf("grpc health of %q on port %d", of.Service, of.Port)
	}
	return fmt.Sprintf("%s port %d", of.Kind, of.Port)
}

func (p *Prober) address(of *gatewayapi.Probe) string {
	host := of.Host
	if host == "" {
		host = p.podIP
	}
	return net.JoinHostPort(host, strconv.Itoa(int(of.Port)))
}

func (p *Prober) runHTTP(ctx context.Context, of *gatewayapi.Probe) error {
	target, err := url.Parse(of.Path) // the path may have a query
	if err != nil {
		target = &url.URL{Path: of.Path}
	}
	target.Scheme, target.Host, target.User = of.Kind, p.address(of), nil
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, target.String(), nil)
	if err != nil {
		return err
	}
	req.Header.Set("User-Agent", p.userAgent)
	req.Header.Set("Accept", "*/*")
	for _, h := range of.Headers {
		if http.CanonicalHeaderKey(h.Name) == "Host" {
			req.Host = h.Value
			continue
		}
		req.Header.Set(h.Name, h.Value)
	}
	answer, err := p.web.Do(req)
	if err != nil {
		return plainly(err)
	}
	defer func() { _ = answer.Body.Close() }()
	_, _ = io.CopyN(io.Discard, answer.Body, maxAnswer)
	if answer.StatusCode < 200 || answer.StatusCode >= 400 {
		return fmt.Errorf("status %d", answer.StatusCode)
	}
	return nil
}

// sameHostOnly follows redirects as the kubelet does: one that leads to another host is an answer of its own.
func sameHostOnly(req *http.Request, via []*http.Request) error {
	if req.URL.Hostname() != via[0].URL.Hostname() {
		return http.ErrUseLastResponse
	}
	if len(via) >= maxRedirects {
		return fmt.Errorf("more than %d redirects", maxRedirects)
	}
	return nil
}

func (p *Prober) runTCP(ctx context.Context, of *gatewayapi.Probe) error {
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", p.address(of))
	if err != nil {
		return plainly(err)
	}
	return conn.Close()
}

// The health protocol has one message in each direction with one field of interest: that is less than the library for it
// would add to the sidecar's size.
const (
	healthPath    = "/grpc.health.v1.Health/Check"
	healthServing = 1
	framePrefix   = 5 // compressed or not, and four bytes of length
)

func (p *Prober) runGRPC(ctx context.Context, of *gatewayapi.Probe) error {
	var message []byte
	if of.Service != "" {
		message = protowire.AppendTag(message, 1, protowire.BytesType)
		message = protowire.AppendString(message, of.Service)
	}
	frame := binary.BigEndian.AppendUint32([]byte{0}, uint32(len(message))) //nolint:gosec // bounded with the assignment
	body := &onceReader{data: append(frame, message...)}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+p.address(of)+healthPath, body)
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/grpc")
	req.Header.Set("Te", "trailers")
	req.Header.Set("User-Agent", p.userAgent)
	answer, err := p.grpc.Do(req)
	if err != nil {
		return plainly(err)
	}
	defer func() { _ = answer.Body.Close() }()
	if answer.StatusCode != http.StatusOK {
		return fmt.Errorf("status %d", answer.StatusCode)
	}
	got, err := io.ReadAll(io.LimitReader(answer.Body, maxAnswer))
	if err != nil {
		return plainly(err)
	}
	status := answer.Trailer.Get("Grpc-Status")
	if status == "" {
		status = answer.Header.Get("Grpc-Status") // an answer without a message has only these
	}
	if status != "0" {
		return fmt.Errorf("gRPC status %.20q", status)
	}
	return servingStatus(got)
}

// servingStatus reads a HealthCheckResponse.
func servingStatus(frame []byte) error {
	if len(frame) < framePrefix || frame[0] != 0 || int(binary.BigEndian.Uint32(frame[1:])) != len(frame)-framePrefix {
		return errors.New("the answer is no gRPC message")
	}
	serving := uint64(0)
	for message := frame[framePrefix:]; len(message) > 0; {
		number, kind, n := protowire.ConsumeTag(message)
		if n < 0 {
			return errors.New("the answer is no health message")
		}
		message = message[n:]
		if number == 1 && kind == protowire.VarintType {
			serving, n = protowire.ConsumeVarint(message)
		} else {
			n = protowire.ConsumeFieldValue(number, kind, message)
		}
		if n < 0 {
			return errors.New("the answer is no health message")
		}
		message = message[n:]
	}
	if serving != healthServing {
		return fmt.Errorf("it says %d, and %d is SERVING", serving, healthServing)
	}
	return nil
}

// onceReader hides from net/http how long the body is: gRPC servers expect none said.
type onceReader struct{ data []byte }

func (r *onceReader) Read(p []byte) (int, error) {
	if len(r.data) == 0 {
		return 0, io.EOF
	}
	n := copy(p, r.data)
	r.data = r.data[n:]
	return n, nil
}

// plainly takes off what net/http and net put around an error: the address is said already.
func plainly(err error) error {
	if e, ok := errors.AsType[*url.Error](err); ok {
		err = e.Err
	}
	if e, ok := errors.AsType[*net.OpError](err); ok {
		return e.Err
	}
	return err
}
