package tlscert

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"

	"github.com/caddyserver/certmagic"
	"go.uber.org/zap"

	"github.com/mysocketio/mysocket-injector/internal/edge/store"
)

func TestStorage(t *testing.T) {
	st, err := store.Open(filepath.Join(t.TempDir(), "x.db"), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = st.Close() })
	ctx := t.Context()
	var s certmagic.Storage = storage{st}
	if _, err := s.Load(ctx, "a/b"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("load: %v", err)
	}
	if _, err := s.Stat(ctx, "a"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("stat: %v", err)
	}
	if _, err := s.List(ctx, "", true); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("list: %v", err)
	}
	for _, key := range []string{"a/b/c", "a/b/d", "a/e", "f"} {
		if err := s.Store(ctx, key, []byte("of "+key)); err != nil {
			t.Fatal(err)
		}
	}
	// Others' blobs are not certmagic's.
	if err := st.PutBlob(ctx, "other/a/b", nil); err != nil {
		t.Fatal(err)
	}
	if got, err := s.Load(ctx, "a/b/c"); err != nil || string(got) != "of a/b/c" {
		t.Errorf("load: %q, %v", got, err)
	}
	for _, c := range []struct {
		path      string
		recursive bool
		want      string
	}{
		{"", true, "[a/b/c a/b/d a/e f]"}, {"", false, "[a f]"}, {"a", true, "[a/b/c a/b/d a/e]"}, {"a", false, "[a/b a/e]"},
		{"a/", false, "[a/b a/e]"}, {"a/b", false, "[a/b/c a/b/d]"},
	} {
		if got, err := s.List(ctx, c.path, c.recursive); err != nil || fmt.Sprint(got) != c.want {
			t.Errorf("list %q, %t: %v, %v, want %s", c.path, c.recursive, got, err, c.want)
		}
	}
	if info, err := s.Stat(ctx, "a/b/c"); err != nil || !info.IsTerminal || info.Size != 8 || info.Key != "a/b/c" {
		t.Errorf("stat of a value: %+v, %v", info, err)
	}
	if info, err := s.Stat(ctx, "a/b"); err != nil || info.IsTerminal {
		t.Errorf("stat of a directory: %+v, %v", info, err)
	}
	if !s.Exists(ctx, "a") || !s.Exists(ctx, "f") || s.Exists(ctx, "other") {
		t.Error("exists")
	}
	for range 2 {
		if err := s.Delete(ctx, "a/b"); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := s.List(ctx, "", true); err != nil || fmt.Sprint(got) != "[a/e f]" {
		t.Errorf("after a delete: %v, %v", got, err)
	}
	if err := s.Lock(ctx, "l"); err != nil {
		t.Fatal(err)
	}
	if err := s.Unlock(ctx, "l"); err != nil {
		t.Fatal(err)
	}
}

func TestCertmagicsLog(t *testing.T) {
	var out bytes.Buffer
	log := zap.New(zapToSlog{slog.New(slog.NewTextHandler(&out, nil))})
	log.Info("a step")
	log.Warn("a warning", zap.String("name", "a.edge.test"), zap.Any("storage", storage{}))
	log.With(zap.Int("n", 1)).Named("x").Error("a fault", zap.Error(errors.New("why")))
	got := out.String()
	for _, want := range []string{
		`level=INFO msg="a warning" name=a.edge.test storage="the edge's state"`, `level=WARN msg="a fault" n=1 err=why`,
	} {
		if !strings.Contains(got, want) {
			t.Errorf("the log is %q, want %q in it", got, want)
		}
	}
	if strings.Contains(got, "a step") {
		t.Error("steps are in the log")
	}
}
