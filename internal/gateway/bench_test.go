package gateway

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/apimachinery/pkg/types"

	"github.com/mysocketio/mysocket-injector/internal/gatewayapi"
)

const (
	benchStreams  = 10_000
	benchServices = 2_000
	// benchPeers makes the test program the other end of a benchmark: protocol and address.
	benchPeers = "MYSOCKET_GATEWAY_BENCH_PEERS"
)

// BenchmarkStreams opens 10,000 streams with TLS over loopback, from another process, and says what one costs this one:
//
//	go test -run '^$' -bench Streams -benchtime 1x ./internal/gateway
//
// bytes/stream is what is in use of heap and stacks after a garbage collection, rss-bytes/stream what the process has
// grown by. "gateway" is the gateway as it is, with 2,000 Services of which one is then edited; the handlers are what an
// ordinary one would cost that writes a line and waits.
func BenchmarkStreams(b *testing.B) {
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err != nil || files.Cur < benchStreams+200 {
		b.Skipf("this needs %d open files, and the limit is %d", benchStreams+200, files.Cur)
	}
	b.Run("gateway", func(b *testing.B) {
		s := benchGateway(b)
		for b.Loop() {
			p := measureStreams(b, "http1", s.address)
			began := time.Now()
			s.cluster.service(0, "web", 8080)
			p.wait("2") // the second line of every stream has come
			b.ReportMetric(time.Since(began).Seconds(), "s-edit-to-all")
			p.stop()
			waitFor(b, "the streams to end", func() bool { return value(b, s.metrics.streams) == 0 })
		}
	})
	for _, protocol := range []string{"http1", "http2"} {
		b.Run("handler-"+protocol, func(b *testing.B) {
			for b.Loop() {
				s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					_, _ = io.WriteString(w, "{}\n")
					_ = http.NewResponseController(w).Flush()
					<-r.Context().Done()
				}))
				s.EnableHTTP2 = protocol == "http2"
				s.Config.ErrorLog = log.New(io.Discard, "", 0)
				s.StartTLS()
				measureStreams(b, protocol, s.Listener.Addr().String()).stop()
				s.CloseClientConnections()
				s.Close()
			}
		})
	}
}

// benchGateway has a pod for each stream and many Services, of which one selects them all.
func benchGateway(b *testing.B) *memoryServer {
	c := newMemoryCluster()
	for n := range benchStreams {
		c.pod(benchPod(n))
	}
	for n := range benchServices {
		c.service(n, fmt.Sprint("app-", n), 80)
	}
	c.service(0, "web", 80)
	return c.serve(b, nil)
}

func benchPod(n int) string { return fmt.Sprint("web-", n) }

func measureStreams(b *testing.B, protocol, address string) *peers {
	debug.FreeOSMemory()
	before, residentBefore := inUse(), resident(b)
	began := time.Now()
	p := startPeers(b, protocol, address)
	p.wait("1")
	b.ReportMetric(time.Since(began).Seconds(), "s-to-open")
	b.ReportMetric(float64(resident(b)-residentBefore)/benchStreams, "rss-bytes-while-opening/stream")
	debug.FreeOSMemory()
	b.ReportMetric(float64(inUse()-before)/benchStreams, "bytes/stream")
	b.ReportMetric(float64(resident(b)-residentBefore)/benchStreams, "rss-bytes/stream")
	return p
}

func inUse() int64 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc + m.StackInuse)
}

func resident(b *testing.B) int64 {
	text, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		b.Skip("this reads /proc: ", err)
	}
	pages, err := strconv.ParseInt(strings.Fields(string(text))[1], 10, 64)
	if err != nil {
		b.Fatal(err)
	}
	return pages * int64(os.Getpagesize())
}

// peers is the process at the other end.
type peers struct {
	b     *testing.B
	cmd   *exec.Cmd
	stdin io.Closer
	lines *bufio.Scanner
}

func startPeers(b *testing.B, protocol, address string) *peers {
	p := &peers{b: b, cmd: exec.Command(os.Args[0])}
	p.cmd.Env = append(os.Environ(), benchPeers+"="+protocol+" "+address)
	p.cmd.Stderr = os.Stderr
	stdin, err := p.cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	stdout, err := p.cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		b.Fatal(err)
	}
	p.stdin, p.lines = stdin, bufio.NewScanner(stdout)
	b.Cleanup(func() { _ = p.cmd.Process.Kill() })
	return p
}

func (p *peers) wait(line string) {
	if !p.lines.Scan() || p.lines.Text() != line {
		p.b.Fatalf("the other process says %q, not %q", p.lines.Text(), line)
	}
}

func (p *peers) stop() {
	_ = p.stdin.Close()
	if err := p.cmd.Wait(); err != nil {
		p.b.Fatal(err)
	}
}

// peersMain opens the streams, says "1" when each has its first line, "2" for the second and so on, and ends with its input.
func peersMain(what string, out io.Writer) int {
	protocol, address, _ := strings.Cut(what, " ")
	var counts [10]atomic.Int64
	failed := make(chan error, benchStreams)
	dialing := make(chan struct{}, 64)
	for n := range benchStreams {
		go func() {
			failed <- func() error {
				dialing <- struct{}{}
				body, err := openStream(protocol, address, n)
				<-dialing
				if err != nil {
					return err
				}
				lines := bufio.NewReaderSize(body, 512)
				for count := 0; count < len(counts); {
					text, err := lines.ReadSlice('\n')
					if err != nil {
						return err
					}
					if len(text) > 1 {
						if counts[count].Add(1) == benchStreams {
							_, _ = fmt.Fprintln(out, count+1)
						}
						count++
					}
				}
				return nil
			}()
		}()
	}
	ended := make(chan struct{})
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		close(ended)
	}()
	select {
	case err := <-failed:
		fmt.Fprintln(os.Stderr, "peers:", err)
		return 1
	case <-ended:
		return 0
	}
}

// openStream has a connection for itself.
func openStream(protocol, address string, n int) (io.Reader, error) {
	t := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, ForceAttemptHTTP2: protocol == "http2"}
	r, err := http.NewRequest(http.MethodGet, "https://"+address+gatewayapi.AssignmentsPath, nil)
	if err != nil {
		return nil, err
	}
	r.Header.Set("Authorization", "Bearer shop/"+benchPod(n)+"/uid-of-"+benchPod(n))
	resp, err := (&http.Client{Transport: t}).Do(r)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK || (resp.ProtoMajor == 2) != (protocol == "http2") {
		return nil, fmt.Errorf("answer %s over %s", resp.Status, resp.Proto)
	}
	return resp.Body, nil
}

// BenchmarkSnapshots is the work of one Service edit in a namespace of 2,000 Services and 10,000 streams without the
// network: everything read anew, and a snapshot for each stream.
func BenchmarkSnapshots(b *testing.B) {
	s := benchGateway(b)
	callers := make([]identity, benchStreams)
	for n := range callers {
		callers[n] = identity{namespace: "shop", pod: benchPod(n), uid: types.UID("uid-of-" + benchPod(n))}
		_, stop := s.Changes.subscribe(callers[n])
		defer stop()
	}
	port := 1
	for b.Loop() {
		port = port%60000 + 1
		s.cluster.service(0, "web", int32(port))
		want := fmt.Appendf(nil, `"port":%d,`, port)
		var wg sync.WaitGroup
		for part := range runtime.GOMAXPROCS(0) {
			wg.Go(func() {
				for n := part; n < len(callers); n += runtime.GOMAXPROCS(0) {
					line, err := s.snapshot(context.Background(), callers[n])
					if err != nil || !bytes.Contains(line, want) {
						b.Errorf("%s %v", line, err)
						return
					}
				}
			})
		}
		wg.Wait()
	}
}
