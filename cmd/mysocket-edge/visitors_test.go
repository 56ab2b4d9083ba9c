package main

import (
	"fmt"
	"io"
	"testing"
)

func TestVisitorsInAFile(t *testing.T) {
	cfg, _, code, ok := serveConfig([]string{"--config", writeConfig(t, `
tls-cert: c.pem
tls-key: k.pem
redirect-http: true
acme-directory: https://acme.example/directory
acme-email: me@example.com
acme-ca: roots.pem
trusted-proxies: [10.0.0.0/8, 192.0.2.7]
proxy-protocol:
- https
- tcp
`)}, io.Discard)
	want := "{c.pem k.pem true https://acme.example/directory me@example.com roots.pem [10.0.0.0/8 192.0.2.7/32] [https tcp]}"
	if got := fmt.Sprint(cfg.Visitors); !ok || got != want {
		t.Errorf("exit %d, %s, want %s", code, got, want)
	}
}
