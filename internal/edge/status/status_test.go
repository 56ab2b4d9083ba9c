package status

import (
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/mysocketio/mysocket-injector/internal/edge/stats"
)

var now = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func config(sockets []Socket) Config {
	return Config{
		Domain: "edge.example.com", Version: "1.2.3", Started: now.Add(-26 * time.Hour), Now: func() time.Time { return now },
		Log: slog.New(slog.DiscardHandler), Sockets: func() []Socket { return sockets },
		Stats: func(id string) stats.Summary {
			s := stats.Summary{Rate: float64(len(id)), Requests: 60 * uint64(len(id)), Median: 12 * time.Millisecond, P99: 1500 * time.Millisecond, Counts: []uint32{0, 5, 10}}
			if id == "bad" {
				s.Failures = 3
			}
			return s
		},
		Total: func() stats.Summary {
			return stats.Summary{Rate: 1234.5, Requests: 100, Failures: 1, Median: 2 * time.Millisecond}
		},
		Certificates: func() []Certificate { return nil },
	}
}

func page(t *testing.T, cfg Config, query string) string {
	t.Helper()
	rec := httptest.NewRecorder()
	Handler(cfg).ServeHTTP(rec, httptest.NewRequest(http.MethodGet, "/"+query, nil))
	if rec.Code != http.StatusOK {
		t.Fatalf("%s: %d %s", query, rec.Code, rec.Body)
	}
	if csp := rec.Header().Get("Content-Security-Policy"); !strings.HasPrefix(csp, "default-src 'none'; style-src 'self';") || strings.Contains(csp, "unsafe") {
		t.Errorf("the policy is %q", csp)
	}
	body := rec.Body.String()
	for _, active := range []string{"<script", "style=", "onload", "href=\"javascript", "zgotmplz"} {
		if i := strings.Index(strings.ToLower(body), active); i >= 0 {
			t.Errorf("%s: the page has %s", query, body[i:min(len(body), i+60)])
		}
	}
	return body
}

func TestPage(t *testing.T) {
	cfg := config([]Socket{
		{ID: "ok", Name: "web", Type: "http", URL: "https://bold-fox-0042.edge.example.com", Account: "ann@example.com", Registered: 2, Tunnels: []Tunnel{
			{ID: "t1", Name: "shop/web-1", Remote: "192.0.2.1:4711", Since: now.Add(-90 * time.Second), Open: 3, Total: 99},
			{ID: "t2", Remote: "192.0.2.2:4711", Since: now, Ejected: true},
		}},
		{ID: "bad", Name: "down", Type: "tcp", URL: "tcp://calm-owl-0001.edge.example.com:20123", Account: "bob@example.com"},
	})
	cfg.Certificates = func() []Certificate {
		return []Certificate{{"*.edge.example.com", now.Add(60 * 24 * time.Hour)}, {"far.example.com", now.Add(1000 * 24 * time.Hour)}, {"old.example.com", now.Add(-time.Hour)}, {"soon.example.com", now.Add(time.Hour)}}
	}
	body := page(t, cfg, "")
	for _, want := range []string{
		"edge.example.com", "Mysocket edge 1.2.3, up 1 d 2 h", "2026-01-02 03:04:05 UTC", `<meta http-equiv="refresh" content="10">`,
		`<dd id="sockets">2</dd>`, "1 without a tunnel", `<dd id="tunnels">2</dd>`, `<dd id="rate">1234</dd>`, `<dd id="errors" class="bad">1.0 %</dd>`, "1 of 100",
		`<dd id="median">2.0 ms</dd>`, "https://bold-fox-0042.edge.example.com", "ann@example.com", "shop/web-1", "192.0.2.1:4711", "connected for 1 min 30 s",
		"3 open", `<td class="dot off">`, `<span class="bad">ejected</span>`, "99 in all", `<span class="quiet">t2</span>`, "12 ms", "1.5 s", "tcp://calm-owl-0001.edge.example.com:20123", "1.7 %",
		`points="0.0,23.0 55.0,12.0 110.0,1.0"`, "2026-03-03, in 60 d 0 h", "2028-09-28, in 1000 d<", "expired 2026-01-02", `class="bad">2026-01-02, in 1 h 0 min`,
	} {
		if !strings.Contains(body, want) {
			t.Errorf("the page has no %s", want)
		}
	}
	if paused := page(t, cfg, "?refresh=off"); strings.Contains(paused, "http-equiv") || !strings.Contains(paused, `<a href="/">go on</a>`) {
		t.Error("the page can't be paused")
	}
	if alone := page(t, cfg, "?socket=ok"); strings.Contains(alone, "calm-owl") || !strings.Contains(alone, "shop/web-1") {
		t.Error("a socket is not shown alone")
	}
	if empty := page(t, config(nil), ""); !strings.Contains(empty, "There is no socket yet.") {
		t.Error("without sockets nothing is said")
	}
}

func TestEverythingIsEscaped(t *testing.T) {
	evil := `"><script>alert(1)</script>&'` + "\x00\u202e"
	cfg := config([]Socket{{ID: evil, Name: evil, Type: evil, URL: "javascript:alert(1)", Account: evil, Tunnels: []Tunnel{{ID: evil, Name: evil, Remote: evil}}}})
	cfg.Version, cfg.Domain = evil, evil
	cfg.Certificates = func() []Certificate { return []Certificate{{evil, now}} }
	for _, query := range []string{"", "?q=" + url.QueryEscape(evil), "?q=%ff%fe", "?socket=" + url.QueryEscape(evil), "?sort=" + url.QueryEscape(evil)} {
		body := page(t, cfg, query) // looks for scripts itself
		if strings.Contains(body, evil[:10]) || strings.ContainsRune(body, 0) || !strings.Contains(body, "&lt;script&gt;") {
			t.Errorf("%s is not escaped", query)
		}
	}
}

func TestManySockets(t *testing.T) {
	var sockets []Socket
	for i := range 10_000 {
		k := Socket{ID: fmt.Sprintf("id-%d", i), Name: fmt.Sprintf("socket %05d", i), URL: fmt.Sprintf("https://name-%d.example.com", i), Type: "http"}
		for n := range 3 {
			k.Tunnels = append(k.Tunnels, Tunnel{ID: "t", Name: fmt.Sprintf("ns%d/pod-%d", i, n), Since: now})
		}
		sockets = append(sockets, k)
	}
	for n := range 3_000 {
		sockets[17].Tunnels = append(sockets[17].Tunnels, Tunnel{ID: fmt.Sprint("more-", n), Since: now})
	}
	cfg := config(sockets)
	rows := func(body string) int { return strings.Count(body, `<tr class="socket">`) }
	first := page(t, cfg, "")
	if rows(first) != perPage || !strings.Contains(first, "1–50 of 10000") || strings.Contains(first, ">previous<") || !strings.Contains(first, `<a href="/?page=2">next</a>`) {
		t.Error("the first page is wrong")
	}
	if !strings.Contains(first, "10+2993") || !strings.Contains(first, `<a href="/?socket=id-17">2993 more</a>`) {
		t.Error("many tunnels are not cut short")
	}
	if len(first) > 200_000 {
		t.Errorf("the page has %d bytes", len(first))
	}
	last := page(t, cfg, "?page=200")
	if rows(last) != perPage || !strings.Contains(last, "9951–10000 of 10000") || !strings.Contains(last, `<a href="/?page=199">previous</a>`) || strings.Contains(last, ">next<") {
		t.Error("the last page is wrong")
	}
	for _, query := range []string{"?page=201", "?page=-1", "?page=x", "?page=99999999999999999999"} {
		if rows(page(t, cfg, query)) != perPage {
			t.Errorf("%s has not %d sockets", query, perPage)
		}
	}
	for query, want := range map[string]int{
		"?q=SOCKET+00042": 1, "?q=ns4242/pod-1": 1, "?q=name-42.example.com": 1, "?q=more-7": 1, "?q=nothing": 0, "?socket=id-7": 1, "?socket=id": 0,
		"?q=" + strings.Repeat("x", 100_000): 0,
	} {
		if got := rows(page(t, cfg, query)); got != want {
			t.Errorf("%.60s has %d sockets, want %d", query, got, want)
		}
	}
	if alone := page(t, cfg, "?socket=id-17"); strings.Count(alone, `<td class="dot">`) != maxTunnels || !strings.Contains(alone, "1003 more") {
		t.Error("a socket alone has not its tunnels")
	}
}

func TestSort(t *testing.T) {
	cfg := config([]Socket{{ID: "1", Name: "c"}, {ID: "333", Name: "b"}, {ID: "22", Name: "a"}, {ID: "bad", Name: "d"}})
	for query, want := range map[string]string{"": "abcd", "?sort=rate": "bdac", "?sort=errors": "dabc", "?sort=p99": "abcd", "?sort=other": "abcd"} {
		got := ""
		for _, part := range strings.Split(page(t, cfg, query), `class="name"`)[1:] {
			_, rest, _ := strings.Cut(part, ">")
			got += rest[:1]
		}
		if got != want {
			t.Errorf("%s gives %s, want %s", query, got, want)
		}
	}
	if body := page(t, cfg, "?q=b&sort=rate&refresh=off"); !strings.Contains(body, `href="/?q=b&amp;refresh=off&amp;sort=errors"`) {
		t.Error("links don't keep what was asked for")
	}
}

func TestStyleAndNothingElse(t *testing.T) {
	h := Handler(config(nil))
	for path, want := range map[string]int{"/status.css": 200, "/page.html": 404, "/other": 404} {
		rec := httptest.NewRecorder()
		h.ServeHTTP(rec, httptest.NewRequest(http.MethodGet, path, nil))
		if rec.Code != want || want == 200 && rec.Header().Get("Content-Type") != "text/css; charset=utf-8" {
			t.Errorf("%s: %d %v", path, rec.Code, rec.Header())
		}
	}
	rec := httptest.NewRecorder()
	h.ServeHTTP(rec, httptest.NewRequest(http.MethodPost, "/", nil))
	if rec.Code != http.StatusMethodNotAllowed {
		t.Errorf("POST: %d", rec.Code)
	}
}

func BenchmarkPageOf10000Sockets(b *testing.B) {
	var sockets []Socket
	for i := range 10_000 {
		sockets = append(sockets, Socket{ID: fmt.Sprint(i), Name: fmt.Sprint("socket ", i), Tunnels: []Tunnel{{ID: "t", Name: fmt.Sprint("pod-", i)}}})
	}
	h := Handler(config(sockets))
	for b.Loop() {
		h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest(http.MethodGet, "/?q=9&sort=rate", nil))
	}
}
