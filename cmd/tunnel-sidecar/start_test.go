package main

import (
	"net"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/mysocketio/mysocket-injector/internal/sidecar/gatewaytest"
)

// BenchmarkStart measures the time from the start of the program to its first connection, which is to the gateway.
func BenchmarkStart(b *testing.B) {
	program := build(b)
	gateway := gatewaytest.Start(b, nil)
	token, ca := gateway.Files(b)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = listener.Close() }()
	env := append(os.Environ(), "POD_IP=127.0.0.1", "POD_NAME=web-1", "POD_NAMESPACE=shop")
	for b.Loop() {
		command := exec.Command(program, "run", "--gateway=https://"+listener.Addr().String(), "--token-file="+token, "--ca-file="+ca,
			"--admin-address=127.0.0.1:"+freePort(b), "--drain-socket=start-test-"+freePort(b))
		command.Env = env
		if err := command.Start(); err != nil {
			b.Fatal(err)
		}
		if err := listener.(*net.TCPListener).SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
			b.Fatal(err)
		}
		conn, err := listener.Accept()
		if err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		_ = conn.Close()
		_ = command.Process.Kill()
		_ = command.Wait()
		b.StartTimer()
	}
}
