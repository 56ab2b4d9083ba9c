// Package crash holds a test alone: the control plane dies at each of its calls to the Kubernetes API and to the Mysocket
// API, one after the other, and a new one has to leave neither an orphan nor a duplicate. It needs the reconcilers and the
// gateway together, which know nothing of each other.
package crash
