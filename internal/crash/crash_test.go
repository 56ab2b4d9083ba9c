package crash

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mysocketio/mysocket-injector/internal/annotations"
)

// scenario is something that users do, and what there must be when all has settled, whatever happened meanwhile.
type scenario struct {
	name string
	pods int
	// before is done and settles, one after the other, before anything can go wrong.
	before []func(*world)
	act    func(*world)
	want   want
	// steps is the least number of calls that there must be, so that the test can't come to test nothing.
	steps int
	// includes are some of the calls that there must be.
	includes []string
}

func does(acts ...func(*world)) []func(*world) { return acts }

func on(w *world)  { w.annotate(annotations.Enabled, "true") }
func off(w *world) { w.annotate(annotations.Enabled, "") }

func withPolicy(policy string) func(*world) {
	return func(w *world) { w.annotate(annotations.Enabled, "true", annotations.DeletionPolicy, policy) }
}

func deleteService(w *world) { cluster.Delete(w.t, w.service()) }

var scenarios = []scenario{
	{
		name: "enable", pods: 2, act: on,
		want:  want{sockets: 1, tunnels: 2, kind: "http", reason: "Ready"},
		steps: 18, includes: []string{"POST /socket", "POST /socket/{}/tunnel", "POST /socket/{}/tunnel/{}/signkey", "create Tunnel", "patch status of Tunnel", "patch Service", "patch status of Service"},
	},
	{
		name: "disable", pods: 1, before: does(on), act: off,
		steps: 8, includes: []string{"DELETE /socket/{}", "delete Tunnel", "patch Tunnel"},
	},
	{
		name: "delete the Service", pods: 1, before: does(on), act: deleteService,
		steps: 8, includes: []string{"DELETE /socket/{}", "delete Tunnel", "patch Service"},
	},
	{
		name: "delete the namespace", pods: 1, before: does(on), act: func(w *world) {
			for _, t := range w.objects() {
				cluster.Delete(w.t, &t)
			}
			deleteService(w)
			w.killPod("web-1")
			cluster.Delete(w.t, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: w.ns}})
		},
		steps: 6, includes: []string{"DELETE /socket/{}", "DELETE /socket/{}/tunnel/{}"},
	},
	{
		name: "a pod is killed", pods: 2, before: does(on), act: func(w *world) { w.killPod("web-1") },
		want:  want{sockets: 1, tunnels: 1, kept: true, reason: "Ready"},
		steps: 3, includes: []string{"DELETE /socket/{}/tunnel/{}"},
	},
	{
		name: "a pod is replaced by one of its name", pods: 1, before: does(on), act: func(w *world) {
			w.killPod("web-1")
			w.addPod("web-1")
		},
		want:  want{sockets: 1, tunnels: 1, kept: true, reason: "Ready"},
		steps: 8, includes: []string{"DELETE /socket/{}/tunnel/{}", "POST /socket/{}/tunnel"},
	},
	{
		name: "retain", pods: 1, before: does(withPolicy("retain")), act: off,
		want:  want{sockets: 1, kept: true},
		steps: 6,
	},
	{
		name: "retain at the last moment", pods: 1, before: does(on), act: func(w *world) {
			w.annotate(annotations.DeletionPolicy, "retain")
			deleteService(w)
		},
		want:  want{sockets: 1, kept: true},
		steps: 8, includes: []string{"PUT /socket/{}"},
	},
	{
		name: "back after retain", pods: 1, before: does(withPolicy("retain"), off), act: on,
		want:  want{sockets: 1, tunnels: 1, kept: true, reason: "Ready"},
		steps: 12,
	},
	{
		name: "another type, which the edge refuses", pods: 1, before: does(on), act: func(w *world) { w.annotate(annotations.Type, "tcp") },
		want:  want{sockets: 1, tunnels: 1, kept: true, kind: "http", reason: "SocketRefused"},
		steps: 3, includes: []string{"PUT /socket/{}"},
	},
	{
		name: "another type by way of off and on", pods: 1, before: does(on, off), act: func(w *world) { w.annotate(annotations.Type, "tcp", annotations.Enabled, "true") },
		want:  want{sockets: 1, tunnels: 1, kind: "tcp", reason: "Ready"},
		steps: 14,
	},
	{
		name: "a socket name of its own", pods: 1, before: does(on), act: func(w *world) { w.annotate(annotations.SocketName, "shop") },
		want:  want{sockets: 1, tunnels: 1, name: "shop", kind: "http", reason: "Ready"},
		steps: 12, includes: []string{"POST /socket", "DELETE /socket/{}"},
	},
	{
		name: "the socket is deleted at Mysocket by somebody else", pods: 1, before: does(on), act: func(w *world) {
			if err := w.account.DeleteSocket(w.t.Context(), w.id); err != nil {
				w.t.Fatal(err)
			}
		},
		want:  want{sockets: 1, tunnels: 1, kind: "http", reason: "Ready"},
		steps: 12, includes: []string{"POST /socket"},
	},
}

// leastCases is about what there is. With it the test can't come to test less without a word.
const leastCases = 280

// lives is how many cases run at once. They wait most of the time, for the API server.
const lives = 8

// TestEveryCrash has the control plane die, and each call fail, at each step. The steps are found by a life without faults.
func TestEveryCrash(t *testing.T) {
	cluster.Require(t)
	free := make(chan *place, lives) // each with an account of its own, which is empty
	for range lives {
		free <- newPlace(t)
	}
	cases := 0
	var running sync.WaitGroup
	for _, sc := range scenarios {
		var steps []string
		t.Run(sc.name, func(t *testing.T) {
			p := <-free
			defer func() { free <- p }()
			steps = sc.play(t, newWorld(t, p, sc.pods), 0, none)
			if len(steps) < sc.steps {
				t.Errorf("%d steps %q, want at least %d", len(steps), steps, sc.steps)
			}
			for _, call := range sc.includes {
				if !slices.Contains(steps, call) {
					t.Errorf("no step %q among %q", call, steps)
				}
			}
		})
		for i, call := range steps {
			for _, what := range fates(call) {
				cases++
				p := <-free
				running.Go(func() {
					defer func() { free <- p }()
					t.Run(fmt.Sprintf("%s/%d %s %s", sc.name, i+1, strings.ReplaceAll(call, "/", "|"), what), func(t *testing.T) {
						if met := sc.play(t, newWorld(t, p, sc.pods), i+1, what); len(met) != 1 || met[0] != call {
							t.Errorf("the fault met %q, want %q", met, call)
						}
					})
				})
			}
		}
	}
	running.Wait()
	if cases < leastCases {
		t.Errorf("%d cases, want at least %d", cases, leastCases)
	}
	t.Logf("%d cases", cases)
}

// play runs a scenario. Without a fault it returns all calls, else the one that met it.
func (sc scenario) play(t *testing.T, w *world, at int, what fate) []string {
	t.Helper()
	defer w.clear()
	for _, act := range sc.before {
		act(w)
		w.prepare()
		svc := w.service()
		cluster.Get(t, svc)
		if id := svc.Annotations[annotations.SocketID]; id != "" {
			w.id = id
		}
	}
	first := w.start(at, what)
	sc.act(w)
	w.settle(first)
	if first.isDead() {
		w.settle(w.start(0, none))
	}
	w.check(sc.want)
	if at == 0 {
		return first.calls
	}
	if met := first.met(); met != "" {
		return []string{met}
	}
	return nil
}
