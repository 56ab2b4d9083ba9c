package sshguard

import (
	"crypto/ed25519"
	"crypto/rand"
	"net"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/crypto/ssh"
)

// pair logs a client in at a server.
func pair(t *testing.T) (client ssh.Conn, clientRequests <-chan *ssh.Request, server *ssh.ServerConn, serverChannels <-chan ssh.NewChannel, serverRequests <-chan *ssh.Request) {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := ssh.NewSignerFromKey(key)
	if err != nil {
		t.Fatal(err)
	}
	cfg := &ssh.ServerConfig{NoClientAuth: true}
	cfg.AddHostKey(signer)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	failed := make(chan error, 1)
	go func() {
		raw, err := ln.Accept()
		if err == nil {
			guarded := New(raw, 0)
			server, serverChannels, serverRequests, err = ssh.NewServerConn(guarded, cfg)
			guarded.LoginOver()
		}
		failed <- err
	}()
	raw, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	guarded := New(raw, 0)
	client, _, clientRequests, err = ssh.NewClientConn(guarded, "", &ssh.ClientConfig{HostKeyCallback: ssh.InsecureIgnoreHostKey()}) // #nosec G106 -- a test
	guarded.LoginOver()
	if err != nil {
		t.Fatal(err)
	}
	if err := <-failed; err != nil {
		t.Fatal(err)
	}
	return client, clientRequests, server, serverChannels, serverRequests
}

// TestDrain: the library still has what Drain and DiscardRequests reach for, at both ends, and they come to an end.
func TestDrain(t *testing.T) {
	defer goleak.VerifyNone(t)
	client, clientRequests, server, serverChannels, serverRequests := pair(t)
	opened := make(chan error, 1)
	go func() {
		_, _, err := client.OpenChannel("session", nil)
		opened <- err
	}()
	channel := <-serverChannels
	discarded := make(chan bool, 1)
	go func() { discarded <- DiscardRequests(channel) }()
	if err := client.Close(); err != nil {
		t.Error(err)
	}
	ssh.DiscardRequests(serverRequests)
	ssh.DiscardRequests(clientRequests)
	if !Drain(server) || !Drain(client) {
		t.Error("the queue of a connection was not found")
	}
	if !<-discarded {
		t.Error("the requests of a channel were not found")
	}
	if err := <-opened; err == nil {
		t.Error("the channel opened")
	}
	if err := server.Close(); err == nil {
		t.Log("the server's end was open still")
	}
}

// TestDrainOfOthers: what is not of the library's is left alone.
func TestDrainOfOthers(t *testing.T) {
	type conn struct{ ssh.Conn }
	type channel struct{ ssh.NewChannel }
	if Drain(nil) || Drain(conn{}) || Drain(&conn{}) || DiscardRequests(nil) || DiscardRequests(&channel{}) {
		t.Error("something was found")
	}
}
