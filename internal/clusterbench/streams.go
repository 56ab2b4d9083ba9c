package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/mysocketio/mysocket-injector/internal/gatewayapi"
	"github.com/mysocketio/mysocket-injector/internal/inject"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/gatewayclient"
)

// dialGateway connects to the gateway, and trusts what the leader publishes for sidecars.
func (l *lab) dialGateway(ctx context.Context) (net.Conn, error) {
	roots, err := l.gatewayCA(ctx)
	if err != nil {
		return nil, err
	}
	d := tls.Dialer{Config: &tls.Config{RootCAs: roots, ServerName: gatewayService + "." + ownNamespace + ".svc", MinVersion: tls.VersionTLS12}}
	return d.DialContext(ctx, "tcp", "127.0.0.1:"+strconv.Itoa(l.gatewayPort))
}

// gatewayCA reads the CA from any namespace's ConfigMap.
func (l *lab) gatewayCA(ctx context.Context) (*x509.CertPool, error) {
	if l.roots != nil {
		return l.roots, nil
	}
	var maps corev1.ConfigMapList
	if err := l.List(ctx, &maps, client.MatchingFields{"metadata.name": inject.DefaultCAConfigMap}, client.Limit(1)); err != nil {
		return nil, err
	}
	if len(maps.Items) == 0 {
		return nil, errors.New("the gateway's CA is not published yet")
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM([]byte(maps.Items[0].Data[inject.CAKey])) {
		return nil, errors.New("the gateway's CA is no certificate")
	}
	l.roots = roots
	return roots, nil
}

// token returns what the kubelet would mount into the sidecar of a pod.
func (l *lab) token(ctx context.Context, pod *corev1.Pod) (string, error) {
	r := &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{
		Audiences: []string{gatewayapi.Audience}, ExpirationSeconds: ptr.To[int64](3600),
		BoundObjectRef: &authenticationv1.BoundObjectReference{APIVersion: "v1", Kind: "Pod", Name: pod.Name, UID: pod.UID},
	}}
	sa := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: pod.Namespace, Name: serviceAccount}}
	if err := l.SubResource("token").Create(ctx, sa, r); err != nil {
		return "", err
	}
	return r.Status.Token, nil
}

// stream is a pod's stream of assignments.
type stream struct {
	conn  net.Conn
	lines *bufio.Reader
	body  io.ReadCloser

	mu    sync.Mutex
	seen  map[string]time.Time // when a snapshot with this mark came first
	wrong error
}

// openStream opens the stream of a pod, as its sidecar does, and reads its first snapshot, which must have an assignment.
func (l *lab) openStream(ctx context.Context, token string) (*stream, error) {
	c, err := l.dialGateway(ctx)
	if err != nil {
		return nil, err
	}
	if _, err := fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: gateway\r\nAuthorization: Bearer %s\r\n\r\n", gatewayapi.AssignmentsPath, token); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	resp, err := http.ReadResponse(bufio.NewReaderSize(c, 2048), nil)
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	if resp.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
		_ = resp.Body.Close()
		return nil, errors.Join(fmt.Errorf("the gateway answers %s: %s", resp.Status, text), c.Close())
	}
	s := &stream{conn: c, body: resp.Body, lines: bufio.NewReaderSize(resp.Body, 1024), seen: map[string]time.Time{}}
	first, err := s.next()
	if err == nil && len(first.Assignments) != 1 {
		err = fmt.Errorf("the pod has %d assignments, want 1", len(first.Assignments))
	}
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return s, nil
}

// next reads the next snapshot.
func (s *stream) next() (gatewayapi.Snapshot, error) {
	for {
		line, err := s.lines.ReadBytes('\n')
		if err != nil {
			return gatewayapi.Snapshot{}, err
		}
		if len(line) > 1 { // else it is a heartbeat
			return gatewayclient.ParseSnapshot(line)
		}
	}
}

// mark is what an edit changes in an assignment.
func mark(port, connections int) string {
	return fmt.Sprintf("port %d, %d connections", port, connections)
}

// follow reads until the stream ends, and notes when which snapshot came.
func (s *stream) follow() {
	for {
		snapshot, err := s.next()
		now := time.Now()
		s.mu.Lock()
		if err != nil {
			s.wrong = err
			s.mu.Unlock()
			return
		}
		for _, a := range snapshot.Assignments {
			if m := mark(int(a.Port), max(1, a.Connections)); s.seen[m].IsZero() {
				s.seen[m] = now
			}
		}
		s.mu.Unlock()
	}
}

// at returns when a snapshot with the mark came, and forgets it.
func (s *stream) at(m string) (time.Time, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.wrong != nil {
		return time.Time{}, fmt.Errorf("a stream has ended: %w", s.wrong)
	}
	at := s.seen[m]
	if at.IsZero() {
		return at, fmt.Errorf("a stream has not got %s", m)
	}
	delete(s.seen, m)
	return at, nil
}
