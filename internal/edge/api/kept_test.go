package api

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"syscall"
	"testing"
)

func TestDiskFailures(t *testing.T) {
	write := func(number syscall.Errno) error {
		return fmt.Errorf("store socket x: %w", &fs.PathError{Op: "write", Path: "/secret/x.db", Err: number})
	}
	for _, c := range []struct {
		err    error
		status int
		says   string
	}{
		{write(syscall.ENOSPC), http.StatusInsufficientStorage, "no room"},
		{write(syscall.EDQUOT), http.StatusInsufficientStorage, "no room"},
		{write(syscall.EFBIG), http.StatusInsufficientStorage, "no room"},
		{fmt.Errorf("store socket x: %w", fmt.Errorf("file resize error: %s", &fs.PathError{Op: "truncate", Path: "x.db", Err: syscall.ENOSPC})), http.StatusInsufficientStorage, "no room"},
		{write(syscall.EROFS), http.StatusServiceUnavailable, "can't write"},
		{write(syscall.EIO), http.StatusServiceUnavailable, "can't write"},
		{write(syscall.EBADF), http.StatusInternalServerError, "its log"},
		{errors.New("no space left on device, says a stranger"), http.StatusInternalServerError, "its log"},
	} {
		var log strings.Builder
		a := New(Config{Log: slog.New(slog.NewTextHandler(&log, nil))})
		rec := httptest.NewRecorder()
		a.fail(rec, httptest.NewRequest(http.MethodPost, "/socket", nil), c.err)
		if rec.Code != c.status || !strings.Contains(rec.Body.String(), c.says) || strings.Contains(rec.Body.String(), "/secret") {
			t.Errorf("%v: %d %s", c.err, rec.Code, rec.Body)
		}
		if got := rec.Header().Get("Retry-After"); (got != "") != (c.status != http.StatusInternalServerError) {
			t.Errorf("%v: Retry-After %q", c.err, got)
		}
		if !strings.Contains(log.String(), "level=ERROR") || !strings.Contains(log.String(), "/socket") {
			t.Errorf("%v is logged as %q", c.err, log.String())
		}
	}
}
