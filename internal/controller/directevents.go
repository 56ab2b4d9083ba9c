package controller

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/apiutil"
)

// DirectEvents records Events at once. The recorder of a manager does it some time later, and a program that ends would
// lose them.
type DirectEvents struct {
	Client client.Client
	Log    *slog.Logger
	// Instance is the name of the pod that runs the program.
	Instance string
}

// Eventf implements events.EventRecorder.
func (e *DirectEvents) Eventf(regarding, _ runtime.Object, kind, reason, action, note string, args ...any) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	object, ok := regarding.(client.Object)
	gvk, err := apiutil.GVKForObject(regarding, e.Client.Scheme())
	if !ok || err != nil {
		e.Log.ErrorContext(ctx, "an Event of something that is no known object", "reason", reason, "err", err)
		return
	}
	note = fmt.Sprintf(note, args...)
	if len(note) > maxMessage {
		note = strings.ToValidUTF8(note[:maxMessage-len("...")], "") + "..."
	}
	event := &eventsv1.Event{
		ObjectMeta: metav1.ObjectMeta{Namespace: object.GetNamespace(), GenerateName: object.GetName() + "-"},
		EventTime:  metav1.NowMicro(),
		Regarding: corev1.ObjectReference{
			APIVersion: gvk.GroupVersion().String(), Kind: gvk.Kind, Namespace: object.GetNamespace(), Name: object.GetName(), UID: object.GetUID(),
		},
		Type: kind, Reason: reason, Action: action, Note: note,
		ReportingController: "mysocket-injector", ReportingInstance: e.Instance,
	}
	if err := e.Client.Create(ctx, event); err != nil {
		e.Log.WarnContext(ctx, "an Event could not be recorded", "reason", reason, "service", object.GetNamespace()+"/"+object.GetName(), "err", err)
	}
}
