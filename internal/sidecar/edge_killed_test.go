package sidecar

import (
	"context"
	"encoding/base64"
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	edgeserver "github.com/mysocketio/mysocket-injector/internal/edge"
	"github.com/mysocketio/mysocket-injector/internal/edge/edgetest"
	"github.com/mysocketio/mysocket-injector/internal/gatewayapi"
	"github.com/mysocketio/mysocket-injector/internal/mysocket"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/gatewayclient"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/retry"
)

// edgeGateway asks a real edge as the control plane does.
type edgeGateway struct {
	api     *mysocket.Client
	address string
}

func (g *edgeGateway) Register(ctx context.Context, of gatewayclient.Connection, publicKey string) (gatewayapi.Registration, error) {
	made, err := g.api.CreateTunnel(ctx, of.SocketID)
	if err != nil {
		return gatewayapi.Registration{}, err
	}
	return g.sign(ctx, of, made.ID, uint32(made.LocalPort), publicKey)
}

func (g *edgeGateway) Renew(context.Context, gatewayclient.Connection, string, string) (gatewayapi.Registration, error) {
	return gatewayapi.Registration{}, errors.New("a plain reconnect needs no new certificate")
}

func (g *edgeGateway) Report(context.Context, gatewayclient.Connection, gatewayapi.StatusReport) error {
	return nil
}

func (g *edgeGateway) Delete(context.Context, gatewayclient.Connection, string) error { return nil }

func (g *edgeGateway) sign(ctx context.Context, of gatewayclient.Connection, tunnelID string, port uint32, publicKey string) (gatewayapi.Registration, error) {
	user, err := g.api.Login(ctx)
	if err != nil {
		return gatewayapi.Registration{}, err
	}
	signed, err := g.api.SignKey(ctx, of.SocketID, tunnelID, publicKey)
	if err != nil {
		return gatewayapi.Registration{}, err
	}
	wire, err := base64.StdEncoding.DecodeString(signed.HostKey)
	if err != nil {
		return gatewayapi.Registration{}, err
	}
	hostKey, err := ssh.ParsePublicKey(wire)
	if err != nil {
		return gatewayapi.Registration{}, err
	}
	return gatewayapi.Registration{
		TunnelID: tunnelID, Certificate: signed.Certificate, User: user, EdgeAddress: g.address,
		HostKeys: []string{authorizedKey(hostKey)}, ForwardHost: "localhost", ForwardPort: port,
	}, nil
}

func newEdgeAPI(t *testing.T, edge *edgetest.Edge) *mysocket.Client {
	t.Helper()
	api, err := mysocket.New(mysocket.Config{
		BaseURL: edge.APIURL,
		Credentials: func() (mysocket.Account, error) {
			return mysocket.Account{Email: edge.Email, Password: edge.Password}, nil
		},
		Transport: edge.APIClient(t).Transport,
	})
	if err != nil {
		t.Fatal(err)
	}
	return api
}

// An edge that is killed and started again gets its 200 sidecars back, spread over time.
func TestAKilledEdgeGetsItsSidecarsBack(t *testing.T) {
	t.Run("a start of a fifth of a second", func(t *testing.T) { killEdge(t, 200*time.Millisecond) })
	t.Run("a start of a second", func(t *testing.T) { killEdge(t, time.Second) })
}

// killEdge kills an edge whose start takes about as long as is said.
func killEdge(t *testing.T, start time.Duration) {
	const (
		sidecars = 200
		sockets  = 8
		bucket   = 250 * time.Millisecond
		deadline = 90 * time.Second // the machine may be busy
	)
	// Nobody hears what the killed edge still says, since the way to it is closed. So its drain only takes time, as a start does.
	edge := edgetest.Start(t, func(cfg *edgeserver.Config) { cfg.Timings.Drain = start })
	way := newGate(t, edge.SSHAddress)
	port, _ := (&world{t: t}).listen("app")
	var all []*sidecarOf
	for range sockets {
		// A client for each socket, since a client limits its own rate.
		api := newEdgeAPI(t, edge)
		socket, err := api.CreateSocket(t.Context(), mysocket.Socket{Name: "k8s shop.web", Type: "http"})
		if err != nil {
			t.Fatal(err)
		}
		for range sidecars / sockets {
			all = append(all, startSidecar(t, &edgeGateway{api, way.address}, retry.System(), rand.Float64, socket.ID, port))
		}
	}
	for _, s := range all {
		s.awaitConnected(t, deadline)
	}

	killed := time.Now()
	way.kill()
	edge.Stop()
	again := edgetest.Start(t, edgetest.SameState(edge))
	way.lead(again.SSHAddress)
	way.open()
	down := time.Since(killed)

	var took []time.Duration
	began, back := map[time.Duration]int{}, map[time.Duration]int{}
	for _, s := range all {
		took = append(took, s.awaitConnected(t, deadline).Sub(killed))
		back[took[len(took)-1].Truncate(bucket)]++
		began[s.attempted.Load().Sub(killed).Truncate(bucket)]++
	}
	slices.Sort(took)
	percentile := func(p int) time.Duration { return took[(len(took)*p+99)/100-1].Round(time.Millisecond) }
	t.Logf("the edge was away for %s; back after p50 %s, p99 %s, at most %s", down.Round(time.Millisecond), percentile(50), percentile(99), percentile(100))
	t.Log("          came  back")
	for at := time.Duration(0); at <= took[len(took)-1]; at += bucket {
		t.Logf("%5.2f s %5d %5d %s", at.Seconds(), began[at], back[at], strings.Repeat("#", back[at]))
		// When they come is theirs; how long the handshakes then take, all at once, is the machine's.
		if began[at] > sidecars/2 {
			t.Errorf("%d of %d came within one quarter of a second", began[at], sidecars)
		}
	}
}
