package tunnel_test

import (
	"errors"
	"net"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/crypto/ssh"

	"github.com/mysocketio/mysocket-injector/internal/sidecar/tunnel"
	"github.com/mysocketio/mysocket-injector/internal/sidecar/tunnel/sshtest"
)

// corked keeps what is written until it is told to let it go, in one piece.
type corked struct {
	net.Conn
	mu   sync.Mutex
	cork bool
	kept []byte
}

func (c *corked) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cork {
		c.kept = append(c.kept, p...)
		return len(p), nil
	}
	return c.Conn.Write(p)
}

func (c *corked) set(on bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cork = on; !on {
		_, _ = c.Conn.Write(c.kept)
		c.kept = nil
	}
}

// An edge with a pinned key that refuses the login and goes on sending leaves nothing behind: x/crypto/ssh stops taking what comes
// at the refusal, and its reader would wait for ever.
func TestARefusingEdgeLeavesNothingBehind(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	t.Run("", func(t *testing.T) {
		for range 5 {
			key := sshtest.NewKey(t)
			address := listenEdge(t, func(raw *holdable) {
				out := &corked{Conn: raw}
				var early ssh.ServerPreAuthConn
				config := &ssh.ServerConfig{
					PreAuthConnCallback: func(conn ssh.ServerPreAuthConn) { early = conn },
					PublicKeyCallback: func(ssh.ConnMetadata, ssh.PublicKey) (*ssh.Permissions, error) {
						out.set(true)
						return nil, errors.New("no")
					},
					AuthLogCallback: func(_ ssh.ConnMetadata, method string, _ error) {
						if method != "publickey" {
							return
						}
						// The refusal itself comes after this; a goroutine follows it with banners, and lets all go at once.
						go func() {
							for range 100 {
								if early.SendAuthBanner("x") != nil {
									break
								}
							}
							out.set(false)
						}()
					},
				}
				config.AddHostKey(key)
				if conn, _, _, err := ssh.NewServerConn(out, config); err == nil {
					_ = conn.Close()
				}
			})
			cfg := config(&sshtest.Server{Address: address, HostKey: key.PublicKey()}, sshtest.NewKey(t), nil)
			cfg.DialApp = hungApp
			cfg.LoginPause = 200 * time.Millisecond // the refusal ends it, on a busy machine too
			if tun, err := tunnel.Connect(t.Context(), cfg); err == nil {
				tun.Close()
				t.Error("the login was taken")
			}
		}
	})
}
