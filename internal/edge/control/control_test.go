package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	// net/http waits half a second for a client whose request it did not read to the end.
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("net/http.(*conn).closeWriteAndWait"))
}

// fake notes what it is asked, and fails for everybody but Ann.
type fake struct{ asked []string }

func (f *fake) do(what, who string) error {
	f.asked = append(f.asked, what+" "+who)
	if who != "ann@example.com" {
		return fmt.Errorf("there is no account for %q", who)
	}
	return nil
}

func (f *fake) Add(n NewUser) (User, error) {
	return User{ID: "1", Email: n.Email, Name: n.Name, Sockets: len(n.SSHKey)}, f.do("add "+n.Password, n.Email)
}
func (f *fake) List() ([]User, error) {
	return []User{{ID: "1"}, {ID: "2"}}, f.do("list", "ann@example.com")
}
func (f *fake) Delete(email string) error         { return f.do("delete", email) }
func (f *fake) SetPassword(email, p string) error { return f.do("password "+p, email) }
func (f *fake) AddToken(n NewToken) (string, error) {
	return "token " + n.Name + n.Lifetime.String(), f.do("token", n.Email)
}
func (f *fake) Tokens() ([]Token, error)    { return nil, f.do("tokens", "ann@example.com") }
func (f *fake) RevokeToken(id string) error { return f.do("revoke", id) }
func (f *fake) Backup(w io.Writer) error {
	_, _ = io.WriteString(w, strings.Repeat("x", 100_000))
	if len(f.asked) == 0 {
		return errors.New("the disk broke")
	}
	return nil
}

func serve(t *testing.T, a Accounts) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "x.sock")
	ln, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: Handler(a, slog.New(slog.DiscardHandler)), ReadHeaderTimeout: time.Second}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.Serve(ln)
	}()
	t.Cleanup(func() {
		_ = server.Close()
		<-done
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the socket is left behind: %v", err)
		}
	})
	return path
}

func dial(t *testing.T, path string) *Client {
	t.Helper()
	c, err := Dial(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func TestEveryOperation(t *testing.T) {
	f := &fake{}
	path := serve(t, f)
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the socket's mode is %v, %v", info.Mode(), err)
	}
	c := dial(t, path)
	if err := c.Backup(io.Discard); err == nil {
		t.Error("a copy that broke off passes for a whole one")
	}
	const ann = "ann@example.com"
	u, err := c.Add(NewUser{Name: "Ann", Email: ann, Password: "secret", SSHKey: "key"})
	if err != nil || u.ID != "1" || u.Name != "Ann" || u.Sockets != 3 {
		t.Errorf("added %+v, %v", u, err)
	}
	if list, err := c.List(); err != nil || len(list) != 2 || list[1].ID != "2" {
		t.Errorf("listed %+v, %v", list, err)
	}
	if token, err := c.AddToken(NewToken{Email: ann, Name: "n", Lifetime: time.Hour}); err != nil || token != "token n1h0m0s" {
		t.Errorf("token %q, %v", token, err)
	}
	if tokens, err := c.Tokens(); err != nil || len(tokens) != 0 {
		t.Errorf("tokens %+v, %v", tokens, err)
	}
	for _, err := range []error{c.SetPassword(ann, "other"), c.Delete(ann), c.RevokeToken(ann)} {
		if err != nil {
			t.Error(err)
		}
	}
	if err := c.Delete("bob@example.com"); err == nil || err.Error() != `there is no account for "bob@example.com"` {
		t.Errorf("the edge's sentence came as %v", err)
	}
	var b strings.Builder
	if err := c.Backup(&b); err != nil || b.Len() != 100_000 {
		t.Errorf("copied %d bytes, %v", b.Len(), err)
	}
	want := "add secret ann@example.com,list ann@example.com,token ann@example.com,tokens ann@example.com,password other ann@example.com," +
		"delete ann@example.com,revoke ann@example.com,delete bob@example.com"
	if got := strings.Join(f.asked, ","); got != want {
		t.Errorf("asked %s\nwant  %s", got, want)
	}
	if _, err := c.Add(NewUser{Name: strings.Repeat("x", maxRequest)}); err == nil || !strings.Contains(err.Error(), "can't be read") {
		t.Errorf("a large request: %v", err)
	}
	if _, err := call[nothing](c, "/v2/other", nothing{}); err == nil || !strings.Contains(err.Error(), "of another version") {
		t.Errorf("an unknown operation: %v", err)
	}
}

func TestNobodyListens(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.sock")
	if _, err := Dial(t.Context(), path); !errors.Is(err, ErrNotRunning) {
		t.Errorf("no socket: %v", err)
	}
	// A socket that an edge which was killed left behind.
	old, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	old.SetUnlinkOnClose(false)
	_ = old.Close()
	if _, err := Dial(t.Context(), path); !errors.Is(err, ErrNotRunning) {
		t.Errorf("an old socket: %v", err)
	}
	ln, err := Listen(path)
	if err != nil {
		t.Fatalf("in the place of an old socket: %v", err)
	}
	_ = ln.Close()
	// A file that is no socket is somebody's.
	if err := os.WriteFile(path, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(path); err == nil || !strings.Contains(err.Error(), "no socket") {
		t.Errorf("in the place of a file: %v", err)
	}
	if left, _ := os.ReadDir(filepath.Dir(path)); len(left) != 1 {
		t.Errorf("left behind: %v", left)
	}
	if _, err := Listen(filepath.Join(t.TempDir(), "none", "x.sock")); err == nil {
		t.Error("listened in a directory that does not exist")
	}
	if _, err := Listen(filepath.Join(t.TempDir(), strings.Repeat("x", MaxPath))); err == nil {
		t.Error("listened on a path that is too long")
	}
}

func TestCommandEndsWithItsContext(t *testing.T) {
	path := serve(t, &fake{})
	ctx, cancel := context.WithCancel(t.Context())
	c, err := Dial(ctx, path)
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if _, err := c.List(); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}
