package certs

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"log/slog"
	"maps"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	certmanagerv1 "github.com/cert-manager/cert-manager/pkg/apis/certmanager/v1"
	cmmeta "github.com/cert-manager/cert-manager/pkg/apis/meta/v1"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
)

const (
	testCertificate  = "mysocket-serving"
	testIssuedSecret = "mysocket-serving-tls"
)

// issuer plays an issuer of cert-manager's.
type issuer struct {
	t     testing.TB
	names []string
	ca    pair
	more  []*x509.Certificate // other CAs that it names
}

func newIssuer(t testing.TB, now time.Time, names ...string) *issuer {
	t.Helper()
	i := &issuer{t: t, names: names}
	i.newCA(now)
	return i
}

func (i *issuer) newCA(now time.Time) {
	i.t.Helper()
	var err error
	if i.ca, err = newCA(now, DefaultCALifetime); err != nil {
		i.t.Fatal(err)
	}
}

// secret is the data of the Secret that cert-manager writes.
func (i *issuer) secret(now time.Time, lifetime time.Duration) map[string][]byte {
	i.t.Helper()
	leaf, err := newLeaf(i.ca, i.names, now, lifetime)
	if err != nil {
		i.t.Fatal(err)
	}
	data, err := (&material{ca: i.ca, leaf: leaf}).encode()
	if err != nil {
		i.t.Fatal(err)
	}
	cas := append([]*x509.Certificate{i.ca.cert}, i.more...)
	return map[string][]byte{keyLeafCert: data[keyLeafCert], keyLeafKey: data[keyLeafKey], keyCACert: encodeCerts(cas)}
}

func (i *issuer) issue(now time.Time, lifetime time.Duration) *issued {
	i.t.Helper()
	is, err := parseIssued(i.secret(now, lifetime), i.names, now)
	if err != nil {
		i.t.Fatal(err)
	}
	return is
}

func TestAdopt(t *testing.T) {
	r := testRotation()
	own, _ := mustNext(t, r, nil, start)
	ownRotated, _ := mustNext(t, r, own, start.Add(DefaultCALifetime/3*2-time.Hour)) // its leaf is due, its CA is not
	ownInRotation, err := r.rotateCA(ownRotated, start.Add(DefaultCALifetime/3*2))
	if err != nil {
		t.Fatal(err)
	}
	at := start.Add(DefaultCALifetime / 3 * 2)
	a, b := newIssuer(t, at, r.names...), newIssuer(t, at.Add(time.Minute), r.names...)
	first, second := a.issue(at, r.leafLifetime), a.issue(at.Add(60*day), r.leafLifetime)
	other := b.issue(at.Add(60*day), r.leafLifetime)
	both := *other
	both.cas = []*x509.Certificate{a.ca.cert, b.ca.cert}
	inUse, _ := r.adopt(nil, first, at)
	published, _ := r.adopt(inUse, other, at.Add(60*day))
	switched, _ := r.adopt(published, other, at.Add(61*day))

	type change struct{ ca, leaf, others bool }
	for _, tc := range []struct {
		name string
		was  *material
		is   *issued
		at   time.Time
		want change
	}{
		{"nothing new", inUse, first, at.Add(day), change{}},
		{"renewed by the same CA", inUse, second, at.Add(60 * day), change{leaf: true}},
		{"by another CA", inUse, other, at.Add(60 * day), change{others: true}},
		{"by another CA, that is not long enough published", published, other, at.Add(61*day - time.Second), change{}},
		{"by another CA, long enough published", published, other, at.Add(61 * day), change{ca: true, leaf: true, others: true}},
		{"by another CA when the leaf in use has expired", inUse, other, at.Add(91 * day), change{ca: true, leaf: true}},
		{"by another CA when the leaf in use has little left", inUse, other, at.Add(90*day - time.Hour), change{others: true}},
		{"old CA still needed by late readers", switched, other, at.Add(62*day - time.Second), change{}},
		{"old CA no longer needed", switched, other, at.Add(62 * day), change{others: true}},
		{"old CA that the issuer names for ever", switched, &both, at.Add(62 * day), change{}},
		{"back to the old CA", switched, second, at.Add(61 * day).Add(time.Minute), change{}},
		{"from a CA of our own", own, first, start.Add(time.Hour), change{others: true}},
		{"in the middle of our own rotation", ownInRotation, first, at, change{others: true}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, said := r.adopt(tc.was, tc.is, tc.at)
			have := change{
				!got.ca.cert.Equal(tc.was.ca.cert), !got.leaf.cert.Equal(tc.was.leaf.cert),
				!bytes.Equal(encodeCerts(got.others), encodeCerts(tc.was.others)),
			}
			if have != tc.want {
				t.Errorf("changed %+v, want %+v", have, tc.want)
			}
			if (len(said) > 0) != (tc.want != change{}) {
				t.Errorf("said %q", said)
			}
			if _, again := r.adopt(got, tc.is, tc.at); len(again) > 0 {
				t.Errorf("a second look finds more to do: %q", again)
			}
			if got.leaf.cert.Equal(tc.is.leaf.cert) && got.ca.key != nil {
				t.Error("the key of a CA that no longer signs is kept")
			}
			verify(t, got, tc.at, r.names)
		})
	}

	// The leaf in use is not kept until it expires, whatever the overlap.
	late, _ := r.adopt(inUse, other, at.Add(90*day-time.Hour))
	if got, _ := r.adopt(late, other, at.Add(90*day-30*time.Minute)); !got.leaf.cert.Equal(other.leaf.cert) {
		t.Error("the new certificate waits though the old one is about to expire")
	}

	// From cert-manager's back to our own: a rotation of the CA as any other.
	back, _ := mustNext(t, r, inUse, at.Add(day))
	if back.ca.key == nil || back.ca.cert.Equal(inUse.ca.cert) || !back.leaf.cert.Equal(inUse.leaf.cert) || !contains(back.others, inUse.ca.cert) {
		t.Errorf("back to self-managed: %+v", back)
	}
	verify(t, back, at.Add(day), r.names)
	signed, _ := mustNext(t, r, back, at.Add(2*day))
	if !signed.signedByCA() || !contains(signed.others, inUse.ca.cert) {
		t.Error("our CA does not sign after the overlap, or the other is forgotten too early")
	}
	if end, _ := mustNext(t, r, signed, at.Add(3*day)); end.others != nil {
		t.Error("cert-manager's CA is trusted for ever")
	}
	expired, _ := mustNext(t, r, inUse, at.Add(91*day))
	verify(t, expired, at.Add(91*day), r.names)
}

// TestAdoptBoundsTheBundle shows what an issuer does that has a new CA each time.
func TestAdoptBoundsTheBundle(t *testing.T) {
	r := testRotation()
	i := newIssuer(t, start, r.names...)
	m, _ := r.adopt(nil, i.issue(start, r.leafLifetime), start)
	now := start
	for range 3 * maxOthers {
		now = now.Add(time.Minute)
		i.newCA(now)
		m, _ = r.adopt(m, i.issue(now, r.leafLifetime), now)
		verify(t, m, now, r.names)
	}
	if len(m.others) > maxOthers {
		t.Errorf("%d CAs are published", len(m.others))
	}
	m, _ = r.adopt(m, i.issue(now, r.leafLifetime), now.Add(r.overlap))
	if !m.ca.cert.Equal(i.ca.cert) {
		t.Error("the newest CA's certificate is not in use after the overlap")
	}
}

func TestParseIssued(t *testing.T) {
	names := []string{"a.ns.svc", "b.ns.svc"}
	i := newIssuer(t, start, names...)
	now := start.Add(time.Hour)

	// Of an intermediate CA, as most that are not self-signed.
	middle, err := sign(&x509.Certificate{NotBefore: start, NotAfter: start.Add(1000 * day), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}, &i.ca)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := newLeaf(middle, names, start, day)
	if err != nil {
		t.Fatal(err)
	}
	chained, err := (&material{ca: i.ca, leaf: leaf, chain: []*x509.Certificate{middle.cert}}).encode()
	if err != nil {
		t.Fatal(err)
	}
	delete(chained, keyCAKey)
	is, err := parseIssued(chained, names, now)
	if err != nil || len(is.chain) != 1 || !is.signer().Equal(i.ca.cert) {
		t.Fatalf("a chain: %v", err)
	}
	m, _ := testRotation().adopt(nil, is, now)
	if got := m.tls().Certificate; len(got) != 2 || !bytes.Equal(got[1], middle.cert.Raw) {
		t.Error("the intermediate CA is not served")
	}

	// An issuer of the type SelfSigned: the certificate is its own CA.
	alone, err := sign(&x509.Certificate{DNSNames: names, NotBefore: start, NotAfter: start.Add(day)}, nil)
	if err != nil {
		t.Fatal(err)
	}
	data, err := (&material{ca: pair{cert: alone.cert}, leaf: alone}).encode()
	if err != nil {
		t.Fatal(err)
	}
	if is, err = parseIssued(data, names, now); err != nil || !is.signer().Equal(alone.cert) {
		t.Errorf("self-signed: %v", err)
	}
	m, _ = testRotation().adopt(nil, is, now)
	verify(t, m, now, names)
	if data, err = m.encode(); err != nil {
		t.Fatal(err)
	}
	if _, err := parse(data); err != nil {
		t.Errorf("self-signed, read back: %v", err)
	}

	foreign := newIssuer(t, start, names...).secret(start, day)
	for _, tc := range []struct {
		name   string
		change func(map[string][]byte)
		names  []string
		at     time.Time
		want   string
	}{
		{"right", func(map[string][]byte) {}, names, now, ""},
		{"empty", func(d map[string][]byte) { clear(d) }, names, now, "it has no tls.crt"},
		{"without a CA", func(d map[string][]byte) { delete(d, keyCACert) }, names, now, "it has no ca.crt: an issuer is needed that says which CA to trust"},
		{"another's CA", func(d map[string][]byte) { d[keyCACert] = foreign[keyCACert] }, names, now, "its tls.crt is not signed by a CA of its ca.crt"},
		{"another's key", func(d map[string][]byte) { d[keyLeafKey] = foreign[keyLeafKey] }, names, now, "tls.key is not the ECDSA key of tls.crt"},
		{"key in another form", func(d map[string][]byte) {
			block, _ := pem.Decode(d[keyLeafKey])
			block.Type = "EC PRIVATE KEY"
			d[keyLeafKey] = pem.EncodeToMemory(block)
		}, names, now, `tls.key has no PEM block "PRIVATE KEY"`},
		{"nonsense", func(d map[string][]byte) { d[keyLeafCert] = []byte("x") }, names, now, "tls.crt is not one PEM block"},
		{"bundle of nonsense", func(d map[string][]byte) { d[keyCACert] = bytes.Repeat(d[keyCACert], maxCerts+1) }, names, now, "ca.crt is not one PEM block"},
		{"other names", func(map[string][]byte) {}, []string{"a.ns.svc", "c.ns.svc"}, now, "its certificate lacks a name: "},
		{"expired", func(map[string][]byte) {}, names, start.Add(day), "its certificate expired at 2030-01-02T00:00:00Z"},
		{"not valid yet", func(map[string][]byte) {}, names, start.Add(-time.Hour), "its certificate is valid from 2029-12-31T23:55:00Z on"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			data := i.secret(start, day)
			tc.change(data)
			_, err := parseIssued(data, tc.names, tc.at)
			if (err == nil) != (tc.want == "") || err != nil && !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want %q", err, tc.want)
			}
		})
	}
}

func FuzzParseIssued(f *testing.F) {
	r := testRotation()
	data := newIssuer(f, start, r.names...).secret(start, day)
	f.Add(data[keyCACert], data[keyLeafCert], data[keyLeafKey])
	f.Add(append(data[keyCACert], data[keyLeafCert]...), append(data[keyLeafCert], data[keyCACert]...), data[keyLeafKey])
	f.Fuzz(func(t *testing.T, ca, leaf, key []byte) {
		is, err := parseIssued(map[string][]byte{keyCACert: ca, keyLeafCert: leaf, keyLeafKey: key}, r.names, start)
		if err != nil {
			return
		}
		m, _ := r.adopt(nil, is, start)
		data, err := m.encode()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := parse(data); err != nil {
			t.Errorf("what was taken can't be read back: %v", err)
		}
	})
}

func certManagerScheme(t testing.TB) *runtime.Scheme {
	t.Helper()
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{clientgoscheme.AddToScheme, certmanagerv1.AddToScheme} {
		if err := add(scheme); err != nil {
			t.Fatal(err)
		}
	}
	return scheme
}

// certManager plays cert-manager at an API server.
type certManager struct {
	*issuer
	c  client.Client
	ns string
}

// put writes the Secret.
func (cm *certManager) put(data map[string][]byte) {
	cm.t.Helper()
	ctx := context.Background()
	secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: cm.ns, Name: testIssuedSecret}}
	if err := cm.c.Get(ctx, client.ObjectKeyFromObject(secret), secret); client.IgnoreNotFound(err) != nil {
		cm.t.Fatal(err)
	} else if err != nil {
		secret.Data = data
		err = cm.c.Create(ctx, secret)
		if err != nil {
			cm.t.Fatal(err)
		}
		return
	}
	secret.Data = maps.Clone(data)
	if err := cm.c.Update(ctx, secret); err != nil {
		cm.t.Fatal(err)
	}
}

// say sets the Certificate's conditions.
func (cm *certManager) say(conditions ...certmanagerv1.CertificateCondition) {
	cm.t.Helper()
	ctx := context.Background()
	c := &certmanagerv1.Certificate{}
	if err := cm.c.Get(ctx, client.ObjectKey{Namespace: cm.ns, Name: testCertificate}, c); err != nil {
		cm.t.Fatal(err)
	}
	for i := range conditions {
		conditions[i].ObservedGeneration = c.Generation
	}
	c.Status.Conditions = conditions
	if err := cm.c.Status().Update(ctx, c); err != nil {
		cm.t.Fatal(err)
	}
}

func ready(status cmmeta.ConditionStatus, reason, message string) certmanagerv1.CertificateCondition {
	return certmanagerv1.CertificateCondition{Type: certmanagerv1.CertificateConditionReady, Status: status, Reason: reason, Message: message}
}

func issuing(status cmmeta.ConditionStatus, reason, message string) certmanagerv1.CertificateCondition {
	return certmanagerv1.CertificateCondition{Type: certmanagerv1.CertificateConditionIssuing, Status: status, Reason: reason, Message: message}
}

func testCertificateObject() *certmanagerv1.Certificate {
	return &certmanagerv1.Certificate{
		ObjectMeta: metav1.ObjectMeta{Namespace: testNamespace, Name: testCertificate},
		Spec: certmanagerv1.CertificateSpec{
			SecretName: testIssuedSecret, DNSNames: []string{serverName}, IssuerRef: cmmeta.IssuerReference{Name: "ca"},
		},
	}
}

// TestCertManagerSaysWhy goes through all that can keep a certificate of cert-manager's from being there: readiness, log and metric
// say it in its words.
func TestCertManagerSaysWhy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		c := fake.NewClientBuilder().WithScheme(certManagerScheme(t)).WithStatusSubresource(&certmanagerv1.Certificate{}).WithObjects(mutating()).Build()
		registry := prometheus.NewRegistry()
		cfg := testConfig()
		cfg.Certificate = testCertificate
		leading := cfg
		cfg.Registerer = registry
		cfg.Log = slog.New(slog.NewTextHandler(&log, nil))
		m, leader := newManager(t, cfg, c), newManager(t, leading, c)
		cm := &certManager{newIssuer(t, time.Now(), m.rotation.names...), c, testNamespace}
		stop := run(t, m, leader.Leader())
		defer stop()
		says := func(metric string, want string) {
			t.Helper()
			pass(10 * time.Second)
			if err := m.Ready(); (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
				t.Errorf("Ready says %v, want %q", err, want)
			}
			const name = "mysocket_certmanager_certificate_ready"
			if err := testutil.GatherAndCompare(registry, strings.NewReader("# HELP "+name+" 1 if cert-manager's Certificate is ready and its Secret can be served, 0 if not.\n# TYPE "+name+" gauge\n"+name+" "+metric+"\n"), name); err != nil {
				t.Error(err)
			}
		}
		says("0", "no certificate yet: the Certificate mysocket-system/mysocket-serving of cert-manager does not exist")
		if err := c.Create(t.Context(), testCertificateObject()); err != nil {
			t.Fatal(err)
		}
		says("0", "is not ready: cert-manager has not looked at it yet: does its controller run?")
		cm.say(ready(cmmeta.ConditionFalse, "DoesNotExist", "Issuing certificate as Secret does not exist"), issuing(cmmeta.ConditionFalse, "Failed", "the issuer said no"))
		says("0", "is not ready: DoesNotExist: Issuing certificate as Secret does not exist; Failed: the issuer said no")
		cm.say(ready(cmmeta.ConditionTrue, "Ready", ""))
		says("0", "the Secret mysocket-system/mysocket-serving-tls of the Certificate mysocket-system/mysocket-serving does not exist")
		data := cm.secret(time.Now(), time.Hour)
		bad := maps.Clone(data)
		delete(bad, keyCACert)
		cm.put(bad)
		says("0", "it has no ca.crt: an issuer is needed that says which CA to trust (ACME ones do not)")
		cm.put(data)
		says("1", "")
		if err := handshake(m, encodeCert(cm.ca.cert)); err != nil {
			t.Error(err)
		}

		// What is served goes on while a renewal fails, until it expires.
		cm.say(ready(cmmeta.ConditionTrue, "Ready", ""), issuing(cmmeta.ConditionFalse, "Failed", "the issuer said no"))
		says("0", "")
		cm.say(ready(cmmeta.ConditionFalse, "Expired", "it expired"), issuing(cmmeta.ConditionTrue, "Expired", "renewing"))
		says("0", "")
		if err := handshake(m, encodeCert(cm.ca.cert)); err != nil {
			t.Error(err)
		}
		pass(2 * time.Hour)
		says("0", "the certificate expired at ")
		says("0", "is not ready: Expired: it expired; Expired: renewing")
		cm.put(cm.secret(time.Now(), time.Hour))
		cm.say(ready(cmmeta.ConditionTrue, "Ready", ""))
		says("1", "")

		stop()
		for _, line := range []string{
			"the certificate of cert-manager: not in order", "does not exist", "DoesNotExist: Issuing certificate", "was not renewed: Failed: the issuer said no", "in order again",
		} {
			if !strings.Contains(log.String(), line) {
				t.Errorf("the log doesn't say %q:\n%s", line, log.String())
			}
		}
		if strings.Contains(log.String(), "PRIVATE KEY-----") {
			t.Errorf("the log shows what the Secret holds:\n%s", log.String())
		}
	})
}

// TestCertManagerClientsNeverFail renews, replaces the CA, deletes and breaks our Secret, changes the leader and the mode,
// and connects all the time as in TestClientsNeverFail.
func TestCertManagerClientsNeverFail(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := fake.NewClientBuilder().WithScheme(certManagerScheme(t)).WithStatusSubresource(&certmanagerv1.Certificate{}).WithObjects(mutating(), testCertificateObject()).Build()
		names := []string{"another.name", serverName, "mysocket-gateway.mysocket-system.svc"} // not as we would have them
		cm := &certManager{newIssuer(t, time.Now(), names...), c, testNamespace}
		cm.put(cm.secret(time.Now(), time.Hour))
		cm.say(ready(cmmeta.ConditionTrue, "Ready", ""))

		// Two replicas as a Deployment has them; roll replaces them one after the other, as a rollout does.
		var replicas [2]*Manager
		stops := [2]func(){func() {}, func() {}}
		stopLeader := func() {}
		roll := func(n int, certificate string) {
			cfg := testConfig()
			cfg.Interval = 15 * time.Second
			cfg.Certificate = certificate
			stops[n]()
			stopLeader()
			replicas[n] = newManager(t, cfg, c)
			stops[n] = run(t, replicas[n])
			stopLeader = run(t, replicas[n].Leader())
			pass(time.Second)
		}
		defer func() { stopLeader(); stops[0](); stops[1]() }()
		roll(0, testCertificate)
		roll(1, testCertificate)
		pass(time.Minute)

		const step = 30 * time.Second
		const late = 6 // steps that the sidecar's bundle is behind: 3 of 4 minutes
		published := [][]byte{}
		cas, own := map[string]bool{}, 0
		for i := range int(8 * time.Hour / step) {
			switch i % 120 { // an hour
			case 40, 80:
				cm.put(cm.secret(time.Now(), time.Hour))
			case 20:
				if i/120%2 == 0 {
					cm.newCA(time.Now())
				}
				cm.put(cm.secret(time.Now(), time.Hour))
			case 60:
				if err := c.Delete(t.Context(), readSecret(t, c)); err != nil {
					t.Fatal(err)
				}
			case 70:
				secret := readSecret(t, c)
				secret.Data[keyLeafCert] = []byte("oops")
				if err := c.Update(t.Context(), secret); err != nil {
					t.Fatal(err)
				}
			case 100: // every second hour in the one mode
				certificate := testCertificate
				if i/120%2 == 1 {
					certificate = ""
				}
				roll(0, certificate)
				roll(1, certificate)
			}
			published = append(published, replicas[i%2].CABundle())
			behind := published[max(0, i-late)]
			for n, m := range replicas {
				if err := m.Ready(); err != nil {
					t.Fatalf("step %d: replica %d is not ready: %v", i, n, err)
				}
				if err := handshake(m, behind); err != nil {
					t.Fatalf("step %d: a sidecar at replica %d: %v", i, n, err)
				}
				if err := handshake(m, readMutating(t, c).Webhooks[1].ClientConfig.CABundle); err != nil {
					t.Fatalf("step %d: the API server at replica %d: %v", i, n, err)
				}
			}
			served, err := replicas[0].GetCertificate(nil)
			if err != nil {
				t.Fatal(err)
			}
			cas[string(served.Leaf.AuthorityKeyId)] = true
			read := replicas[0].reads()
			if read.ca.key != nil {
				own++
			}
			if n := len(read.others); n > 3 {
				t.Fatalf("step %d: %d CAs are published beside the one in use", i, n)
			}
			pass(step)
		}
		if len(cas) < 6 || own < 100 {
			t.Errorf("only %d CAs were in use, our own for %d steps", len(cas), own)
		}
	})
}
