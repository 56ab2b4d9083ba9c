package mysocket

import (
	"strings"
	"testing"
)

func TestNames(t *testing.T) {
	for _, tc := range []struct{ name, want string }{
		{"k8s shop.web", "k8s---shop--web"},
		{"k8s prod shop.web", "k8s---prod---shop--web"},
		{"k8s a-b.c", "k8s---a-b--c"},
		{"k8s a.b-c", "k8s---a--b-c"},
		{"my-socket", "my-socket"},
		{"x", "x"},
		{"k8s Prod shop.web", "k8s-prod-shop-web----equ3oh6c6qbyifu2"},
		{"k8s prod shop.web ", "k8s-prod-shop-web----4mf3pvhldw3u6xjv"},
		{"k8s a--b.c", "k8s-a-b-c----p5almk7boa7k53ue"},
		{"ab.cd", "ab-cd----medummh7g5go5zia"}, // ab--cd is a name that DNS keeps for itself
		{"k8s " + strings.Repeat("n", 40) + "." + strings.Repeat("s", 40), "k8s-" + strings.Repeat("n", 39) + "----ja4fjzuyb7ybhk5o"},
		{"ü", "name----mb2hjsshlklsjvzw"},
		{"", "name----4oymiquy7qobjgx3"},
		{"ab", "ab"},
		{"AB", "name-ab----hale7pixma6xh5uw"},
	} {
		got := encodeName(tc.name)
		if got != tc.want {
			t.Errorf("%q is mapped to %q, want %q", tc.name, got, tc.want)
		}
		if back := decodeName(got, tc.name); back != tc.name {
			t.Errorf("%q comes back as %q", tc.name, back)
		}
	}
	for _, tc := range []struct{ name, display, want string }{
		{"k8s---shop--web", "", "k8s shop.web"},                       // nobody kept display_name
		{"k8s---shop--web", "k8s other.web", "k8s shop.web"},          // somebody changed it
		{"k8s-prod-shop-web----equ3oh6c6qbyifu2", "k8s shop.web", ""}, // nor is a hash to be had that way
		{"k8s-prod-shop-web----equ3oh6c6qbyifu2", "", ""},             // it can't be known
		{"a-----b", "", ""},                                            // somebody else's
		{"k8s shop.web", "", "k8s shop.web"},                           // made in the classic dialect
		{"k8s---shop--web----aaaaaaaaaaaaaaaa", "k8s---shop--web", ""}, // made to look like ours
		{"k8s-a-b-c----p5almk7boa7k53ue", "k8s a--b.c", "k8s a--b.c"},  // by its display_name
		{"k8s-a-b-c----p5almk7boa7k53ue", "K8s a--b.c", ""},            // not by another
	} {
		if got := decodeName(tc.name, tc.display); got != tc.want {
			t.Errorf("%q shown as %q is %q to us, want %q", tc.name, tc.display, got, tc.want)
		}
	}
}

// FuzzNames looks for two names that meet, for one that the dialect would not take, and for a socket that passes for another.
func FuzzNames(f *testing.F) {
	for _, s := range []string{"k8s shop.web", "k8s a-b.c", "A", "", "a--b", "a.b", "a b", "xn--a", strings.Repeat("a", 64), "name----4oymiquy7qobjgx3"} {
		f.Add(s, "k8s shop.web")
		f.Add(s, s)
	}
	f.Fuzz(func(t *testing.T, a, b string) {
		x, y := encodeName(a), encodeName(b)
		if !border0Name.MatchString(x) || len(x) > maxLabel || strings.HasPrefix(x, "-") || strings.HasSuffix(x, "-") || reservedLabel(x) {
			t.Fatalf("%q is mapped to %q", a, x)
		}
		if a != b && x == y {
			t.Fatalf("%q and %q are both mapped to %q", a, b, x)
		}
		if got := decodeName(x, a); got != a {
			t.Fatalf("%q comes back as %q", a, got)
		}
		// A stranger's socket, with any name and any display_name, is ours only if its name is what ours is mapped to.
		if got := decodeName(a, b); got != "" && border0Name.MatchString(a) && encodeName(got) != a {
			t.Fatalf("the socket %q, shown as %q, passes for %q", a, b, got)
		}
	})
}
