package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"strconv"

	jsonpatch "gomodules.xyz/jsonpatch/v2"
	"sigs.k8s.io/controller-runtime/pkg/webhook"
	webhookadmission "sigs.k8s.io/controller-runtime/pkg/webhook/admission"
)

// noopCommand makes this program the webhook that ours is compared with: the same server, in a process of its own, that
// allows everything without looking at it. Its arguments are a port, and the files of its certificate and key. At another path
// it adds one label, the least that a webhook can change: what the API server then does is no work of the webhook's.
const noopCommand = "noop"

const (
	noopPath  = "/allow"
	labelPath = "/label"
)

func serveNoop(ctx context.Context, args []string) error {
	if len(args) != 3 {
		return errors.New("noop: give a port, a certificate's file and a key's file")
	}
	port, err := strconv.Atoi(args[0])
	if err != nil {
		return fmt.Errorf("noop: port %q is no number", args[0])
	}
	pair, err := tls.LoadX509KeyPair(args[1], args[2])
	if err != nil {
		return fmt.Errorf("noop: %w", err)
	}
	s := webhook.NewServer(webhook.Options{Port: port, TLSOpts: []func(*tls.Config){func(c *tls.Config) {
		c.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return &pair, nil }
		c.MinVersion = tls.VersionTLS12
	}}})
	s.Register(noopPath, &webhookadmission.Webhook{Handler: webhookadmission.HandlerFunc(func(context.Context, webhookadmission.Request) webhookadmission.Response {
		return webhookadmission.Allowed("")
	})})
	patch := jsonpatch.NewOperation("add", "/metadata/labels/bench", "true") // the pods have labels
	s.Register(labelPath, &webhookadmission.Webhook{Handler: webhookadmission.HandlerFunc(func(context.Context, webhookadmission.Request) webhookadmission.Response {
		return webhookadmission.Patched("", patch)
	})})
	return s.Start(ctx)
}
