package admission

import (
	"slices"
	"strconv"
	"strings"

	jsonpatch "gomodules.xyz/jsonpatch/v2"
	corev1 "k8s.io/api/core/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"

	"github.com/mysocketio/mysocket-injector/internal/annotations"
	"github.com/mysocketio/mysocket-injector/internal/inject"
)

// patch returns the operations that turn before into after, the result of [inject.Inject] on it.
//
// It isn't a diff of the two as JSON, as admission.PatchResponseFromRaw makes: the API server may be newer than we are,
// and a field that our types don't know would be lost, or, since that diff compares arrays by index, would move from one
// container to the next. These operations touch only what is ours.
func patch(before, after *corev1.Pod) []jsonpatch.Operation {
	ops := annotationPatch(before.Annotations, after.Annotations[annotations.PodInjected])
	ops = append(ops, listPatch("/spec/initContainers", before.Spec.InitContainers, after.Spec.InitContainers,
		func(c corev1.Container) bool { return c.Name == inject.ContainerName })...)
	ops = append(ops, preStopPatch(before.Spec.Containers, after.Spec.Containers)...)
	return append(ops, listPatch("/spec/volumes", before.Spec.Volumes, after.Spec.Volumes,
		func(v corev1.Volume) bool { return v.Name == inject.VolumeName })...)
}

func annotationPatch(before map[string]string, hash string) []jsonpatch.Operation {
	const path = "/metadata/annotations"
	if len(before) == 0 {
		return []jsonpatch.Operation{jsonpatch.NewOperation("add", path, map[string]string{annotations.PodInjected: hash})}
	}
	if before[annotations.PodInjected] == hash {
		return nil
	}
	return []jsonpatch.Operation{jsonpatch.NewOperation("add", path+"/"+strings.ReplaceAll(annotations.PodInjected, "/", "~1"), hash)}
}

// preStopPatch adds the hooks that Inject gave to containers without one.
func preStopPatch(before, after []corev1.Container) []jsonpatch.Operation {
	var ops []jsonpatch.Operation
	for i := range before {
		path := item("/spec/containers", i) + "/lifecycle"
		switch was, is := before[i].Lifecycle, after[i].Lifecycle; {
		case is == nil || is.PreStop == nil || was != nil && was.PreStop != nil:
		case was == nil:
			ops = append(ops, jsonpatch.NewOperation("add", path, is))
		default:
			ops = append(ops, jsonpatch.NewOperation("add", path+"/preStop", is.PreStop))
		}
	}
	return ops
}

// listPatch relies on what Inject promises: after has exactly one item of ours, where the first was or where it is
// inserted, and the other items are those of before.
func listPatch[T any](path string, before, after []T, ours func(T) bool) []jsonpatch.Operation {
	if len(before) == 0 {
		return []jsonpatch.Operation{jsonpatch.NewOperation("add", path, after)}
	}
	at := slices.IndexFunc(after, ours)
	var ops []jsonpatch.Operation
	switch was := slices.IndexFunc(before, ours); {
	case was < 0:
		return []jsonpatch.Operation{jsonpatch.NewOperation("add", item(path, at), after[at])}
	case !apiequality.Semantic.DeepEqual(before[was], after[at]):
		ops = append(ops, jsonpatch.NewOperation("replace", item(path, at), after[at]))
	}
	for i := len(before) - 1; i > at; i-- {
		if ours(before[i]) {
			ops = append(ops, jsonpatch.NewOperation("remove", item(path, i), nil))
		}
	}
	return ops
}

func item(path string, i int) string { return path + "/" + strconv.Itoa(i) }
