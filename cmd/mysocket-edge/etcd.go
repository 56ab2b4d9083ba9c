package main

import (
	"flag"
	"strings"

	"github.com/mysocketio/mysocket-injector/internal/edge/store"
)

// etcdFlags are the flags that say in which etcd the state is that edges share.
type etcdFlags struct {
	fs        *flag.FlagSet
	endpoints *string
	cfg       store.EtcdConfig
}

// addEtcdFlags adds the flags. Where it is not serve that has them, they are explained shortly.
func addEtcdFlags(fs *flag.FlagSet) *etcdFlags {
	f := &etcdFlags{fs: fs}
	f.endpoints = fs.String("etcd-endpoints", "", "`URLs` of an etcd that edges share their state in, instead of --state; comma separated")
	fs.StringVar(&f.cfg.Prefix, "etcd-prefix", store.DefaultEtcdPrefix, "`path` that all keys in etcd begin with")
	fs.StringVar(&f.cfg.CertFile, "etcd-cert", "", "`file` with a client certificate for etcd (PEM)")
	fs.StringVar(&f.cfg.KeyFile, "etcd-key", "", "`file` with its private key (PEM)")
	fs.StringVar(&f.cfg.CAFile, "etcd-ca", "", "`file` with the authority of etcd's certificates (PEM); the system's if empty")
	fs.StringVar(&f.cfg.User, "etcd-user", "", "`name` to log in to etcd with")
	fs.StringVar(&f.cfg.PasswordFile, "etcd-password-file", "", "`file` whose first line is that user's password")
	return f
}

// take returns which etcd was named, and whether one was. It takes the default of --state back then: both given is an error, but not
// one and a default.
func (f *etcdFlags) take(state *string) (cfg store.EtcdConfig, shared bool) {
	for _, endpoint := range strings.Split(*f.endpoints, ",") {
		if endpoint = strings.TrimSpace(endpoint); endpoint != "" {
			f.cfg.Endpoints = append(f.cfg.Endpoints, endpoint)
		}
	}
	if len(f.cfg.Endpoints) == 0 {
		return f.cfg, false
	}
	given := false
	f.fs.Visit(func(one *flag.Flag) { given = given || one.Name == "state" })
	if !given {
		*state = ""
	}
	return f.cfg, true
}
