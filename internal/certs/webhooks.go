package certs

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// fieldOwner is the name under which the API server notes which fields are ours.
const fieldOwner = "mysocket-injector-certs"

// webhook is what we care about in one entry of a configuration of either kind.
type webhook struct {
	name   string
	config admissionregistrationv1.WebhookClientConfig
}

// configuration is a webhook configuration of either kind.
type configuration struct {
	object   client.Object
	kind     string
	webhooks func() []webhook
	// optional tells that the control plane does its work without it.
	optional bool
}

var errNoConfiguration = errors.New("does not exist")

// configurations returns the configurations that are ours to mend, not read yet.
func (m *Manager) configurations() []configuration {
	var list []configuration
	if name := m.cfg.MutatingWebhook; name != "" {
		c := &admissionregistrationv1.MutatingWebhookConfiguration{}
		c.Name = name
		list = append(list, configuration{object: c, kind: "MutatingWebhookConfiguration", webhooks: func() (all []webhook) {
			for _, w := range c.Webhooks {
				all = append(all, webhook{w.Name, w.ClientConfig})
			}
			return all
		}})
	}
	if name := m.cfg.ValidatingWebhook; name != "" {
		c := &admissionregistrationv1.ValidatingWebhookConfiguration{}
		c.Name = name
		// Who deletes this one, so that Services can be written whatever we say, must not lose tunnels by it.
		list = append(list, configuration{object: c, kind: "ValidatingWebhookConfiguration", optional: true, webhooks: func() (all []webhook) {
			for _, w := range c.Webhooks {
				all = append(all, webhook{w.Name, w.ClientConfig})
			}
			return all
		}})
	}
	return list
}

func (m *Manager) readConfiguration(ctx context.Context, c configuration) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	err := m.client.Get(ctx, client.ObjectKeyFromObject(c.object), c.object)
	if apierrors.IsNotFound(err) {
		return fmt.Errorf("%s %s %w", c.kind, c.object.GetName(), errNoConfiguration)
	}
	return named("read "+c.kind+" "+c.object.GetName(), err)
}

// publish writes our CAs into every configuration that has others, and nothing else of it.
func (m *Manager) publish(ctx context.Context) {
	bundle := m.CABundle()
	for _, c := range m.configurations() {
		if err := m.readConfiguration(ctx, c); err != nil {
			continue // checkWebhooks says so
		}
		patch, err := bundlePatch(c.webhooks(), bundle)
		if err == nil && patch != nil {
			err = m.patch(ctx, c, patch)
		}
		m.report.report("writing the CA into the webhook configuration", err, "kind", c.kind, "name", c.object.GetName())
		if err == nil && patch != nil {
			m.log.Info("CA written into the webhook configuration", "kind", c.kind, "name", c.object.GetName())
		}
	}
}

func (m *Manager) patch(ctx context.Context, c configuration, patch []byte) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	return m.client.Patch(ctx, c.object, client.RawPatch(types.JSONPatchType, patch), client.FieldOwner(fieldOwner))
}

// bundlePatch returns the JSON patch that gives every webhook the bundle, nil if all have it. The patch fails if the
// webhooks have been reordered since they were read; the next round then sees them as they are.
func bundlePatch(webhooks []webhook, bundle []byte) ([]byte, error) {
	type operation struct {
		Op    string `json:"op"`
		Path  string `json:"path"`
		Value any    `json:"value"`
	}
	var ops []operation
	for i, w := range webhooks {
		if !bytes.Equal(w.config.CABundle, bundle) {
			at := fmt.Sprintf("/webhooks/%d/", i)
			ops = append(ops, operation{"test", at + "name", w.name}, operation{"add", at + "clientConfig/caBundle", bundle})
		}
	}
	if ops == nil {
		return nil, nil
	}
	return json.Marshal(ops)
}

// checkWebhooks sees whether the API server would trust our certificate.
func (m *Manager) checkWebhooks(ctx context.Context) {
	m.mu.Lock()
	current := m.material
	m.mu.Unlock()
	if current == nil {
		return
	}
	var problem error
	for _, c := range m.configurations() {
		problem = m.readConfiguration(ctx, c)
		if c.optional {
			var missing error
			if errors.Is(problem, errNoConfiguration) {
				missing, problem = problem, nil
			}
			m.report.report("the "+c.kind, missing)
			if missing != nil {
				continue
			}
		}
		if problem == nil {
			problem = trusts(c, current)
		}
		if problem != nil {
			break
		}
	}
	if errors.Is(problem, context.Canceled) {
		return
	}
	m.mu.Lock()
	m.webhooks = problem
	m.published = m.published || problem == nil
	m.mu.Unlock()
	m.report.report("trust of the webhook configurations in our certificate", problem)
}

// trusts says why the API server would not take what is served for the webhooks of the configuration.
func trusts(c configuration, served *material) error {
	chain := x509.NewCertPool()
	for _, i := range served.chain {
		chain.AddCert(i)
	}
	for _, w := range c.webhooks() {
		roots := x509.NewCertPool()
		roots.AppendCertsFromPEM(w.config.CABundle)
		options := x509.VerifyOptions{Roots: roots, Intermediates: chain}
		if s := w.config.Service; s != nil {
			options.DNSName = s.Name + "." + s.Namespace + ".svc" // as the API server asks for it
		}
		if _, err := served.leaf.cert.Verify(options); err != nil {
			return fmt.Errorf("webhook %s of %s %s does not trust our certificate: %w", w.name, c.kind, c.object.GetName(), err)
		}
	}
	return nil
}
