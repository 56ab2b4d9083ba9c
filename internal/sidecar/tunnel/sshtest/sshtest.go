// Package sshtest is a small SSH server that does what an edge does, and on request what a broken edge does.
package sshtest

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
)

// Patience is how long tests wait for what should happen at once.
const Patience = 10 * time.Second

// Faults are what an edge can do wrong. They may be changed while the server runs.
type Faults struct {
	Hang          atomic.Bool // accepts connections and says nothing
	RefuseAuth    atomic.Bool
	RefuseForward atomic.Bool
	RefuseCancel  atomic.Bool
	RefuseSession atomic.Bool
	EndSession    atomic.Bool  // ends every session at once
	Quiet         atomic.Int32 // sessions that asked for no output
	Silent        atomic.Bool  // answers no global request
}

// Server is an SSH server on loopback.
type Server struct {
	Faults
	Address string
	HostKey ssh.PublicKey
	// BoundPort is what the server says it listens on when asked for port 0.
	BoundPort uint32
	// HoldForward, when set before a client comes, delays the answers to forwards until it is closed.
	HoldForward chan struct{}

	listener net.Listener
	signer   ssh.Signer
	conns    chan *Conn
	logins   atomic.Int64

	mu      sync.Mutex
	raw     map[net.Conn]struct{}
	running sync.WaitGroup
}

// Start runs a server until the test ends.
func Start(t testing.TB) *Server {
	t.Helper()
	return StartAt(t, "127.0.0.1:0")
}

// StartAt is Start at an address of the caller's.
func StartAt(t testing.TB, address string) *Server {
	t.Helper()
	listener, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	s := &Server{
		Address: listener.Addr().String(), BoundPort: 20001,
		listener: listener, signer: NewKey(t), conns: make(chan *Conn, 64), raw: make(map[net.Conn]struct{}),
	}
	s.HostKey = s.signer.PublicKey()
	s.running.Go(s.accept)
	t.Cleanup(s.Stop)
	return s
}

// NewKey makes an Ed25519 key.
func NewKey(t testing.TB) ssh.Signer {
	t.Helper()
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := ssh.NewSignerFromKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return signer
}

// Stop closes the listener and all connections.
func (s *Server) Stop() {
	_ = s.listener.Close()
	s.CloseConnections()
	s.running.Wait()
}

// CloseConnections closes all connections, as a restart does.
func (s *Server) CloseConnections() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for conn := range s.raw {
		_ = conn.Close()
	}
}

// Logins returns how many clients have logged in.
func (s *Server) Logins() int { return int(s.logins.Load()) }

// Await returns the next client that has logged in.
func (s *Server) Await(t testing.TB) *Conn {
	t.Helper()
	select {
	case conn := <-s.conns:
		return conn
	case <-time.After(Patience):
		t.Fatal("no client logged in")
		return nil
	}
}

func (s *Server) accept() {
	for {
		raw, err := s.listener.Accept()
		if err != nil {
			return
		}
		s.mu.Lock()
		s.raw[raw] = struct{}{}
		s.mu.Unlock()
		s.running.Go(func() {
			defer func() {
				_ = raw.Close()
				s.mu.Lock()
				delete(s.raw, raw)
				s.mu.Unlock()
			}()
			if s.Hang.Load() {
				_, _ = io.Copy(io.Discard, raw)
				return
			}
			s.serve(raw)
		})
	}
}

func (s *Server) serve(raw net.Conn) {
	config := &ssh.ServerConfig{
		PublicKeyCallback: func(_ ssh.ConnMetadata, _ ssh.PublicKey) (*ssh.Permissions, error) {
			if s.RefuseAuth.Load() {
				return nil, errors.New("refused")
			}
			return nil, nil
		},
		BannerCallback: func(ssh.ConnMetadata) string { return "hello from the test\n" },
	}
	config.AddHostKey(s.signer)
	conn, channels, requests, err := ssh.NewServerConn(raw, config)
	if err != nil {
		return
	}
	s.logins.Add(1)
	c := &Conn{ServerConn: conn, server: s, Forwards: make(chan Forward, 16), Cancels: make(chan Forward, 16), sessions: make(chan ssh.Channel, 16)}
	s.conns <- c
	s.running.Go(func() { c.answer(requests) })
	for channel := range channels {
		if channel.ChannelType() != "session" || s.RefuseSession.Load() {
			_ = channel.Reject(ssh.Prohibited, "no")
			continue
		}
		session, sessionRequests, err := channel.Accept()
		if err != nil {
			continue
		}
		s.running.Go(func() {
			for request := range sessionRequests {
				_ = request.Reply(true, nil)
				if request.Type == "quiet@mysocket.io" && !request.WantReply {
					s.Quiet.Add(1)
				}
				if request.Type == "shell" {
					_, _ = io.WriteString(session, "welcome\r\n")
					if s.EndSession.Load() {
						_ = session.Close()
					}
					c.sessions <- session
				}
			}
		})
	}
}

// Forward is what a client asked to have forwarded.
type Forward struct {
	Host string
	Port uint32
}

// Conn is one client.
type Conn struct {
	*ssh.ServerConn
	server *Server
	// Forwards and Cancels are what the client asked for, in order.
	Forwards, Cancels chan Forward
	sessions          chan ssh.Channel
}

func (c *Conn) answer(requests <-chan *ssh.Request) {
	for request := range requests {
		if c.server.Silent.Load() {
			continue
		}
		var forward Forward
		switch request.Type {
		case "tcpip-forward":
			_ = ssh.Unmarshal(request.Payload, &forward)
			if c.server.RefuseForward.Load() {
				_ = request.Reply(false, nil)
				break
			}
			var reply []byte
			if forward.Port == 0 {
				forward.Port = c.server.BoundPort
				reply = binary.BigEndian.AppendUint32(nil, forward.Port)
			}
			if hold := c.server.HoldForward; hold != nil {
				c.Forwards <- forward
				<-hold
				_ = request.Reply(true, reply)
				break
			}
			_ = request.Reply(true, reply)
			c.Forwards <- forward
		case "cancel-tcpip-forward":
			_ = ssh.Unmarshal(request.Payload, &forward)
			_ = request.Reply(!c.server.RefuseCancel.Load(), nil)
			c.Cancels <- forward
		default:
			_ = request.Reply(false, nil)
		}
	}
}

// AwaitForward returns the next forward that the client asked for.
func (c *Conn) AwaitForward(t testing.TB) Forward {
	t.Helper()
	return await(t, c.Forwards, "no tcpip-forward came")
}

// AwaitCancel returns the next forward that the client cancelled.
func (c *Conn) AwaitCancel(t testing.TB) Forward {
	t.Helper()
	return await(t, c.Cancels, "no cancel-tcpip-forward came")
}

// AwaitSession returns the client's session.
func (c *Conn) AwaitSession(t testing.TB) ssh.Channel {
	t.Helper()
	return await(t, c.sessions, "no session was opened")
}

func await[T any](t testing.TB, c <-chan T, message string) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(Patience):
		t.Fatal(message)
		panic("unreachable")
	}
}

// Visit opens a channel for a visitor.
func (c *Conn) Visit(forward Forward) (ssh.Channel, error) {
	payload := ssh.Marshal(struct {
		Host       string
		Port       uint32
		OriginHost string
		OriginPort uint32
	}{forward.Host, forward.Port, "192.0.2.7", 50000})
	channel, requests, err := c.OpenChannel("forwarded-tcpip", payload)
	if err != nil {
		return nil, err
	}
	c.server.running.Go(func() { ssh.DiscardRequests(requests) })
	return channel, nil
}
