package mysocket_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"sort"
	"testing"

	"github.com/mysocketio/mysocket-injector/internal/edge/edgetest"
)

// notAtOurEdge are fields of recorded answers that our edge leaves out, because it has nothing to say there.
var notAtOurEdge = map[string]bool{
	"upstream_username": true, "upstream_password": true, "policy_names": true,
	"alive": true, "connectors": true, "connector_managed": true, "end_to_end_encryption_enabled": true, "private_network_enabled": true,
}

// TestEdgeAnswersInTheRecordedShapes asks our edge for everything that the documents name, in both dialects, and compares the
// answers with the recorded ones: every field there, with the same kind of value.
func TestEdgeAnswersInTheRecordedShapes(t *testing.T) {
	e := edgetest.Start(t)
	asker := &shapes{t: t, edge: e, client: e.APIClient(t), seen: map[string]bool{}}
	_, key := newKey(t)
	sign := map[string]string{"ssh_public_key": key}

	login := asker.ask("POST", "/login", map[string]string{"email": e.Email, "password": e.Password}, 200, "classic/login.json")
	token, _ := login["token"].(string)
	asker.token = token
	asker.ask("POST", "/login/refresh", nil, 200, "classic/login_refresh.json")
	asker.ask("GET", "/user/"+e.UserID, nil, 200, "classic/user.json")
	asker.ask("GET", "/organization", nil, 200, "classic/organization.json")
	connected := asker.ask("POST", "/connect", map[string]any{"name": "k8s shop.web", "tags": map[string]string{"a": "b"}}, 200, "classic/connect.json")
	socket := "/socket/" + fmt.Sprint(connected["socket_id"])
	asker.ask("GET", "/socket", nil, 200, "classic/sockets.json")
	asker.ask("GET", "/connect", nil, 200, "classic/sockets.json")
	asker.ask("GET", socket, nil, 200, "classic/socket.json")
	asker.ask("PUT", socket, map[string]any{"description": "x"}, 200, "classic/socket.json")
	tunnel := asker.ask("POST", socket+"/tunnel", nil, 200, "classic/tunnel.json")
	asker.ask("GET", socket+"/tunnel", nil, 200, "classic/tunnels.json")
	path := socket + "/tunnel/" + fmt.Sprint(tunnel["tunnel_id"])
	asker.ask("GET", path, nil, 200, "classic/tunnel.json")
	asker.ask("POST", path+"/signkey", sign, 200, "classic/signkey_2021.json")
	asker.ask("POST", socket+"/signkey", sign, 200, "classic/signkey.json")
	asker.ask("POST", "/socket", map[string]any{"socket_type": "nonsense"}, 400, "classic/error.json")
	asker.ask("GET", "/socket/none", nil, 404, "classic/error.json")

	asker.token = e.Token
	const v1 = "/api/v1"
	asker.ask("GET", v1+"/serverinfo", nil, 200, "border0/serverinfo.json")
	made := asker.ask("POST", v1+"/socket", map[string]any{"name": "k8s---shop--web", "display_name": "k8s shop.web", "socket_type": "http", "tags": map[string]string{"a": "b"}}, 200, "border0/socket.json")
	socket = v1 + "/socket/" + fmt.Sprint(made["socket_id"])
	asker.ask("GET", v1+"/sockets?page=1&page_size=1", nil, 200, "border0/sockets_page1.json")
	asker.ask("GET", v1+"/sockets?page=2&page_size=1", nil, 200, "border0/sockets_page2.json")
	asker.ask("GET", v1+"/sockets?name=none", nil, 200, "border0/sockets_none.json")
	asker.ask("GET", socket+"?activeOnly=true", nil, 200, "border0/socket.json")
	asker.ask("GET", v1+"/socket/k8s---shop--web", nil, 200, "border0/socket.json")
	asker.ask("PUT", socket, map[string]any{"description": "x"}, 200, "border0/socket.json")
	asker.ask("POST", socket+"/signkey", sign, 200, "border0/signkey.json")
	asker.ask("POST", v1+"/socket", map[string]any{"name": "x", "socket_type": "ssh"}, 400, "border0/error.json")
	asker.ask("POST", v1+"/socket", map[string]any{"name": "k8s---shop--web"}, 409, "border0/error.json")
	asker.ask("GET", v1+"/socket/none", nil, 404, "border0/error.json")
	asker.token = "x"
	asker.ask("GET", v1+"/sockets", nil, 401, "border0/error.json")

	files, err := filepath.Glob("testdata/*/*.json")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		if name, _ := filepath.Rel("testdata", file); !asker.seen[name] && name != "border0/error_fallback.json" { // an API's that says less
			t.Errorf("nothing was compared with %s", file)
		}
	}
}

type shapes struct {
	t      *testing.T
	edge   *edgetest.Edge
	client *http.Client
	token  string
	seen   map[string]bool
}

// ask makes a request and compares the answer with a recorded one. It returns the answer, if it is an object.
func (s *shapes) ask(method, path string, body any, status int, file string) map[string]any {
	s.t.Helper()
	s.seen[file] = true
	text, err := json.Marshal(body) // null for none: the protocol has servers tolerate it
	if err != nil {
		s.t.Fatal(err)
	}
	r, err := http.NewRequestWithContext(s.t.Context(), method, s.edge.APIURL+path, bytes.NewReader(text))
	if err != nil {
		s.t.Fatal(err)
	}
	if s.token != "" {
		r.Header.Set("Authorization", "Bearer "+s.token)
	}
	resp, err := s.client.Do(r)
	if err != nil {
		s.t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	golden, err := os.ReadFile(filepath.Join("testdata", file))
	if err != nil {
		s.t.Fatal(err)
	}
	var got, want any
	if err := json.Unmarshal(golden, &want); err != nil {
		s.t.Fatalf("%s: %v", file, err)
	}
	if err := json.Unmarshal(answer, &got); err != nil || resp.StatusCode != status {
		s.t.Fatalf("%s %s: %d %s, %v; want %d", method, path, resp.StatusCode, answer, err, status)
	}
	for _, difference := range differences("", got, want) {
		s.t.Errorf("%s %s, compared with %s: %s", method, path, file, difference)
	}
	object, _ := got.(map[string]any)
	return object
}

func differences(at string, got, want any) []string {
	switch want := want.(type) {
	case map[string]any:
		got, ok := got.(map[string]any)
		if !ok {
			return []string{at + " is no object"}
		}
		var out []string
		for key, value := range want {
			if field, there := got[key]; there {
				out = append(out, differences(at+"."+key, field, value)...)
			} else if !notAtOurEdge[key] && at != ".tags" && at != ".list.tags" {
				out = append(out, at+"."+key+" is missing")
			}
		}
		sort.Strings(out)
		return out
	case []any:
		got, ok := got.([]any)
		if !ok {
			return []string{at + " is no list"}
		}
		if len(want) > 0 && len(got) > 0 {
			return differences(at, got[0], want[0])
		}
	default:
		if want != nil && fmt.Sprintf("%T", got) != fmt.Sprintf("%T", want) {
			return []string{fmt.Sprintf("%s is a %T, not a %T", at, got, want)}
		}
	}
	return nil
}
