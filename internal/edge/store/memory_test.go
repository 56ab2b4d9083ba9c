package store

import "testing"

// TestWhatIsReadAnewTakesThePlaceOfTheOld has an edge miss that something went and something else got its e-mail address, its public name
// or its port: both are told in one go when everything is read anew, in an order that is not theirs.
func TestWhatIsReadAnewTakesThePlaceOfTheOld(t *testing.T) {
	s := newStore(&file{}, nil)
	all := func(userID, socketID string) []record {
		var all []record
		for _, of := range []struct {
			bucket, id string
			value      any
		}{
			{bucketUsers, userID, User{ID: userID, Email: "a@example.com"}},
			{bucketSockets, socketID, Socket{ID: socketID, UserID: userID, DNSName: "bold-fox-0001.edge.test", TCPPort: 20000}},
			{bucketTunnels, "t" + socketID, Tunnel{ID: "t" + socketID, SocketID: socketID, UserID: userID, LocalPort: 10000}},
		} {
			r, err := put(of.bucket, of.id, of.value)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, r)
		}
		return all
	}
	if err := s.apply(state{revision: 1, guard: 1}, all("u1", "k1")); err != nil {
		t.Fatal(err)
	}
	if done, err := s.replace(state{revision: 2, guard: 2}, append(all("u1", "k2")[1:], all("u2", "k2")[0]), false); !done || err != nil {
		t.Fatal(done, err)
	}
	if u, err := s.UserByEmail("A@example.com"); err != nil || u.ID != "u2" {
		t.Errorf("the account is %+v, %v", u, err)
	}
	if k, err := s.SocketByDNSName("bold-fox-0001.edge.test"); err != nil || k.ID != "k2" {
		t.Errorf("the socket is %+v, %v", k, err)
	}
	if id := s.byPort[20000]; id != "k2" {
		t.Errorf("the port is that of %q", id)
	}
	if tunnel, err := s.TunnelByLocalPort("u1", 10000); err != nil || tunnel.ID != "tk2" {
		t.Errorf("the tunnel is %+v, %v", tunnel, err)
	}
}
