package edge_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http/httptest"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/mysocketio/mysocket-injector/internal/edge/edgetest"
)

// echoService is a gRPC service without generated code: a call that greets, and a stream that echoes.
var echoService = grpc.ServiceDesc{
	ServiceName: "test.Echo",
	HandlerType: (*any)(nil),
	Methods: []grpc.MethodDesc{{MethodName: "Greet", Handler: func(_ any, ctx context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
		var in wrapperspb.StringValue
		if err := decode(&in); err != nil {
			return nil, err
		}
		if in.Value == "" {
			return nil, status.Error(codes.InvalidArgument, "nobody is there to greet")
		}
		md, _ := metadata.FromIncomingContext(ctx)
		_ = grpc.SetTrailer(ctx, metadata.Pairs("seen-visitor", strings.Join(md.Get("x-real-ip"), "")))
		return wrapperspb.String("hello " + in.Value), nil
	}}},
	Streams: []grpc.StreamDesc{{StreamName: "Talk", ServerStreams: true, ClientStreams: true, Handler: func(_ any, stream grpc.ServerStream) error {
		for {
			var in wrapperspb.StringValue
			if err := stream.RecvMsg(&in); err != nil {
				if errors.Is(err, io.EOF) {
					return nil
				}
				return err
			}
			if err := stream.SendMsg(wrapperspb.String("echo " + in.Value)); err != nil {
				return err
			}
		}
	}}},
}

// newGRPCApp serves the service without TLS.
func newGRPCApp(t *testing.T, options ...grpc.ServerOption) (address string, stop func()) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(options...)
	server.RegisterService(&echoService, nil)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.Serve(ln)
	}()
	stop = func() {
		server.Stop()
		<-done
	}
	t.Cleanup(stop)
	return ln.Addr().String(), stop
}

func newGRPCClient(t *testing.T, e *edgetest.Edge, s socket) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+s.DNSName+":443",
		grpc.WithTransportCredentials(credentials.NewClientTLSFromCert(e.CAPool(), "")),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "tcp", e.HTTPSAddress)
		}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// An app that speaks gRPC over TLS.
func TestGRPCOverTLSToTheApp(t *testing.T) {
	e := edgetest.Start(t)
	a := login(t, e)
	var s socket
	a.must("POST", "/socket", map[string]any{"name": "s", "upstream_type": "https"}, &s)
	lender := httptest.NewTLSServer(nil) // of a certificate
	defer lender.Close()
	app, _ := newGRPCApp(t, grpc.Creds(credentials.NewServerTLSFromCert(&lender.TLS.Certificates[0])))
	a.connect(s, app)
	conn := newGRPCClient(t, e, s)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for range 3 {
		var out wrapperspb.StringValue
		if err := conn.Invoke(ctx, "/test.Echo/Greet", wrapperspb.String("Ann"), &out); err != nil || out.Value != "hello Ann" {
			t.Errorf("got %q, %v", out.Value, err)
		}
	}
}

func TestGRPC(t *testing.T) {
	e := edgetest.Start(t)
	a := login(t, e)
	s := a.newSocket("http")
	app, stop := newGRPCApp(t)
	first := a.connect(s, app)
	conn := newGRPCClient(t, e, s)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()

	greet := func(name string) (string, metadata.MD, error) {
		var out wrapperspb.StringValue
		var trailer metadata.MD
		err := conn.Invoke(ctx, "/test.Echo/Greet", wrapperspb.String(name), &out, grpc.Trailer(&trailer))
		return out.Value, trailer, err
	}
	for range 20 {
		got, trailer, err := greet("Ann")
		if err != nil || got != "hello Ann" || strings.Join(trailer.Get("seen-visitor"), "") != "127.0.0.1" {
			t.Fatalf("got %q, trailer %v, %v", got, trailer, err)
		}
	}
	// An error without a message is header and trailer in one, which must not come in two.
	for range 50 {
		if _, _, err := greet(""); status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "nobody is there") {
			t.Fatalf("got %v", err)
		}
	}
	if n := first.opened.Load(); n != 1 {
		t.Errorf("70 calls took %d channels, want 1", n)
	}

	talk, err := conn.NewStream(ctx, &echoService.Streams[0], "/test.Echo/Talk")
	if err != nil {
		t.Fatal(err)
	}
	for i := range 5 {
		// Each message is answered before the next is sent.
		if err := talk.SendMsg(wrapperspb.String(fmt.Sprint("message ", i))); err != nil {
			t.Fatal(err)
		}
		var out wrapperspb.StringValue
		if err := talk.RecvMsg(&out); err != nil || out.Value != fmt.Sprint("echo message ", i) {
			t.Fatalf("got %q, %v", out.Value, err)
		}
	}
	_ = talk.CloseSend()
	if err := talk.RecvMsg(&wrapperspb.StringValue{}); !errors.Is(err, io.EOF) {
		t.Errorf("the stream ended with %v", err)
	}
	if open := e.Tunnels()[0].Tunnels[0].Open; open != 0 {
		t.Errorf("%d calls are outstanding after they ended", open)
	}

	// The app of one tunnel is gone: calls go to the other.
	other, _ := newGRPCApp(t)
	a.connect(s, other)
	stop()
	for range 10 {
		if got, _, err := greet("Bob"); err != nil || got != "hello Bob" {
			t.Fatalf("got %q, %v", got, err)
		}
	}
}

func TestGRPCWithoutATunnelIsUnavailable(t *testing.T) {
	e := edgetest.Start(t)
	a := login(t, e)
	s := a.newSocket("http")
	app, stop := newGRPCApp(t)
	stop()
	a.connect(s, app)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	err := newGRPCClient(t, e, s).Invoke(ctx, "/test.Echo/Greet", wrapperspb.String("Ann"), &wrapperspb.StringValue{})
	if status.Code(err) != codes.Unavailable {
		t.Errorf("got %v", err)
	}
}
