package annotations

import (
	"strings"
	"testing"
)

func TestCheckSocketName(t *testing.T) {
	for name, want := range map[string]string{
		"shop":                  "",
		"s":                     "",
		"4-shop-2":              "",
		"k8sshop":               "",
		strings.Repeat("a", 63): "",
		strings.Repeat("a", 64): "up to 63 small letters",
		"":                      `socket name "": allowed are up to 63`,
		"Shop":                  `socket name "Shop": allowed are up to 63`,
		"k8s shop.web":          "allowed are up to 63",
		"shop.web":              "allowed are up to 63",
		"-shop":                 "allowed are up to 63",
		"shop-":                 "allowed are up to 63",
		"shop\n":                "allowed are up to 63",
		"shop--web":             "two dashes side by side",
		"k8s":                   "made for Services",
		"k8s-shop":              `socket name "k8s-shop": k8s and what begins with k8s- are names that are made for Services`,
	} {
		err := CheckSocketName(name)
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%q: %v, want %q", name, err, want)
		}
	}
}

// TestNamesOf: a name is a part of its traffic, so it is had only by whom the operator named.
func TestNamesOf(t *testing.T) {
	names := Names{Cluster: "north", Allowed: map[string][]string{"web": {"shop", "blog"}, "pay": {"shop"}, "other": {"bank"}}}
	for _, tc := range []struct {
		names             Names
		namespace         string
		asked             string
		want, wantProblem string
	}{
		{names, "shop", "web", "web", ""},
		{names, "blog", "web", "web", ""},
		{names, "blog", "pay", "", `annotation mysocket.io/socket-name has the value "pay"; allowed: in namespace blog web`},
		{names, "shop", "other", "", `annotation mysocket.io/socket-name has the value "other"; allowed: in namespace shop pay, web`},
		{names, "bank", "web", "", `annotation mysocket.io/socket-name has the value "web"; allowed: in namespace bank other`},
		{names, "shop", "", "", `has the value ""; allowed: in namespace shop pay, web`},
		{names, "attic", "web", "", `has the value "web"; allowed: in namespace attic none; whoever runs mysocket-injector lists names and their namespaces in the chart's value socketNames`},
		{Names{}, "shop", "web", "", "allowed: in namespace shop none"},
		{Names{}, "shop", "k8s bank.web", "", `has the value "k8s bank.web"`},
	} {
		svc := service(with(SocketName, tc.asked))
		svc.Namespace = tc.namespace
		got, err := tc.names.Of(svc)
		spec, parseErr := Parse(svc, tc.names)
		if tc.wantProblem == "" {
			if err != nil || parseErr != nil || got != tc.want || spec.SocketName != tc.want {
				t.Errorf("%s in %s: %q, %v; %+v, %v", tc.asked, tc.namespace, got, err, spec, parseErr)
			}
			continue
		}
		p, ok := parseErr.(*Problem) //nolint:errorlint // never wrapped: that is the promise
		if err == nil || got != "" || !ok || p.Reason != ReasonInvalidAnnotation || !strings.Contains(p.Message, tc.wantProblem) {
			t.Errorf("%s in %s: %q, %v, %v, want %s", tc.asked, tc.namespace, got, err, parseErr, tc.wantProblem)
		}
	}
	if got, err := names.Of(service()); err != nil || got != "k8s north shop.web" {
		t.Errorf("without a wish: %q, %v", got, err)
	}
}
