package cluster

import (
	"bytes"
	"embed"
	"encoding/base64"
	"fmt"
	"os"
	"path/filepath"
	"text/template"
)

//go:embed templates
var templates embed.FS

// settings are what the templates are filled with.
type settings struct {
	PauseImage, CoreDNSImage         string
	CNIDir, ConfigDir, PKIDir        string
	NodeName, NodeIP, HostIP, DNSIP  string
	PodCIDR, NodePodCIDR, HostDomain string
	CgroupName                       string
}

func (o Options) settings() settings {
	return settings{
		PauseImage: pauseImage, CoreDNSImage: coreDNSImage,
		CNIDir: cniDir, ConfigDir: o.configDir(), PKIDir: o.pkiDir(),
		NodeName: NodeName, NodeIP: NodeIP, HostIP: HostIP, DNSIP: DNSIP,
		PodCIDR: PodCIDR, NodePodCIDR: nodePodCIDR, HostDomain: HostDomain, CgroupName: cgroupName,
	}
}

// render fills a template; a name in it that data lacks is an error.
func render(name string, data any) ([]byte, error) {
	t, err := template.New(name).Option("missingkey=error").ParseFS(templates, "templates/"+name)
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	if err := t.Execute(&b, data); err != nil {
		return nil, fmt.Errorf("render %s: %w", name, err)
	}
	return b.Bytes(), nil
}

// kubeconfig renders a kubeconfig with the credentials in it.
func kubeconfig(p *pki, user string) ([]byte, error) {
	kp, ok := p.clients[user]
	if !ok {
		return nil, fmt.Errorf("kubeconfig for %s: no such client", user)
	}
	b64 := base64.StdEncoding.EncodeToString
	return render("kubeconfig.yaml", map[string]string{
		"NodeIP": NodeIP, "CA": b64(p.ca.cert), "User": user, "Cert": b64(kp.cert), "Key": b64(kp.key),
	})
}

// writeConfig writes every file that the components read.
//
// The CNI plugin is ptp, not bridge: between two ports of a bridge packets do not pass the
// node's IP layer unless the br_netfilter module is loaded, so a pod that calls a Service whose
// pod is on the same node would get answers that kube-proxy has not translated back. Loading a
// module changes the machine; ptp routes every packet through the node and needs none. There
// is no masquerading: a server on the host sees the address of the pod that calls it.
func writeConfig(o Options, p *pki) error {
	dir := o.configDir()
	if err := os.MkdirAll(filepath.Join(dir, "cni"), 0o700); err != nil {
		return err
	}
	for name, to := range map[string]string{
		"containerd.toml": "containerd.toml",
		"cni.conflist":    "cni/10-mysocket-e2e.conflist",
		"kubelet.yaml":    "kubelet.yaml",
		"kube-proxy.yaml": "kube-proxy.yaml",
	} {
		b, err := render(name, o.settings())
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, to), b, 0o600); err != nil {
			return err
		}
	}
	// Pods with dnsPolicy Default get no servers: the machine's own cannot be reached from them.
	if err := os.WriteFile(filepath.Join(dir, "resolv.conf"), nil, 0o600); err != nil {
		return err
	}
	for user := range p.clients {
		b, err := kubeconfig(p, user)
		if err != nil {
			return err
		}
		to := filepath.Join(dir, user+".kubeconfig")
		if user == "admin" {
			to = o.kubeconfig()
		}
		if err := os.WriteFile(to, b, 0o600); err != nil {
			return err
		}
	}
	return nil
}
