package edge

import (
	"encoding/json"
	"net/http"
	"time"

	"github.com/mysocketio/mysocket-injector/internal/edge/metrics"
)

// DebugSocket is one socket in the answer of /debug/tunnels, which is a list of them.
type DebugSocket struct {
	Socket  string `json:"socket"`
	Name    string `json:"name"`
	DNSName string `json:"dnsname"`
	Type    string `json:"type"`
	// Registered counts the tunnel objects of the API, connected or not.
	Registered int           `json:"registered"`
	Tunnels    []DebugTunnel `json:"tunnels"`
}

// DebugTunnel is one connected tunnel.
type DebugTunnel struct {
	Tunnel string `json:"tunnel"`
	// Name is what the tunnel's client calls itself, such as the namespace and name of a pod.
	Name string `json:"name,omitempty"`
	// Remote is where the SSH connection comes from, address:port.
	Remote string    `json:"remote"`
	Since  time.Time `json:"since"`
	// Open are the requests and connections that it carries now, Total all it was chosen for.
	Open  int    `json:"open"`
	Total uint64 `json:"total"`
	// Ejected says that it is out of the rotation, since channels don't open or requests get no answer, until a probe succeeds.
	Ejected bool `json:"ejected,omitempty"`
}

// admin serves metrics, health and what is connected. It is for the operator: the default address is loopback.
func (e *Edge) admin(m *metrics.Metrics) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /", e.statusPage())
	mux.Handle("GET /metrics", m.Handler())
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		if !e.ready.Load() {
			http.Error(w, "not ready", http.StatusServiceUnavailable)
			return
		}
		_, _ = w.Write([]byte("ok\n"))
	})
	mux.HandleFunc("GET /debug/tunnels", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		_ = enc.Encode(e.Tunnels())
	})
	mux.HandleFunc("GET /ca.pem", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/x-pem-file")
		_, _ = w.Write(e.keys.CAPEM)
	})
	return mux
}

// Tunnels says what is connected, for every socket there is.
func (e *Edge) Tunnels() []DebugSocket {
	connected := e.registry.Snapshot()
	out := []DebugSocket{}
	for _, k := range e.store.AllSockets() {
		s := DebugSocket{
			Socket: k.ID, Name: k.Name, DNSName: k.DNSName, Type: string(k.Type),
			Registered: len(e.store.Tunnels(k.ID)), Tunnels: []DebugTunnel{},
		}
		for _, t := range connected[k.ID] {
			s.Tunnels = append(s.Tunnels, DebugTunnel{
				Tunnel: t.TunnelID, Name: t.Name, Remote: t.RemoteAddr, Since: t.Since.UTC(), Open: t.Outstanding, Total: t.Total, Ejected: t.Ejected,
			})
		}
		out = append(out, s)
	}
	return out
}
