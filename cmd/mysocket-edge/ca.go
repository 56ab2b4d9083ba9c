package main

import (
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"
)

const (
	caTimeout = 5 * time.Second
	maxCA     = 64 << 10
)

// ca prints what `serve --ca-out` writes, of an edge that runs. In a container without a shell there is nothing else that could
// hand a file out.
func ca(args []string, stdout, stderr io.Writer) int {
	fs := newFlags("mysocket-edge ca", "Prints the certificate of a running edge's own authority (PEM), which its API's certificate is from.", stderr)
	address := fs.String("admin-address", "127.0.0.1:9090", "`address` of the edge's admin server, host:port")
	if code, ok := parse(fs, args, stderr); !ok {
		return code
	}
	if host, port, err := net.SplitHostPort(*address); err != nil || host == "" || port == "" {
		_, _ = fmt.Fprintf(stderr, "mysocket-edge ca: --admin-address %q is not host:port\n", *address)
		return 2
	}
	certificate, err := fetchCA(*address)
	if err != nil {
		return fail(stderr, "ca", err)
	}
	if _, err := stdout.Write(certificate); err != nil {
		return fail(stderr, "ca", err)
	}
	return 0
}

func fetchCA(address string) ([]byte, error) {
	client := &http.Client{Timeout: caTimeout, Transport: &http.Transport{DisableKeepAlives: true}}
	res, err := client.Get("http://" + address + "/ca.pem") //nolint:noctx // the client has a time-out
	if err != nil {
		return nil, fmt.Errorf("no edge answers at its admin address: %w", err)
	}
	defer func() { _ = res.Body.Close() }()
	text, err := io.ReadAll(io.LimitReader(res.Body, maxCA))
	if err != nil {
		return nil, err
	}
	if res.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s answers with %s", address, res.Status)
	}
	if block, _ := pem.Decode(text); block == nil || block.Type != "CERTIFICATE" {
		return nil, errors.New(address + " answers with something else than a certificate")
	}
	return text, nil
}
