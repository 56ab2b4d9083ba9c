//go:build chromium

package main

import (
	"bytes"
	"fmt"
	"image"
	"image/color"
	"image/png"
	"io"
	"maps"
	"math"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// pictureVariable says where to write the picture of the status page that the documentation has. The traffic in it is that of a whole minute.
const pictureVariable = "MYSOCKET_STATUS_PICTURE"

const maxPicture = 150 << 10

// service is a socket of the picture.
type service struct {
	socket, kind string
	pods         []string
	// perSecond is how often it is visited, on average; it comes and goes with the period.
	perSecond float64
	period    time.Duration
	app       http.HandlerFunc
}

// every calls visit at a rate that swings by half around the average, until stop is closed.
func every(perSecond float64, period time.Duration, stop <-chan struct{}, visit func(n int)) {
	began := time.Now()
	for n := 0; ; n++ {
		phase := 2 * math.Pi * time.Since(began).Seconds() / period.Seconds()
		pause := time.NewTimer(time.Duration(float64(time.Second) / (perSecond * (1 + 0.5*math.Sin(phase)))))
		select {
		case <-stop:
			pause.Stop()
			return
		case <-pause.C:
			visit(n)
		}
	}
}

// chromium runs the browser without a window. What it has to say of the page is in complaints.
func chromium(t *testing.T, args ...string) (stdout []byte, complaints string) {
	t.Helper()
	// Its sandbox does not work for root. It sees a page of our own, and nothing else.
	cmd := exec.CommandContext(t.Context(), "chromium", append([]string{"--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
		"--hide-scrollbars", "--disable-lcd-text", "--enable-logging=stderr", "--user-data-dir=" + t.TempDir()}, args...)...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		t.Fatalf("chromium: %v: %s", err, errs.String())
	}
	for _, line := range strings.Split(errs.String(), "\n") {
		if strings.Contains(line, "CONSOLE") {
			complaints += line + "\n"
		}
	}
	return out.Bytes(), complaints
}

// TestStatusPageInChromium has a browser show the page of an edge that is visited.
func TestStatusPageInChromium(t *testing.T) {
	dir := t.TempDir()
	state, ca := filepath.Join(dir, "x.db"), filepath.Join(dir, "ca.pem")
	if code, _, errs := invoke(t, "a long password", "user", "add", "--email", "you@example.com", "--state", state); code != 0 {
		t.Fatal(errs)
	}
	p := startProcess(t, state, nil, "--ca-out", ca)
	api := p.api(ca)
	if status := api.login("you@example.com", "a long password"); status != http.StatusOK {
		t.Fatalf("login: %d", status)
	}
	wait := func(r *http.Request, d time.Duration) {
		select {
		case <-time.After(d):
		case <-r.Context().Done():
		}
	}
	services := []service{
		{"k8s shop.web", "http", []string{"shop/web-7d9c5b6f44-2xk4b", "shop/web-7d9c5b6f44-9hq7m", "shop/web-7d9c5b6f44-tz8wd"}, 40, 30 * time.Second,
			func(w http.ResponseWriter, r *http.Request) {
				wait(r, 4*time.Millisecond)
				_, _ = io.WriteString(w, "hello")
			}},
		{"k8s shop.api", "http", []string{"shop/api-0", "shop/api-1"}, 25, 20 * time.Second, func(w http.ResponseWriter, r *http.Request) {
			if strings.HasSuffix(r.URL.Path, "37") {
				w.WriteHeader(http.StatusInternalServerError)
				return
			}
			wait(r, 12*time.Millisecond)
		}},
		{"k8s media.thumbnails", "http", []string{"media/thumbnails-5c8d7f9b6-kk2px"}, 6, 40 * time.Second, func(_ http.ResponseWriter, r *http.Request) { wait(r, 180*time.Millisecond) }},
		{"k8s data.postgres", "tcp", []string{"data/postgres-0"}, 2, 15 * time.Second, func(http.ResponseWriter, *http.Request) {}},
		{"k8s staging.web", "http", nil, 0, time.Second, nil},
	}
	stop := make(chan struct{})
	var visits sync.WaitGroup
	finish := sync.OnceFunc(func() {
		close(stop)
		visits.Wait()
	})
	defer finish()
	visitors := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 64}, Timeout: patience}
	for _, s := range services {
		_, made := api.call("POST", "/socket", fmt.Sprintf(`{"name": %q, "socket_type": %q}`, s.socket, s.kind))
		id, _ := made["socket_id"].(string)
		for _, pod := range s.pods {
			_, tunnel := api.call("POST", "/socket/"+id+"/tunnel", "null")
			p.serve(api, made, tunnel, pod, s.app)
		}
		if s.perSecond == 0 {
			continue
		}
		url := "http://" + p.address("http") + "/"
		if s.kind == "tcp" {
			url = fmt.Sprintf("http://127.0.0.1:%d/", int(made["socket_tcp_ports"].([]any)[0].(float64)))
		}
		visits.Go(func() {
			every(s.perSecond, s.period, stop, func(n int) {
				visits.Go(func() {
					req, err := http.NewRequest(http.MethodGet, url+fmt.Sprint(n), nil)
					if err != nil {
						t.Error(err)
						return
					}
					req.Host, req.Close = made["dnsname"].(string), s.kind == "tcp"
					resp, err := visitors.Do(req)
					if err != nil {
						t.Error(err)
						return
					}
					_, _ = io.Copy(io.Discard, resp.Body)
					_ = resp.Body.Close()
				})
			})
		})
	}
	picture := os.Getenv(pictureVariable)
	page := "http://" + p.address("admin") + "/"
	if picture != "" {
		<-time.After(65 * time.Second)
	}
	p.wait("an error and a slow answer on the page", func() bool {
		resp, err := http.Get(page)
		if err != nil {
			return false
		}
		defer func() { _ = resp.Body.Close() }()
		body, err := io.ReadAll(resp.Body)
		return err == nil && bytes.Contains(body, []byte(" %</td>")) && bytes.Count(body, []byte(" ms</td>")) >= 6
	})
	dom, complaints := chromium(t, "--dump-dom", page)
	if complaints != "" {
		t.Errorf("the browser complains: %s", complaints)
	}
	for _, s := range services {
		for _, want := range append(s.pods, s.socket) {
			if !bytes.Contains(dom, []byte(want)) {
				t.Errorf("the page has no %s", want)
			}
		}
	}
	for _, want := range []string{`<dd id="sockets">5</dd>`, `<dd id="tunnels">7</dd>`, "1 without a tunnel", " ms</td>", " %</td>", "api.edge.example.com", `content="10"`} {
		if !bytes.Contains(dom, []byte(want)) {
			t.Errorf("the page has no %s", want)
		}
	}
	if bytes.Contains(dom, []byte(`<dd id="rate">0</dd>`)) {
		t.Error("the page shows no requests")
	}
	if t.Failed() {
		t.Logf("%s", dom)
	}

	shot := filepath.Join(dir, "page.png")
	chromium(t, "--window-size=1200,985", "--screenshot="+shot, page)
	data, err := os.ReadFile(shot)
	if err != nil {
		t.Fatal(err)
	}
	shown, err := png.Decode(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	small, colours := fewerColours(shown)
	// The style's colours, as they are on a light background: with no style there is none of them.
	for name, colour := range map[string]color.RGBA{"the background": {0xf5, 0xf6, 0xf8, 0xff}, "the dots of tunnels": {0x23, 0x94, 0x5f, 0xff}} {
		if colours[colour] == 0 {
			t.Errorf("the picture has not the colour of %s", name)
		}
	}
	var out bytes.Buffer
	if err := (&png.Encoder{CompressionLevel: png.BestCompression}).Encode(&out, small); err != nil {
		t.Fatal(err)
	}
	if out.Len() > maxPicture {
		t.Errorf("the picture has %d bytes; the documentation takes %d", out.Len(), maxPicture)
	}
	if picture != "" && !t.Failed() {
		if err := os.WriteFile(picture, out.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// fewerColours gives a picture at most 256 colours: those that it has most of, and of the others the most frequent of those that look alike. It also
// counts the colours.
func fewerColours(from image.Image) (image.Image, map[color.RGBA]int) {
	counts := map[color.RGBA]int{}
	bounds := from.Bounds()
	at := func(x, y int) color.RGBA { return color.RGBAModel.Convert(from.At(x, y)).(color.RGBA) }
	for y := range bounds.Dy() {
		for x := range bounds.Dx() {
			counts[at(x, y)]++
		}
	}
	all := slices.SortedFunc(maps.Keys(counts), func(a, b color.RGBA) int { return counts[b] - counts[a] })
	var palette color.Palette
	seen := map[color.RGBA]bool{}
	for i, c := range all {
		alike := color.RGBA{c.R &^ 15, c.G &^ 15, c.B &^ 15, c.A}
		if (i < 32 || !seen[alike]) && len(palette) < 256 {
			palette = append(palette, c)
		}
		seen[alike] = true
	}
	index := map[color.RGBA]uint8{}
	for _, c := range all {
		index[c] = uint8(palette.Index(c))
	}
	to := image.NewPaletted(bounds, palette)
	for y := range bounds.Dy() {
		for x := range bounds.Dx() {
			to.SetColorIndex(x, y, index[at(x, y)])
		}
	}
	return to, counts
}
