#!/bin/sh
# Writes what manifests/ holds into a directory, from the chart: manifests.sh HELM DIRECTORY
set -eu
helm=$1 out=$2
cd "$(dirname "$0")/.."
chart() {
	"$helm" template mysocket charts/mysocket-injector --namespace mysocket-system --set account.existingSecret=mysocket-account "$@" |
		sed '/^ *app\.kubernetes\.io\/managed-by: Helm$/d'
}
mkdir -p "$out"
{
	cat <<'END'
# mysocket-injector without Helm, made from the chart with its default values (make manifests). Needs, before it, a namespace
# and a Secret with the account:
#
#   kubectl create namespace mysocket-system
#   kubectl create secret generic mysocket-account -n mysocket-system --from-literal=email=ADDRESS --from-file=password=FILE
#   kubectl apply --server-side -f install.yaml
#
# See uninstall.yaml before it is deleted.
END
	chart --include-crds --no-hooks
} >"$out/install.yaml"
{
	cat <<'END'
# What has to run before mysocket-injector is deleted: it ends the control plane and releases all Services in its place, which would
# otherwise keep a finalizer that nobody removes. Made from the chart with its default values (make manifests).
#
#   kubectl apply --server-side -f uninstall.yaml
#   kubectl wait -n mysocket-system --for=condition=Complete --timeout=5m job/mysocket-injector-cleanup
#   kubectl delete -f uninstall.yaml -f install.yaml
END
	chart --show-only templates/cleanup.yaml
} >"$out/uninstall.yaml"
