package api

import (
	"errors"
	"net/http"
	"regexp"
	"strconv"
	"strings"

	"github.com/mysocketio/mysocket-injector/internal/edge/pki"
	"github.com/mysocketio/mysocket-injector/internal/edge/store"
)

// border0Prefix is where the border0 dialect is.
const border0Prefix = "/api/v1"

const (
	defaultPageSize = 100
	maxPageSize     = 1000
)

func inBorder0(r *http.Request) bool { return strings.HasPrefix(r.URL.Path, border0Prefix+"/") }

func (a *API) border0Routes(route func(pattern string, open bool, m methods)) {
	route(border0Prefix+"/serverinfo", true, methods{"GET": serverInfo})
	route(border0Prefix+"/sockets", false, methods{"GET": a.pageOfSockets})
	route(border0Prefix+"/socket", false, methods{"POST": a.createNamed})
	route(border0Prefix+"/socket/{name}", false, methods{"GET": a.getNamed, "PUT": a.updateNamed, "DELETE": a.deleteNamed})
	route(border0Prefix+"/socket/{name}/signkey", false, methods{"POST": a.signNamed})
}

// border0Error is the body of a refusal in this dialect.
type border0Error struct {
	Status       int    `json:"status_code"`
	ErrorMessage string `json:"error_message"`
	Message      string `json:"message"`
}

type border0Form struct {
	socketForm
	DisplayName   *string `json:"display_name"`
	Recording     *bool   `json:"recording_enabled"`
	ConnectorAuth *bool   `json:"connector_authentication_enabled"`
}

// border0Answer is a socket in this dialect. It has no tunnel objects.
type border0Answer struct {
	socketAnswer
	Tunnels       *struct{} `json:"tunnels,omitempty"` // never: hides that of the classic answer
	DisplayName   string    `json:"display_name"`
	Recording     bool      `json:"recording_enabled"`
	ConnectorAuth bool      `json:"connector_authentication_enabled"`
}

type paginationAnswer struct {
	CurrentPage    int `json:"current_page"`
	NextPage       int `json:"next_page"` // 0 on the last
	TotalRecords   int `json:"total_records"`
	TotalPages     int `json:"total_pages"`
	RecordsPerPage int `json:"records_per_page"`
	ActualPageSize int `json:"actual_page_size"`
}

type pageAnswer struct {
	List       []border0Answer  `json:"list"`
	Pagination paginationAnswer `json:"pagination"`
}

func (a *API) answerNamed(k store.Socket) border0Answer {
	return border0Answer{socketAnswer: a.answerSocket(k, nil), DisplayName: k.DisplayName}
}

// serverInfo says that what was written is seen at once: there is one state, and an edge that shares it looks up what it doesn't know.
func serverInfo(*http.Request, store.User) (any, error) {
	return map[string]any{"data_consistency": map[string]int{"rx_after_tx_delay_ms": 0}}, nil
}

func (a *API) pageOfSockets(r *http.Request, user store.User) (any, error) {
	page, err := numberOf(r, "page", 1, 1, 1<<20)
	if err != nil {
		return nil, err
	}
	size, err := numberOf(r, "page_size", defaultPageSize, 1, maxPageSize)
	if err != nil {
		return nil, err
	}
	all := a.cfg.Store.Sockets(user.ID)
	if name := r.URL.Query().Get("name"); name != "" {
		named := all[:0]
		for _, k := range all {
			if k.Name == name {
				named = append(named, k)
			}
		}
		all = named
	}
	from := min((page-1)*size, len(all))
	to := min(from+size, len(all))
	answer := pageAnswer{List: []border0Answer{}, Pagination: paginationAnswer{
		CurrentPage: page, TotalRecords: len(all), TotalPages: (len(all) + size - 1) / size, RecordsPerPage: size, ActualPageSize: to - from,
	}}
	if to < len(all) {
		answer.Pagination.NextPage = page + 1
	}
	for _, k := range all[from:to] {
		answer.List = append(answer.List, a.answerNamed(k))
	}
	return answer, nil
}

func numberOf(r *http.Request, parameter string, absent, least, most int) (int, error) {
	v := r.URL.Query().Get(parameter)
	if v == "" {
		return absent, nil
	}
	n, err := strconv.Atoi(v)
	if err != nil || n < least || n > most {
		return 0, badRequest("%s %q is not a number from %d to %d", parameter, truncate(v, 20), least, most)
	}
	return n, nil
}

// namedOf finds the socket of the request's path, by id or by name, if it is the user's.
func (a *API) namedOf(r *http.Request, user store.User) (store.Socket, error) {
	name := r.PathValue("name")
	if validID(name) {
		if k, err := a.cfg.Store.Socket(name); err == nil && k.UserID == user.ID {
			return k, nil
		}
	}
	return a.cfg.Store.SocketByName(user.ID, name)
}

var socketNamePattern = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

func checkSocketName(name string) error {
	if !socketNamePattern.MatchString(name) {
		return badRequest("name %q: allowed are up to 63 lower-case letters, digits and dashes, beginning and ending with a letter or digit", truncate(name, 100))
	}
	return nil
}

func nameTaken(name string) error {
	return refuse(http.StatusConflict, "there is a socket named %q already; names are unique", name)
}

func (a *API) createNamed(r *http.Request, user store.User) (any, error) {
	var form border0Form
	if err := decode(r, &form); err != nil {
		return nil, err
	}
	if form.Name == nil || *form.Name == "" {
		return nil, badRequest("name is missing: give the socket a name")
	}
	if err := checkSocketName(*form.Name); err != nil {
		return nil, err
	}
	k, _, err := a.makeSocket(user, form.socketForm, func(k store.Socket) (store.Socket, []store.Tunnel, error) {
		if err := form.applyOwn(&k); err != nil {
			return store.Socket{}, nil, err
		}
		k, err := a.cfg.Store.CreateUniqueSocket(k, a.cfg.Domain)
		return k, nil, err
	})
	if errors.Is(err, store.ErrExists) {
		return nil, nameTaken(*form.Name)
	}
	if err != nil {
		return nil, err
	}
	return a.answerNamed(k), nil
}

// applyOwn does what socketForm.apply does, for the fields that only this dialect has.
func (f *border0Form) applyOwn(k *store.Socket) error {
	if isTrue(f.Recording) {
		return badRequest("recording_enabled is not supported by this edge")
	}
	if isTrue(f.ConnectorAuth) {
		return badRequest("connector_authentication_enabled is not supported by this edge")
	}
	if f.DisplayName != nil {
		if err := checkText("display_name", *f.DisplayName, maxNameLength); err != nil {
			return err
		}
		k.DisplayName = *f.DisplayName
	}
	return nil
}

func (a *API) getNamed(r *http.Request, user store.User) (any, error) {
	k, err := a.namedOf(r, user)
	if err != nil {
		return nil, err
	}
	return a.answerNamed(k), nil
}

func (a *API) updateNamed(r *http.Request, user store.User) (any, error) {
	k, err := a.namedOf(r, user)
	if err != nil {
		return nil, err
	}
	var form border0Form
	if err := decode(r, &form); err != nil {
		return nil, err
	}
	updated, err := a.cfg.Store.UpdateSocket(k.ID, func(k *store.Socket) error {
		if form.Name != nil && *form.Name != k.Name { // one that the classic dialect gave may stay
			if err := checkSocketName(*form.Name); err != nil {
				return err
			}
			if _, err := a.cfg.Store.SocketByName(user.ID, *form.Name); err == nil {
				return nameTaken(*form.Name)
			}
		}
		if err := form.change(k); err != nil {
			return err
		}
		return form.applyOwn(k)
	})
	if err != nil {
		return nil, err
	}
	return a.answerNamed(updated), nil
}

func (a *API) deleteNamed(r *http.Request, user store.User) (any, error) {
	k, err := a.namedOf(r, user)
	if err != nil {
		return nil, err
	}
	return a.removeSocket(k)
}

// signNamed signs for a socket. Each login with the certificate is a tunnel, until its connection ends.
func (a *API) signNamed(r *http.Request, user store.User) (any, error) {
	k, err := a.namedOf(r, user)
	if err != nil {
		return nil, err
	}
	return a.sign(r, user, pki.Binding{SocketID: k.ID})
}
