package main

import (
	"strings"
	"testing"
	"time"

	"github.com/mysocketio/mysocket-injector/internal/edge"
)

func TestAccessLogDoesNotDependOnTheLevel(t *testing.T) {
	for _, c := range []struct {
		args []string
		want bool
	}{
		{[]string{"--log-level", "error"}, true},
		{[]string{"--access-log=false"}, false},
	} {
		var out strings.Builder
		cfg, log, code, ok := serveConfig(c.args, &out)
		if !ok {
			t.Fatalf("%q: exit %d: %s", c.args, code, &out)
		}
		log.Debug("not this")
		if c.want != (cfg.AccessLog != nil) {
			t.Fatalf("%q: the access log is %v", c.args, cfg.AccessLog)
		}
		if !c.want {
			continue
		}
		log.Info("not this either")
		cfg.AccessLog.Info("request")
		if !strings.Contains(out.String(), "msg=request") || strings.Contains(out.String(), "not this") {
			t.Errorf("%q: the log is %s", c.args, &out)
		}
	}
}

func TestTimeoutFlags(t *testing.T) {
	var out strings.Builder
	cfg, _, _, ok := serveConfig([]string{"--header-timeout", "3s", "--idle-timeout", "4s", "--body-timeout", "0s", "--answer-timeout", "5s"}, &out)
	want := edge.WebTimeouts{Header: 3 * time.Second, Idle: 4 * time.Second, Body: edge.Forever, Upgraded: time.Hour, Answer: 5 * time.Second}
	if !ok || cfg.Web != want {
		t.Errorf("got %+v, %s", cfg.Web, &out)
	}
}
