// Command coredns is CoreDNS with only the plugins that the test cluster's DNS uses, in a
// module of its own so that its dependencies stay apart from the product's.
package main

import (
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/coremain"

	_ "github.com/coredns/coredns/plugin/cache"
	_ "github.com/coredns/coredns/plugin/errors"
	_ "github.com/coredns/coredns/plugin/health"
	_ "github.com/coredns/coredns/plugin/kubernetes"
	_ "github.com/coredns/coredns/plugin/loadbalance"
	_ "github.com/coredns/coredns/plugin/log"
	_ "github.com/coredns/coredns/plugin/ready"
	_ "github.com/coredns/coredns/plugin/template"
)

func main() {
	// The order here is the order in which plugins see a query, as in CoreDNS's own plugin.cfg.
	dnsserver.Directives = []string{"health", "ready", "log", "errors", "cache", "loadbalance", "template", "kubernetes"}
	coremain.Run()
}
