package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"os"
	"path/filepath"
	"strconv"
	"text/tabwriter"
	"time"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/mysocketio/mysocket-injector/internal/annotations"
	"github.com/mysocketio/mysocket-injector/internal/inject"
)

const (
	noopService = "noop"
	// noopLabel is on a namespace, and says at which path the webhook that is not ours is asked about its pods.
	noopLabel = "bench.example.com/noop"
	manyInOne = 500
)

// variant is a namespace whose pods are created with or without a webhook.
type variant struct {
	name, namespace string
	services        int // enabled ones
	injected        bool
	written         bool              // the sidecar is in the pod that is created
	took            []time.Duration   // of this round
	p50, p99        []float64         // of each round, in milliseconds
	all             []time.Duration   // of all rounds
	labels          map[string]string // of the namespace
}

// admission measures how long the API server takes to create a pod. The variants take turns pod by pod, so that whatever else
// the machine does hits all of them alike.
func admission(ctx context.Context, o options, out io.Writer) error {
	l, err := newLab(ctx, o, out)
	defer l.close()
	if err != nil {
		return err
	}
	if err := l.startNoop(ctx); err != nil {
		return err
	}
	enabled := map[string]string{annotations.NamespaceInjection: annotations.NamespaceInjectionEnabled}
	variants := []*variant{
		{name: "no webhook", namespace: "bench-none"},
		{name: "webhook that does nothing", namespace: "bench-noop", labels: map[string]string{noopLabel: "allow"}},
		{name: "webhook that adds a label", namespace: "bench-label", labels: map[string]string{noopLabel: "label"}},
		{name: "ours, 1 enabled Service", namespace: "bench-one", services: 1, injected: true, labels: enabled},
		{name: fmt.Sprintf("ours, %d enabled Services", manyInOne), namespace: "bench-many", services: manyInOne, injected: true, labels: enabled},
		{name: "no webhook, the sidecar is in the manifest", namespace: "bench-full", injected: true, written: true},
	}
	var namespaces []string
	for _, v := range variants {
		namespaces = append(namespaces, v.namespace)
		if err := l.namespace(ctx, v.namespace, v.labels); err != nil {
			return err
		}
		if err := inParallel(ctx, v.services, func(ctx context.Context, i int) error {
			_, err := l.service(ctx, v.namespace, appName(i))
			return err
		}); err != nil {
			return err
		}
	}
	if _, _, err := l.startWebhook(ctx); err != nil {
		return err
	}
	if !o.leader {
		if err := l.follow(ctx); err != nil {
			return err
		}
	}
	l.say("load average before: %s", loadAverage())
	for round := range o.rounds + 1 { // the first is not counted
		if _, err := l.settled(ctx); err != nil {
			return err
		}
		creates := o.creates
		if round == 0 {
			creates = 100
		}
		if err := l.round(ctx, variants, creates); err != nil {
			return err
		}
		for _, v := range variants {
			if round > 0 {
				v.all = append(v.all, v.took...)
				v.p50 = append(v.p50, milliseconds(quantile(v.took, 0.50)))
				v.p99 = append(v.p99, milliseconds(quantile(v.took, 0.99)))
			}
			v.took = v.took[:0]
		}
		if err := l.deletePods(ctx, namespaces); err != nil {
			return err
		}
	}
	l.say("load average after: %s", loadAverage())
	if err := l.sayHandlerTime(ctx); err != nil {
		return err
	}
	return report(out, variants, o)
}

// round creates pods one after the other, in each variant in turn; who is first changes each time.
func (l *lab) round(ctx context.Context, variants []*variant, creates int) error {
	for i := range creates {
		for turn := range variants {
			v := variants[(i+turn)%len(variants)]
			pod := podOf(v.namespace, "pod-"+strconv.Itoa(i), appName(i%max(1, v.services)))
			if v.written {
				if err := l.fill(pod); err != nil {
					return err
				}
			}
			began := time.Now()
			if err := l.Create(ctx, pod); err != nil {
				return err
			}
			v.took = append(v.took, time.Since(began))
			if v.injected && !v.written {
				l.admitted = pod
			}
			if inject.HasSidecar(pod) != v.injected {
				return fmt.Errorf("%s: the pod has a sidecar: %t, want %t", v.name, !v.injected, v.injected)
			}
		}
	}
	return nil
}

// fill puts the sidecar into a pod, as the webhook does. What that costs the API server, a larger object, is no cost of
// asking a webhook.
func (l *lab) fill(pod *corev1.Pod) error {
	if l.admitted == nil {
		return errors.New("no pod was admitted yet")
	}
	pod.Annotations, pod.Spec = l.admitted.Annotations, *l.admitted.Spec.DeepCopy()
	return nil
}

func report(out io.Writer, variants []*variant, o options) error {
	t := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	row := func(format string, args ...any) { _, _ = fmt.Fprintf(t, format+"\n", args...) }
	row("create a pod, ms: median of %d rounds of %d (least - most)\tp50\tp99\tp99 of all", o.rounds, o.creates)
	for _, v := range variants {
		row("%s\t%s\t%s\t%.2f", v.name, spreadOf(v.p50copy()).text("%.2f"), spreadOf(v.p99copy()).text("%.2f"), milliseconds(quantile(v.all, 0.99)))
	}
	row("\t\t\t")
	row("what the webhook adds, against what one adds that does nothing\tp50\tp99\tp99 of all")
	none, noop, full := variants[0], variants[1], variants[len(variants)-1]
	for _, v := range variants[2 : len(variants)-1] {
		row("%s\t%s\t%s\t%.2f", v.name, overhead(v.p50, none.p50, noop.p50).text("%.2f"), overhead(v.p99, none.p99, noop.p99).text("%.2f"),
			ratio(milliseconds(quantile(v.all, 0.99)), milliseconds(quantile(none.all, 0.99)), milliseconds(quantile(noop.all, 0.99))))
	}
	row("\t\t\t")
	row("the same, over a floor of pods that are as large\tp50\tp99\tp99 of all")
	for _, v := range variants[3 : len(variants)-1] {
		own, theirs := less(v.p50, full.p50), less(noop.p50, none.p50)
		own99, theirs99 := less(v.p99, full.p99), less(noop.p99, none.p99)
		zero := make([]float64, len(own))
		row("%s\t%s\t%s\t%.2f", v.name, overhead(own, zero, theirs).text("%.2f"), overhead(own99, zero, theirs99).text("%.2f"),
			ratio(milliseconds(quantile(v.all, 0.99))-milliseconds(quantile(full.all, 0.99)), 0, milliseconds(quantile(noop.all, 0.99))-milliseconds(quantile(none.all, 0.99))))
	}
	row("\t\t\t")
	row("the whole creation, against that with a webhook that does nothing\tp50\tp99\tp99 of all")
	for _, v := range variants[2:] {
		zero := make([]float64, len(noop.p50))
		row("%s\t%s\t%s\t%.2f", v.name, overhead(v.p50, zero, noop.p50).text("%.2f"), overhead(v.p99, zero, noop.p99).text("%.2f"),
			ratio(milliseconds(quantile(v.all, 0.99)), 0, milliseconds(quantile(noop.all, 0.99))))
	}
	return t.Flush()
}

func (v *variant) p50copy() []float64 { return append([]float64(nil), v.p50...) }
func (v *variant) p99copy() []float64 { return append([]float64(nil), v.p99...) }

// less returns the differences, round by round.
func less(a, b []float64) []float64 {
	out := make([]float64, len(a))
	for i := range a {
		out[i] = a[i] - b[i]
	}
	return out
}

// overhead is the ratio of what ours and the other add to the floor, round by round.
func overhead(ours, floor, other []float64) spread {
	var ratios []float64
	for i := range ours {
		ratios = append(ratios, ratio(ours[i], floor[i], other[i]))
	}
	return spreadOf(ratios)
}

func ratio(ours, floor, other float64) float64 { return (ours - floor) / (other - floor) }

// sayHandlerTime says what the handler itself took, by its own metric: the rest is the API server and the way there.
func (l *lab) sayHandlerTime(ctx context.Context) error {
	sum, err := l.metric(ctx, "mysocket_admission_duration_seconds_sum")
	if err != nil {
		return err
	}
	count, err := l.metric(ctx, "mysocket_admission_duration_seconds_count")
	if err != nil {
		return err
	}
	l.say("our handler itself took %.3f ms on average of %.0f", 1000*sum/count, count)
	return nil
}

// follow starts the control plane anew while another holds the lease, once the leader has written the certificate.
func (l *lab) follow(ctx context.Context) error {
	if _, err := l.settled(ctx); err != nil {
		return err
	}
	l.webhook.stop()
	lease := &coordinationv1.Lease{}
	if err := l.Get(ctx, client.ObjectKey{Namespace: ownNamespace, Name: "mysocket-injector"}, lease); err != nil {
		return err
	}
	now := metav1.NowMicro()
	lease.Spec.HolderIdentity, lease.Spec.LeaseDurationSeconds, lease.Spec.RenewTime = ptr.To("bench"), ptr.To[int32](24*60*60), &now
	if err := l.Update(ctx, lease); err != nil {
		return err
	}
	_, _, err := l.startWebhook(ctx)
	return err
}

// startNoop starts the webhook that does nothing, with a configuration that is ours but for the namespaces and the address.
func (l *lab) startNoop(ctx context.Context) error {
	certificate, key, err := selfSigned(noopService + "." + ownNamespace + ".svc")
	if err != nil {
		return err
	}
	certificateFile, keyFile := filepath.Join(l.dir, "noop.crt"), filepath.Join(l.dir, "noop.key")
	for file, text := range map[string][]byte{certificateFile: certificate, keyFile: key} {
		if err := os.WriteFile(file, text, 0o600); err != nil {
			return err
		}
	}
	port, err := freePort()
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	noop, err := start("the webhook that does nothing", l.log, nil, self, noopCommand, strconv.Itoa(port), certificateFile, keyFile)
	if err != nil {
		return err
	}
	l.later(noop.stop)
	ours := &admissionregistrationv1.MutatingWebhookConfiguration{}
	if err := l.Get(ctx, client.ObjectKey{Name: configuration}, ours); err != nil {
		return err
	}
	var webhooks []admissionregistrationv1.MutatingWebhook
	for _, path := range []string{noopPath, labelPath} {
		w := *ours.Webhooks[0].DeepCopy()
		w.Name = path[1:] + ".noop.example.com"
		w.NamespaceSelector = &metav1.LabelSelector{MatchLabels: map[string]string{noopLabel: path[1:]}}
		w.ClientConfig.Service = &admissionregistrationv1.ServiceReference{Namespace: ownNamespace, Name: noopService, Path: ptr.To(path), Port: ptr.To(int32(port))} //nolint:gosec // a port
		w.ClientConfig.CABundle = certificate
		w.FailurePolicy = ptr.To(admissionregistrationv1.Fail) // a webhook that is not asked is not to be measured
		webhooks = append(webhooks, w)
	}
	for _, o := range []client.Object{
		&corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: ownNamespace, Name: noopService}, Spec: corev1.ServiceSpec{Type: corev1.ServiceTypeExternalName, ExternalName: "127.0.0.1"}},
		&admissionregistrationv1.MutatingWebhookConfiguration{ObjectMeta: metav1.ObjectMeta{Name: noopService}, Webhooks: webhooks},
	} {
		if err := l.Create(ctx, o); err != nil {
			return err
		}
	}
	return nil
}

func selfSigned(name string) (certificate, key []byte, err error) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		return nil, nil, err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return nil, nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), nil
}
