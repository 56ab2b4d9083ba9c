package front

import (
	"context"
	"maps"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/mysocketio/mysocket-injector/internal/edge/registry"
)

const (
	grpcContentType = "application/grpc"
	// A channel to an app that is silent for grpcPingAfter is asked whether the app is still there, and closed if there is no
	// answer for grpcPingTimeout.
	grpcPingAfter   = 30 * time.Second
	grpcPingTimeout = 15 * time.Second
)

// isGRPC says whether a request is a gRPC call, which needs HTTP/2 all the way: not gRPC-Web, which is made for HTTP/1.1.
func isGRPC(r *http.Request) bool {
	rest, ok := strings.CutPrefix(strings.ToLower(r.Header.Get("Content-Type")), grpcContentType)
	return ok && r.ProtoMajor == 2 && (rest == "" || rest[0] == '+' || rest[0] == ';')
}

// grpcTransport speaks HTTP/2: over TLS to apps that want that, else without an upgrade (h2c with prior knowledge), as gRPC servers do.
// An app may take as long as it likes to begin an answer: servers of a stream begin with the first message.
func (us *upstreams) grpcTransport(t *registry.Tunnel) *http.Transport {
	transport := us.transport(t, false)
	transport.Protocols = new(http.Protocols)
	transport.Protocols.SetUnencryptedHTTP2(true)
	transport.Protocols.SetHTTP2(true)
	transport.DialTLSContext = func(ctx context.Context, _, address string) (net.Conn, error) {
		return us.dialTLS(ctx, t, address, "h2")
	}
	transport.HTTP2 = &http.HTTP2Config{SendPingTimeout: grpcPingAfter, PingTimeout: grpcPingTimeout}
	transport.ResponseHeaderTimeout = 0
	return transport
}

// passTrailers has the trailers of the visitor's request, if it announced any, reach the app.
func (v *visit) passTrailers(out *http.Request) {
	if len(out.Trailer) == 0 || v.rec.body == nil {
		return
	}
	out.ContentLength = -1 // HTTP/1.1 has trailers only where the length is not known before.
	v.rec.body.trailers = func() {
		for name := range out.Trailer {
			if values, ok := v.in.Trailer[name]; ok {
				out.Trailer[name] = values
			}
		}
		maps.DeleteFunc(out.Trailer, func(_ string, values []string) bool { return values == nil })
	}
}
