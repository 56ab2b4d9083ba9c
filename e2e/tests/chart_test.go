//go:build cluster

package tests

import (
	"bytes"
	"context"
	"encoding/json"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mysocketio/mysocket-injector/e2e/lab"
)

// selector is a label selector.
type selector struct {
	MatchLabels map[string]string `json:"matchLabels"`
}

// hook is one webhook of a configuration.
type hook struct {
	FailurePolicy      string `json:"failurePolicy"`
	SideEffects        string `json:"sideEffects"`
	ReinvocationPolicy string `json:"reinvocationPolicy"`
	TimeoutSeconds     int    `json:"timeoutSeconds"`
	ClientConfig       struct {
		CABundle string `json:"caBundle"`
	} `json:"clientConfig"`
}

// chart are the objects of a rendered chart that the tests look into.
type chart struct {
	deployment struct {
		Replicas int `json:"replicas"`
		Strategy struct {
			RollingUpdate struct {
				MaxUnavailable int `json:"maxUnavailable"`
			} `json:"rollingUpdate"`
		} `json:"strategy"`
		Template struct {
			Metadata struct {
				Labels map[string]string `json:"labels"`
			} `json:"metadata"`
			Spec struct {
				Containers []struct {
					Args []string `json:"args"`
				} `json:"containers"`
				Grace    int `json:"terminationGracePeriodSeconds"`
				Affinity struct {
					PodAntiAffinity struct {
						Preferred []struct {
							Term struct {
								TopologyKey   string   `json:"topologyKey"`
								LabelSelector selector `json:"labelSelector"`
							} `json:"podAffinityTerm"`
						} `json:"preferredDuringSchedulingIgnoredDuringExecution"`
					} `json:"podAntiAffinity"`
					NodeAffinity json.RawMessage `json:"nodeAffinity"`
				} `json:"affinity"`
			} `json:"spec"`
		} `json:"template"`
	}
	budgets []struct {
		MaxUnavailable int      `json:"maxUnavailable"`
		Selector       selector `json:"selector"`
	}
	hooks []hook
}

// renderChart renders the chart with the lab's values and these, has the API server look at all of it as it looks at what is
// applied, and reads it.
func renderChart(t *testing.T, values ...string) chart {
	t.Helper()
	// Another release than the lab's: what is applied over objects that there are would be merged with them.
	args := []string{"template", "chart-test", "charts/mysocket-injector", "--namespace", lab.Namespace, "--no-hooks", "--set", "account.existingSecret=" + lab.AccountSecret}
	for _, v := range values {
		args = append(args, "--set", v)
	}
	render := env.Helm(t.Context(), args...)
	render.Dir, render.Stderr = env.Root, os.Stderr
	text, err := render.Output()
	if err != nil {
		t.Fatal(err)
	}
	look := env.Kubectl(t.Context(), "apply", "--dry-run=server", "--namespace", lab.Namespace, "-o", "json", "-f", "-")
	look.Stdin, look.Stderr = strings.NewReader(string(text)), os.Stderr
	answer, err := look.Output()
	if err != nil {
		t.Fatal(err)
	}
	var all list[struct {
		Kind     string          `json:"kind"`
		Spec     json.RawMessage `json:"spec"`
		Webhooks []hook          `json:"webhooks"`
	}]
	if err := json.Unmarshal(answer, &all); err != nil {
		t.Fatal(err)
	}
	var c chart
	for _, o := range all.Items {
		switch o.Kind {
		case "Deployment":
			err = json.Unmarshal(o.Spec, &c.deployment)
		case "PodDisruptionBudget":
			c.budgets = append(c.budgets, struct {
				MaxUnavailable int      `json:"maxUnavailable"`
				Selector       selector `json:"selector"`
			}{})
			err = json.Unmarshal(o.Spec, &c.budgets[len(c.budgets)-1])
		case "MutatingWebhookConfiguration", "ValidatingWebhookConfiguration":
			c.hooks = append(c.hooks, o.Webhooks...)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return c
}

// TestChart looks into what the chart promises of availability: no single event takes both replicas, and the webhooks can't stop
// a cluster.
func TestChart(t *testing.T) {
	t.Run("default", func(t *testing.T) {
		c := renderChart(t)
		d := c.deployment
		selected := func(s selector) bool {
			return len(s.MatchLabels) > 0 && maps.Equal(s.MatchLabels, intersection(s.MatchLabels, d.Template.Metadata.Labels))
		}
		if d.Replicas != controlPlaneReplicas || d.Strategy.RollingUpdate.MaxUnavailable != 0 {
			t.Errorf("%d replicas, of which %d may be missing in a rollout", d.Replicas, d.Strategy.RollingUpdate.MaxUnavailable)
		}
		if len(c.budgets) != 1 || c.budgets[0].MaxUnavailable != 1 || !selected(c.budgets[0].Selector) {
			t.Errorf("PodDisruptionBudgets %+v for pods with %v", c.budgets, d.Template.Metadata.Labels)
		}
		anti := d.Template.Spec.Affinity.PodAntiAffinity.Preferred
		if len(anti) != 1 || anti[0].Term.TopologyKey != "kubernetes.io/hostname" || !selected(anti[0].Term.LabelSelector) {
			t.Errorf("anti-affinity %+v for pods with %v", anti, d.Template.Metadata.Labels)
		}
		if d.Template.Spec.Grace < 25 { // 15 seconds that it may go on at most, and 10 to end
			t.Errorf("a grace period of %d seconds", d.Template.Spec.Grace)
		}
		if len(c.hooks) != 2 {
			t.Errorf("%d webhooks", len(c.hooks))
		}
		for _, h := range c.hooks {
			// The fields that an API server fills in are looked at as it fills them in.
			if h.FailurePolicy != "Ignore" || h.SideEffects != "None" || h.TimeoutSeconds > 5 {
				t.Errorf("webhook %+v", h)
			}
		}
		if reinvoked := slices.IndexFunc(c.hooks, func(h hook) bool { return h.ReinvocationPolicy == "IfNeeded" }); reinvoked < 0 {
			t.Error("no webhook is reinvoked")
		}
	})
	t.Run("one replica", func(t *testing.T) {
		// A budget for one pod would keep its node from being drained.
		if c := renderChart(t, "replicas=1"); c.deployment.Replicas != 1 || len(c.budgets) != 0 {
			t.Errorf("%d replicas, PodDisruptionBudgets %+v", c.deployment.Replicas, c.budgets)
		}
	})
	t.Run("preStop sleep", func(t *testing.T) {
		for seconds, want := range map[string]bool{"0": false, "7": true} {
			c := renderChart(t, "sidecar.preStopSleep="+seconds)
			containers := c.deployment.Template.Spec.Containers
			if len(containers) != 1 {
				t.Fatalf("%d containers", len(containers))
			}
			if got := slices.Contains(containers[0].Args, "--sidecar-prestop-sleep="+seconds); got != want {
				t.Errorf("with %s: %q", seconds, containers[0].Args)
			}
		}
	})
	t.Run("affinity of one's own", func(t *testing.T) {
		const own = "affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms[0].matchExpressions[0]"
		c := renderChart(t, own+".key=example.com/pool", own+".operator=Exists")
		if a := c.deployment.Template.Spec.Affinity; len(a.PodAntiAffinity.Preferred) != 0 || !strings.Contains(string(a.NodeAffinity), "example.com/pool") {
			t.Errorf("affinity %+v", a)
		}
	})
}

// intersection are the labels of a that b has with the same value.
func intersection(a, b map[string]string) map[string]string {
	out := map[string]string{}
	for k, v := range a {
		if b[k] == v {
			out[k] = v
		}
	}
	return out
}

// TestManifests wants what is installed without Helm to be what the chart renders, and taken by the API server.
func TestManifests(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	const kept = "../../manifests"
	rendered := t.TempDir()
	if out, err := exec.CommandContext(ctx, "../../hack/manifests.sh", filepath.Join(env.BinDir, "helm"), rendered).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, name := range []string{"install.yaml", "uninstall.yaml"} {
		want, err := os.ReadFile(filepath.Join(rendered, name))
		if err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(filepath.Join(kept, name))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("manifests/%s is not what the chart renders; run make manifests", name)
		}
		out, err := env.Kubectl(ctx, "apply", "--server-side", "--force-conflicts", "--dry-run=server", "-f", filepath.Join(kept, name)).CombinedOutput()
		if err != nil || !strings.Contains(string(out), "serverside-applied (server dry run)") {
			t.Errorf("manifests/%s: %v: %s", name, err, out)
		}
	}
}
