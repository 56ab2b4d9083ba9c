package front

import (
	"context"
	"crypto/tls"
	"net"
	"time"

	"github.com/mysocketio/mysocket-injector/internal/edge/store"
)

// Certificate finds the certificate of a public name.
type Certificate func(name string, hello *tls.ClientHelloInfo) (*tls.Certificate, error)

// tlsOf is what visitors of a tls socket get, nil for a tcp socket. It is made once for a port, since it has the keys of
// session tickets.
func (f *TCP) tlsOf(socket store.Socket) *tls.Config {
	if socket.Type != store.TypeTLS {
		return nil
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		GetCertificate: func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
			// The port belongs to one socket, so who names nothing means it.
			if name := hostName(hello.ServerName); name != "" && name != socket.DNSName {
				return nil, nil // crypto/tls answers unrecognized_name.
			}
			return f.cfg.Certificate(socket.DNSName, hello)
		},
	}
}

// endTLS agrees with the visitor on keys. What comes out of the connection then is what goes to the app.
func endTLS(ctx context.Context, conn net.Conn, config *tls.Config, limit time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	secure := tls.Server(conn, config)
	if err := secure.HandshakeContext(ctx); err != nil {
		return nil, err
	}
	return secure, nil
}
