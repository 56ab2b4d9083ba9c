package sshguard

import (
	"reflect"

	"golang.org/x/crypto/ssh"
)

// Drain empties the queue of a connection that logged in and has ended: the Go channel of its requests is closed. It returns when
// the library has let go of the connection, which must be closed for that, or at once, with false, if the library is not as we
// know it. The library has no call for this, so Drain reaches for the queue by its name; a test tells when that has changed.
func Drain(conn ssh.Conn) bool {
	if server, ok := conn.(*ssh.ServerConn); ok {
		conn = server.Conn
	}
	queue, ok := field[chan []byte](conn, "transport", "incoming")
	if !ok {
		return false
	}
	for range queue { // until the reader has ended
	}
	return true
}

// DiscardRequests takes the requests of a channel whose Accept failed, until the connection has ended. The library may have marked it
// as accepted and hand it requests, and waits when nobody takes them.
func DiscardRequests(channel ssh.NewChannel) bool {
	requests, ok := field[chan *ssh.Request](channel, "incomingRequests")
	if !ok {
		return false
	}
	ssh.DiscardRequests(requests)
	return true
}

// field finds a field of what v points to, or of what its fields point to.
func field[T any](v any, path ...string) (value T, ok bool) {
	at := reflect.ValueOf(v)
	for _, name := range path {
		for at.Kind() == reflect.Interface || at.Kind() == reflect.Pointer {
			at = at.Elem()
		}
		if at.Kind() != reflect.Struct {
			return value, false
		}
		if at = at.FieldByName(name); !at.IsValid() {
			return value, false
		}
	}
	if at.Type() != reflect.TypeFor[T]() || !at.CanAddr() {
		return value, false
	}
	value, ok = reflect.NewAt(at.Type(), at.Addr().UnsafePointer()).Elem().Interface().(T)
	return value, ok
}
