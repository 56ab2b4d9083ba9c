package tlscert

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"sync"
	"time"
)

// maxFile bounds what is read of a file: a chain of several certificates has some kilobytes.
const maxFile = 1 << 20

// FilesConfig says where a certificate and its key are.
type FilesConfig struct {
	// CertPath has the certificate and its chain, KeyPath the key, both in PEM form.
	CertPath, KeyPath string
	// Domain is the parent of all public names: there is a warning if the certificate is not for *.Domain.
	Domain string
	Log    *slog.Logger
	Now    func() time.Time
	// Expires is told when the certificate that is served now expires.
	Expires func(time.Time)
}

// Files is a certificate in files, which may be replaced at any time.
type Files struct {
	cfg FilesConfig

	mu      sync.RWMutex
	current *tls.Certificate

	// Of the goroutine that checks. serving is what current was made of; suspect is what the last check could not use;
	// reported is what the log was told of.
	serving, suspect, reported content
}

// content identifies what two files hold, or why they could not be read.
type content [sha256.Size]byte

// OpenFiles reads a certificate and its key. The key must fit.
func OpenFiles(cfg FilesConfig) (*Files, error) {
	f := &Files{cfg: cfg}
	id, cert, err := f.read()
	if err != nil {
		return nil, err
	}
	f.use(id, cert)
	return f, nil
}

// Watch reads the files again every interval, until ctx ends. Their content is compared, not their times: a Secret that is
// mounted changes by a symbolic link.
func (f *Files) Watch(ctx context.Context, interval time.Duration) {
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			f.check()
		}
	}
}

// check serves what is in the files now. If that can't be used the old certificate stays, and the log says so once, when it
// was found twice: between the change of one file and that of the other, the two don't fit.
func (f *Files) check() {
	id, cert, err := f.read()
	switch {
	case id == f.serving:
		f.suspect, f.reported = content{}, content{}
	case err == nil:
		f.use(id, cert)
		f.suspect, f.reported = content{}, content{}
	case id == f.suspect && id != f.reported:
		f.reported = id
		f.cfg.Log.Error("the new certificate can't be used; the old one stays in use", "expires", f.leafEnd(), "err", err)
	default:
		f.suspect = id
	}
}

// read reads both files. The content is known even when they can't be used.
func (f *Files) read() (content, *tls.Certificate, error) {
	certPEM, certErr := readFile("tls-cert", f.cfg.CertPath)
	keyPEM, keyErr := readFile("tls-key", f.cfg.KeyPath)
	if err := errors.Join(certErr, keyErr); err != nil {
		return sha256.Sum256([]byte(err.Error())), nil, err
	}
	hash := sha256.New()
	_, _ = fmt.Fprintf(hash, "%d ", len(certPEM))
	_, _ = hash.Write(certPEM)
	_, _ = hash.Write(keyPEM)
	id := content(hash.Sum(nil))
	cert, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		return id, nil, fmt.Errorf("tls-cert %s with tls-key %s: %w", f.cfg.CertPath, f.cfg.KeyPath, err)
	}
	return id, &cert, nil
}

func readFile(flag, path string) ([]byte, error) {
	file, err := os.Open(path) // #nosec G304 -- the operator names the file
	if err != nil {
		return nil, fmt.Errorf("%s: %w", flag, err)
	}
	defer func() { _ = file.Close() }()
	data, err := io.ReadAll(io.LimitReader(file, maxFile+1))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", flag, err)
	}
	if len(data) > maxFile {
		return nil, fmt.Errorf("%s: %s is larger than %d bytes", flag, path, maxFile)
	}
	return data, nil
}

func (f *Files) use(id content, cert *tls.Certificate) {
	leaf := cert.Leaf // X509KeyPair has parsed it.
	f.mu.Lock()
	f.current = cert
	f.mu.Unlock()
	f.serving = id
	if f.cfg.Expires != nil {
		f.cfg.Expires(leaf.NotAfter)
	}
	names := strings.Join(leaf.DNSNames, " ")
	f.cfg.Log.Info("certificate read", "file", f.cfg.CertPath, "names", names, "expires", leaf.NotAfter)
	// One label stands for all: a certificate for *.DOMAIN is for any.
	if leaf.VerifyHostname("any-public-name."+f.cfg.Domain) != nil {
		f.cfg.Log.Warn("the certificate is not for all public names; the others get one from elsewhere", "file", f.cfg.CertPath, "names", names,
			"wanted", "*."+f.cfg.Domain)
	}
	if now := f.cfg.Now(); now.After(leaf.NotAfter) || now.Before(leaf.NotBefore) {
		f.cfg.Log.Warn("the certificate is not valid now; visitors will refuse it", "file", f.cfg.CertPath, "from", leaf.NotBefore, "expires", leaf.NotAfter)
	}
}

func (f *Files) leafEnd() time.Time {
	f.mu.RLock()
	defer f.mu.RUnlock()
	return f.current.Leaf.NotAfter
}

// certificate is the one for a name, nil if it is not for it.
func (f *Files) certificate(name string) *tls.Certificate {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if f.current.Leaf.VerifyHostname(name) != nil {
		return nil
	}
	return f.current
}
