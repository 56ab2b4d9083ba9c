package certs

import (
	"bytes"
	"crypto/x509"
	"slices"
	"strings"
	"testing"
	"time"
)

// start is when the tests of pure functions begin.
var start = time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)

const day = 24 * time.Hour

func testRotation() rotation {
	return rotation{names: []string{"a.ns.svc", "b.ns.svc"}, leafLifetime: DefaultLeafLifetime, caLifetime: DefaultCALifetime, overlap: DefaultOverlap}
}

func mustNext(t *testing.T, r rotation, was *material, now time.Time) (*material, []string) {
	t.Helper()
	m, said, err := r.next(was, now)
	if err != nil {
		t.Fatal(err)
	}
	return m, said
}

// TestRotation goes through the rows of the table in rotation's comment.
func TestRotation(t *testing.T) {
	r := testRotation()
	first, said := mustNext(t, r, nil, start)
	if len(said) != 2 || first.others != nil || !first.signedByCA() {
		t.Fatalf("from nothing: %v, previous %v", said, first.others)
	}
	if got := first.leaf.cert.NotAfter; !got.Equal(start.Add(DefaultLeafLifetime)) {
		t.Errorf("leaf until %s", got)
	}
	caDue := start.Add(DefaultCALifetime / 3 * 2)
	fresh := func(m *material, at time.Time) *material { // the same CA, with a leaf made just before at
		leaf, err := newLeaf(m.ca, r.names, at.Add(-time.Hour), r.leafLifetime)
		if err != nil {
			t.Fatal(err)
		}
		return &material{ca: m.ca, leaf: leaf, others: m.others}
	}
	beforeCA := fresh(first, caDue)
	rotated, _ := mustNext(t, r, beforeCA, caDue)
	signedByNew, _ := mustNext(t, r, rotated, caDue.Add(DefaultOverlap))
	renamed := r
	renamed.names = []string{"c.ns.svc"}

	type change struct{ ca, leaf, previous bool }
	for _, tc := range []struct {
		name string
		r    rotation
		was  *material
		at   time.Time
		want change
	}{
		{"nothing due", r, first, start.Add(59 * day), change{}},
		{"leaf at two thirds", r, first, start.Add(60 * day), change{leaf: true}},
		{"leaf expired", r, first, start.Add(91 * day), change{leaf: true}},
		{"leaf for other names", renamed, first, start.Add(day), change{leaf: true}},
		{"CA just before two thirds", r, beforeCA, caDue.Add(-time.Second), change{}},
		{"CA at two thirds", r, beforeCA, caDue, change{ca: true, previous: true}},
		{"CA and leaf both due", r, first, caDue, change{ca: true, leaf: true, previous: true}},
		{"new CA not long enough published", r, rotated, caDue.Add(DefaultOverlap - time.Second), change{}},
		{"new CA long enough published", r, rotated, caDue.Add(DefaultOverlap), change{leaf: true}},
		{"other names during the overlap", renamed, rotated, caDue.Add(time.Hour), change{leaf: true}},
		{"old leaf expired during the overlap", r, &material{ca: rotated.ca, leaf: first.leaf, others: []*x509.Certificate{first.ca.cert}}, caDue.Add(time.Hour), change{leaf: true}},
		{"old CA still needed by late readers", r, signedByNew, caDue.Add(2*DefaultOverlap - time.Second), change{}},
		{"old CA no longer needed", r, signedByNew, caDue.Add(2 * DefaultOverlap), change{previous: true}},
		{"CA expired", r, first, start.Add(DefaultCALifetime), change{ca: true, leaf: true}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, said := mustNext(t, tc.r, tc.was, tc.at)
			samePrevious := slices.EqualFunc(got.others, tc.was.others, (*x509.Certificate).Equal)
			have := change{!got.ca.cert.Equal(tc.was.ca.cert), !got.leaf.cert.Equal(tc.was.leaf.cert), !samePrevious}
			if have != tc.want {
				t.Errorf("changed %+v, want %+v", have, tc.want)
			}
			if (len(said) > 0) != (tc.want != change{}) {
				t.Errorf("said %q", said)
			}
			if _, again := mustNext(t, tc.r, got, tc.at); len(again) > 0 {
				t.Errorf("a second look finds more to do: %q", again)
			}
			verify(t, got, tc.at, tc.r.names)
		})
	}
}

// verify checks what is served against the bundle, as a client would.
func verify(t *testing.T, m *material, at time.Time, names []string) {
	t.Helper()
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(m.bundle()) {
		t.Fatal("no bundle")
	}
	for _, name := range names {
		if _, err := m.leaf.cert.Verify(x509.VerifyOptions{Roots: roots, CurrentTime: at, DNSName: name}); err != nil {
			t.Errorf("%s at %s: %v", name, at, err)
		}
	}
}

func TestReplace(t *testing.T) {
	r := testRotation()
	first, _ := mustNext(t, r, nil, start)
	replaced, said, err := r.replace(first, start.Add(day))
	if err != nil || len(said) == 0 {
		t.Fatalf("%v %v", said, err)
	}
	if replaced.ca.cert.Equal(first.ca.cert) || len(replaced.others) != 1 || !replaced.others[0].Equal(first.ca.cert) || !replaced.leaf.cert.Equal(first.leaf.cert) {
		t.Error("a replaced CA isn't an ordinary rotation")
	}
	if again, _, err := r.replace(replaced, start.Add(day+time.Hour)); err != nil || again != replaced {
		t.Errorf("in the middle of a rotation it isn't restored (%v)", err)
	}
	late, _, err := r.replace(first, start.Add(91*day))
	if err != nil || late.others != nil {
		t.Errorf("from an expired leaf: others %v, %v", late.others, err)
	}
	verify(t, late, start.Add(91*day), r.names)
}

func TestParse(t *testing.T) {
	r := testRotation()
	m, _ := mustNext(t, r, nil, start)
	other, _ := mustNext(t, r, nil, start)
	rotated, err := r.rotateCA(m, start)
	if err != nil {
		t.Fatal(err)
	}
	encode := func(m *material) map[string][]byte {
		data, err := m.encode()
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	foreignCA := &material{ca: pair{cert: m.ca.cert}, leaf: m.leaf, chain: []*x509.Certificate{m.ca.cert}, others: []*x509.Certificate{other.ca.cert, rotated.ca.cert}, since: start}
	for _, m := range []*material{m, rotated, foreignCA} {
		back, err := parse(encode(m))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(back.bundle(), m.bundle()) || !back.leaf.cert.Equal(m.leaf.cert) || !back.leaf.key.Equal(m.leaf.key) ||
			(m.ca.key == nil) != (back.ca.key == nil) || m.ca.key != nil && !back.ca.key.Equal(m.ca.key) ||
			len(back.chain) != len(m.chain) || !back.since.Equal(m.since) {
			t.Error("what is read is not what was written")
		}
	}
	foreign := encode(other)
	for _, tc := range []struct {
		name   string
		change func(map[string][]byte)
		want   string
	}{
		{"empty", func(d map[string][]byte) { clear(d) }, "no certificate"},
		{"CA missing", func(d map[string][]byte) { delete(d, keyCACert) }, "ca.crt"},
		{"nonsense as CA's key", func(d map[string][]byte) { d[keyCAKey] = []byte("x") }, "ca.key"},
		{"nonsense as time", func(d map[string][]byte) { d[keySince] = []byte("x") }, "ca-since is not a time"},
		{"leaf missing", func(d map[string][]byte) { delete(d, keyLeafCert) }, "tls.crt"},
		{"leaf's key missing", func(d map[string][]byte) { delete(d, keyLeafKey) }, "tls.key"},
		{"no PEM", func(d map[string][]byte) { d[keyLeafCert] = []byte("hello") }, "tls.crt is not one PEM block"},
		{"two CAs", func(d map[string][]byte) { d[keyCACert] = append(d[keyCACert], foreign[keyCACert]...) }, "ca.crt is not one PEM block"},
		{"a chain that is none", func(d map[string][]byte) { d[keyLeafCert] = append(d[keyLeafCert], foreign[keyLeafCert]...) }, "signed neither by"},
		{"PEM of nonsense", func(d map[string][]byte) {
			d[keyCACert] = []byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
		}, "ca.crt: "},
		{"key of nonsense", func(d map[string][]byte) {
			d[keyLeafKey] = []byte("-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----\n")
		}, "tls.key is not a PKCS #8 key"},
		{"another's key", func(d map[string][]byte) { d[keyLeafKey] = foreign[keyLeafKey] }, "tls.key is not the ECDSA key of tls.crt"},
		{"another's CA", func(d map[string][]byte) { d[keyCACert], d[keyCAKey] = foreign[keyCACert], foreign[keyCAKey] }, "signed neither by"},
		{"a leaf as CA", func(d map[string][]byte) { d[keyCACert], d[keyCAKey] = d[keyLeafCert], d[keyLeafKey] }, "not a CA's"},
		{"nonsense as previous CA", func(d map[string][]byte) { d[keyOthers] = []byte("x") }, "ca-previous.crt"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			data := encode(m)
			tc.change(data)
			_, err := parse(data)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want an error with %q", err, tc.want)
			}
		})
	}
}

func FuzzParse(f *testing.F) {
	r := testRotation()
	m, _, err := r.next(nil, start)
	if err != nil {
		f.Fatal(err)
	}
	data, err := m.encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data[keyCACert], data[keyCAKey], data[keyLeafCert], data[keyLeafKey], data[keyOthers])
	f.Add(data[keyCACert], data[keyCAKey], data[keyLeafCert], data[keyLeafKey], data[keyCACert])
	f.Fuzz(func(t *testing.T, ca, caKey, leaf, leafKey, previous []byte) {
		m, err := parse(map[string][]byte{keyCACert: ca, keyCAKey: caKey, keyLeafCert: leaf, keyLeafKey: leafKey, keyOthers: previous})
		if err != nil {
			return
		}
		if _, _, err := r.next(m, start); err != nil {
			t.Error(err)
		}
	})
}

func TestValidate(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(*Config)
		want   string
	}{
		{"defaults", func(*Config) {}, ""},
		{"no name", func(c *Config) { c.SecretName = "" }, "both names are required"},
		{"no DNS name", func(c *Config) { c.DNSNames = nil }, "DNS name"},
		{"wrong DNS name", func(c *Config) { c.DNSNames = []string{"a b"} }, `"a b"`},
		{"negative", func(c *Config) { c.Interval = -1 }, "negative"},
		{"overlap too long", func(c *Config) { c.Overlap = 30 * day }, "third of the leaf lifetime"},
		{"CA too short", func(c *Config) { c.CALifetime = 200 * day }, "CA lifetime"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			cfg := Config{Namespace: "ns", SecretName: "tls", DNSNames: []string{"a.ns.svc"}}
			tc.change(&cfg)
			err := cfg.Validate()
			if (err == nil) != (tc.want == "") || err != nil && !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want %q", err, tc.want)
			}
		})
	}
}
