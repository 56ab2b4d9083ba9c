package controller

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/mysocketio/mysocket-injector/internal/annotations"
)

const (
	// secretPoll is how often a Secret is read again. It is not watched: that would need the right to list all Secrets of
	// its namespace, or an informer for each.
	secretPoll = time.Minute

	secretUsername = "username"
	secretPassword = "password"
	maxCredential  = 256
)

// credentials are what visitors of a protected socket must know. They are never written down.
type credentials struct {
	username, password string
	// atEdge tells whether this process has given them to the edge, which does not tell the password.
	atEdge bool
}

// String keeps them out of logs.
func (*credentials) String() string { return "[credentials]" }

// digest tells credentials from others. It stays in memory: a password may be short enough to be guessed from it.
func (c *credentials) digest() [sha256.Size]byte {
	if c == nil {
		return [sha256.Size]byte{}
	}
	return sha256.Sum256([]byte(c.username + "\x00" + c.password))
}

// redact takes the password out of an error, in case the API repeats what it was sent.
func (c *credentials) redact(err error) error {
	const short = 4 // what is shorter is part of any sentence
	if err == nil || c == nil || len(c.password) < short {
		return err
	}
	text := err.Error()
	quoted := strings.Trim(strconv.Quote(c.password), `"`)
	safe := strings.ReplaceAll(strings.ReplaceAll(text, c.password, "[password]"), quoted, "[password]")
	if safe == text {
		return err
	}
	return &redactedError{safe, err}
}

type redactedError struct {
	text string
	err  error
}

func (e *redactedError) Error() string { return e.text }
func (e *redactedError) Unwrap() error { return e.err }

// secretError says why a Service's Secret can't be used, and what to do. It never holds what is in the Secret.
type secretError struct{ message string }

func (e *secretError) Error() string { return e.message }

func secretProblem(format string, args ...any) error {
	return &secretError{fmt.Sprintf(format, args...)}
}

// credentialsOf reads the Secret that a Service names; nil if it names none.
func (r *ServiceReconciler) credentialsOf(ctx context.Context, namespace string, spec annotations.Spec) (*credentials, error) {
	if spec.ProtectedSecret == "" {
		return nil, nil
	}
	name := namespace + "/" + spec.ProtectedSecret
	secret := &corev1.Secret{}
	err := r.Secrets.Get(ctx, client.ObjectKey{Namespace: namespace, Name: spec.ProtectedSecret}, secret)
	switch {
	case apierrors.IsForbidden(err):
		return nil, secretProblem("the control plane may not read Secret %s (annotation %s): add %q to the chart's value protectedSecretNamespaces", name, annotations.ProtectedSecret, namespace)
	case apierrors.IsNotFound(err):
		return nil, secretProblem("Secret %s (annotation %s) does not exist: make it with the keys %s and %s (kubectl create secret generic)", name, annotations.ProtectedSecret, secretUsername, secretPassword)
	case err != nil:
		return nil, secretProblem("Secret %s (annotation %s) could not be read: %s", name, annotations.ProtectedSecret, err)
	}
	c := &credentials{}
	for _, k := range []struct {
		key  string
		into *string
	}{{secretUsername, &c.username}, {secretPassword, &c.password}} {
		raw, set := secret.Data[k.key]
		v := strings.TrimRight(string(raw), "\r\n") // as editors leave them at the end of a file
		switch {
		case !set:
			return nil, secretProblem("Secret %s has no key %q; it needs %s and %s", name, k.key, secretUsername, secretPassword)
		case v == "":
			return nil, secretProblem("the key %q of Secret %s is empty", k.key, name)
		case len(v) > maxCredential:
			return nil, secretProblem("the key %q of Secret %s has %d bytes; allowed are %d", k.key, name, len(v), maxCredential)
		case !utf8.ValidString(v) || strings.ContainsFunc(v, unicode.IsControl):
			return nil, secretProblem("the key %q of Secret %s must be text without control characters", k.key, name)
		}
		*k.into = v
	}
	if strings.Contains(c.username, ":") {
		return nil, secretProblem("the key %q of Secret %s must not hold a colon", secretUsername, name)
	}
	return c, nil
}

// protections remembers which credentials this process has given to the edge for a Service. The zero value is ready. After
// a change of the leader all are given once more, which does no harm.
type protections struct {
	mu sync.Mutex
	by map[client.ObjectKey][sha256.Size]byte
}

func (p *protections) known(service client.ObjectKey, c *credentials) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	known, ok := p.by[service]
	return ok && known == c.digest()
}

func (p *protections) remember(service client.ObjectKey, c *credentials) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if c == nil {
		delete(p.by, service)
		return
	}
	if p.by == nil {
		p.by = map[client.ObjectKey][sha256.Size]byte{}
	}
	p.by[service] = c.digest()
}

func isSecretError(err error) bool {
	var e *secretError
	return errors.As(err, &e)
}
