package admission

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"testing"

	corev1 "k8s.io/api/core/v1"
	toolscache "k8s.io/client-go/tools/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/webhook/admission"

	"github.com/mysocketio/mysocket-injector/internal/index"
)

// indexed reads Services from an indexer as the informer cache does, without its bookkeeping.
type indexed struct {
	client.Reader // the rest is not called
	services      toolscache.Indexer
}

func (i indexed) List(_ context.Context, list client.ObjectList, opts ...client.ListOption) error {
	var o client.ListOptions
	o.ApplyOptions(opts)
	of := o.FieldSelector.Requirements()[0]
	found, err := i.services.ByIndex(of.Field, o.Namespace+"/"+of.Value)
	if err != nil {
		return err
	}
	into := list.(*corev1.ServiceList)
	for _, obj := range found {
		into.Items = append(into.Items, *obj.(*corev1.Service))
	}
	return nil
}

// BenchmarkPod is one admission, from the request's body to the answer's. It must not depend on how many Services there are.
func BenchmarkPod(b *testing.B) {
	for _, services := range []int{1, 500} {
		b.Run(fmt.Sprintf("services=%d", services), func(b *testing.B) {
			indexer := toolscache.NewIndexer(toolscache.MetaNamespaceKeyFunc, toolscache.Indexers{string(indexOfServices): func(obj any) (keys []string, err error) {
				svc := obj.(*corev1.Service)
				for _, key := range index.Keys(svc) {
					keys = append(keys, svc.Namespace+"/"+key)
				}
				return keys, nil
			}})
			for i := range services {
				svc := service("web", "true", "web")
				if i > 0 {
					svc = service(fmt.Sprint("other-", i), "true", fmt.Sprint("other-", i))
				}
				if err := indexer.Add(svc); err != nil {
					b.Fatal(err)
				}
			}
			m, _ := newMutator(b, indexed{services: indexer}, reader())
			handler := &admission.Webhook{Handler: m}
			body := reviewOf(b, webPod())
			b.ReportAllocs()
			for b.Loop() {
				request := httptest.NewRequestWithContext(b.Context(), http.MethodPost, "/mutate-pod", bytes.NewReader(body))
				request.Header.Set("Content-Type", "application/json")
				recorder := httptest.NewRecorder()
				handler.ServeHTTP(recorder, request)
				if !bytes.Contains(recorder.Body.Bytes(), []byte("JSONPatch")) {
					b.Fatalf("no patch: %s", recorder.Body)
				}
			}
		})
	}
}
