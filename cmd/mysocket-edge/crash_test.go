package main

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"path/filepath"
	"sync"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/mysocketio/mysocket-injector/internal/edge/control"
	"github.com/mysocketio/mysocket-injector/internal/edge/store"
)

const (
	crashRounds  = 30
	crashWriters = 6
)

// acknowledged is what clients were told: what there is, and what is gone. What was asked for and not answered is in neither.
type acknowledged struct {
	mu   sync.Mutex
	live map[string]object
	gone map[string]object
}

// object is a socket, a tunnel, an account or an access token.
type object struct {
	kind string
	// name is the public name of a socket and the socket of a tunnel.
	name string
}

func (a *acknowledged) made(id string, o object) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.live[id] = o
}

// some returns an object of a kind that there is.
func (a *acknowledged) some(kind string, mine func(object) bool) (id string, o object) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for id, o := range a.live {
		if o.kind == kind && mine(o) {
			return id, o
		}
	}
	return "", object{}
}

// deleting takes an object, and the tunnels of a socket with it, out of what there must be, until the answer is known.
func (a *acknowledged) deleting(id string) (all map[string]object) {
	a.mu.Lock()
	defer a.mu.Unlock()
	all = map[string]object{id: a.live[id]}
	for t, o := range a.live {
		if o.kind == "tunnel" && o.name == id {
			all[t] = o
		}
	}
	for id := range all {
		delete(a.live, id)
	}
	return all
}

func (a *acknowledged) deleted(all map[string]object) {
	a.mu.Lock()
	defer a.mu.Unlock()
	maps.Copy(a.gone, all)
}

// kinds counts what was acknowledged.
func (a *acknowledged) kinds() (kinds map[string]int, total int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	kinds = map[string]int{}
	for _, o := range a.live {
		kinds[o.kind]++
	}
	for _, o := range a.gone {
		kinds["deleted "+o.kind]++
	}
	return kinds, len(a.live) + len(a.gone)
}

// check opens the state as an edge would and looks for all of it.
func (a *acknowledged) check(t *testing.T, state string) {
	t.Helper()
	db, err := bolt.Open(state, 0o600, &bolt.Options{ReadOnly: true, Timeout: time.Second})
	if err != nil {
		t.Fatalf("the state can't be opened: %v", err)
	}
	err = db.View(func(tx *bolt.Tx) error {
		for err := range tx.Check() {
			t.Errorf("the state is inconsistent: %v", err)
		}
		return nil
	})
	if err = errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
	s, err := store.Open(state, nil)
	if err != nil {
		t.Fatalf("the state can't be loaded: %v", err)
	}
	defer func() { _ = s.Close() }()
	find := func(id string, o object) (name string, err error) {
		switch o.kind {
		case "socket":
			k, err := s.Socket(id)
			return k.DNSName, err
		case "tunnel":
			k, err := s.Tunnel(id)
			return k.SocketID, err
		case "account":
			u, err := s.UserByEmail(id)
			return u.Email, err
		}
		_, err = s.AccessToken(id)
		return "", err
	}
	for id, o := range a.live {
		if name, err := find(id, o); err != nil || name != o.name {
			t.Errorf("%s %s was acknowledged and is %q, %v; want %q", o.kind, id, name, err, o.name)
		}
	}
	for id, o := range a.gone {
		if _, err := find(id, o); !errors.Is(err, store.ErrNotFound) {
			t.Errorf("the deletion of %s %s was acknowledged, and it is there: %v", o.kind, id, err)
		}
	}
}

// writeSockets makes and deletes sockets and tunnels until the edge is gone. Sockets have the writer's number in their name, so that no two writers
// delete one thing.
func (a *acknowledged) writeSockets(api *apiClient, writer int) {
	sockets := map[string]bool{}
	for {
		switch choice := rand.IntN(10); {
		case choice < 4 || len(sockets) == 0:
			path := "/socket"
			if choice%2 == 0 {
				path = "/connect"
			}
			status, answer := api.call("POST", path, fmt.Sprintf(`{"name": "of writer %d"}`, writer))
			if status != http.StatusOK {
				if status != 0 {
					api.t.Errorf("POST %s answered %d %v", path, status, answer)
				}
				return
			}
			id := answer["socket_id"].(string)
			sockets[id] = true
			a.made(id, object{"socket", answer["dnsname"].(string)})
			for _, t := range answer["tunnels"].([]any) {
				a.made(t.(map[string]any)["tunnel_id"].(string), object{"tunnel", id})
			}
		case choice < 7:
			var id string
			for id = range sockets {
				break
			}
			status, answer := api.call("POST", "/socket/"+id+"/tunnel", "null")
			if status != http.StatusOK {
				return
			}
			a.made(answer["tunnel_id"].(string), object{"tunnel", id})
		case choice < 9:
			id, o := a.some("tunnel", func(o object) bool { return sockets[o.name] })
			if id == "" {
				continue
			}
			all := a.deleting(id)
			if status, _ := api.call("DELETE", "/socket/"+o.name+"/tunnel/"+id, ""); status != http.StatusNoContent {
				return
			}
			a.deleted(all)
		default:
			var id string
			for id = range sockets {
				break
			}
			delete(sockets, id)
			all := a.deleting(id)
			if status, _ := api.call("DELETE", "/socket/"+id, ""); status != http.StatusNoContent {
				return
			}
			a.deleted(all)
		}
	}
}

// writeAccounts does the same with accounts and access tokens, as the operator.
func (a *acknowledged) writeAccounts(c *control.Client, round int) {
	for n := 0; ; n++ {
		email := fmt.Sprintf("%d.%d@example.com", round, n)
		if _, err := c.Add(control.NewUser{Email: email, Password: "a long password"}); err != nil {
			return
		}
		a.made(email, object{"account", email})
		if n%2 == 0 {
			continue
		}
		id, _ := a.some("account", func(object) bool { return true })
		all := a.deleting(id)
		if c.Delete(id) != nil {
			return
		}
		a.deleted(all)
	}
}

// TestKilledAtAnyMoment kills the edge while clients make and delete objects as fast as they can, and looks each time whether all that they were told holds.
func TestKilledAtAnyMoment(t *testing.T) {
	dir := t.TempDir()
	state, ca := filepath.Join(dir, "x.db"), filepath.Join(dir, "ca.pem")
	if code, _, errs := invoke(t, "a long password", "user", "add", "--email", "owner@example.com", "--state", state); code != 0 {
		t.Fatal(errs)
	}
	all := &acknowledged{live: map[string]object{}, gone: map[string]object{}}
	token := ""
	for round := range crashRounds {
		if round%5 == 4 {
			// While it starts.
			p := launch(t, state, nil)
			<-time.After(time.Duration(rand.Int64N(int64(50 * time.Millisecond))))
			p.kill()
			all.check(t, state)
			continue
		}
		p := startProcess(t, state, nil, "--ca-out", ca, "--log-level", "info")
		api := p.api(ca)
		api.token = token
		if token == "" {
			if status := api.login("owner@example.com", "a long password"); status != http.StatusOK {
				t.Fatalf("login: %d", status)
			}
			token = api.token
		}
		operator, err := control.Dial(t.Context(), state+".sock")
		if err != nil {
			t.Fatal(err)
		}
		var writers sync.WaitGroup
		for writer := range crashWriters {
			writers.Go(func() { all.writeSockets(api, writer) })
		}
		writers.Go(func() { all.writeAccounts(operator, round) })
		// A moment in answers, not in time: a machine that is busy is to be asked as much.
		_, before := all.kinds()
		answers := rand.IntN(60)
		p.wait("answers", func() bool {
			kinds, total := all.kinds()
			return total >= before+answers && (round < crashRounds-2 || kinds["account"] > 0 && kinds["deleted account"] > 0 &&
				kinds["deleted socket"] > 0 && kinds["deleted tunnel"] > 0)
		})
		p.kill()
		writers.Wait()
		all.check(t, state)
		if t.Failed() {
			t.Fatalf("in round %d, killed after %d answers", round, answers)
		}
	}
	kinds, _ := all.kinds()
	t.Logf("acknowledged in %d rounds: %v", crashRounds, kinds)
}
