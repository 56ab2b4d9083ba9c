package annotations

import (
	"errors"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

func TestParseSettings(t *testing.T) {
	for _, tc := range []struct {
		name string
		svc  *corev1.Service
		want Spec
	}{
		{"one address", service(with(AllowedEmails, "ann@example.com")), Spec{AllowedEmails: "ann@example.com"}},
		{"addresses with blanks, out of order and twice", service(with(AllowedEmails, "bob+x@example.com , ann@sub.example.com,bob+x@example.com")),
			Spec{AllowedEmails: "ann@sub.example.com,bob+x@example.com"}},
		{"domains", service(with(AllowedEmailDomains, "example.org,example.com")), Spec{AllowedDomains: "example.com,example.org"}},
		{"Secret", service(with(ProtectedSecret, "web.login-1")), Spec{ProtectedSecret: "web.login-1"}},
		{"upstream", service(with(UpstreamType, "https"), with(UpstreamHTTPHostname, "shop.example.com:8443")), Spec{UpstreamType: "https", UpstreamHostname: "shop.example.com:8443"}},
		{"upstream of an https socket", service(with(Type, "https"), with(UpstreamHTTPHostname, "shop")), Spec{UpstreamHostname: "shop"}},
		{"access to a tcp socket is the edge's to decide", service(with(Type, "tcp"), with(AllowedEmails, "a@b")), Spec{AllowedEmails: "a@b"}},
	} {
		got, err := Parse(tc.svc, Names{})
		if err != nil {
			t.Errorf("%s: %v", tc.name, err)
			continue
		}
		if got = (Spec{ProtectedSecret: got.ProtectedSecret, AllowedEmails: got.AllowedEmails, AllowedDomains: got.AllowedDomains, UpstreamType: got.UpstreamType, UpstreamHostname: got.UpstreamHostname}); got != tc.want {
			t.Errorf("%s: got %+v, want %+v", tc.name, got, tc.want)
		}
	}
}

func TestParseSettingsSaysWhatIsWrong(t *testing.T) {
	for _, tc := range []struct {
		name    string
		svc     *corev1.Service
		message string
	}{
		{"no address", service(with(AllowedEmails, "")), `annotation mysocket.io/allowed-emails has the entry ""; allowed: e-mail addresses, separated by commas`},
		{"a comma too many", service(with(AllowedEmails, "a@b,")), `annotation mysocket.io/allowed-emails has the entry ""; allowed: e-mail addresses, separated by commas`},
		{"a semicolon", service(with(AllowedEmails, "a@b;c@d")), `annotation mysocket.io/allowed-emails has the entry "a@b;c@d"; allowed: e-mail addresses, separated by commas`},
		{"a name", service(with(AllowedEmails, "Ann <a@b>")), `annotation mysocket.io/allowed-emails has the entry "Ann <a@b>"; allowed: e-mail addresses, separated by commas`},
		{"a domain as an address", service(with(AllowedEmails, "@example.com")), `annotation mysocket.io/allowed-emails has the entry "@example.com"; allowed: e-mail addresses, separated by commas`},
		{"too many", service(with(AllowedEmails, strings.Repeat("a@b,", 101))), `annotation mysocket.io/allowed-emails has 102 entries; allowed are 100`},
		{"an address as a domain", service(with(AllowedEmailDomains, "a@b")), `annotation mysocket.io/allowed-email-domains has the entry "a@b"; allowed: domains such as example.com, separated by commas`},
		{"all domains", service(with(AllowedEmailDomains, "*")), `annotation mysocket.io/allowed-email-domains has the entry "*"; allowed: domains such as example.com, separated by commas`},
		{"a Secret in capitals", service(with(ProtectedSecret, "Login")), `annotation mysocket.io/protected-secret has the value "Login"; allowed: the name of a Secret in the Service's namespace`},
		{"a Secret elsewhere", service(with(ProtectedSecret, "other/login")), `annotation mysocket.io/protected-secret has the value "other/login"; allowed: the name of a Secret in the Service's namespace`},
		{"a Secret without a name", service(with(ProtectedSecret, "")), `annotation mysocket.io/protected-secret has the value ""; allowed: the name of a Secret in the Service's namespace`},
		{"upstream type", service(with(UpstreamType, "h2c")), `annotation mysocket.io/upstream-type has the value "h2c"; allowed: http, https`},
		{"upstream name", service(with(UpstreamHTTPHostname, "a b")), `annotation mysocket.io/upstream-http-hostname has the value "a b"; allowed: a host name such as shop.example.com, with :port if need be`},
		{"upstream port", service(with(UpstreamHTTPHostname, "a:65536")), `annotation mysocket.io/upstream-http-hostname has the value "a:65536"; allowed: a host name such as shop.example.com, with :port if need be`},
		{"upstream URL", service(with(UpstreamHTTPHostname, "http://a")), `annotation mysocket.io/upstream-http-hostname has the value "http://a"; allowed: a host name such as shop.example.com, with :port if need be`},
		{"upstream of a tcp socket", service(with(Type, "tcp"), with(UpstreamType, "http")), `annotation mysocket.io/upstream-type is for sockets of the types http and https; this one is tcp (annotation mysocket.io/type)`},
	} {
		_, err := Parse(tc.svc, Names{})
		var p *Problem
		if !errors.As(err, &p) || p.Reason != ReasonInvalidAnnotation || p.Message != tc.message {
			t.Errorf("%s: got  %v\nwant %s", tc.name, err, tc.message)
		}
	}
}

func TestGuarded(t *testing.T) {
	emails := with(AllowedEmails, "a@b")
	for _, tc := range []struct {
		name string
		svc  *corev1.Service
		want bool
	}{
		{"nothing asked for", service(), true},
		{"nothing asked for, and something left over", service(with(Applied, "access-ending")), true},
		{"asked for", service(emails), false},
		{"in force", service(emails, with(Applied, "access")), true},
		{"in force beside others", service(emails, with(Applied, "upstream,access")), true},
		{"another in force", service(emails, with(Applied, "upstream")), false},
		{"being taken back", service(emails, with(Applied, "access-ending")), false},
		{"something like it", service(emails, with(Applied, "accessible, access")), false},
		{"two guards, one in force", service(emails, with(ProtectedSecret, "x"), with(Applied, "access")), false},
		{"two guards in force", service(emails, with(ProtectedSecret, "x"), with(Applied, "access,protection")), true},
		{"upstream is no guard", service(with(UpstreamType, "https")), true},
	} {
		spec, err := Parse(tc.svc, Names{})
		if err != nil {
			t.Fatal(err)
		}
		if got := spec.Guarded(tc.svc); got != tc.want {
			t.Errorf("%s: %v", tc.name, got)
		}
	}
}

func TestAppliedSettings(t *testing.T) {
	svc := service(with(Applied, AppliedValue([]Setting{Access, Upstream})))
	applied := AppliedOf(svc)
	if !applied.InForce(Access) || !applied.Ours(Upstream) || applied.String() != "access,upstream" {
		t.Errorf("applied %q", applied)
	}
	ending := applied.Ending(Access)
	if ending.InForce(Access) || !ending.Ours(Access) || !ending.InForce(Upstream) || !slices.Equal(ending, ending.Ending(Access)) || !applied.InForce(Access) {
		t.Errorf("ending %q of %q", ending, applied)
	}
	if none := AppliedOf(service()); none.Ours(Access) || none.String() != "" || none.Ending(Access).Ours(Access) {
		t.Errorf("none: %q", none)
	}
}

func FuzzParseSettings(f *testing.F) {
	f.Add("ann@example.com,bob@example.com", "example.com", "https", "shop.example.com:80")
	f.Add(",", "a..b", "", ":")
	f.Add("\xff@\x00", strings.Repeat("a.", 200), "HTTP", "[::1]:80")
	f.Fuzz(func(t *testing.T, emails, domains, upstream, host string) {
		svc := service(with(AllowedEmails, emails), with(AllowedEmailDomains, domains), with(UpstreamType, upstream), with(UpstreamHTTPHostname, host))
		spec, err := Parse(svc, Names{})
		if err != nil {
			if p, ok := err.(*Problem); !ok || p.Message == "" || len(p.Message) > 600 { //nolint:errorlint // never wrapped: that is the promise
				t.Fatalf("error %#v", err)
			}
			return
		}
		for _, s := range []string{spec.AllowedEmails, spec.AllowedDomains, spec.UpstreamHostname} {
			if s == "" || strings.ContainsAny(s, " \n\x00\"<>/;") {
				t.Fatalf("accepted %+v", spec)
			}
		}
	})
}
