package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/mysocketio/mysocket-injector/internal/edge/store"
)

// onSmallDisk is what runs the program with a file system of its own, of a megabyte, at dir, that nobody else sees and that goes with it.
func onSmallDisk(t *testing.T, dir, then string) []string {
	t.Helper()
	wrap := []string{"unshare", "--mount"}
	if os.Geteuid() != 0 {
		wrap = append(wrap, "--map-root-user")
	}
	wrap = append(wrap, "sh", "-ec", `mount -t tmpfs -o size=1m,mode=0700 tmpfs "$0"; `+then+` exec "$@"`, dir)
	if out, err := exec.CommandContext(t.Context(), wrap[0], append(wrap[1:], "true")...).CombinedOutput(); err != nil && os.Geteuid() != 0 {
		t.Skipf("this user may not mount: %v: %s", err, out)
	}
	return wrap
}

// connect logs a tunnel client in for a new socket and serves "hello" through it. It returns the public name.
func (p *process) connect(api *apiClient) (name string) {
	p.t.Helper()
	_, made := api.call("POST", "/connect", `{"name": "web"}`)
	id, _ := made["socket_id"].(string)
	tunnel := made["tunnels"].([]any)[0].(map[string]any)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		p.t.Fatal(err)
	}
	signer, err := ssh.NewSignerFromKey(key)
	if err != nil {
		p.t.Fatal(err)
	}
	_, signed := api.call("POST", "/socket/"+id+"/tunnel/"+tunnel["tunnel_id"].(string)+"/signkey",
		fmt.Sprintf(`{"ssh_public_key": %q}`, ssh.MarshalAuthorizedKey(signer.PublicKey())))
	cert, _, _, _, err := ssh.ParseAuthorizedKey([]byte(signed["signed_ssh_cert"].(string)))
	if err != nil {
		p.t.Fatal(err)
	}
	if signer, err = ssh.NewCertSigner(cert.(*ssh.Certificate), signer); err != nil {
		p.t.Fatal(err)
	}
	client, err := ssh.Dial("tcp", p.address("ssh"), &ssh.ClientConfig{
		User: made["user_name"].(string), Auth: []ssh.AuthMethod{ssh.PublicKeys(signer)}, HostKeyCallback: ssh.InsecureIgnoreHostKey(), Timeout: patience,
	})
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { _ = client.Close() })
	ln, err := client.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(int(tunnel["local_port"].(float64)))))
	if err != nil {
		p.t.Fatal(err)
	}
	go func() {
		_ = http.Serve(ln, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "hello") }))
	}()
	return made["dnsname"].(string)
}

func (p *process) visit(name string) error {
	req, err := http.NewRequest(http.MethodGet, "http://"+p.address("http")+"/", nil)
	if err != nil {
		return err
	}
	req.Host = name
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	if body, err := io.ReadAll(resp.Body); err != nil || string(body) != "hello" {
		return fmt.Errorf("visitors get %s %q: %w", resp.Status, body, err)
	}
	return nil
}

// TestDiskFull leaves no room where the state is: what can't be kept is refused with a sentence, nothing of it is left, visitors notice
// nothing, and with room there again all goes on.
func TestDiskFull(t *testing.T) {
	t.Run("disk", func(t *testing.T) {
		disk := t.TempDir()
		wrap := onSmallDisk(t, disk, "")
		filler := ""
		withoutRoom(t, filepath.Join(disk, "x.db"), wrap, "no space left on device", func(p *process) {
			filler = fmt.Sprintf("/proc/%d/root%s/filler", p.cmd.Process.Pid, disk)
			f, err := os.Create(filler)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = f.Close() }()
			for err == nil {
				_, err = f.Write(make([]byte, 4096))
			}
			if !errors.Is(err, syscall.ENOSPC) {
				t.Fatal(err)
			}
		}, func(*process) {
			if err := os.Remove(filler); err != nil {
				t.Fatal(err)
			}
		})
	})
	t.Run("limit", func(t *testing.T) {
		state := filepath.Join(t.TempDir(), "x.db")
		var before unix.Rlimit
		withoutRoom(t, state, nil, "file too large", func(p *process) {
			if err := unix.Prlimit(p.cmd.Process.Pid, unix.RLIMIT_FSIZE, nil, &before); err != nil {
				t.Fatal(err)
			}
			info, err := os.Stat(state)
			if err != nil {
				t.Fatal(err)
			}
			limit := before
			limit.Cur = uint64(info.Size())
			if err := unix.Prlimit(p.cmd.Process.Pid, unix.RLIMIT_FSIZE, &limit, nil); err != nil {
				t.Fatal(err)
			}
		}, func(p *process) {
			if err := unix.Prlimit(p.cmd.Process.Pid, unix.RLIMIT_FSIZE, &before, nil); err != nil {
				t.Fatal(err)
			}
		})
	})
}

// withoutRoom runs an edge to which fill leaves no room, and free gives it back. says is what the system says of that.
func withoutRoom(t *testing.T, state string, wrap []string, says string, fill, free func(*process)) {
	dir := t.TempDir()
	ca, control := filepath.Join(dir, "ca.pem"), filepath.Join(dir, "x.sock")
	p := startProcess(t, state, wrap, "--ca-out", ca, "--control-socket", control)
	operator := func(args ...string) (code int, said string) {
		t.Helper()
		code, out, errs := invoke(t, "a long password", append(args, "--control-socket", control)...)
		return code, out + errs
	}
	users := 0
	if code, said := operator("user", "add", "--email", "owner@example.com"); code != 0 {
		t.Fatal(said)
	}
	users++
	api := p.api(ca)
	if status := api.login("owner@example.com", "a long password"); status != http.StatusOK {
		t.Fatalf("login: %d", status)
	}
	name := p.connect(api)
	p.wait("visitors are served", func() bool { return p.visit(name) == nil })
	kept := map[string]bool{}
	newSocket := func(kind string) (int, map[string]any) {
		status, answer := api.call("POST", "/socket", fmt.Sprintf(`{"name": "n", "socket_type": %q, "description": %q}`, kind, strings.Repeat("x", 1000)))
		if id, ok := answer["socket_id"].(string); ok {
			kept[id] = true
		}
		return status, answer
	}

	fill(p)
	refused, last := 0, map[string]any{}
	for range 300 {
		// The first may find room in the file.
		status, answer := newSocket("tcp")
		if status != http.StatusOK && status != http.StatusInsufficientStorage {
			t.Fatalf("answered %d %v", status, answer)
		}
		if status == http.StatusInsufficientStorage {
			refused, last = refused+1, answer
		}
		if refused == 10 {
			break
		}
	}
	if refused < 10 || !strings.Contains(fmt.Sprint(last["error_message"]), "no room to keep this; nothing was changed") {
		t.Fatalf("%d were refused, the last with %v", refused, last)
	}
	for {
		code, said := operator("user", "add", "--email", fmt.Sprintf("%d@example.com", users), "--name", strings.Repeat("x", 250))
		if code == 0 && users < 100 {
			users++
			continue
		}
		if code != 1 || !strings.Contains(said, says) {
			t.Errorf("the operator is told %s, exit code %d", said, code)
		}
		break
	}
	if err := p.visit(name); err != nil {
		t.Error(err)
	}
	if !p.stderr.has("level=ERROR") || !p.stderr.has(says) {
		t.Errorf("the log does not say why: %s", p.stderr)
	}
	if status := api.login("owner@example.com", "a long password"); status != http.StatusOK {
		t.Errorf("login without room: %d", status)
	}
	if n := strings.Count(p.debugTunnels(), `"socket"`); n != len(kept)+1 {
		t.Errorf("there are %d sockets of %d that were acknowledged", n, len(kept)+1)
	}

	free(p)
	for range 20 {
		if status, answer := newSocket("http"); status != http.StatusOK {
			t.Fatalf("with room again: %d %v", status, answer)
		}
	}
	if code, said := operator("user", "add", "--email", "last@example.com"); code != 0 {
		t.Errorf("with room again: %s", said)
	}
	users++
	if err := p.visit(name); err != nil {
		t.Error(err)
	}
	// What the next edge finds is what was acknowledged.
	copied := filepath.Join(dir, "copy.db")
	if code, said := operator("backup", "--out", copied); code != 0 {
		t.Fatal(said)
	}
	p.kill()
	s, err := store.Open(copied, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	if n := len(s.AllSockets()); n != len(kept)+1 {
		t.Errorf("the state has %d sockets of %d that were acknowledged", n, len(kept)+1)
	}
	for id := range kept {
		if _, err := s.Socket(id); err != nil {
			t.Error(err)
		}
	}
	if n := len(s.Users()); n != users {
		t.Errorf("the state has %d accounts of %d", n, users)
	}
}

func (p *process) debugTunnels() string {
	p.t.Helper()
	resp, err := http.Get("http://" + p.address("admin") + "/debug/tunnels")
	if err != nil {
		p.t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		p.t.Fatal(err)
	}
	return string(body)
}

// TestReadOnlyDisk starts on a disk that can't be written: it says so and ends.
func TestReadOnlyDisk(t *testing.T) {
	disk := t.TempDir()
	state := filepath.Join(disk, "x.db")
	wrap := onSmallDisk(t, disk, `mount -o remount,ro tmpfs "$0";`)
	p := launch(t, state, wrap)
	<-p.exited
	if p.cmd.ProcessState.ExitCode() != 1 || !p.stderr.has("open state file "+state) || !p.stderr.has("read-only file system") {
		t.Errorf("%v: %s", p.err, p.stderr)
	}
}
