package tlscert

import (
	"bytes"
	"crypto/tls"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/mysocketio/mysocket-injector/internal/edge/tlscert/tlscerttest"
)

func open(t *testing.T, dir string, log *bytes.Buffer, now time.Time) (*Files, error) {
	t.Helper()
	return OpenFiles(FilesConfig{
		CertPath: dir + "/tls.crt", KeyPath: dir + "/tls.key", Domain: "edge.test", Log: slog.New(slog.NewTextHandler(log, nil)),
		Now: func() time.Time { return now },
	})
}

func TestFilesAreChecked(t *testing.T) {
	a := tlscerttest.New(t)
	cert, key := a.Issue(time.Hour, "*.edge.test")
	_, otherKey := a.Issue(time.Hour, "*.edge.test")
	hostCert, hostKey := a.Issue(time.Hour, "a.edge.test")
	for _, c := range []struct {
		name      string
		cert, key []byte
		now       time.Duration
		err, warn string
	}{
		{name: "good", cert: cert, key: key},
		{name: "the key of another", cert: cert, key: otherKey, err: "private key does not match public key"},
		{name: "no certificate", cert: []byte("nothing"), key: key, err: "failed to find any PEM data in certificate input"},
		{name: "no key", cert: cert, key: cert, err: "tls-key"},
		{name: "huge", cert: make([]byte, maxFile+1), key: key, err: "larger than 1048576 bytes"},
		{name: "one name only", cert: hostCert, key: hostKey, warn: "not for all public names"},
		{name: "expired", cert: cert, key: key, now: 2 * time.Hour, warn: "not valid now"},
		{name: "from tomorrow", cert: cert, key: key, now: -2 * time.Hour, warn: "not valid now"},
	} {
		dir, log := t.TempDir(), &bytes.Buffer{}
		tlscerttest.Write(t, dir, c.cert, c.key)
		_, err := open(t, dir, log, time.Now().Add(c.now))
		if (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s: %v, want %q", c.name, err, c.err)
		}
		if warned := strings.Contains(log.String(), "level=WARN"); warned != (c.warn != "") || !strings.Contains(log.String(), c.warn) {
			t.Errorf("%s: the log is %q, want %q", c.name, log, c.warn)
		}
	}
	if _, err := open(t, t.TempDir(), &bytes.Buffer{}, time.Now()); err == nil || !strings.Contains(err.Error(), "tls-cert: ") || !strings.Contains(err.Error(), "tls-key: ") {
		t.Errorf("missing files: %v", err)
	}
}

func TestChangedFiles(t *testing.T) {
	a := tlscerttest.New(t)
	dir, log := t.TempDir(), &bytes.Buffer{}
	first, firstKey := a.Issue(time.Hour, "*.edge.test", "edge.test")
	tlscerttest.Write(t, dir, first, firstKey)
	f, err := open(t, dir, log, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	served := func() *tls.Certificate { return f.certificate("a.edge.test") }
	old := served()
	if old == nil || f.certificate("edge.test") != old || f.certificate("a.b.edge.test") != nil || f.certificate("other.test") != nil {
		t.Fatal("the certificate is not chosen by its names")
	}
	log.Reset()
	f.check()
	if served() != old || log.Len() != 0 {
		t.Errorf("read again though nothing changed: %s", log)
	}
	// A key that does not fit yet is half of a change: nothing is said of it until it is found again, and then once.
	second, secondKey := a.Issue(2*time.Hour, "*.edge.test")
	tlscerttest.Write(t, dir, second, firstKey)
	for i, lines := range []int{0, 1, 1, 1} {
		f.check()
		if n := strings.Count(log.String(), "the old one stays in use"); n != lines || served() != old {
			t.Errorf("check %d of a broken pair: %d lines, want %d: %s", i, n, lines, log)
		}
	}
	tlscerttest.Write(t, dir, second, secondKey)
	f.check()
	if served() == old || served() == nil {
		t.Error("the new certificate is not served")
	}
	// The same fault after that is a new one.
	log.Reset()
	tlscerttest.Write(t, dir, second, firstKey)
	f.check()
	f.check()
	if n := strings.Count(log.String(), "the old one stays in use"); n != 1 {
		t.Errorf("%d lines: %s", n, log)
	}
	if strings.Contains(log.String(), "PRIVATE") {
		t.Error("a key is in the log")
	}
}
