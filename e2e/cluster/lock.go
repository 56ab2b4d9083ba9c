package cluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
	"time"
)

// lockFile takes an exclusive lock on path and waits for it as long as ctx lasts, telling out
// that it waits. The lock ends with the returned function, which removes the file, or with the
// process.
func lockFile(ctx context.Context, out io.Writer, path string) (unlock func(), err error) {
	told := false
	for {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			return nil, err
		}
		err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			if sameFile(f, path) {
				return func() {
					_ = os.Remove(path)
					_ = f.Close()
				}, nil
			}
			// The holder before us removed the file between our open and our lock.
			_ = f.Close()
			continue
		}
		_ = f.Close()
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		if !told {
			told = true
			_, _ = fmt.Fprintf(out, "waiting for another cluster command to end (it holds %s)\n", path)
		}
		if err := pause(ctx, 200*time.Millisecond); err != nil {
			return nil, fmt.Errorf("wait for the lock %s: %w", path, err)
		}
	}
}

func sameFile(f *os.File, path string) bool {
	a, err := f.Stat()
	if err != nil {
		return false
	}
	b, err := os.Stat(path)
	return err == nil && os.SameFile(a, b)
}

// pause waits for d or for the end of ctx, whichever is first.
func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

// waitFor asks ok every interval until it is nil; when ctx ends first, the error says why the
// last attempt was not good enough.
func waitFor(ctx context.Context, interval time.Duration, ok func() error) error {
	for {
		err := ok()
		if err == nil {
			return nil
		}
		if ctx.Err() != nil || pause(ctx, interval) != nil {
			return fmt.Errorf("%w (last: %w)", ctx.Err(), err)
		}
	}
}
