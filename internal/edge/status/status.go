// Package status is the edge's status page: sockets, their tunnels, and how visitors fare. It is made on the server from what it is
// given, with no script in it. It must not know where that comes from, nor change anything.
package status

import (
	"cmp"
	"embed"
	"fmt"
	"html/template"
	"log/slog"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/mysocketio/mysocket-injector/internal/edge/stats"
)

const (
	// perPage is how many sockets a page shows, perSocket how many tunnels of each; a socket that was asked for alone shows maxTunnels.
	perPage    = 50
	perSocket  = 10
	maxTunnels = 2_000

	refresh  = 10 * time.Second
	maxQuery = 256
	// soon is when the end of a certificate is worth a warning.
	soon = 7 * 24 * time.Hour
)

//go:embed page.html style.css
var files embed.FS

// Socket is what there is to say of a socket.
type Socket struct {
	ID, Name, Type, URL string
	// Account is the e-mail address of its owner.
	Account string
	// Registered counts its tunnel objects, connected or not.
	Registered int
	// Tunnels are those that are connected.
	Tunnels []Tunnel
}

// Tunnel is a connected tunnel.
type Tunnel struct {
	ID string
	// Name is what its client calls itself, such as the namespace and name of a pod; it may be empty, or a lie.
	Name   string
	Remote string
	Since  time.Time
	// Open are the requests and connections that it carries now, Total all it was chosen for.
	Open  int
	Total uint64
	// Ejected says that it is out of the rotation, since it does not work.
	Ejected bool
}

// Certificate is one that the edge shows.
type Certificate struct {
	Name     string
	NotAfter time.Time
}

// Config says where the page's content comes from.
type Config struct {
	Domain, Version string
	Started         time.Time
	Log             *slog.Logger
	Now             func() time.Time
	// Sockets returns all sockets there are.
	Sockets func() []Socket
	// Stats says how a socket fared over the last minute, Total how all did.
	Stats func(socketID string) stats.Summary
	Total func() stats.Summary
	// Certificates returns those in use.
	Certificates func() []Certificate
}

// view is what the template is given.
type view struct {
	Domain, Version, Uptime, At string
	Refresh                     int
	Sockets, Tunnels, Down      int
	Total                       stats.Summary
	Certificates                []certificateView
	Query                       string
	Matching, From, To          int
	Rows                        []row
	Sorts                       []link
	Previous, Next, Pause       string
	Alone                       bool
}

type row struct {
	Socket
	Stats stats.Summary
	Only  string // the page with this socket alone
	More  int    // tunnels that are not shown
}

type link struct {
	Name, URL string
	Current   bool
}

type certificateView struct {
	Name, Ends string
	Soon       bool
}

// Handler serves the page at / and its style at /status.css.
func Handler(cfg Config) http.Handler {
	page := template.Must(template.New("page.html").Funcs(template.FuncMap{
		"rate": rate, "share": share, "took": took, "ago": func(at time.Time) string { return span(cfg.Now().Sub(at)) }, "spark": spark, "peak": peak,
	}).ParseFS(files, "page.html"))
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, r *http.Request) {
		v := cfg.view(r.URL.Query())
		var out strings.Builder
		if err := page.Execute(&out, v); err != nil {
			cfg.Log.Error("status page", "err", err)
			http.Error(w, "the page could not be made; the log says why", http.StatusInternalServerError)
			return
		}
		headers(w, "text/html; charset=utf-8")
		_, _ = w.Write([]byte(out.String()))
	})
	mux.HandleFunc("GET /status.css", func(w http.ResponseWriter, _ *http.Request) {
		style, err := files.ReadFile("style.css")
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		headers(w, "text/css; charset=utf-8")
		_, _ = w.Write(style)
	})
	return mux
}

// headers let the page load its style and send its form, and nothing else, wherever its content comes from.
func headers(w http.ResponseWriter, contentType string) {
	h := w.Header()
	h.Set("Content-Type", contentType)
	h.Set("Content-Security-Policy", "default-src 'none'; style-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("Cache-Control", "no-store")
}

// orders are by what the page can be sorted. All but the first put what is worth a look on top.
var orders = []struct {
	key, name string
	value     func(stats.Summary) float64
}{
	{"", "name", nil},
	{"rate", "requests", func(s stats.Summary) float64 { return s.Rate }},
	{"errors", "errors", func(s stats.Summary) float64 { return float64(s.Failures) }},
	{"p99", "p99", func(s stats.Summary) float64 { return float64(s.P99) }},
}

func (cfg Config) view(asked url.Values) view {
	now := cfg.Now()
	v := view{
		Domain: cfg.Domain, Version: cfg.Version, Uptime: span(now.Sub(cfg.Started)), At: now.UTC().Format("2006-01-02 15:04:05 UTC"),
		Total: cfg.Total(), Refresh: int(refresh.Seconds()),
	}
	for _, c := range cfg.Certificates() {
		v.Certificates = append(v.Certificates, certificateView{c.Name, ends(c.NotAfter, now), c.NotAfter.Sub(now) < soon})
	}
	v.Query = strings.ToValidUTF8(asked.Get("q"), "")
	if len(v.Query) > maxQuery {
		v.Query = strings.ToValidUTF8(v.Query[:maxQuery], "")
	}
	only := asked.Get("socket")
	v.Alone = only != ""
	var rows []row
	for _, k := range cfg.Sockets() {
		v.Sockets++
		v.Tunnels += len(k.Tunnels)
		if len(k.Tunnels) == 0 {
			v.Down++
		}
		if only != "" && k.ID != only || only == "" && !k.matches(v.Query) {
			continue
		}
		rows = append(rows, row{Socket: k})
	}
	v.Matching = len(rows)

	order := orders[0]
	for _, o := range orders {
		if o.key == asked.Get("sort") {
			order = o
		}
	}
	if order.value != nil {
		for i := range rows {
			rows[i].Stats = cfg.Stats(rows[i].ID)
		}
	}
	slices.SortStableFunc(rows, func(a, b row) int {
		if order.value != nil {
			if c := cmp.Compare(order.value(b.Stats), order.value(a.Stats)); c != 0 {
				return c
			}
		}
		return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.ID, b.ID))
	})

	page, _ := strconv.Atoi(asked.Get("page"))
	page = min(max(page, 1), max(1, (len(rows)+perPage-1)/perPage))
	begin, end := (page-1)*perPage, min(page*perPage, len(rows))
	if end > begin {
		v.From, v.To = begin+1, end
	}
	paused := asked.Get("refresh") == "off"
	if paused {
		v.Refresh = 0
	}
	here := func(change ...string) string {
		q := url.Values{}
		set := func(key, value string) {
			q.Del(key)
			if value != "" {
				q.Set(key, value)
			}
		}
		set("q", v.Query)
		set("sort", order.key)
		set("socket", only)
		if page > 1 {
			set("page", strconv.Itoa(page))
		}
		if paused {
			set("refresh", "off")
		}
		for i := 0; i < len(change); i += 2 {
			set(change[i], change[i+1])
		}
		if len(q) == 0 {
			return "/"
		}
		return "/?" + q.Encode()
	}
	if begin > 0 {
		v.Previous = here("page", strconv.Itoa(page-1))
	}
	if end < len(rows) {
		v.Next = here("page", strconv.Itoa(page+1))
	}
	if v.Pause = here("refresh", "off"); paused {
		v.Pause = here("refresh", "")
	}
	for _, o := range orders {
		v.Sorts = append(v.Sorts, link{o.name, here("sort", o.key, "page", ""), o.key == order.key})
	}
	limit := perSocket
	if v.Alone {
		limit = maxTunnels
	}
	for _, r := range rows[begin:end] {
		r.Stats = cfg.Stats(r.ID)
		r.Only = here("q", "", "page", "", "socket", r.ID)
		if r.More = len(r.Tunnels) - limit; r.More > 0 {
			r.Tunnels = r.Tunnels[:limit]
		}
		v.Rows = append(v.Rows, r)
	}
	return v
}

// matches looks for the query in whatever names the socket or one of its tunnels.
func (k Socket) matches(query string) bool {
	if query == "" {
		return true
	}
	query = strings.ToLower(query)
	has := func(s string) bool { return strings.Contains(strings.ToLower(s), query) }
	return has(k.Name) || has(k.URL) || has(k.ID) || has(k.Account) || has(k.Type) ||
		slices.ContainsFunc(k.Tunnels, func(t Tunnel) bool { return has(t.Name) || has(t.ID) || has(t.Remote) })
}

func rate(perSecond float64) string {
	if perSecond >= 100 || perSecond == 0 {
		return fmt.Sprintf("%.0f", perSecond)
	}
	return fmt.Sprintf("%.1f", perSecond)
}

func share(s stats.Summary) string {
	percent := 100 * s.FailureShare()
	switch {
	case s.Failures == 0:
		return "0"
	case percent < 0.1:
		return "<0.1 %"
	}
	return fmt.Sprintf("%.1f %%", percent)
}

func took(d time.Duration) string {
	ms := float64(d) / float64(time.Millisecond)
	switch {
	case d <= 0:
		return "–"
	case ms < 10:
		return fmt.Sprintf("%.1f ms", ms)
	case ms < 1000:
		return fmt.Sprintf("%.0f ms", ms)
	}
	return fmt.Sprintf("%.1f s", d.Seconds())
}

// span writes a time in its two largest units.
func span(d time.Duration) string {
	d = max(d, 0)
	switch day := 24 * time.Hour; {
	case d >= 100*day:
		return fmt.Sprintf("%d d", d/day)
	case d >= day:
		return fmt.Sprintf("%d d %d h", d/day, d%day/time.Hour)
	case d >= time.Hour:
		return fmt.Sprintf("%d h %d min", d/time.Hour, d%time.Hour/time.Minute)
	case d >= time.Minute:
		return fmt.Sprintf("%d min %d s", d/time.Minute, d%time.Minute/time.Second)
	}
	return fmt.Sprintf("%d s", d/time.Second)
}

func ends(at, now time.Time) string {
	left := at.Sub(now)
	if left <= 0 {
		return "expired " + at.UTC().Format(time.DateOnly)
	}
	return fmt.Sprintf("%s, in %s", at.UTC().Format(time.DateOnly), span(left))
}

// The size of the line that shows the counts of the last minute, in units of the drawing.
const sparkWidth, sparkHeight = 110, 24

// spark is the points of that line.
func spark(counts []uint32) string {
	highest := max(1, peak(counts))
	var out strings.Builder
	for i, n := range counts {
		x := float64(i) * sparkWidth / float64(max(1, len(counts)-1))
		y := sparkHeight - 1 - float64(n)/float64(highest)*(sparkHeight-2)
		_, _ = fmt.Fprintf(&out, "%.1f,%.1f ", x, y)
	}
	return strings.TrimSuffix(out.String(), " ")
}

func peak(counts []uint32) uint32 {
	highest := uint32(0)
	for _, n := range counts {
		highest = max(highest, n)
	}
	return highest
}
