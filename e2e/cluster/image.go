package cluster

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"strings"
	"time"
)

// image is a container image of one layer, written without a base image, a daemon or a
// registry.
type image struct {
	ref        string
	entrypoint []string
	user       string
	labels     map[string]string
	ports      []string // "10250/tcp"
	files      []imageFile
}

// imageFile is a file of the machine and its place in the image. Its mode is taken over, its
// owner is root.
type imageFile struct{ from, to string }

// defaultPath is the PATH that image builders give a "FROM scratch" image.
const defaultPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// writeArchive writes the image in the layout of "docker save", which containerd imports. The
// same files give the same bytes: nothing in it depends on the time or the machine.
func (m image) writeArchive(to string) error {
	layer, err := m.layer()
	if err != nil {
		return fmt.Errorf("image %s: %w", m.ref, err)
	}
	sum := sha256.Sum256(layer)
	diffID := hex.EncodeToString(sum[:])
	config, err := m.config(diffID)
	if err != nil {
		return err
	}
	sum = sha256.Sum256(config)
	configName := hex.EncodeToString(sum[:]) + ".json"
	manifest, err := json.Marshal([]map[string]any{{
		"Config": configName, "RepoTags": []string{m.ref}, "Layers": []string{diffID + "/layer.tar"},
	}})
	if err != nil {
		return err
	}
	var out bytes.Buffer
	tw := tar.NewWriter(&out)
	for _, f := range []struct {
		name string
		data []byte
	}{{configName, config}, {diffID + "/layer.tar", layer}, {"manifest.json", manifest}} {
		if err := addFile(tw, f.name, 0o644, f.data); err != nil {
			return err
		}
	}
	if err := tw.Close(); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	return writeFile(to, out.Bytes(), 0o644)
}

func (m image) config(diffID string) ([]byte, error) {
	run := map[string]any{"Env": []string{defaultPath}, "WorkingDir": "/"}
	if len(m.entrypoint) > 0 {
		run["Entrypoint"] = m.entrypoint
	}
	if m.user != "" {
		run["User"] = m.user
	}
	if len(m.labels) > 0 {
		run["Labels"] = m.labels
	}
	if len(m.ports) > 0 {
		ports := map[string]struct{}{}
		for _, p := range m.ports {
			ports[p] = struct{}{}
		}
		run["ExposedPorts"] = ports
	}
	epoch := time.Unix(0, 0).UTC()
	return json.Marshal(map[string]any{
		"created": epoch, "architecture": runtime.GOARCH, "os": "linux", "config": run,
		"rootfs":  map[string]any{"type": "layers", "diff_ids": []string{"sha256:" + diffID}},
		"history": []map[string]any{{"created": epoch, "created_by": "mysocket-injector e2e/cmd/cluster"}},
	})
}

func (m image) layer() ([]byte, error) {
	var out bytes.Buffer
	tw := tar.NewWriter(&out)
	made := map[string]bool{"/": true, ".": true}
	for _, f := range m.files {
		if !path.IsAbs(f.to) || path.Clean(f.to) != f.to {
			return nil, fmt.Errorf("file %q: a place in an image is an absolute, clean path", f.to)
		}
		if err := addDirs(tw, made, path.Dir(f.to)); err != nil {
			return nil, err
		}
		info, err := os.Stat(f.from)
		if err != nil {
			return nil, err
		}
		b, err := os.ReadFile(f.from)
		if err != nil {
			return nil, err
		}
		if err := addFile(tw, strings.TrimPrefix(f.to, "/"), int64(info.Mode().Perm()), b); err != nil {
			return nil, err
		}
	}
	return out.Bytes(), tw.Close()
}

func addDirs(tw *tar.Writer, made map[string]bool, dir string) error {
	if made[dir] {
		return nil
	}
	if err := addDirs(tw, made, path.Dir(dir)); err != nil {
		return err
	}
	made[dir] = true
	return tw.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: strings.TrimPrefix(dir, "/") + "/", Mode: 0o755, ModTime: time.Unix(0, 0)})
}

func addFile(tw *tar.Writer, name string, mode int64, data []byte) error {
	err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode, Size: int64(len(data)), ModTime: time.Unix(0, 0)})
	if err != nil {
		return err
	}
	_, err = tw.Write(data)
	return err
}

// archiveSizes returns the size of an archive's content as it lies on a node's disk and as a
// registry would keep it (gzip).
func archiveSizes(file string) (unpacked, packed int64, err error) {
	f, err := os.Open(file)
	if err != nil {
		return 0, 0, err
	}
	defer func() { _ = f.Close() }()
	tr := tar.NewReader(f)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return unpacked, packed, nil
		}
		if err != nil {
			return 0, 0, fmt.Errorf("%s: %w", file, err)
		}
		if !strings.HasSuffix(h.Name, "/layer.tar") {
			continue
		}
		counter := new(countingWriter)
		gz := gzip.NewWriter(counter)
		n, err := io.Copy(gz, tr)
		if err := errors.Join(err, gz.Close()); err != nil {
			return 0, 0, fmt.Errorf("%s: %w", file, err)
		}
		unpacked, packed = unpacked+n, packed+int64(*counter)
	}
}

type countingWriter int64

func (c *countingWriter) Write(b []byte) (int, error) {
	*c += countingWriter(len(b))
	return len(b), nil
}
