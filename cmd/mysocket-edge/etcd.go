package main

import (
	"cmp"
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

// addEtcdFlags adds the flags. env has the defaults of those that are in the environment.
func addEtcdFlags(fs *flag.FlagSet, env func(name string) string) *etcdFlags {
	f := &etcdFlags{fs: fs}
	f.endpoints = fs.String("etcd-endpoints", env("ETCD_ENDPOINTS"), "`URLs` of an etcd that edges share their state in, instead of --state; comma separated")
	fs.StringVar(&f.cfg.Prefix, "etcd-prefix", cmp.Or(env("ETCD_PREFIX"), store.DefaultEtcdPrefix), "`path` that all keys in etcd begin with")
	fs.StringVar(&f.cfg.CertFile, "etcd-cert", env("ETCD_CERT"), "`file` with a client certificate for etcd (PEM)")
	fs.StringVar(&f.cfg.KeyFile, "etcd-key", env("ETCD_KEY"), "`file` with its private key (PEM)")
	fs.StringVar(&f.cfg.CAFile, "etcd-ca", env("ETCD_CA"), "`file` with the authority of etcd's certificates (PEM); the system's if empty")
	fs.StringVar(&f.cfg.User, "etcd-user", env("ETCD_USER"), "`name` to log in to etcd with")
	fs.StringVar(&f.cfg.PasswordFile, "etcd-password-file", env("ETCD_PASSWORD_FILE"), "`file` whose first line is that user's password")
	return f
}

// take returns which etcd was named, and whether one was. It takes the default of --state back then: both given, in whatever way, is an error, but
// not one and a default.
func (f *etcdFlags) take(state *string) (cfg store.EtcdConfig, shared bool) {
	for _, endpoint := range strings.Split(*f.endpoints, ",") {
		if endpoint = strings.TrimSpace(endpoint); endpoint != "" {
			f.cfg.Endpoints = append(f.cfg.Endpoints, endpoint)
		}
	}
	if len(f.cfg.Endpoints) == 0 {
		return f.cfg, false
	}
	given := *state != defaultState // by the environment or a file, of which the flags don't know
	f.fs.Visit(func(one *flag.Flag) { given = given || one.Name == "state" })
	if !given {
		*state = ""
	}
	return f.cfg, true
}
